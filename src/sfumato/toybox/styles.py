"""Styles: the same picture as a sketch, in pixels, in watercolour, as a mosaic, or badly stored.

A style is a pure function of a picture and a seed, so the same scene can be shown in every style and what differs is
the style alone. All measures are shares of the picture's side: a style looks alike at every size.

===========  ===========================================================================================
style        what it does
===========  ===========================================================================================
plain        nothing
sketch       pencil on paper: dark lines where the brightness changes, a little shading
pixel        16 big pixels across, 6 levels of each channel
watercolour  flat washes (Kuwahara filter), paler, darker at their rims, on rough paper
mosaic       tiles of one colour on a jittered grid, with joints between them
degraded     blurred and stored in blocks: each of 16 x 16 blocks keeps its mean and its coarse slope
===========  ===========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput, UnknownName
from ..rng import hashed

__all__ = ["STYLES", "styled"]

PAPER = (0.96, 0.94, 0.88)


def styled(images: Tensor, style: str, seed: int = 0) -> Tensor:
    """Pictures (b, 3, h, w) in [-1, 1] in a style, in the same range, dtype and device; ``seed`` says how the paper is
    grained and the tiles are laid.

    Raises:
        UnknownName: no such style. BadInput: not square pictures of 16 pixels or more.
    """
    if style not in STYLES:
        raise UnknownName("style", str(style), STYLES)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.shape[2] < 16:
        raise BadInput(f"styles are for pictures (b, 3, h, h) of 16 pixels or more, got {tuple(images.shape)}.")
    if style == "plain":
        return images
    unit = (images.float() + 1) / 2
    return (STYLES[style](unit.clamp(0, 1), seed).clamp(0, 1) * 2 - 1).to(images.dtype)


def _sketch(x: Tensor, seed: int) -> Tensor:
    light = _luminance(_blurred(x, 0.012))
    strength = (_gradients(light) * x.shape[-1] / 5).clamp(0, 1)
    shade = 0.75 + 0.25 * light
    ink = (shade * (1 - 0.9 * strength) + 0.04 * _grain(x, seed)).clamp(0, 1)
    return ink * torch.tensor(PAPER).to(x)[None, :, None, None]


def _pixel(x: Tensor, seed: int) -> Tensor:
    small = F.adaptive_avg_pool2d(x, 16)
    return F.interpolate((small * 5).round() / 5, x.shape[-2:], mode="nearest")


def _watercolour(x: Tensor, seed: int) -> Tensor:
    radius = max(1, round(0.045 * x.shape[-1]))
    wash = _kuwahara(x, radius)
    rim = (_gradients(_luminance(wash)) * x.shape[-1] / 10).clamp(0, 1)
    pale = 1 - 0.72 * (1 - wash)
    return pale * (1 - 0.25 * rim) + 0.05 * _grain(x, seed)


def _mosaic(x: Tensor, seed: int) -> Tensor:
    side, tiles = x.shape[-1], 12
    generator = torch.Generator().manual_seed(hashed(f"mosaic:{seed}"))
    step = side / tiles
    at = (torch.arange(tiles) + 0.5) * step
    jitter = (torch.rand(2, tiles, tiles, generator=generator) - 0.5) * 0.6 * step
    centres = torch.stack(torch.meshgrid(at, at, indexing="ij")) + jitter
    place = torch.arange(side) + 0.5
    pixels = torch.stack(torch.meshgrid(place, place, indexing="ij")).flatten(1).T
    near = torch.cdist(pixels, centres.flatten(1).T).topk(2, largest=False)
    own = near.indices[:, 0].to(x.device)
    joint = ((near.values[:, 1] - near.values[:, 0]) < 0.14 * step).view(1, 1, side, side).to(x)
    flat = x.flatten(2)
    sums = torch.zeros(*flat.shape[:2], tiles**2, dtype=x.dtype, device=x.device).index_add_(2, own, flat)
    counts = torch.zeros(tiles**2, dtype=x.dtype, device=x.device).index_add_(0, own, torch.ones_like(flat[0, 0]))
    tile = (sums / counts.clamp_min(1))[:, :, own].view_as(x)
    return tile * (1 - joint) + 0.35 * joint


def _degraded(x: Tensor, seed: int) -> Tensor:
    soft = _blurred(x, 0.025)
    blocks = F.interpolate(F.adaptive_avg_pool2d(soft, 16), x.shape[-2:], mode="nearest")
    slope = F.interpolate(F.adaptive_avg_pool2d(soft, 16), x.shape[-2:], mode="bilinear", align_corners=False)
    return ((0.5 * blocks + 0.3 * slope + 0.2 * soft) * 24).round() / 24


#: style -> what it makes of pictures (b, 3, h, h) in [0, 1]
STYLES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "plain": lambda x, seed: x,
    "sketch": _sketch,
    "pixel": _pixel,
    "watercolour": _watercolour,
    "mosaic": _mosaic,
    "degraded": _degraded,
}


def _luminance(x: Tensor) -> Tensor:
    """(b, 1, h, w) by the weights of ITU-R BT.601."""
    return (x * torch.tensor([0.299, 0.587, 0.114]).to(x)[None, :, None, None]).sum(1, keepdim=True)


def _gradients(x: Tensor) -> Tensor:
    """Length of the gradient (b, 1, h, w), per pixel, by central differences."""
    wide = F.pad(x, [1, 1, 1, 1], mode="replicate")
    dx, dy = wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2], wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]
    return (dx.square() + dy.square() + 1e-12).sqrt() / 2


def _blurred(x: Tensor, share: float) -> Tensor:
    """Gaussian blur of a standard deviation of ``share`` of the side."""
    sigma = share * x.shape[-1]
    reach = max(1, round(2.5 * sigma))
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).to(x) / sigma).square())
    bell = (bell / bell.sum()).expand(x.shape[1], 1, 1, -1)
    wide = F.pad(x, [reach] * 4, mode="replicate")
    across = F.conv2d(wide, bell, groups=x.shape[1])
    return F.conv2d(across, bell.transpose(2, 3), groups=x.shape[1])


def _kuwahara(x: Tensor, radius: int) -> Tensor:
    """The mean of whichever of four windows at each pixel varies least (Kuwahara et al. 1976)."""
    wide = F.pad(x, [radius] * 4, mode="replicate")
    mean = F.avg_pool2d(wide, radius + 1, 1)
    spread = (F.avg_pool2d(wide.square(), radius + 1, 1) - mean.square()).sum(1, keepdim=True)
    h, w = x.shape[-2:]
    corners = [(a, b) for a in (0, radius) for b in (0, radius)]
    means = torch.stack([mean[..., a : a + h, b : b + w] for a, b in corners])
    least = torch.stack([spread[..., a : a + h, b : b + w] for a, b in corners]).argmin(0)
    return means.gather(0, least[None].expand(1, *x.shape))[0]


def _grain(x: Tensor, seed: int) -> Tensor:
    """Roughness of paper (1, 1, h, w), about -1 to 1, the same for every picture."""
    generator = torch.Generator().manual_seed(hashed(f"paper:{seed}"))
    rough = F.interpolate(torch.randn(1, 1, 48, 48, generator=generator), x.shape[-2:], mode="bilinear")
    return rough.to(x).clamp(-2, 2) / 2
