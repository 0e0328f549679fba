"""The pieces of the claims of the bench and of SaD and PaD."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from claims import bench, sad_pad
from claims.core import Context
from sfumato.toybox.dataset import draw_scene
from sfumato.toybox.oracle.caption_check import requested


@pytest.mark.parametrize("key", ["bench", "sad_pad"])
def test_they_are_registered(key):
    experiment = importlib.import_module(f"claims.{key}").EXPERIMENT
    assert experiment.key == key and len({part.name for part in experiment.parts}) == len(experiment.parts)


def test_sets_have_the_shares_that_are_planted():
    for red in sad_pad.REDS:
        scenes, shown = sad_pad.drawn(90, 3, red)
        assert shown[:, 0].sum() == round(red * 90) and shown[:, 3:].sum(0).tolist() == [30, 30, 30]
        assert all(
            scene.toys[0].color == sad_pad.COLORS[row[:3].argmax()] for scene, row in zip(scenes, shown, strict=True)
        )
    _, free = sad_pad.drawn(90, 1)
    scenes, tied = sad_pad.drawn(90, 2, tied=True)
    assert free.sum(0).tolist() == tied.sum(0).tolist()  # no single share differs
    assert (tied[:, 0] == tied[:, 3]).all() and not (free[:, 0] == free[:, 3]).all()
    assert {scene.toys[0].shape for scene in scenes if scene.toys[0].color == "red"} == {"cube"}


def test_exact_divergence():
    p, q = 0.3, 0.6
    slow = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert sad_pad.exact_kl([p], [q])[0] == pytest.approx(slow) and sad_pad.exact_kl([0.5], [0.5])[0] == 0


def test_failures_are_planted_where_they_should_be():
    for i in range(20):
        scene = draw_scene("test", 3, i, 2)
        text = " and ".join(f"a {toy.color} {toy.shape}" for toy in scene.toys)
        assert bench._fulfils(scene, requested(text), "all_bound")
        other = bench.recoloured(scene, np.random.default_rng(i))
        assert other.toys[0].color not in {toy.color for toy in scene.toys} and other.toys[1:] == scene.toys[1:]
        assert bench._fulfils(other, requested(text), "all_present") and not bench._fulfils(
            other, requested(text), "all_bound"
        )
        assert not bench._fulfils(scene.remove(0), requested(text), "all_present")


def test_corruptions_begin_at_nothing_and_grow():
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for corrupt in bench.CORRUPTIONS.values():
        gaps = [
            float((corrupt(pictures, strength, torch.Generator().manual_seed(1)) - pictures).square().mean())
            for strength in bench.STRENGTHS
        ]
        assert gaps[0] == 0 and gaps == sorted(gaps) and gaps[-1] > 0.01


def test_the_oracle_part_runs():
    [row] = sad_pad.oracle(Context(quick=True))
    assert row.n == 4 and -1 <= row.data["spearman"][0] <= 1 and isinstance(row.holds, bool)
