"""Relevance against a slow reference: eager attention of transformers, loops in float64, finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from sfumato.errors import BadInput
from sfumato.models.readers import Clip, Preprocessing
from sfumato.relevance.capture import captured, gradients_of
from sfumato.relevance.clip import ClipExplainer
from sfumato.relevance.rules import Relevancy, fuse_heads, normalised, self_relevance
from tests.helpers import fingerprint
from tests.tiny import clip_tokenizer

TEXTS = ["a red cube and a blue ball", "a cone"]


@pytest.fixture(scope="module")
def clip():
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, projection_dim=12)
    tokenizer = clip_tokenizer()
    config = CLIPConfig(
        text_config=dict(
            **tower, vocab_size=len(tokenizer), max_position_embeddings=77, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(**tower, image_size=16, patch_size=4),
        projection_dim=12,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CLIPModel(config).double().eval().requires_grad_(False)
        for parameter in model.parameters():  # larger than CLIP's own start, so that attention is far from even
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Clip("tiny", model, tokenizer, Preprocessing((16, 16), (0.4,) * 3, (0.3,) * 3))


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def reference(clip, images, texts, text_start, image_start):
    """Rules 5 and 6 entry by entry, on the attention that transformers itself returns; one pair at a time."""
    model = copy.deepcopy(clip.model)
    model.set_attn_implementation("eager")
    found = []
    for image, text in zip(images, texts, strict=True):
        ids = torch.tensor([clip.tokenizer(text).input_ids])
        pixels = ((image[None] + 1) / 2 - 0.4) / 0.3
        model.requires_grad_(True)
        out = model(input_ids=ids, pixel_values=pixels, output_attentions=True)
        cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds)[0]
        pair = [cosine.detach()]
        for tower, start in ((out.text_model_output, text_start), (out.vision_model_output, image_start)):
            grads = torch.autograd.grad(cosine, tower.attentions, retain_graph=True)
            n = tower.attentions[0].shape[-1]
            relevance = torch.eye(n, dtype=torch.float64)
            for maps, grad in list(zip(tower.attentions, grads, strict=True))[start:]:
                weights = torch.zeros(n, n, dtype=torch.float64)
                for head in range(maps.shape[1]):
                    weights += torch.relu(maps[0, head] * grad[0, head]) / maps.shape[1]
                relevance = relevance + torch.stack(
                    [sum(weights[i, j] * relevance[j] for j in range(n)) for i in range(n)]
                )
            pair.append(relevance.detach())
        found.append((*pair, ids.shape[1]))
    return found


@pytest.mark.parametrize(("text_start", "image_start"), [(0, 0), (1, -1)])
def test_clip_relevance_is_that_of_eager_attention(clip, images, text_start, image_start):
    before = fingerprint(clip.model)
    seen = ClipExplainer(clip).explain(
        images, TEXTS, text=True, image=True, text_start=text_start, image_start=image_start
    )
    assert fingerprint(clip.model) == before
    for i, (cosine, text, image, length) in enumerate(reference(clip, images, TEXTS, text_start, image_start)):
        assert seen.similarity[i].item() == pytest.approx(cosine.item(), abs=1e-6)
        torch.testing.assert_close(seen.text[i, :length, :length].double(), text, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(seen.image[i].double(), image, atol=1e-6, rtol=1e-4)
        row = text[length - 1, 1 : length - 1]
        torch.testing.assert_close(seen.tokens()[i, 1 : length - 1].double(), row / row.sum(), atol=1e-5, rtol=1e-3)
        assert seen.tokens()[i].sum().item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(seen.patches()[i].flatten().double(), image[0, 1:], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("which", ["text", "image"])
def test_relevance_as_a_loss_has_the_gradient_of_finite_differences(clip, images, which):
    explainer = ClipExplainer(clip)
    weight = torch.rand(2, 77, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(pixels):
        seen = explainer.explain(pixels, TEXTS, **{which: True}, image_start=0, second_order=True)
        row = seen.tokens() if which == "text" else seen.patches().flatten(1)
        return (row * weight[:, : row.shape[1]]).sum()

    x = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(x), x)
    assert gradient.abs().max() > 0
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-3
    rise = (loss(images + step * direction) - loss(images - step * direction)).item() / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(rise, rel=2e-3, abs=1e-8)


def test_first_order_leaves_no_graph(clip, images):
    with torch.no_grad():
        seen = ClipExplainer(clip).explain(images, TEXTS, text=True)
    assert not seen.text.requires_grad and seen.image is None


def test_pairs_do_not_mix(clip, images):
    explainer = ClipExplainer(clip)
    both, alone = (
        explainer.explain(images, TEXTS, text=True, image=True),
        explainer.explain(images[1:], TEXTS[1:], text=True, image=True),
    )
    torch.testing.assert_close(both.image[1:], alone.image)
    n = alone.text.shape[-1]
    torch.testing.assert_close(both.text[1:, :n, :n], alone.text)


def test_rules_by_hand():
    maps = torch.tensor([[[[0.5, 0.5], [0.2, 0.8]], [[1.0, 0.0], [0.5, 0.5]]]])
    grads = torch.tensor([[[[1.0, -1.0], [2.0, 0.0]], [[0.0, 3.0], [-1.0, 1.0]]]])
    weights = fuse_heads(maps, grads)
    torch.testing.assert_close(weights, torch.tensor([[[0.25, 0.0], [0.2, 0.25]]]))
    torch.testing.assert_close(
        self_relevance([maps, maps], [grads, grads])[0], torch.tensor([[1.5625, 0.0], [0.5, 1.5625]])
    )
    torch.testing.assert_close(
        normalised(torch.tensor([[[1.5, 0.5], [0.0, 1.0]]])), torch.tensor([[[1.5, 0.5], [0.0, 1.0]]])
    )
    across, own = torch.tensor([[[0.1, 0.2, 0.3], [0.0, 0.0, 1.0]]]), torch.eye(2)[None]
    back = torch.ones(1, 3, 2)
    state = Relevancy({"s": 2, "q": 3}, own)
    assert state.cross_gain("s", "q", across)[1].abs().sum() == 0
    state.matrices["q", "s"] = back
    added, returned = state.cross_gain("s", "q", across)
    torch.testing.assert_close(added, across)
    torch.testing.assert_close(returned, torch.tensor([[[0.6, 0.6], [1.0, 1.0]]]))
    state.matrices["s", "q"] = across
    state.attend_self("s", weights)
    torch.testing.assert_close(state["s", "q"], across + weights @ across)


def test_chosen_maps_make_the_output(clip):
    vit = clip.model.vision_model
    pixels = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    with captured(vit, lambda path: path.endswith("layers.2.self_attn")) as calls:
        out = vit(pixels).pooler_output
    torch.testing.assert_close(out, vit(pixels).pooler_output)
    assert [(c.path, c.probs.shape) for c in calls] == [("encoder.layers.2.self_attn", (1, 2, 17, 17))]
    [gradient] = gradients_of(out.sum(1), [calls[0].probs])
    assert gradient.shape == (1, 2, 17, 17) and gradient.abs().max() > 0
    with pytest.raises(BadInput, match="does not depend"):
        gradients_of(out.sum(1).detach(), [calls[0].probs])


def test_bad_input(clip, images):
    explainer = ClipExplainer(clip)
    with pytest.raises(BadInput, match="2 pictures and 1 texts"):
        explainer.explain(images, TEXTS[:1])
    with pytest.raises(BadInput, match="squares"):
        explainer.explain(images[..., :8], TEXTS)
    with pytest.raises(BadInput, match="one layer"):
        self_relevance([], [])
