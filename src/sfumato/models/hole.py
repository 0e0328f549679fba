"""What an inpainting denoiser is shown beside its latents: a picture and where it is to be drawn anew."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def hole_of(model: Any, pixels: Tensor, erased: Tensor, share: Tensor) -> Tensor:
    """What an inpainting denoiser sees beside its latents (b m+c h w): the mask, and the latents of the picture with
    the hole in grey.

    ``pixels`` (b or 1, 3 H W) in [-1, 1]; ``erased`` (b or 1, 1 H W) and ``share`` (b or 1, 1 h w) are 1 where to draw
    anew.
    """
    n = max(len(pixels), len(erased))
    known = model.encode_image((pixels * (1 - erased)).expand(n, -1, -1, -1))
    hole: Tensor = model.family.hole(known, *(each.expand(n, -1, -1, -1) for each in (erased, share)))
    return hole
