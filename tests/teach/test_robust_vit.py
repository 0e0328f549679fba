"""Robust ViT: its relevance and loss against a slow reference, what training does to relevance, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.teach.robust_vit import RobustVit, masks_from, relevance_maps, teach
from sfumato.teach.robust_vit.loss import batch_loss


def vit(**more) -> ViTForImageClassification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        options |= {"image_size": 16, "patch_size": 4, "num_labels": 3, "initializer_range": 0.2, **more}
        return ViTForImageClassification(ViTConfig(**options)).eval()


def examples(n: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures with a bright square; the mask is the square, the label its brightness."""
    generator = torch.Generator().manual_seed(seed)
    images, masks = 0.3 * torch.randn(n, 3, 16, 16, generator=generator), torch.zeros(n, 16, 16)
    labels = torch.arange(n) % 3
    for i in range(n):
        y, x = (4 * torch.randint(0, 3, (2,), generator=generator)).tolist()
        images[i, :, y : y + 8, x : x + 8] += 1.0 + labels[i]
        masks[i, y : y + 8, x : x + 8] = 1
    return images, masks, labels


def slow_maps(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Relevance by the matrix R of the paper, one picture at a time, from transformers' own attention outputs."""
    out = []
    model = ViTForImageClassification(model.config).eval()
    model.load_state_dict(REFERENCE.state_dict())
    model.set_attn_implementation("eager")
    for image, label in zip(images, labels, strict=True):
        result = model(image[None], output_attentions=True)
        slopes = torch.autograd.grad(result.logits[0, label], result.attentions)
        r = torch.eye(17)
        for probs, slope in zip(result.attentions, slopes, strict=True):
            r = r + (slope * probs)[0].clamp_min(0).mean(0).detach() @ r
        out.append(r[0, 1:].view(4, 4))
    return torch.stack(out)


REFERENCE = vit()


def test_relevance_is_the_papers_matrix() -> None:
    images, _, labels = examples()
    maps, output = relevance_maps(REFERENCE, images, labels)
    torch.testing.assert_close(maps, slow_maps(REFERENCE, images, labels), rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(output.logits, REFERENCE(images).logits, rtol=1e-4, atol=1e-5)


def test_loss_is_the_papers() -> None:
    images, masks, labels = examples()
    options = RobustVit(temperature=2.0).params
    loss, told = batch_loss(REFERENCE, images, masks, labels, options)
    maps = F.interpolate(slow_maps(REFERENCE, images, labels)[:, None], (16, 16), mode="bilinear")[:, 0]
    low, high = maps.flatten(1).min(1)[0], maps.flatten(1).max(1)[0]
    heat = (maps - low[:, None, None]) / (high - low)[:, None, None]
    background, foreground = ((heat * (1 - masks)) ** 2).mean(), ((heat * masks - masks) ** 2).mean()
    logits = REFERENCE(images).logits
    own = F.cross_entropy(logits / 2, logits.argmax(1))
    want = 0.8 * (2 * background + 0.3 * foreground) + 0.2 * own
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-4)
    assert told["background"] == pytest.approx(float(background), rel=1e-4)
    assert told["foreground"] == pytest.approx(float(foreground), rel=1e-4)
    label = batch_loss(REFERENCE, images, masks, labels, RobustVit(keep="label", relevance=0).params)[0]
    assert float(label.detach()) == pytest.approx(0.2 * float(F.cross_entropy(logits, labels).detach()), rel=1e-4)


@pytest.mark.parametrize("part", ["background", "foreground"])
def test_teaching_moves_relevance_and_keeps_the_answers(part: str) -> None:
    images, masks, labels = examples(8)
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {"background": 0.0, "foreground": 0.0, part: 2.0}
    taught = teach(model, images, masks, labels, lr=1e-3, epochs=10, validation=examples(6, seed=2), **weights)
    log = taught.log
    assert len(log) == 10 and log[-1][part] < 0.9 * log[0][part] and log[-1]["loss"] < log[0]["loss"]
    assert taught.epoch == min(range(10), key=lambda i: log[i]["validation"]) + 1
    was, now = model(images).logits.argmax(1), taught.model(images).logits.argmax(1)
    assert (was == now).float().mean() >= 0.75
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # the model itself is not touched


def test_same_seed_same_weights_and_flags_are_kept() -> None:
    images, masks, labels = examples()
    model = vit().requires_grad_(False)
    one, two = (teach(model, images, masks, labels, epochs=2, seed=3).model for _ in range(2))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad and a.grad is None


def test_saved_as_an_ordinary_checkpoint(tmp_path) -> None:
    images, masks, labels = examples()
    taught = teach(vit(), images, masks, labels, epochs=1)
    folder = taught.save(tmp_path / "out")
    again = ViTForImageClassification.from_pretrained(folder)
    torch.testing.assert_close(again(images).logits, taught.model(images).logits)
    told = json.loads((folder / "robust_vit.json").read_text())
    assert told["params"]["background"] == 2.0 and len(told["log"]) == 1
    with pytest.raises(BadInput, match="not empty"):
        taught.save(folder)


def test_masks_from_maps() -> None:
    maps = torch.tensor([[[0.0, 1.0], [2.0, 9.0]]])
    assert masks_from(maps).tolist() == [[[False, False], [False, True]]]
    assert masks_from(maps, 0.2).tolist() == [[[False, False], [True, True]]]
    with pytest.raises(BadInput, match=r"\(n, h, w\)"):
        masks_from(maps[0])


class LinearAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_bad_input_is_refused_in_one_line() -> None:
    images, masks, labels = examples()
    model = vit()
    linear = nn.Sequential(LinearAttention(), nn.Flatten(), nn.Linear(768, 3))
    linear.forward = lambda x: type("Out", (), {"logits": nn.Sequential.forward(linear, x)})()  # type: ignore[method-assign]
    cases = [
        (BadInput, "target 5 is not a label", lambda: teach(model, images, masks, [0, 1, 2, 5])),
        (UnknownName, "LABEL_0", lambda: teach(model, images, masks, ["LABEL_7"] * 4)),
        (BadInput, "3 targets for 4", lambda: teach(model, images, masks, labels[:3])),
        (BadInput, "full precision.*bfloat16", lambda: teach(vit().bfloat16(), images, masks, labels)),
        (BadInput, "full precision.*pictures is float16", lambda: teach(model, images.half(), masks, labels)),
        (BadInput, "must be", lambda: teach(model, images, masks[:, :8], labels)),
        (BadInput, "0 to 1", lambda: teach(model, images, 2 * masks, labels)),
        (
            BadInput,
            "mask of picture 2 is empty",
            lambda: teach(model, images, masks * (torch.arange(4) != 2)[:, None, None], labels),
        ),
        (BadInput, "lr", lambda: teach(model, images, masks, labels, lr=0)),
        (UnknownName, "epochs", lambda: teach(model, images, masks, labels, epoch=3)),
        (NotSupported, "linear attention .LinearAttention", lambda: teach(linear, images, masks, labels, epochs=1)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
