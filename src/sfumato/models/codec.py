"""Between pictures and latents by an autoencoder, as the diffusers pipelines call it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import NotFinite


class Overflow(UserWarning):
    """An autoencoder overflowed in half precision and was run again in float32."""


def decode(vae: Any, latents: Tensor, upcasts: bool = False, shifts: bool = False) -> Tensor:
    """Pictures (b 3 H W), about [-1, 1] and not clamped, from latents (b c h w). ``upcasts``, ``shifts``: see
    ``Family``."""
    with upcast(vae, upcasts):
        latents = latents.to(vae.dtype)
        mean, std = _statistics(vae, latents) if upcasts else (None, None)
        scaling = vae.config.scaling_factor
        if mean is not None and std is not None:
            latents = latents * std / scaling + mean
        else:
            latents = latents / scaling
            if shifts and vae.config.get("shift_factor") is not None:
                latents = latents + vae.config.shift_factor
        return vae.decode(latents, return_dict=False)[0]


def encode(
    vae: Any,
    images: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    upcasts: bool = False,
    shifts: bool = False,
) -> Tensor:
    """Latents (b c h w) of pictures (b 3 H W) in [-1, 1], in the autoencoder's dtype: the posterior's mean, or a draw
    from it with one generator per picture. ``images`` lie on the device where the autoencoder computes."""
    with upcast(vae, upcasts):
        latents = unscaled(vae, images.to(dtype=vae.dtype), generators)
        mean, std = _statistics(vae, latents) if upcasts else (None, None)
        scaling = vae.config.scaling_factor
        if mean is not None and std is not None:
            return (latents - mean) * scaling / std
        if shifts and vae.config.get("shift_factor") is not None:
            return (latents - vae.config.shift_factor) * scaling
        return latents * scaling


def decode_frames(vae: Any, latents: Tensor) -> Tensor:
    """Clips (b 3 f H W) from latents (b c f h w) of an autoencoder that states mean and spread of its channels (Wan's
    and others), in the pipelines' order of operations."""
    latents = latents.to(vae.dtype)
    mean, inverse = _frame_statistics(vae, latents)
    return vae.decode(latents / inverse + mean, return_dict=False)[0]


def encode_frames(vae: Any, clips: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """Latents (b c f h w) of clips (b 3 f H W) in [-1, 1] by such an autoencoder; see :func:`encode`."""
    latents = unscaled(vae, clips.to(dtype=vae.dtype), generators)
    mean, inverse = _frame_statistics(vae, latents)
    return (latents - mean) * inverse


def _frame_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and one over the standard deviation (1 c 1 1 1)."""
    mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std))
    return mean.to(like), 1.0 / std.to(like)


def unscaled(vae: Any, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """What the encoder says of pictures (b 3 H W), before any scaling. Some autoencoders give a distribution, others
    (`AutoencoderTiny`, `AutoencoderDC`) the latents themselves, so that there is nothing to draw."""
    if generators is None:
        return latents_of(vae.encode(images), None)
    rows = zip(images.split(1), generators, strict=True)
    return torch.cat([latents_of(vae.encode(image), generator) for image, generator in rows])


def latents_of(found: Any, generator: torch.Generator | None) -> Tensor:
    """The latents in an encoder's answer: the mean, or a draw from its distribution."""
    spread = getattr(found, "latent_dist", None)
    if spread is not None:
        return spread.mode() if generator is None else spread.sample(generator)
    return found.latents if hasattr(found, "latents") else found.latent


@contextmanager
def upcast(vae: Any, wanted: bool) -> Iterator[None]:
    """Lifts a float16 autoencoder whose configuration says ``force_upcast`` to float32 for a while: where the pipeline
    does so (``wanted``), or where it is said expressly rather than by the class's default."""
    declared = vae.config.get("force_upcast", False)
    expressly = "force_upcast" not in vae.config.get("_use_default_values", ())
    if declared and (wanted or expressly) and vae.dtype == torch.float16:
        with in_float32(vae):
            yield
    else:
        yield


@contextmanager
def in_float32(vae: Any) -> Iterator[None]:
    """The autoencoder in float32 for a while; afterwards it has the very tensors that it had."""
    held = [(tensor, tensor.data) for tensor in (*vae.parameters(), *vae.buffers()) if tensor.is_floating_point()]
    try:
        for tensor, data in held:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


def finite(vae: Any, run: Callable[[], Tensor], done: str, who: str) -> Tensor:
    """What ``run`` makes with an autoencoder, made once more in float32 where half precision overflows.

    Warns `Overflow`; raises `NotFinite`. In float32 nothing is looked at here.
    """
    out = run()
    half = None if vae is None else vae.dtype  # what draws pixels at once has none
    if half not in (torch.float16, torch.bfloat16) or not out.is_floating_point() or bool(out.isfinite().all()):
        return out
    with in_float32(vae):
        again = run()
    if not again.isfinite().all():
        raise NotFinite(f"what the autoencoder of {who} {done} is not finite, in float32 neither.")
    warnings.warn(
        f"the autoencoder of {who} overflows in {str(half).removeprefix('torch.')}; it {done} once more in float32. "
        "dtype=float32 for the whole model spares the first try.",
        Overflow,
        stacklevel=4,
    )
    return again.to(out.dtype)


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Per-channel mean and standard deviation of the latents (1 c 1 1), where the autoencoder states them."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return None, None
    return torch.tensor(mean).view(1, -1, 1, 1).to(like), torch.tensor(std).view(1, -1, 1, 1).to(like)
