"""The tap reads and replaces what it says, leaves nothing behind, and slerp keeps norms."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import NotSupported, UnknownName
from sfumato.hspace import bottleneck_of, layer_of, tapped
from tests.helpers import fingerprint
from tests.tiny import tiny_model


def call(model, x):
    told = model.encode_text(["a red cube"] * len(x), guidance=False, embedded_guidance=3.0)
    with torch.no_grad():
        return model.predict(x, torch.tensor(500.0), told, "cond")


def noise(model, b=1):
    return torch.randn(b, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(b))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "sd35", "flux", "pixart"])
def test_every_layer_of_every_family_can_be_read_and_replaced(kind):
    model = tiny_model(kind, fresh=True)
    before, x = fingerprint(model), noise(model)
    plain = call(model, x)
    for layer in model.layers:
        seen = []
        with tapped(model, layer, lambda h, seen=seen: seen.append(h) or h.clone()):
            assert torch.equal(call(model, x), plain)  # its own features in their own place
        [h] = seen
        assert h.shape[0] == 1 and h.dim() in (3, 4)
        with tapped(model, layer, torch.zeros_like):
            assert not torch.allclose(call(model, x), plain, atol=1e-5)
        with tapped(model, layer, seen.append, stop=True):
            call(model, x)
            raise AssertionError("the call should have ended at the layer")
        assert len(seen) == 2 and torch.equal(seen[1], h)
    with pytest.raises(RuntimeError), tapped(model, model.layers[0], lambda h: _boom()):
        call(model, x)
    assert fingerprint(model) == before


def _boom():
    raise RuntimeError("boom")


def test_names():
    model = tiny_model("sd")
    assert layer_of(model, None) == bottleneck_of(model, "x") == layer_of(model, "mid")
    assert [layer.name for layer in model.layers] == ["down.0", "down.1", "mid", "up.0", "up.1"]
    with pytest.raises(UnknownName, match="middle"):
        layer_of(model, "middle")
    assert layer_of(tiny_model("sd3"), None).name == "joint.0"
    with pytest.raises(NotSupported, match="my system needs a U-Net"):
        bottleneck_of(tiny_model("sd3"), "my system")
