"""Between pictures and latents by a Kullback-Leibler autoencoder, as the diffusers pipelines call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def decode(vae: Any, latents: Tensor, upcasts: bool = False) -> Tensor:
    """Pictures (b 3 H W), about [-1, 1] and not clamped, from latents (b c h w). ``upcasts``: see ``Family``."""
    with upcast(vae, upcasts):
        latents = latents.to(vae.dtype)
        mean, std = _statistics(vae, latents) if upcasts else (None, None)
        scaling = vae.config.scaling_factor
        if mean is not None and std is not None:
            latents = latents * std / scaling + mean
        else:
            latents = latents / scaling
            if vae.config.get("shift_factor") is not None:
                latents = latents + vae.config.shift_factor
        return vae.decode(latents, return_dict=False)[0]


def encode(
    vae: Any, images: Tensor, generators: Sequence[torch.Generator] | None = None, upcasts: bool = False
) -> Tensor:
    """Latents (b c h w) of pictures (b 3 H W) in [-1, 1], in the autoencoder's dtype: the posterior's mean, or a draw
    from it with one generator per picture."""
    with upcast(vae, upcasts):
        images = images.to(vae.device, vae.dtype)
        if generators is None:
            latents = vae.encode(images).latent_dist.mode()
        else:
            rows = zip(images.split(1), generators, strict=True)
            latents = torch.cat([vae.encode(image).latent_dist.sample(generator) for image, generator in rows])
        mean, std = _statistics(vae, latents) if upcasts else (None, None)
        scaling = vae.config.scaling_factor
        if mean is not None and std is not None:
            return (latents - mean) * scaling / std
        if vae.config.get("shift_factor") is not None:
            return (latents - vae.config.shift_factor) * scaling
        return latents * scaling


def decode_frames(vae: Any, latents: Tensor) -> Tensor:
    """Clips (b 3 f H W) from latents (b c f h w) of an autoencoder that states mean and spread of its channels (Wan's
    and its kin), in the pipelines' order of operations."""
    latents = latents.to(vae.dtype)
    mean, inverse = _frame_statistics(vae, latents)
    return vae.decode(latents / inverse + mean, return_dict=False)[0]


def encode_frames(vae: Any, clips: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """Latents (b c f h w) of clips (b 3 f H W) in [-1, 1] by such an autoencoder; see :func:`encode`."""
    clips = clips.to(vae.device, vae.dtype)
    if generators is None:
        latents = vae.encode(clips).latent_dist.mode()
    else:
        rows = zip(clips.split(1), generators, strict=True)
        latents = torch.cat([vae.encode(clip).latent_dist.sample(generator) for clip, generator in rows])
    mean, inverse = _frame_statistics(vae, latents)
    return (latents - mean) * inverse


def _frame_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and one over the standard deviation (1 c 1 1 1)."""
    mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std))
    return mean.to(like), 1.0 / std.to(like)


class upcast:
    """Lifts a float16 autoencoder that overflows in float16 to float32 for a while."""

    def __init__(self, vae: Any, wanted: bool):
        self.vae = vae
        self.needed = wanted and vae.dtype == torch.float16 and vae.config.get("force_upcast", False)

    def __enter__(self) -> None:
        if self.needed:
            self.vae.to(dtype=torch.float32)

    def __exit__(self, *_: object) -> None:
        if self.needed:
            self.vae.to(dtype=torch.float16)


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Per-channel mean and standard deviation of the latents (1 c 1 1), where the autoencoder states them."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return None, None
    return torch.tensor(mean).view(1, -1, 1, 1).to(like), torch.tensor(std).view(1, -1, 1, 1).to(like)
