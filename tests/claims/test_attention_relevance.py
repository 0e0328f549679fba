"""The pieces of the experiment on attention relevance: scenes, truths, verdicts."""

from __future__ import annotations

import torch

from claims import attention_relevance as experiment
from claims.core import Context
from sfumato.metrics import segmentation
from sfumato.metrics.perturbation import perturb


def test_pairs_are_two_visible_toys_that_differ():
    for scene, picture, mask in experiment.pairs(5, 3, 64):
        first, second = scene.toys
        assert first.shape != second.shape and first.color != second.color and picture.shape == (3, 64, 64)
        assert all(float((mask == toy).float().mean()) >= experiment.LEAST for toy in (0, 1))


def test_each_toy_is_asked_for_once_with_its_own_mask():
    given = experiment.questions_of(Context(quick=True), "toy-clip", 5, 2)
    assert len(given["asked"]) == 4 and torch.equal(given["own"][0], given["other"][1])
    toys = [toy for scene in given["scenes"][::2] for toy in scene.toys]
    assert given["asked"] == [f"a {toy.color} {toy.shape}" for toy in toys]


def test_the_truth_itself_passes_and_a_picture_without_the_toy_is_not_seen():
    context = Context(quick=True)
    given = experiment.questions_of(context, "toy-clip", 5, 4)
    right = experiment.still_seen(context, "toy-clip", given)
    assert sum(right(given["pictures"])) >= 6
    assert sum(right(torch.zeros_like(given["pictures"]))) <= 2
    assert segmentation.pointing(given["own"].float(), given["own"]).all()
    assert experiment.ratio(given["own"].float(), given["own"], given["other"], [0, 0, 1, 1, 2, 2, 3, 3]).low > 1e6


def test_a_perturbation_verdict():
    worth = torch.rand(30, 8, generator=torch.Generator().manual_seed(0)) ** 4
    rest = {name: torch.rand(30, 8, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab", 1)}

    def score(keep):
        return (worth * keep).sum(1) / worth.sum(1)

    shares = (0.0, 0.5, 1.0)
    found = experiment.curves({"relevance": worth, **rest}, score, shares)
    assert experiment.curve_row("x", 30, found, ("a", "b"), "s").holds
    alone = perturb(lambda gone: score(~gone), worth, shares)
    assert found["relevance"]["positive"].areas == alone["positive"].areas
    swapped = experiment.curves({"relevance": rest["a"], "a": worth, "b": rest["b"]}, score, shares)
    assert experiment.curve_row("x", 30, swapped, ("a", "b"), "s").holds is False


def test_the_gaussian_lies_in_its_box():
    mask = experiment.otsu_mask(experiment.gaussian_in(torch.tensor([0.25, 0.5, 0.5, 1.0]), 64))
    rows, columns = mask.nonzero(as_tuple=True)
    assert mask.any() and rows.min() >= 30 and columns.min() >= 15 and columns.max() < 33
