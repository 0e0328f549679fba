"""Autoencoders of every kind that overflow in half precision: the sample is made once more in float32, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.errors import NotFinite
from sfumato.models import Model, codec
from tests.front_door.test_folders import tiny_autoencoder, with_vae
from tests.tiny import tiny_pipeline


def overflows(part: torch.nn.Module) -> None:
    """From now on a part's positive samples exceed half precision on their way, which leaves float32 as it is."""

    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        large = (out.flatten(1).float().mean(1) > 0).view(-1, *[1] * (out.dim() - 1))
        return out * torch.where(large, 1e7, 1.0).to(out.dtype) / torch.where(large, 1e7, 1.0).to(out.dtype)

    part.register_forward_hook(hook)


def signed(part: torch.nn.Module, sign: float) -> None:
    """From now on a part's outputs are all of one sign."""
    part.register_forward_hook(lambda module, args, out: sign * out.abs())


def half(kind: str) -> Model:
    pipe = tiny_pipeline("sd" if kind == "tiny" else kind, fresh=True)
    if kind == "tiny":
        pipe = with_vae("sd", tiny_autoencoder())
    for name in ("vae", "vqvae"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).to(torch.float16)
    return Model(pipe, name="tiny")


def state(model: Model, samples: int = 1) -> Tensor:
    shape = model.latent_shape(32, 32, 5 if model.clips else None)
    if model.family.name == "amused":
        return (torch.arange(samples * shape[-1] * shape[-2]) % 16).view(samples, *shape[-2:])
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0))


def autoencoder(model: Model) -> Any:
    return getattr(model.pipe, "vae", None) or model.pipe.vqvae


KINDS = ["tiny", "amused", "sana", "flux2", "qwenimage", "animatediff", "wan", "ltx"]


@pytest.mark.parametrize("kind", KINDS)
def test_decoders_and_encoders_of_every_kind(kind: str) -> None:
    model = half(kind)
    vae = autoencoder(model)
    before = dict(vae.state_dict())
    z, pixels = state(model), torch.rand(1, 3, *([5] if model.clips else []), 32, 32) * 2 - 1
    for part, run in ((vae.decoder, lambda: model.decode(z)), (vae.encoder, lambda: model.encode_image(pixels))):
        signed(part, 1.0)
        with codec.in_float32(vae):
            expected = run()
        overflows(part)
        with pytest.warns(codec.Overflow, match="overflows in float16"):
            found = run()
        if found.is_floating_point():
            assert found.isfinite().all()
            torch.testing.assert_close(found.to(expected.dtype), expected, rtol=2e-3, atol=2e-3)
        else:  # tokens: what lies between two may go to either
            assert (found == expected).float().mean() > 0.95
    after = vae.state_dict()
    assert all(after[key].data_ptr() == value.data_ptr() for key, value in before.items())


def test_the_others_of_a_batch_stay_as_they_are() -> None:
    model = half("sd")
    signed(model.pipe.vae.decoder, -1.0)
    z = state(model, 3)
    expected = model.decode(z)
    model.pipe.vae.decoder.register_forward_hook(
        lambda module, args, out: torch.cat([out[:1], out[1:2].abs(), out[2:]]) if len(out) == 3 else out.abs()
    )
    overflows(model.pipe.vae.decoder)
    with pytest.warns(codec.Overflow):
        found = model.decode(z)
    assert torch.equal(found[::2], expected[::2]) and found[1].isfinite().all()
    torch.testing.assert_close(found[1], -expected[1], rtol=2e-3, atol=2e-3)


def test_encoding_draws_for_the_samples_that_overflowed() -> None:
    model = half("sd")
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = model.encode_image(pixels, generators)
    overflows(model.pipe.vae.encoder)
    signed(model.pipe.vae.encoder.conv_in, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", codec.Overflow)
        found = model.encode_image(pixels, [torch.Generator().manual_seed(i) for i in range(2)])
    assert found.shape == expected.shape and found.isfinite().all()


@pytest.mark.parametrize("upcasts", [False, True])
def test_guidance_by_pixels_is_differentiated_in_float32(upcasts: bool) -> None:
    """SDXL's autoencoder is lifted anyway, Stable Diffusion's once it has overflowed."""
    pipe = tiny_pipeline("sdxl" if upcasts else "sd", fresh=True).to(dtype=torch.float16)
    model = Model(pipe, name="tiny")
    if not upcasts:
        signed(pipe.vae.decoder, 1.0)
        overflows(pipe.vae.decoder)
    x = state(model, 2).half().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", codec.Overflow)
        (found,) = torch.autograd.grad(model.decode(x).float().square().sum(), x)
        x32 = x.detach().float().requires_grad_()
        with codec.in_float32(pipe.vae):
            (expected,) = torch.autograd.grad(model.decode(x32).square().sum(), x32)
    assert found.isfinite().all()
    torch.testing.assert_close(found.float() / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=5e-3)


@pytest.fixture
def offloaded() -> Iterator[Model]:
    from accelerate import cpu_offload

    pipe = tiny_pipeline("sd", fresh=True).to(dtype=torch.float16)
    signed(pipe.vae.decoder, 1.0)
    overflows(pipe.vae.decoder)
    cpu_offload(pipe.vae, torch.device("cpu"))
    yield Model(pipe, name="tiny")


def test_an_offloaded_autoencoder(offloaded: Model) -> None:
    z = state(offloaded).half()
    with pytest.warns(codec.Overflow):
        found = offloaded.decode(z)
    assert found.isfinite().all()
    vae = offloaded.pipe.vae
    assert vae.dtype == torch.float16 and next(vae.parameters()).device.type == "meta"
    with pytest.warns(codec.Overflow):
        assert torch.equal(offloaded.decode(z), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["sd", "amused"])
def test_a_part_of_a_picture_that_no_precision_helps(kind: str, dtype: torch.dtype) -> None:
    model = half(kind)
    vae = autoencoder(model).to(dtype)

    def spoil(module: Any, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[-1, ..., -1] = float("nan")
        return out

    vae.decoder.register_forward_hook(spoil)
    with pytest.raises(NotFinite, match="decoded is not finite"):
        model.decode(state(model, 2))
    if kind == "amused":
        vae.encoder.register_forward_hook(spoil)
        with pytest.raises(NotFinite, match="encoded is not finite"):
            model.encode_image(torch.zeros(1, 3, 32, 32))
