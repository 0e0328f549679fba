"""Between pictures and latents by an autoencoder, as the diffusers pipelines call it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

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
    """The autoencoder in float32 for a while; afterwards it has the very tensors that it had.

    Its tensors are replaced, not changed: what is differentiated later still finds those it was computed with, and
    hooks that bring weights from elsewhere bring them in float32.
    """
    held = [
        (module, name, tensor)
        for module in vae.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.is_floating_point() and tensor.element_size() < 4
    ]
    lifted: dict[int, Tensor] = {}
    try:
        for module, name, tensor in held:
            if id(tensor) not in lifted:  # parts that share a tensor go on sharing it
                data = tensor.detach().float()
                own = isinstance(tensor, nn.Parameter)
                lifted[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if own else data
            setattr(module, name, lifted[id(tensor)])
        yield
    finally:
        for module, name, tensor in held:
            setattr(module, name, tensor)


Which: TypeAlias = "slice | list[int]"


def same_draws(
    generators: Sequence[torch.Generator] | None, total: int
) -> Callable[[Which], Sequence[torch.Generator] | None]:
    """The generators of some of ``total`` samples, set back to where they were when this was called: a second try draws
    the same."""
    states = [generator.get_state() for generator in generators or ()]

    def some(which: Which) -> Sequence[torch.Generator] | None:
        if generators is None:
            return None
        numbers = range(total)[which] if isinstance(which, slice) else which
        for i in numbers:
            generators[i].set_state(states[i])
        return [generators[i] for i in numbers]

    return some


def finite(vae: Any, run: Callable[[Which], Tensor], done: str, who: str) -> Tensor:
    """What ``run(which)`` makes with an autoencoder of these samples; those in which half precision overflows are
    made once more in float32. The others stay as they are: a sample does not depend on its neighbours.

    Warns `Overflow`; raises `NotFinite`, in float32 too.
    """
    out = run(slice(None))
    if not out.is_floating_point() or bool((fine := out.isfinite().flatten(1).all(1)).all()):
        return out
    half = None if vae is None else vae.dtype  # what draws pixels at once has none
    if half not in (torch.float16, torch.bfloat16):
        raise NotFinite(f"what {'the autoencoder of ' if vae is not None else ''}{who} {done} is not finite.")
    bad, good = ([i for i, each in enumerate(fine.tolist()) if each is wanted] for wanted in (False, True))
    with in_float32(vae):
        again = run(bad).to(out.dtype)
    if not again.isfinite().all():
        raise NotFinite(f"what the autoencoder of {who} {done} is not finite, in float32 neither.")
    warnings.warn(
        f"the autoencoder of {who} overflows in {str(half).removeprefix('torch.')}; it {done} once more in float32. "
        "dtype=float32 for the whole model spares the first try.",
        Overflow,
        stacklevel=4,
    )
    if out.requires_grad:  # or else what overflowed would be differentiated too
        out = run(good) if good else out.detach()[:0]
    else:
        out = out[good]
    order = torch.tensor([*good, *bad], device=out.device).argsort()
    return torch.cat([out, again])[order]


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Per-channel mean and standard deviation of the latents (1 c 1 1), where the autoencoder states them."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return None, None
    return torch.tensor(mean).view(1, -1, 1, 1).to(like), torch.tensor(std).view(1, -1, 1, 1).to(like)
