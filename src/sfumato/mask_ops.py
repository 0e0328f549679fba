"""Operations on masks: other grids, morphology, soft edges, thresholds of maps.

Where a method needs yes or no, a cell belongs to the region from a coverage of ``level`` on.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from sfumato.arrays import to_tensor
from sfumato.errors import NoMatch
from sfumato.metrics.segmentation import otsu_split

__all__ = [
    "area",
    "binarised",
    "close",
    "dilate",
    "feather",
    "fill_holes",
    "mixture_threshold",
    "on_grid",
    "otsu_threshold",
]


def area(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A mask (... H W) on another ``grid`` (h, w): each cell gets the mean of the mask over its area, exactly, whether
    the grid is finer or coarser."""
    rows, columns = (_overlap(a, b).to(mask.device) for a, b in zip(mask.shape[-2:], grid, strict=True))
    return (rows @ mask.double() @ columns.T).float()


def _overlap(n: int, m: int) -> Tensor:
    """(m n): which share of each of m equal cells lies in each of n equal cells of the same length."""
    cells, finer = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    # in units of 1 / (n m) all borders are whole numbers, so that nothing is rounded
    ends = torch.minimum((cells + 1) * n, (finer + 1) * m) - torch.maximum(cells * n, finer * m)
    return ends.clamp_min(0) / n


def on_grid(mask: Tensor, grid: tuple[int, int], level: float = 0.5, soft: bool = False) -> Tensor:
    """A mask (... H W) on a ``grid`` (h, w): cells covered to ``level`` or more are 1, others 0; ``soft`` keeps the
    coverage itself. A mask too thin to cover any cell so far keeps the cells it covers most (at least half as much as
    the best one)."""
    covered = area(mask, grid)
    return covered if soft else binarised(covered, level)


def binarised(coverage: Tensor, level: float = 0.5) -> Tensor:
    """Yes or no (1 or 0) for every cell of a mask (... h w): as :func:`on_grid`, on the mask's own grid."""
    best = coverage.amax((-2, -1), keepdim=True)
    bar = torch.where(best >= level, torch.full_like(best, level), best / 2)
    return ((coverage >= bar) & (coverage > 0)).float()


def dilate(mask: Tensor, cells: int) -> Tensor:
    """The mask (... H W) grown by ``cells`` in every direction (a square), or shrunk where negative; grey levels too.
    Beyond the border lies what lies at the border."""
    if not cells:
        return mask
    size, flat = 2 * abs(cells) + 1, mask.reshape(-1, 1, *mask.shape[-2:])
    sign = 1 if cells > 0 else -1
    return (sign * F.max_pool2d(sign * flat, size, 1, abs(cells))).reshape(mask.shape)


def close(mask: Tensor, cells: int = 1) -> Tensor:
    """Gaps of up to 2 ``cells`` in a mask (... H W) closed: grown, then shrunk."""
    return dilate(dilate(mask, cells), -cells)


def fill_holes(mask: Tensor) -> Tensor:
    """A mask (H W) of 0 and 1 with everything filled that it encloses (cells touch at their sides)."""
    return to_tensor(ndimage.binary_fill_holes(mask.cpu().numpy() > 0.5).astype(np.float32))


def feather(mask: Tensor, width: float) -> Tensor:
    """1 on a mask (H W) of 0 and 1, falling in a straight line to 0 at a distance of ``width`` cells outside it."""
    if width <= 0 or not mask.any():
        return (mask > 0.5).float()
    away = to_tensor(ndimage.distance_transform_edt(mask.cpu().numpy() <= 0.5))
    return (1 - away / width).clamp(0, 1).float()


def otsu_threshold(values: Tensor, bins: int = 256) -> float:
    """The threshold that best parts the values in two (Otsu 1979): largest variance between the parts. Raises NoMatch
    where all values are equal."""
    flat = values.double().flatten().cpu()
    low, high = flat.min().item(), flat.max().item()
    if not high > low:
        raise NoMatch(f"the map is {low:g} everywhere, so no threshold parts it in two.")
    counts = torch.histc(flat, bins, low, high)
    best = int(otsu_split(counts[None]))
    return low + (best + 1) * (high - low) / bins


def mixture_threshold(values: Tensor, iterations: int = 200) -> float:
    """The midpoint of the means of two Gaussians fitted to the values by expectation maximisation (Dombrowski et al.
    2023); Otsu's threshold where the two fall together. Raises NoMatch where all values are equal."""
    x = values.double().flatten().cpu()
    split = otsu_threshold(values)
    # start from the two sides of Otsu's threshold
    near = torch.stack([(x < split).double(), (x >= split).double()])
    floor = 1e-6 * x.var(unbiased=False)
    means = torch.zeros(2, dtype=torch.float64)
    for _ in range(iterations):
        mass = near.sum(1).clamp_min(1e-12)
        before, means = means, near @ x / mass
        spread = (near * (x - means[:, None]) ** 2).sum(1) / mass + floor
        likely = (mass / len(x)).log()[:, None] - 0.5 * (
            spread.log()[:, None] + (x - means[:, None]) ** 2 / spread[:, None]
        )
        near = likely.softmax(0)
        if (means - before).abs().max() <= 1e-9 * x.std(unbiased=False):
            break
    apart = (means[1] - means[0]).abs().item()
    if not math.isfinite(apart) or apart < 1e-3 * (x.max() - x.min()).item():
        return split
    return means.mean().item()
