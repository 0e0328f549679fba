"""Presence, binding, counts and relations on readings made by hand."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from sfumato.errors import BadInput
from sfumato.toybox import COLORS, SHAPES, caption, sample_scene
from sfumato.toybox.oracle import presence
from sfumato.toybox.oracle.presence import RequestedToy
from sfumato.toybox.oracle.toy_judge import ObjectReading, SceneReading


def toy(shape, color, box=(0.0, 0.0, 8.0, 8.0), pattern="plain", size="small"):
    return ObjectReading(shape, color, pattern, size, torch.zeros(16, 16, dtype=torch.bool), box, 0.9)


def reading(*toys):
    return SceneReading(tuple(toys), "grass", "day")


def test_parse():
    assert RequestedToy.parse("a small red striped cube") == RequestedToy("cube", "red", "striped", "small")
    assert RequestedToy.parse("ball").color is None
    with pytest.raises(BadInput, match="no toy"):
        RequestedToy.parse("a teapot")


def test_wanted_from_scene_and_caption_agree():
    for seed in range(20):
        scene = sample_scene(np.random.default_rng(seed), 2)
        named = presence.requested_toys(caption(scene))
        assert sorted(map(repr, (w.only("shape", "color", "size") for w in named))) == sorted(
            map(repr, (w.only("shape", "color", "size") for w in presence.requested_toys(scene)))
        )


def test_binding():
    requests = (RequestedToy("cube", "red"), RequestedToy("ball", "blue"))
    good = presence.check(reading(toy("ball", "blue"), toy("cube", "red")), requests)
    assert good.all_present and good.all_bound and good.counted and good.leaked == (False, False)
    swapped = presence.check(reading(toy("ball", "red"), toy("cube", "blue")), requests)
    assert swapped.all_present and swapped.bound == (False, False) and swapped.leaked == (True, True)
    lost = presence.check(reading(toy("cube", "red")), requests)
    assert lost.present == (True, False) and lost.bound == (True, False) and not lost.counted
    other = presence.check(reading(toy("cube", "green"), toy("ball", "blue")), requests)
    assert other.bound == (False, True) and other.leaked == (False, False)


def test_a_toy_serves_one_wish():
    twins = (RequestedToy("cube", "red"), RequestedToy("cube", "red"))
    assert presence.check(reading(toy("cube", "red")), twins).bound == (True, False)
    # the loose request must leave the only red cube to the strict one
    both = presence.check(
        reading(toy("cube", "red"), toy("cube", "blue")), (RequestedToy("cube"), RequestedToy("cube", "red"))
    )
    assert both.bound == (True, True)


def test_matching_is_maximum():
    draw = random.Random(0)
    for _ in range(200):
        toys = [toy(draw.choice(SHAPES[:2]), draw.choice(COLORS[:2])) for _ in range(draw.randint(0, 4))]
        requests = [
            RequestedToy(draw.choice((None, *SHAPES[:2])), draw.choice((None, *COLORS[:2])))
            for _ in range(draw.randint(1, 4))
        ]
        best = 0
        for order in itertools.permutations(range(len(toys)), min(len(toys), len(requests))):
            for chosen in itertools.combinations(range(len(requests)), len(order)):
                best = max(best, sum(requests[w].fits(toys[t]) for w, t in zip(chosen, order, strict=True)))
        assert sum(presence._matched(requests, toys)) == best


def test_rates():
    requests = (RequestedToy("cube", "red"), RequestedToy("ball", "blue"))
    checks = [
        presence.check(reading(toy("ball", "blue"), toy("cube", "red")), requests),
        presence.check(reading(toy("cube", "red")), requests),
    ]
    got = presence.rates(checks)
    assert (got.present.value, got.all_present.value, got.counted.value) == (0.75, 0.5, 0.5)
    assert got.present.n == 4 and got.all_bound.n == 2
    assert set(got.to_json()) == {"present", "all_present", "bound", "all_bound", "leaked", "counted"}


def test_relations():
    scene = reading(toy("cube", "red", (2, 4, 10, 12)), toy("ball", "blue", (20, 8, 30, 20)))
    cube, ball = RequestedToy("cube"), RequestedToy("ball")
    assert presence.related(scene, cube, "left of", ball) and presence.related(scene, ball, "right of", cube)
    assert presence.related(scene, cube, "behind", ball) and presence.related(scene, ball, "in front of", cube)
    assert not presence.related(scene, cube, "right of", ball)
    assert not presence.related(scene, cube, "left of", RequestedToy("cone"))
    assert not presence.related(reading(toy("cube", "red")), cube, "left of", cube)
    with pytest.raises(BadInput, match="above"):
        presence.related(scene, cube, "above", ball)


def test_empty_wishes():
    with pytest.raises(BadInput, match="empty"):
        presence.check(reading(), ())
