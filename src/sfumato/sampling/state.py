"""States of any shape: samples come first, then whatever one sample is made of - (b c h w), (b c f h w), (b n)."""

from __future__ import annotations

from torch import Tensor


def sample_axes(x: Tensor) -> tuple[int, ...]:
    """All axes but the first: what a reduction per sample runs over, ``x.mean(sample_axes(x), keepdim=True)``."""
    return tuple(range(1, x.dim()))


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """One value per sample (b) in a shape (b 1 ...) that multiplies ``x`` (b ...)."""
    return values.reshape(-1, *[1] * (x.dim() - 1))
