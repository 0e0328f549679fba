"""Captured attention: the same output, every map once, in order, on the gradient's way; nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.errors import NotSupported
from sfumato.relevance import capture
from sfumato.relevance.capture import captured, refuse_no_attention
from tests.readers import KINDS, tiny
from tests.tiny import tiny_model


def hooks(model):
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_same_and_maps_are_maps(kind):
    model, inputs, target = tiny(kind)
    with torch.no_grad():
        plain = target(model(**inputs))
    before = hooks(model)
    with captured(model) as calls:
        seen = target(model(**inputs))
    assert hooks(model) == before
    assert torch.allclose(plain, seen, atol=1e-5)
    assert calls
    for call in calls:
        assert call.probs.dtype == torch.float32 and call.probs.dim() == 4
        assert torch.allclose(call.probs.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "lxmert", "detr"])
def test_gradients_are_those_of_finite_differences(kind, monkeypatch):
    """The first map, moved a little along a random direction, moves the output as its gradient says."""
    model, inputs, target = tiny(kind, 1)
    model = model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with captured(model) as calls:
        y = target(model(**inputs))
    slope = torch.autograd.grad(y.sum(), calls[0].probs)[0]
    push = torch.randn(slope.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    keep, moved = capture._Capture._keep, []
    for step in (1e-5, -1e-5):

        def shifted(self, now, probs, step=step):
            return keep(self, now, probs if self.calls else probs + step * push)

        monkeypatch.setattr(capture._Capture, "_keep", shifted)
        with captured(model):
            moved.append(float(target(model(**inputs)).detach().sum()))
    assert (moved[0] - moved[1]) / 2e-5 == pytest.approx(float((slope * push).sum()), rel=1e-4)


def test_frozen_weights_and_no_grad_outside():
    model, inputs, target = tiny("vit")
    model.requires_grad_(False)
    with torch.no_grad(), captured(model) as calls:
        y = target(model(**inputs))
    slopes = torch.autograd.grad(y.sum(), [call.probs for call in calls])
    assert all(float(slope.abs().sum()) > 0 for slope in slopes)


def test_eager_attention_gives_the_same_maps():
    model, inputs, _ = tiny("vit")
    maps = []
    for how in ("sdpa", "eager"):
        model.set_attn_implementation(how)
        with captured(model) as calls:
            model(**inputs)
        maps.append([call.probs.detach() for call in calls])
    assert len(maps[0]) == len(maps[1]) == 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*maps, strict=True))


def test_maps_are_those_the_model_itself_reports():
    model, inputs, _ = tiny("lxmert")
    told = model(**inputs, output_attentions=True)
    with captured(model) as calls:
        model(**inputs)
    words = [c.probs for c in calls if "encoder.layer." in c.path]
    regions = [c.probs for c in calls if "r_layers" in c.path]
    across = [c.probs for c in calls if "visual_attention" in c.path and c.index == 0]
    for ours, theirs in ((words, told.language_attentions), (regions, told.vision_attentions)):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(across, told.cross_encoder_attentions, strict=True))


def test_nothing_is_left_after_a_failure():
    model, inputs, _ = tiny("vit")

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.vit.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), captured(model):
        model(**inputs)
    handle.remove()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    with torch.no_grad():
        assert not model(**inputs).logits.requires_grad


class LinearAttention(nn.Module):
    def forward(self, x):
        k = x.softmax(1)
        return x @ (k.transpose(1, 2) @ x)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Sequential(nn.Linear(4, 4), LinearAttention()), "linear attention (LinearAttention at 1)"),
        (nn.Sequential(nn.Conv1d(3, 3, 1)), "no softmax attention"),
    ],
)
def test_models_without_attention_are_named(module, said):
    with captured(module) as calls:
        module(torch.randn(1, 3, 4))
    with pytest.raises(NotSupported, match=said.replace("(", r"\(").replace(")", r"\)")):
        refuse_no_attention(module, calls)


def test_what_hides_attention_is_refused():
    model, inputs, _ = tiny("vit")
    with torch.inference_mode(), pytest.raises(NotSupported, match="inference mode"), captured(model):
        pass
    with pytest.raises(NotSupported, match="compile"), captured(torch.compile(model)):
        pass


def test_denoisers():
    model = tiny_model("sd3")
    condition = model.encode_text(["a red cube"])
    x = torch.randn(1, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model.predict(x, 500.0, condition, "cond")
    with captured(model.denoiser) as calls:
        seen = model.predict(x, 500.0, condition, "cond")
    assert torch.allclose(plain, seen, atol=1e-5) and len(calls) == len(model.sites(32, 32))
