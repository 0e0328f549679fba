"""Biased splits: how often the backdrop tells the shape, and what each shift changes."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from sfumato.errors import BadInput, UnknownName
from sfumato.toybox import BIASED_SPLITS, SHAPES, BiasedDataset, draw_biased
from sfumato.toybox.biased import (
    SEEN_COLORS,
    SEEN_GROUNDS,
    UNSEEN_COLORS,
    UNSEEN_GROUNDS,
    Bias,
    bias_of,
    own_color,
    own_scenery,
)


@functools.cache
def drawn(bias: Bias, n: int = 1200):
    return [draw_biased(bias, np.random.default_rng((8, i))) for i in range(n)]


def tied(scenes) -> float:
    return np.mean([(s.ground, s.sky) == own_scenery(s.toys[0].shape) for s in scenes])


def test_every_shape_has_a_backdrop_and_a_colour_of_its_own() -> None:
    assert len({own_scenery(shape) for shape in SHAPES}) == len({own_color(shape) for shape in SHAPES}) == len(SHAPES)
    assert not set(SEEN_GROUNDS) & set(UNSEEN_GROUNDS) and not set(SEEN_COLORS) & set(UNSEEN_COLORS)


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.95, 1.0])
def test_strength_is_the_share_of_own_backdrops(strength: float) -> None:
    by_chance = 1 / 15  # three grounds, five skies
    scenes = drawn(Bias(scenery=strength, color=strength))  # each tied by itself
    assert tied(scenes) == pytest.approx(strength + (1 - strength) * by_chance, abs=0.04)
    colored = [s.toys[0].color == own_color(s.toys[0].shape) for s in scenes]
    assert np.mean(colored) == pytest.approx(strength + (1 - strength) / 6, abs=0.05)


def test_splits_change_one_thing_each() -> None:
    same, shuffled, wrong, grounds, colors = (
        drawn(bias_of(s)) for s in ("same", "shuffled", "wrong", "grounds", "colors")
    )
    assert tied(same) > 0.92 and tied(shuffled) < 0.12 and tied(wrong) == 0 == tied(grounds)
    homes = {own_scenery(shape) for shape in SHAPES}
    assert all((s.ground, s.sky) in homes for s in wrong)
    assert {s.ground for s in grounds} == set(UNSEEN_GROUNDS)
    assert {s.toys[0].color for s in colors} == set(UNSEEN_COLORS) and tied(colors) > 0.92
    for a, b in zip(same, shuffled, strict=True):  # the same draw: the same toy in the same place
        assert a.toys == b.toys and a.camera == b.camera and a.light == b.light


def test_shapes_are_even_and_alone() -> None:
    scenes = drawn(Bias())
    counts = np.bincount([SHAPES.index(s.toys[0].shape) for s in scenes], minlength=len(SHAPES))
    assert counts.min() > 0.7 * counts.mean() and all(len(s.toys) == 1 for s in scenes)


def test_datasets_are_cached_and_grow_without_changing(tmp_path) -> None:
    small = BiasedDataset("wrong", 3, size=32, cache=tmp_path)
    large = BiasedDataset("wrong", 5, size=32, cache=tmp_path)
    assert small.scenes == large.scenes[:3] and np.array_equal(small.images, large.images[:3])
    again = BiasedDataset("wrong", 3, size=32, cache=tmp_path)
    assert np.array_equal(small.masks, again.masks) and again.labels.tolist() == small.labels.tolist()
    assert len(list(tmp_path.iterdir())) == 2
    assert (large.shortcut != large.labels).all() and (large.shortcut >= 0).all()
    assert large.labels.tolist() == [SHAPES.index(s.toys[0].shape) for s in large.scenes]
    assert BiasedDataset("grounds", 2, size=32, cache=tmp_path).shortcut.tolist() == [-1, -1]
    assert BiasedDataset("wrong", 3, size=32, scenery=0.5, cache=tmp_path).folder != small.folder
    assert {BiasedDataset(s, 1, size=16, cache=tmp_path).split for s in BIASED_SPLITS} == set(BIASED_SPLITS)


def test_bad_input() -> None:
    with pytest.raises(UnknownName, match="shuffled"):
        BiasedDataset("shuffle", 1)
    with pytest.raises(BadInput, match="0 to 1"):
        BiasedDataset("train", 1, scenery=1.5)
    with pytest.raises(BadInput, match="n must be"):
        BiasedDataset("train", 0)
    with pytest.raises(UnknownName, match="grass"):
        Bias(grounds=("gras",))
    with pytest.raises(BadInput, match="at least one"):
        Bias(colors=())
