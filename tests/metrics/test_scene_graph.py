"""Scene-graph recall against a slow reference and cases counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sfumato.errors import BadInput
from sfumato.metrics.scene_graph import PredictedGraph, TrueGraph, box_iou, oracle, scene_graph_recall

BOXES = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30]], float)
TRUTH = TrueGraph(np.array([1, 2, 1]), BOXES, np.array([[0, 1], [1, 2], [2, 0]]), np.array([1, 2, 2]))


def scores(*rows):
    return np.array(rows, float)


def by_hand(truth, found, k, constraint, iou=0.5):
    """One image, triplet by triplet."""
    ranked = []
    for row, (a, b) in enumerate(found.pairs):
        sure = 1 if found.label_scores is None else found.label_scores[a] * found.label_scores[b]
        each = [(found.scores[row, p] * sure, row, p) for p in range(1, found.scores.shape[1])]
        ranked += [max(each, key=lambda e: (e[0], -e[2]))] if constraint else each
    ranked.sort(key=lambda e: (-e[0], e[1], e[2]))

    def same(i, j):
        x0, y0, x1, y1 = truth.boxes[i]
        u0, v0, u1, v1 = found.boxes[j]
        both = max(0, min(x1, u1) - max(x0, u0)) * max(0, min(y1, v1) - max(y0, v0))
        whole = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - both
        return truth.labels[i] == found.labels[j] and both / whole >= iou

    hit = []
    for (a, b), p in zip(truth.pairs, truth.predicates, strict=True):
        hit.append(any(q == p and same(a, found.pairs[r][0]) and same(b, found.pairs[r][1]) for _, r, q in ranked[:k]))
    return np.array(hit)


@pytest.mark.parametrize("constraint", [True, False])
def test_agrees_with_counting_by_hand(constraint):
    rng = np.random.default_rng(1)
    truths, founds = [], []
    for _ in range(12):
        n, m = int(rng.integers(2, 6)), int(rng.integers(1, 8))
        corner = rng.uniform(0, 20, (n, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(3, 20, (n, 2))], 1)
        labels, pairs = rng.integers(1, 4, n), rng.integers(0, n, (m, 2))
        truths.append(TrueGraph(labels, boxes, pairs, rng.integers(1, 4, m)))
        every = np.array([(a, b) for a in range(n) for b in range(n)])
        founds.append(
            PredictedGraph(labels, boxes + rng.normal(0, 1, boxes.shape), every, rng.random((n * n, 4)), rng.random(n))
        )
    for k in (1, 3, 10):
        hits = [by_hand(t, f, k, constraint) for t, f in zip(truths, founds, strict=True)]
        score = scene_graph_recall(truths, founds, (k,), constraint)
        assert np.isclose(score.recall[k].value, np.mean([h.mean() for h in hits]))
        every = {
            p: [h[t.predicates == p].mean() for t, h in zip(truths, hits, strict=True) if (t.predicates == p).any()]
            for p in (1, 2, 3)
        }
        assert np.isclose(score.mean_recall[k], np.mean([np.mean(v) for v in every.values() if v]))
        assert score.recall[k].n == 12


def test_truth_is_one_and_k_counts():
    found = oracle(TRUTH, 2)
    for constraint in (True, False):
        score = scene_graph_recall([TRUTH], [found], (1, 2, 3), constraint)
        assert [score.recall[k].value for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert scene_graph_recall([TRUTH], [found], (3,)).by_predicate == {1: 1.0, 2: 1.0}
    assert "mR@3 1.000" in score.text() and score.text().startswith("ngR@1")


def test_one_predicate_a_pair_is_what_the_constraint_costs():
    double = TrueGraph(TRUTH.labels, BOXES, np.array([[0, 1], [0, 1]]), np.array([1, 2]))
    found = oracle(double, 2)
    assert scene_graph_recall([double], [found], (20,)).recall[20].value == 0.5
    assert scene_graph_recall([double], [found], (20,), constraint=False).recall[20].value == 1


def test_boxes_labels_and_order_must_fit():
    found = oracle(TRUTH, 2)
    half = replace(found, boxes=BOXES + [5, 0, 5, 0])  # an IoU of one third
    assert scene_graph_recall([TRUTH], [half]).recall[20].value == 0
    assert scene_graph_recall([TRUTH], [half], iou=0.3).recall[20].value == 1
    assert scene_graph_recall([TRUTH], [replace(found, labels=np.array([2, 2, 1]))]).recall[20].value < 1
    assert scene_graph_recall([TRUTH], [replace(found, pairs=found.pairs[:, ::-1])]).recall[20].value == 0
    none = replace(found, pairs=np.empty((0, 2), int), scores=np.empty((0, 3)))
    empty = TrueGraph(TRUTH.labels, BOXES, np.empty((0, 2), int), np.empty(0, int))
    score = scene_graph_recall([TRUTH, empty], [none, found])  # an image without relationships says nothing
    assert score.recall[20].value == 0 and score.recall[20].n == 1
    assert np.allclose(box_iou(BOXES, BOXES), np.eye(3))


@pytest.mark.parametrize(
    ("truth", "found", "more", "says"),
    [
        (TRUTH, oracle(TRUTH, 2), {"ks": ()}, "K must be"),
        (TRUTH, oracle(TRUTH, 2), {"ks": (0,)}, "K must be"),
        (TRUTH, oracle(TRUTH, 2), {"iou": 0}, "above 0"),
        (replace(TRUTH, boxes=BOXES[:2]), oracle(TRUTH, 2), {}, "3 labels, but boxes"),
        (replace(TRUTH, pairs=TRUTH.pairs + 1), oracle(TRUTH, 2), {}, "pairs name row 3"),
        (replace(TRUTH, predicates=TRUTH.predicates[:2]), oracle(TRUTH, 2), {}, "other numbers"),
        (replace(TRUTH, predicates=TRUTH.predicates - 1), oracle(TRUTH, 2), {}, "begin at 1"),
        (TRUTH, replace(oracle(TRUTH, 2), scores=scores([0, 1])), {}, "one row of scores"),
        (TRUTH, replace(oracle(TRUTH, 2), scores=np.full((3, 3), np.nan)), {}, "not finite"),
        (replace(TRUTH, pairs=TRUTH.pairs[:0], predicates=TRUTH.predicates[:0]), oracle(TRUTH, 2), {}, "no image has"),
    ],
)
def test_refusals(truth, found, more, says):
    with pytest.raises(BadInput, match=says):
        scene_graph_recall([truth], [found], **more)
    with pytest.raises(BadInput, match="one for each image"):
        scene_graph_recall([TRUTH], [])
