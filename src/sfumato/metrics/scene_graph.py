"""Recall of scene graphs: R@K and mR@K, with and without graph constraint.

R@K is the share of an image's true triplets (subject, predicate, object) among the K most confident predicted ones,
mean over images (Lu et al. 2016); a predicted triplet is a true one if its three labels agree and both boxes overlap it
by an IoU of one half. With *graph constraint* a pair of boxes gets one predicate, the most confident (Xu et al. 2017);
without it all predicates of all pairs are ranked together (Newell & Deng 2017; named by Zellers et al. 2018). mR@K is
the mean over predicates of the recall of each (Chen et al. 2019, Tang et al. 2019), so that rare ones count as much as
frequent ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sfumato.markup import described

from ..errors import BadInput
from .stats import Interval, mean

KS = (20, 50, 100)


@dataclass(frozen=True)
class TrueGraph:
    """labels (n) int; boxes (n 4) x0 y0 x1 y1; pairs (m 2) rows of subject and object; predicates (m) int."""

    labels: np.ndarray
    boxes: np.ndarray
    pairs: np.ndarray
    predicates: np.ndarray

    __repr__ = described


@dataclass(frozen=True)
class PredictedGraph:
    """labels (n) int and their scores (n); boxes (n 4) x0 y0 x1 y1; pairs (p 2) rows of subject and object; scores (p
    q) of each predicate, by its number: column 0 is "no relation" and never ranked."""

    labels: np.ndarray
    boxes: np.ndarray
    pairs: np.ndarray
    scores: np.ndarray
    label_scores: np.ndarray | None = None

    __repr__ = described


@dataclass(frozen=True)
class GraphRecall:
    """K -> R@K over images (with its interval) and mR@K over predicates; predicate -> recall at the largest K."""

    recall: dict[int, Interval]
    mean_recall: dict[int, float]
    by_predicate: dict[int, float]
    constraint: bool

    def text(self) -> str:
        """One line, ``R@20 0.512 [...], mR@20 0.401, ...``; ``ng`` where pairs may have several predicates."""
        mark = "" if self.constraint else "ng"
        return ", ".join(
            f"{mark}R@{k} {each.text()}, {mark}mR@{k} {self.mean_recall[k]:.3f}" for k, each in self.recall.items()
        )


def oracle(truth: TrueGraph, predicates: int) -> PredictedGraph:
    """A prediction that is the truth: its recall is 1 at any K that is not below the number of triplets - with graph
    constraint only where no pair has two predicates. ``predicates``: how many there are, "no relation" left out."""
    pairs, back = np.unique(truth.pairs.reshape(-1, 2), axis=0, return_inverse=True)
    scores = np.zeros((len(pairs), predicates + 1))
    scores[back.reshape(-1), truth.predicates] = 1.0
    return PredictedGraph(truth.labels, truth.boxes, pairs, scores)


def scene_graph_recall(
    truths: Sequence[TrueGraph],
    predictions: Sequence[PredictedGraph],
    ks: Sequence[int] = KS,
    constraint: bool = True,
    iou: float = 0.5,
) -> GraphRecall:
    """R@K and mR@K of predicted graphs; images without a true triplet say nothing and are passed over.

    Give the true boxes and labels to score predicates alone (PredCls), the true boxes to score labels too (SGCls).

    Raises BadInput where the two do not fit together, a graph names rows or predicates that are not there, or no image
    has a triplet.
    """
    if len(truths) != len(predictions):
        raise BadInput(
            f"{len(truths)} true graphs, but {len(predictions)} predicted; there must be one for each image."
        )
    if not ks or min(ks) < 1:
        raise BadInput(f"ks is {tuple(ks)}; K must be 1 or more.")
    if not 0 < iou <= 1:
        raise BadInput(f"iou is {iou}; it must be above 0 and at most 1.")
    ks = sorted(set(ks))
    hits: dict[int, list[float]] = {k: [] for k in ks}
    each: dict[int, dict[int, list[float]]] = {k: {} for k in ks}
    for index, (truth, found) in enumerate(zip(truths, predictions, strict=True)):
        _fits(truth, found, index)
        if not len(truth.predicates):
            continue
        rank = _ranks(truth, found, ks[-1], constraint, iou)
        for k in ks:
            right = rank < k
            hits[k].append(float(right.mean()))
            for predicate in np.unique(truth.predicates):
                each[k].setdefault(int(predicate), []).append(float(right[truth.predicates == predicate].mean()))
    if not hits[ks[0]]:
        raise BadInput("no image has a relationship, so there is nothing to recall.")
    by = {k: {p: float(np.mean(v)) for p, v in sorted(each[k].items())} for k in ks}
    means = {k: float(np.mean(list(by[k].values()))) for k in ks}
    return GraphRecall({k: mean(hits[k]) for k in ks}, means, by[ks[-1]], constraint)


def _fits(truth: TrueGraph, found: PredictedGraph, index: int) -> None:
    for name, graph, n in (("true", truth, len(truth.labels)), ("predicted", found, len(found.labels))):
        if graph.boxes.shape != (n, 4):
            raise BadInput(f"the {name} graph of image {index} has {n} labels, but boxes {graph.boxes.shape}.")
        pairs = graph.pairs.reshape(-1, 2)
        if len(pairs) and not 0 <= pairs.min() <= pairs.max() < n:
            raise BadInput(f"the {name} graph of image {index} has {n} boxes, but its pairs name row {pairs.max()}.")
    if len(truth.predicates) != len(truth.pairs.reshape(-1, 2)):
        raise BadInput(f"the true graph of image {index} has other numbers of pairs and predicates.")
    if found.scores.ndim != 2 or len(found.scores) != len(found.pairs.reshape(-1, 2)):
        raise BadInput(f"the predicted graph of image {index} needs one row of scores for each of its pairs.")
    if len(truth.predicates) and not 1 <= truth.predicates.min() <= truth.predicates.max():
        raise BadInput(f"the true graph of image {index} has predicate {truth.predicates.min()}; numbers begin at 1.")
    if not np.isfinite(found.scores).all():
        raise BadInput(f"the predicted graph of image {index} has scores that are not finite.")


def _ranks(truth: TrueGraph, found: PredictedGraph, most: int, constraint: bool, iou: float) -> np.ndarray:
    """(m) place of each true triplet among the predicted ones, from 0; ``most`` where it is not among so many."""
    missing = np.full(len(truth.predicates), most)
    pairs, scores = found.pairs.reshape(-1, 2), np.array(found.scores, dtype=np.float64)
    if not len(pairs) or scores.shape[1] < 2:
        return missing
    sure = np.ones(len(found.labels)) if found.label_scores is None else np.asarray(found.label_scores, np.float64)
    if constraint:
        rows, columns = np.arange(len(pairs)), 1 + scores[:, 1:].argmax(1)
    else:
        rows, columns = (each.reshape(-1) for each in np.indices(scores[:, 1:].shape))
        columns = columns + 1
    worth = scores[rows, columns] * sure[pairs[rows, 0]] * sure[pairs[rows, 1]]
    order = np.argsort(-worth, kind="stable")[:most]
    rows, columns = rows[order], columns[order]
    ends, true = pairs[rows], truth.pairs.reshape(-1, 2)
    overlap = box_iou(truth.boxes, found.boxes) >= iou
    fit = truth.predicates[:, None] == columns[None]
    for side in (0, 1):
        fit &= truth.labels[true[:, side]][:, None] == found.labels[ends[:, side]][None]
        fit &= overlap[true[:, side]][:, ends[:, side]]
    return np.where(fit.any(1), fit.argmax(1), most)


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n m) intersection over union of boxes (n 4) and (m 4), x0 y0 x1 y1."""
    a, b = np.asarray(first, np.float64)[:, None], np.asarray(second, np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = sides.clip(0).prod(-1)
    areas = [(each[..., 2:] - each[..., :2]).clip(0).prod(-1) for each in (a, b)]
    return both / np.maximum(areas[0] + areas[1] - both, 1e-12)
