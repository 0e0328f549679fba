"""Scoring heat maps as segmentations: IoU at a threshold fixed elsewhere, pointing game, and the trivial baselines.

Maps are float (n, h, w), truths bool (n, h, w). A threshold is always fitted on one split and used on another:
``fit_threshold(maps_a, truths_a)`` then ``score(maps_b, truths_b, tau)``; the baselines are given the same courtesy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.metrics import stats

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class MapScore:
    """mIoU and pointing game of one set of maps; ``ious``/``hits`` keep the single values for paired tests."""

    miou: stats.Interval
    pointing: stats.Interval
    tau: float
    ious: tuple[float, ...]
    hits: tuple[bool, ...]

    def to_json(self) -> dict[str, object]:
        """The two intervals and the threshold."""
        return {"miou": self.miou.to_json(), "pointing": self.pointing.to_json(), "tau": self.tau}


def normalise(maps: Tensor, how: str = "minmax", dims: int = 2) -> Tensor:
    """Maps (... h w) brought to [0, 1] each: ``"minmax"`` (DAAM's code) or ``"max"`` (DAAM's paper, relative to peak).

    A constant map becomes 0. ``dims``: a map is so many of the last axes, 3 for that of a clip (f h w).
    """
    if how not in ("minmax", "max"):
        raise BadInput(f"normalise: how={how!r}; allowed: 'minmax', 'max'.")
    maps = maps.float()
    axes = tuple(range(-dims, 0))
    least = maps.amin(axes, keepdim=True)
    low = least if how == "minmax" else torch.zeros_like(least)
    span = maps.amax(axes, keepdim=True) - low
    return torch.where(span > 0, (maps - low) / span.clamp_min(1e-30), torch.zeros_like(maps))


def iou(predictions: Tensor, truths: Tensor) -> Tensor:
    """Intersection over union of bool masks (n, h, w), one value each; two empty masks agree: 1."""
    _same(predictions, truths)
    predictions, truths = predictions.bool(), truths.bool()
    joint = (predictions & truths).sum((-2, -1)).double()
    union = (predictions | truths).sum((-2, -1)).double()
    return torch.where(union > 0, joint / union.clamp_min(1), torch.ones_like(union))


def overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, IoD and IoH of a head's masks ``first`` and its dependent's ``second`` (n, h, w).

    IoD is the share of the dependent inside the head, IoH the share of the head inside the dependent (Tang et al.
    2022, section 4.1). Undefined shares (an empty mask) are 0.
    """
    _same(first, second)
    joint = (first & second).sum((-2, -1)).double()
    return (
        joint / (first | second).sum((-2, -1)).double().clamp_min(1),
        joint / second.sum((-2, -1)).double().clamp_min(1),
        joint / first.sum((-2, -1)).double().clamp_min(1),
    )


def pointing(maps: Tensor, truths: Tensor) -> Tensor:
    """Pointing game (Zhang et al. 2016): whether each map's peak lies in its truth. bool (n,).

    A map whose peak is shared by several pixels (a constant map) scores the centre-most of them, deterministically.
    """
    _same(maps, truths)
    n, h, w = maps.shape
    rows = torch.linspace(-1, 1, h)[:, None].expand(h, w)
    columns = torch.linspace(-1, 1, w)[None].expand(h, w)
    off_centre = (rows.square() + columns.square()).flatten()
    flat = maps.float().flatten(1)
    peaks = flat >= flat.amax(1, keepdim=True)
    where = torch.where(peaks, -off_centre, -1e9).argmax(1)
    return truths.bool().flatten(1)[torch.arange(n), where]


def inside_share(maps: Tensor, truths: Tensor) -> Tensor:
    """Share of each non-negative map's mass that lies inside its truth (n,)."""
    _same(maps, truths)
    mass = maps.double().clamp_min(0)
    return (mass * truths).sum((-2, -1)) / mass.sum((-2, -1)).clamp_min(1e-30)


def fit_threshold(
    maps: Tensor, truths: Tensor, candidates: Sequence[float] = THRESHOLDS, how: str = "minmax"
) -> tuple[float, float]:
    """The threshold on normalised maps with the best mean IoU, and that mean. Fit on a split that is not reported."""
    if not len(maps):
        raise BadInput("fit_threshold: no maps were given.")
    levels = normalise(maps, how)
    means = [float(iou(levels >= tau, truths).mean()) for tau in candidates]
    best = max(range(len(means)), key=means.__getitem__)
    return float(candidates[best]), means[best]


def score(maps: Tensor, truths: Tensor, tau: float, how: str = "minmax", seed: int = 0) -> MapScore:
    """mIoU (bootstrap interval) of ``normalise(maps) >= tau`` and pointing game (Wilson) of the maps."""
    if not len(maps):
        raise BadInput("score: no maps were given.")
    ious = iou(normalise(maps, how) >= tau, truths)
    hits = pointing(maps, truths)
    return MapScore(
        stats.bootstrap(ious.numpy(), seed=seed),
        stats.share(hits.numpy()),
        tau,
        tuple(ious.tolist()),
        tuple(hits.tolist()),
    )


def whole_image(n: int, size: tuple[int, int]) -> Tensor:
    """The baseline that answers "everywhere": constant maps (n, h, w); any threshold keeps the whole image."""
    ramp = torch.ones(n, *size)
    # normalise() sends constants to 0; one dark corner pixel keeps "everywhere" meaning everywhere
    ramp[:, 0, 0] = 0
    return ramp


def centred_gaussian(n: int, size: tuple[int, int], sigma: float = 0.25) -> Tensor:
    """The baseline that answers "in the middle": a Gaussian of ``sigma`` image widths, (n, h, w)."""
    h, w = size
    rows = torch.linspace(-0.5, 0.5, h)[:, None]
    columns = torch.linspace(-0.5, 0.5, w)[None]
    blob = torch.exp(-(rows.square() + columns.square()) / (2 * sigma * sigma))
    return blob.expand(n, h, w).clone()


def random_blobs(n: int, size: tuple[int, int], cells: int = 8, seed: int = 0) -> Tensor:
    """Smooth random maps (n, h, w): noise on ``cells`` x ``cells`` resized bicubically, about a toy's scale."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, 1, cells, cells, generator=generator)
    return torch.nn.functional.interpolate(noise, size=size, mode="bicubic", align_corners=False)[:, 0].clamp_min(0)


def _same(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim != 3:
        raise BadInput(
            f"masks or maps must share one shape (n, h, w); got {tuple(first.shape)} and {tuple(second.shape)}."
        )


def average_precision(maps: Tensor, truths: Tensor) -> Tensor:
    """Average precision of pixels ranked by their value, one per map (n,): area under the precision-recall curve.

    Equal values count as one step, so a constant map scores the share of true pixels. nan where nothing is true.
    """
    _same(maps, truths)
    out = []
    for heat, truth in zip(maps.flatten(1).double(), truths.bool().flatten(1), strict=True):
        order = heat.argsort(descending=True)
        value, hit = heat[order], truth[order].double()
        last = torch.cat([value[1:] != value[:-1], torch.ones(1, dtype=torch.bool)])  # the end of each run of equals
        found = hit.cumsum(0)[last]
        count = torch.arange(1, len(hit) + 1, dtype=torch.float64)[last]
        gained = torch.diff(found, prepend=torch.zeros(1, dtype=torch.float64))
        total = hit.sum()
        out.append((gained * found / count).sum() / total if total > 0 else torch.tensor(float("nan")))
    return torch.stack(out)


def otsu(maps: Tensor, levels: int = 256) -> Tensor:
    """Thresholds (n,) that split each map's min-max normalised histogram with the largest variance between the parts
    (Otsu 1979); use as ``normalise(maps) > otsu(maps)[:, None, None]``. A constant map has threshold 0."""
    flat = (normalise(maps).flatten(1) * (levels - 1)).round().long()
    counts = torch.zeros(len(flat), levels, dtype=torch.float64).scatter_add_(1, flat, torch.ones(flat.shape).double())
    best = otsu_split(counts)
    return torch.where(best >= 0, best.double() / (levels - 1) + 0.5 / (levels - 1), 0.0).float()


def otsu_split(counts: Tensor) -> Tensor:
    """(n,): the last bin below the threshold that parts histograms (n, bins) with the largest variance between the
    parts (Otsu 1979); -1 where all lies in one bin."""
    share = counts / counts.sum(1, keepdim=True)
    below = share.cumsum(1)
    mass = (share * torch.arange(counts.shape[1], dtype=torch.float64)).cumsum(1)
    between = (mass[:, -1:] * below - mass).square() / (below * (1 - below)).clamp_min(1e-12)
    between = between.masked_fill((below <= 1e-9) | (below >= 1 - 1e-9), -1)
    return torch.where(between.amax(1) > 0, between.argmax(1), -1)


def instance_ap(masks: Sequence[Tensor], truths: Sequence[Tensor], certain: Sequence[Tensor], least: float) -> float:
    """Average precision over all pictures of found masks (k h w) with their certainty (k,) against true ones (m h w):
    a find is right if it overlaps a toy that none before it has taken by at least ``least`` (IoU)."""
    entries: list[tuple[float, bool]] = []
    total = 0
    for found, true, odds in zip(masks, truths, certain, strict=True):
        total += len(true)
        taken: set[int] = set()
        for k in odds.argsort(descending=True).tolist():
            overlaps = iou(found[k][None].expand(len(true), -1, -1), true) if len(true) else torch.zeros(0)
            free = [j for j in range(len(true)) if j not in taken]
            best = max(free, key=lambda j: float(overlaps[j]), default=None)
            right = best is not None and float(overlaps[best]) >= least
            if right:
                taken.add(best)  # type: ignore[arg-type]
            entries.append((float(odds[k]), right))
    if not entries or not total:
        return 0.0
    entries.sort(key=lambda entry: -entry[0])
    right = torch.tensor([entry[1] for entry in entries], dtype=torch.float64)
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    return float((precision * right).sum() / total)
