"""What captions ask for, and prompt sets over the toybox's grammar."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sfumato.errors import BadInput, UnknownName
from sfumato.toybox import COLORS, SHAPES, VOCABULARY, caption
from sfumato.toybox.dataset import draw_scene
from sfumato.toybox.oracle.caption_check import check_caption, requested
from sfumato.toybox.oracle.presence import RequestedToy, requested_toys
from sfumato.toybox.oracle.prompts import TASKS, prompt_set, write_prompts
from sfumato.toybox.oracle.toy_judge import ObjectReading, SceneReading


def reading(*toys):
    mask = torch.zeros(8, 8, dtype=torch.bool)
    read = [ObjectReading(s, c, "plain", "small", mask, (x, 0.0, x + 4.0, y), 0.9) for s, c, x, y in toys]
    return SceneReading(tuple(read), "grass", "day")


@pytest.mark.parametrize("style", ["full", "short", "plain", "random"])
def test_captions_of_the_toybox_are_read_as_they_were_written(style):
    for index in range(60):
        scene = draw_scene("test", 5, index)
        drawn = caption(scene, np.random.default_rng(index), style)
        got = requested(drawn.text)
        assert got.requests == requested_toys(drawn), drawn.text
        if len(scene.toys) == 2 and got.relations:
            [(first, how, second)] = got.relations
            order = [phrase.object for phrase in drawn.phrases if phrase.object is not None]
            assert scene.relation(order[first], order[second]) == how


@pytest.mark.parametrize(
    ("text", "requests", "relations"),
    [
        ("two red cubes and a ball", [("cube", "red"), ("cube", "red"), ("ball", None)], ()),
        ("3 crosses", [("cross", None)] * 3, ()),
        ("A shiny RED metal cube, behind it a blue ball.", [("cube", "red"), ("ball", "blue")], ((0, "behind", 1),)),
        ("a ball left of a cone behind a ring", [("ball", None), ("cone", None), ("ring", None)],
         ((0, "left of", 1), (1, "behind", 2))),
        ("a red house and a cube", [("cube", None)], ()),
        ("two dogs and one cube", [("cube", None)], ()),
        ("a photograph of a horse", [], ()),
        ("", [], ()),
    ],
)  # fmt: skip
def test_freer_captions(text, requests, relations):
    got = requested(text)
    assert [(request.shape, request.color) for request in got.requests] == requests and got.relations == relations


def test_answers():
    scene = reading(("cube", "red", 0, 8), ("ball", "blue", 20, 4))
    right = check_caption(scene, requested("a red cube to the left of a blue ball"))
    assert right.solved(None) and right.related == (True,) and all(right.solved(task) for task in TASKS[-1:])
    assert right.solved("position") and right.solved("two")
    swapped = check_caption(scene, requested("a blue cube to the left of a red ball"))
    assert swapped.solved("two") and not swapped.solved("color_attribution") and not swapped.solved("position")
    turned = check_caption(scene, requested("a red cube to the right of a blue ball"))
    assert turned.toys.all_bound and not turned.solved("position") and not turned.solved(None)
    many = reading(*[("cube", "red", 10 * i, 4) for i in range(3)], ("ball", "red", 50, 4))
    assert check_caption(many, requested("a red cube, a red cube and a red cube")).solved("counting")
    assert not check_caption(many, requested("a red cube and a red cube")).solved("counting")
    assert not check_caption(many, requested("three red cubes")).solved(None)  # the ball is one too many
    with pytest.raises(BadInput, match="empty"):
        check_caption(scene, requested("nothing"))


def test_prompt_sets_speak_the_grammar_and_mean_their_task():
    for seed, bare in ((0, False), (1, True)):
        made = prompt_set(TASKS, 30, seed, bare=bare)
        assert len(made) == 180 and made == prompt_set(TASKS, 30, seed, bare=bare)
        for each in made:
            words = each.prompt.replace(",", " ,").split()
            assert set(words) <= set(VOCABULARY), each.prompt
            want = requested(each.prompt)
            colored = not bare or each.task in ("colors", "color_attribution")
            assert all((request.color in COLORS) == colored and request.shape in SHAPES for request in want.requests)
            toys = {"one": 1, "colors": 1, "counting": len(want.requests)}.get(each.task, 2)
            assert len(want.requests) == toys and (each.task != "counting" or 2 <= toys <= 4)
            assert len(want.relations) == (each.task == "position")
            if toys == 2 and each.task != "counting":
                assert want.requests[0].shape != want.requests[1].shape
                assert bare or want.requests[0].color != want.requests[1].color


def test_prompt_sets_repeat_nothing_and_grow_without_changing():
    for task in TASKS:
        texts = [each.prompt for each in prompt_set([task], 48, 3, scenery=False)]
        assert len(set(texts)) == 48
        assert prompt_set([task], 10, 3) == prompt_set([task], 48, 3)[:10]
    assert len({each.prompt for each in prompt_set(["one"], 60, scenery=False)}) == 48  # all there are
    assert prompt_set(["two"], 5, 1) != prompt_set(["two"], 5, 2)


def test_prompt_files(tmp_path):
    path = write_prompts(tmp_path / "p.jsonl", prompt_set(["two"], 2, 7))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["seed"] for row in rows] == [7, 8] and set(rows[0]) == {"prompt", "task", "seed"}
    with pytest.raises(UnknownName, match="unknown task 'tow'"):
        prompt_set(["tow"])
    with pytest.raises(BadInput, match="n is 0"):
        prompt_set(n=0)
    assert RequestedToy.parse("red cube").shape == "cube"
