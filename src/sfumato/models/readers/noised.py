"""How a CLIP reads noised latents: what a genuine ``CLIPModel`` is fed so that it knows how much noise it looks at.

All noise paths are brought to one form: ``x = alpha x0 + sigma eps`` divided by ``sqrt(alpha^2 + sigma^2)``, and the
*noise level* u, the angle between data and noise as a share of a right angle (0 clean, 1 pure noise). Diffusion and
rectified flow then look the same. The level comes in through further input channels that are constant over the picture,
so that the network needs nothing that transformers does not have. GLIDE has a learned token per timestep instead
(Nichol et al. 2021, its code), which knows one schedule only.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

PLANES = 8
"""Channels that tell the noise level."""


def noise_level(alpha: Any, sigma: Any) -> Tensor:
    """u in [0, 1] of a noise level (alpha, sigma), numbers or tensors: 0 clean, 1 pure noise."""
    return torch.atan2(torch.as_tensor(sigma).float(), torch.as_tensor(alpha).float()) * (2 / math.pi)


def alpha_sigma(level: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) with alpha^2 + sigma^2 = 1 of noise levels u."""
    angle = level * (math.pi / 2)
    return angle.cos(), angle.sin()


def noised_input(x: Tensor, level: Tensor) -> Tensor:
    """The network's input (b, c + PLANES, h, w) for unit-norm noised latents x (b c h w) at levels u (b)."""
    steps = math.pi * torch.arange(PLANES, device=x.device)
    planes = (level.to(x.device).reshape(-1, 1) * steps).cos()  # the first is 1: a bias
    return torch.cat([x, planes.to(x.dtype)[:, :, None, None].expand(len(x), -1, *x.shape[2:])], 1)


def codec_hash(vae: Any) -> str:
    """Tells autoencoders apart, whatever precision they are held in: 16 hex digits over the rounded weights and the
    scaling of the latents."""
    digest = hashlib.sha256(repr([vae.config.get("scaling_factor"), vae.config.get("shift_factor")]).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        rounded = tensor.detach().cpu().to(torch.bfloat16).contiguous().flatten()
        digest.update(name.encode())
        digest.update(rounded.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
