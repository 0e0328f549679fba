"""SaD and PaD of scores: how unequally two sets of pictures show attributes, and pairs of attributes.

Kim, Kwon, Uh 2024 (https://arxiv.org/abs/2310.17261). Heterogeneous CLIPScore (section 3.1) says how strongly an
attribute shows in a picture; single-attribute divergence (SaD, 3.2) compares its densities in two sets,
paired-attribute divergence (PaD, 3.3) those of every two attributes together.

Beyond the paper: a null by permutation, so that a figure can be told from chance; the part of a pair's divergence that
its two attributes do not explain already; whether the CLIP can read an attribute at all, where captions tell the truth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfumato.errors import BadInput
from sfumato.markup import described
from sfumato.metrics import stats
from sfumato.metrics.clip_score import unit
from sfumato.metrics.frechet import finite

FLOOR = 1e-10  # added to the probability of every cell, as in the authors' code
SCALE = 1000.0  # figures are 1000 x KL in nats: what the authors' mean over 10,000 cells, times 1e7, comes to
READABLE = 0.75  # AUROC against captions below which a CLIP's densities of an attribute mean nothing
LEAST = 20  # pictures on each side; a density of fewer says nothing


# --- heterogeneous CLIPScore -----------------------------------------------------------------------------------------


def hcs(images: np.ndarray, attributes: np.ndarray, image_centre: np.ndarray, text_centre: np.ndarray) -> np.ndarray:
    """Heterogeneous CLIPScore (equation 3): 100 cos(E(x) - C_X, E(a) - C_A), as (n, m).

    Args:
        images: picture embeddings (n, d), attributes: text embeddings (m, d); neither normalised.
        image_centre, text_centre: C_X, the mean over the *real* pictures, for both sets, and C_A, over the attributes.

    Picture and text embeddings of a CLIP lie in separate cones; without centring every cosine is small and positive.
    """
    return 100 * unit(finite(images) - image_centre) @ unit(finite(attributes) - text_centre).T


# --- densities -------------------------------------------------------------------------------------------------------


class Lattice:
    """Gaussian kernel densities with Scott's bandwidth on a fixed lattice around ``points`` (n, d), d = 1 or 2.

    Points are shared out linearly among the nodes around them, and the sum is multiplied by the kernel's characteristic
    function: the kernel has the full covariance factor^2 Cov, as ``scipy.stats.gaussian_kde`` has, at a cost that does
    not depend on how many points there are. The lattice reaches three bandwidths beyond the data (the authors' fixed
    window of [-35, 35] fits ViT-B/32 only). No direction's bandwidth is less than half a cell, which makes densities of
    constant or discrete attributes finite.
    """

    def __init__(self, points: np.ndarray, factor: float, nodes: int):
        n, d = points.shape
        self.factor, self.shape = factor, (nodes,) * d
        low, high = points.min(0), points.max(0)
        reach = 3 * factor * np.where(high > low, points.std(0), 0) + 1e-9
        spread = np.where(high > low, high - low + 2 * reach, 1.0)  # a constant lies in the middle of a unit window
        low = np.where(high > low, low - reach, low - 0.5)
        self.low, self.step = low, spread / (nodes - 1)
        place = (points - self.low) / self.step
        base = np.clip(np.floor(place).astype(np.int64), 0, nodes - 2)
        part = place - base
        self.corners: list[tuple[Any, Any]] = []
        for corner in itertools.product((0, 1), repeat=d):
            weight = np.prod([part[:, k] if up else 1 - part[:, k] for k, up in enumerate(corner)], axis=0)
            self.corners.append((np.ravel_multi_index(tuple((base + corner).T), self.shape), weight))
        self.total = self.counts(slice(None))
        waves = [2 * np.pi * np.fft.fftfreq(2 * nodes)] * (d - 1) + [2 * np.pi * np.fft.rfftfreq(2 * nodes)]
        grid = np.stack(np.meshgrid(*waves, indexing="ij"), -1)
        self.squares = grid[..., :, None] * grid[..., None, :]  # w w^T of every wave vector w

    def counts(self, rows: Any) -> np.ndarray:
        """How many of the chosen points fall to each node."""
        found: np.ndarray = np.zeros(int(np.prod(self.shape)))
        for at, weight in self.corners:
            found += np.bincount(at[rows], weight[rows], len(found))
        return found.reshape(self.shape)

    def density(self, counts: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        """Probabilities of the nodes, summing to 1, of points with these counts and this covariance (d, d)."""
        inside = self.factor**2 * np.atleast_2d(covariance) / np.outer(self.step, self.step)  # in cells
        values, vectors = np.linalg.eigh(inside)
        # sharing points out among nodes has blurred them by a triangle of variance 1/6 cell already
        inside = (vectors * (np.maximum(values, 0.25) - 1 / 6)) @ vectors.T
        damping = np.exp(-0.5 * np.tensordot(self.squares, inside, 2))
        padded = [2 * size for size in self.shape]  # so that nothing comes round the other side
        axes = tuple(range(len(padded)))
        smooth = np.fft.irfftn(np.fft.rfftn(counts, padded, axes) * damping, padded, axes)
        smooth = smooth[tuple(slice(0, size) for size in self.shape)].clip(0)
        return smooth / smooth.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Kullback-Leibler divergence of two discrete densities in nats, each cell lifted by ``FLOOR``; never negative."""
    p, q = (np.asarray(density, np.float64) + FLOOR for density in (p, q))
    p, q = p / p.sum(), q / q.sum()
    return float(max((p * np.log(p / q)).sum(), 0.0))


# --- divergences -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttributeShift:
    """One attribute in two sets. ``kl``, ``j`` (mean of both directions) and ``null`` (the 95 % point of chance) are
    times 1000; ``gap`` is mean HCS fake - real (above 0: too much of it) with its interval; ``p`` by permutation;
    ``auroc`` how well HCS finds the real pictures whose captions name it, None where no captions tell."""

    name: str
    kl: float
    j: float
    gap: stats.Interval
    null: float
    p: float
    auroc: float | None = None

    @property
    def readable(self) -> bool:
        """Whether the densities mean something, as far as is known."""
        return self.auroc is None or self.auroc >= READABLE

    @property
    def shifted(self) -> bool:
        """Above what equal sets would show in 95 of 100 cases."""
        return self.kl > self.null


@dataclass(frozen=True)
class PairShift:
    """Two attributes together. ``excess`` is the pair's KL less those of its two attributes; its ``null`` and ``p``."""

    first: str
    second: str
    kl: float
    excess: float
    null: float
    p: float

    @property
    def shifted(self) -> bool:
        """Combined otherwise than in the real set, beyond chance."""
        return self.excess > self.null


@dataclass(frozen=True)
class Divergences:
    """SaD and PaD (times 1000) with what equal sets of these sizes would show, and the ranked lists behind them."""

    sad: float
    pad: float
    sad_null: float
    pad_null: float
    attributes: tuple[AttributeShift, ...]
    pairs: tuple[PairShift, ...]
    real: int
    fake: int
    grids: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]  # name -> (HCS, real density, fake density)

    __repr__ = described

    def to_json(self) -> dict[str, Any]:
        """Everything but the densities, as plain values."""
        return {
            "sad": self.sad, "pad": self.pad, "sad_null": self.sad_null, "pad_null": self.pad_null,
            "real": self.real, "fake": self.fake,
            "attributes": [
                {"name": each.name, "kl": each.kl, "j": each.j, "gap": each.gap.to_json(), "null": each.null,
                 "p": each.p, "auroc": each.auroc, "shifted": each.shifted, "readable": each.readable}
                for each in self.attributes
            ],
            "pairs": [
                {"first": each.first, "second": each.second, "kl": each.kl, "excess": each.excess, "null": each.null,
                 "p": each.p, "shifted": each.shifted}
                for each in self.pairs
            ],
        }  # fmt: skip


def divergence(
    real: np.ndarray,
    fake: np.ndarray,
    names: Sequence[str],
    *,
    pairs: bool = True,
    draws: int = 100,
    nodes: int = 512,
    pair_nodes: int = 64,
    seed: int = 0,
    mentions: np.ndarray | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Divergences:
    """SaD and PaD of any scores: HCS, or an oracle's.

    Args:
        real, fake: scores (n, m) and (n', m) of m attributes ``names``.
        pairs: whether to look at pairs too (m (m - 1) / 2 of them).
        draws: permutations of the pooled pictures for the null: equal sets of these very sizes, so that the bias of a
            density of few pictures, which makes every KL positive, is in the null as well.
        nodes, pair_nodes: sides of the lattices for one and two attributes.
        mentions: 0, 1 or NaN (n, m), whether the captions of the real pictures name the attributes.

    Both sides use the bandwidth factor of the smaller one, so that unequal sizes blur alike. Attributes are ranked by
    KL, unreadable ones last; pairs by excess. Raises BadInput for fewer than 20 pictures on a side, or no attribute.
    """
    x, y = finite(real), finite(fake)
    if not len(names) == x.shape[1] == y.shape[1] or not len(names):
        raise BadInput(f"{len(names)} attributes, but scores of {x.shape[1]} and {y.shape[1]}; there must be one each.")
    if min(len(x), len(y)) < LEAST:
        raise BadInput(f"attribute densities need at least {LEAST} pictures on each side; got {len(x)} and {len(y)}.")
    least = min(len(x), len(y))
    pooled = np.concatenate([x, y])
    single = [Lattice(pooled[:, [k]], least ** (-1 / 5), nodes) for k in range(len(names))]
    both = list(itertools.combinations(range(len(names)), 2)) if pairs else []
    double = [Lattice(pooled[:, list(pair)], least ** (-1 / 6), pair_nodes) for pair in both]

    def measured(rows: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Any]]:
        """KL of every attribute and pair between pooled rows and the rest, and the single densities."""
        one, two = (np.atleast_2d(np.cov(pooled[part], rowvar=False)) for part in (rows, rest))

        def densities(lattice: Lattice, which: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
            counts = lattice.counts(rows)
            at: Any = np.ix_(which, which)
            return lattice.density(counts, one[at]), lattice.density((lattice.total - counts).clip(0), two[at])

        alone = [densities(lattice, [k]) for k, lattice in enumerate(single)]
        joint = [kl(*densities(lattice, pair)) for lattice, pair in zip(double, both, strict=True)]
        return np.array([kl(p, q) for p, q in alone]), np.array(joint), alone

    def excess(alone: np.ndarray, joint: np.ndarray) -> np.ndarray:
        return joint - np.array([alone[i] + alone[j] for i, j in both])

    order = np.arange(len(pooled))
    alone, joint, curves = measured(order[: len(x)], order[len(x) :])
    rng = np.random.default_rng(seed)
    null_alone, null_joint, null_excess = [], [], []
    for draw in range(draws):
        rng.shuffle(order)
        chance, chance_joint, _ = measured(order[: len(x)], order[len(x) :])
        null_alone.append(chance)
        null_joint.append(chance_joint.mean() if both else 0.0)
        null_excess.append(excess(chance, chance_joint) if both else np.zeros(0))
        if on_progress is not None:
            on_progress(draw + 1, draws)

    def judged(value: float, chance: np.ndarray) -> tuple[float, float]:
        """(95 % point, p-value) of a figure among those of chance."""
        if not len(chance):
            return float("inf"), 1.0
        return SCALE * float(np.quantile(chance, 0.95)), float(((chance >= value).sum() + 1) / (len(chance) + 1))

    by_attribute, by_pair = np.array(null_alone), np.array(null_excess)
    shifts = []
    for k, name in enumerate(names):
        p, q = curves[k]
        null, by_chance = judged(float(alone[k]), by_attribute[:, k] if draws else np.zeros(0))
        truth = None if mentions is None else auroc(x[:, k], mentions[:, k])
        gap = stats.welch(y[:, k], x[:, k])
        shifts.append(
            AttributeShift(
                name, SCALE * float(alone[k]), SCALE * (kl(p, q) + kl(q, p)) / 2, gap, null, by_chance, truth
            )
        )
    extra = excess(alone, joint) if both else np.zeros(0)
    pair_shifts = []
    for index, (i, j) in enumerate(both):
        null, by_chance = judged(float(extra[index]), by_pair[:, index] if draws else np.zeros(0))
        pair_shifts.append(
            PairShift(names[i], names[j], SCALE * float(joint[index]), SCALE * float(extra[index]), null, by_chance)
        )
    return Divergences(
        sad=SCALE * float(alone.mean()),
        pad=SCALE * float(joint.mean()) if both else 0.0,
        sad_null=judged(0, by_attribute.mean(1) if draws else np.zeros(0))[0],
        pad_null=judged(0, np.array(null_joint))[0],
        attributes=tuple(sorted(shifts, key=lambda each: (not each.readable, -each.kl))),
        pairs=tuple(sorted(pair_shifts, key=lambda each: -each.excess)),
        real=len(x),
        fake=len(y),
        grids={
            name: (single[k].low[0] + single[k].step[0] * np.arange(nodes), *curves[k]) for k, name in enumerate(names)
        },
    )


def auroc(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """Chance that a picture with the attribute scores above one without, ties one half; None without both kinds."""
    from scipy.stats import rankdata

    known = ~np.isnan(truth)
    scores, truth = scores[known], truth[known] > 0.5
    yes, no = int(truth.sum()), int((~truth).sum())
    if not yes or not no:
        return None
    return float((rankdata(scores)[truth].sum() - yes * (yes + 1) / 2) / (yes * no))
