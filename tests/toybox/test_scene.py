from __future__ import annotations

import json

import numpy as np
import pytest

from sfumato.errors import BadInput, NoMatch, UnknownName
from sfumato.toybox import COLORS, PATTERNS, SHAPES, Camera, Scene, Toy, is_held_out, sample_scene


def test_json_round_trip_is_exact():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = sample_scene(rng)
        assert Scene.from_json(scene.to_json()) == scene


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"toys": [{"shape": "ball"}]}', '{"toys": [], "planet": "mars"}'])
def test_json_that_is_no_scene(text):
    with pytest.raises(BadInput, match="not a toybox scene"):
        Scene.from_json(text)


def test_json_with_unknown_word_names_the_nearest():
    bad = json.dumps({"toys": [{"shape": "bal", "color": "red"}]})
    with pytest.raises(UnknownName, match="'ball'"):
        Scene.from_json(bad)


def test_edits_change_one_thing():
    scene = Scene((Toy("ball", "red"), Toy("cube", "green", x=1.0)))
    assert scene.replace(object="red ball", color="blue").toys == (Toy("ball", "blue"), scene.toys[1])
    assert scene.replace(object=1, size="small").toys[0] is scene.toys[0]
    assert scene.replace(ground="sand").toys == scene.toys
    assert scene.add(Toy("cone", "white")).remove("cone") == scene
    assert scene.remove(0).toys == (scene.toys[1],)
    assert scene.move("cube", dx=0.5).toys[1].x == 1.5


def test_edits_that_match_nothing_list_the_toys():
    scene = Scene((Toy("ball", "red"), Toy("cube", "red", x=1.0)))
    with pytest.raises(NoMatch, match="large red plain ball"):
        scene.replace(object="green ball", color="blue")
    with pytest.raises(NoMatch, match="several"):
        scene.remove("red")
    with pytest.raises(NoMatch, match="object 5"):
        scene.remove(5)
    with pytest.raises(UnknownName, match="'color'"):
        scene.replace(object=0, colour="blue")
    with pytest.raises(UnknownName, match="'ground'"):
        scene.replace(grond="sand")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Toy("ball", "rad"), "red"),
        (lambda: Toy("ball", "red", x=float("nan")), "x must"),
        (lambda: Toy("ball", "red", gloss=2), "gloss"),
        (lambda: Camera(elevation=0), "elevation"),
        (lambda: sample_scene(np.random.default_rng(0), toys=9), "toys"),
        (lambda: sample_scene(np.random.default_rng(0), split="trian"), "train"),
    ],
)
def test_bad_values_name_argument_and_remedy(make, word):
    with pytest.raises((BadInput, UnknownName), match=word):
        make()


def test_held_out_combinations_never_train_and_leave_every_word_known():
    combos = [(s, c, p) for s in SHAPES for c in COLORS for p in PATTERNS]
    held = [x for x in combos if is_held_out(Toy(*x))]
    assert 0.05 < len(held) / len(combos) < 0.15
    trained = [x for x in combos if x not in held]
    for position, words in enumerate((SHAPES, COLORS, PATTERNS)):
        assert {x[position] for x in trained} == set(words)
    rng = np.random.default_rng(0)
    assert not any(is_held_out(t) for _ in range(200) for t in sample_scene(rng).toys)
    assert all(is_held_out(t) for _ in range(50) for t in sample_scene(rng, split="heldout").toys)


def test_sampling_is_a_function_of_the_seed():
    a, b = (sample_scene(np.random.default_rng(7)) for _ in range(2))
    assert a == b != sample_scene(np.random.default_rng(8))
