"""Distorted views of a picture, which make it harder to raise CLIP's score without drawing anything."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def cut_outs(
    image: Tensor, covers: Tensor | None, count: int, side: int, augment: float, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """``count`` square views (c 3 s s) of a picture (3 H W), and with each the masks (r H W), moved alike (c r s s).

    Every view is turned (15 degrees), shifted (a tenth) and seen at an angle, each with a chance of 0.7, then its
    colours are weakened or strengthened, a rectangle is erased and noise added (to the picture alone); ``augment``
    scales it all. A picture that is not square is seen whole, its borders continued.
    """
    height, width = image.shape[-2:]
    longest = max(height, width)
    if longest > side:
        small = (max(1, round(height * side / longest)), max(1, round(width * side / longest)))
        image = F.interpolate(image[None], size=small, mode="bicubic", antialias=True)[0]
    draw = torch.rand(count, 14, generator=generator)
    noise = torch.randn(count, 3, side, side, generator=generator)
    spread = 2 * draw[:, :5] - 1
    on = (draw[:, 5:9] < 0.7).float() * augment
    angle = spread[:, 0] * on[:, 0] * math.pi / 12
    shift = spread[:, 1:3] * on[:, :1] * 0.2  # a tenth of the picture, which is 2 wide here
    tilt = spread[:, 3:5] * on[:, 1:2] * 0.25
    ticks = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    depth = 1 + tilt[:, 0, None, None] * x + tilt[:, 1, None, None] * y
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    u = (cos * x - sin * y) / depth + shift[:, 0, None, None]
    v = (sin * x + cos * y) / depth + shift[:, 1, None, None]
    grid = torch.stack([u * longest / width, v * longest / height], -1).to(image)

    def moved(what: Tensor) -> Tensor:
        spread_out = what[None].expand(count, -1, -1, -1)
        return F.grid_sample(spread_out, grid, mode="bilinear", padding_mode="border", align_corners=False)

    views = moved(image)
    gray = views.mean(1, keepdim=True)
    color = (1 + 0.1 * (2 * draw[:, 9] - 1) * on[:, 2]).view(-1, 1, 1, 1).to(views)
    views = gray + (views - gray) * color
    place, reach = draw[:, 10:12] * 2 - 1, 0.1 + 0.25 * draw[:, 12:13]
    erased = ((x - place[:, 0, None, None]).abs() < reach[:, :, None]) & (
        (y - place[:, 1, None, None]).abs() < reach[:, :, None]
    )
    keep = 1 - erased[:, None].to(views) * (on[:, 3] > 0).view(-1, 1, 1, 1).to(views)
    views = views * keep + 0.1 * augment * draw[:, 13].view(-1, 1, 1, 1).to(views) * noise.to(views)
    return views, None if covers is None else moved(covers).round()
