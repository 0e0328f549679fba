"""Toybox questions: answers hold in the scene, wording is unambiguous, everything is deterministic."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.errors import BadInput, UnknownName
from sfumato.toybox import ANSWERS, QUESTION_KINDS, Question, Scene, Toy, questions_about, sample_question, sample_scene
from sfumato.toybox.questions import NUMBERS, QUESTION_WORDS

SCENE = Scene(
    (
        Toy("cube", "red", "striped", x=-1.0),
        Toy("ball", "blue", x=0.1),
        Toy("ball", "green", x=1.0),
    )
)


def told(kind, scene=SCENE):
    return {q.text: q.answer for q in questions_about(scene, [kind])}


def test_attributes():
    assert told("color") == {
        "what color is the cube ?": "red",
    }
    assert told("shape")["what shape is the green toy ?"] == "ball"
    assert told("pattern")["what pattern is the red cube ?"] == "striped"
    assert not any("is the ball ?" in q.text for q in questions_about(SCENE))  # there are two balls


def test_counts_sides_and_existence():
    counts = told("count")
    assert counts["how many balls are there ?"] == "two" and counts["how many toys are there ?"] == "three"
    assert counts["how many crosses are there ?"] == "zero" and counts["how many red toys are there ?"] == "one"
    halves = told("half")
    assert "on which side is the blue toy ?" not in halves  # it is in the middle
    assert halves["on which side is the cube ?"] == "left" and halves["on which side is the green toy ?"] == "right"
    sides = told("side")
    assert sides["on which side of the cube is the blue toy ?"] == "right"
    assert sides["on which side of the green toy is the cube ?"] == "left"
    assert told("exists")["is there a red cube ?"] == "yes" and told("exists")["is there an orange cube ?"] == "no"


def test_every_answer_holds_and_every_word_is_known():
    rng = np.random.default_rng(0)
    for toys in (0, 1, 2, 3, 4):
        scene = sample_scene(rng, toys, "any")
        for q in questions_about(scene):
            assert q.answer in ANSWERS and set(q.text.split()) <= set(QUESTION_WORDS)
            assert all(q.text[w.start : w.end] == w.text for w in q.words)
            assert all(w.text in q.text.split() for w in q.words)
            assert set(q.objects) <= set(range(toys))
            named = [scene.toys[i] for i in q.objects]
            if q.kind in ("color", "shape", "pattern"):
                assert getattr(named[0], q.kind) == q.answer and len(named) == 1
            if q.kind == "side":
                across = scene.picture_x(named[0]) - scene.picture_x(named[1])
                assert (across < 0) == (q.answer == "left") and abs(across) >= 0.3
            if q.kind == "half":
                across = scene.picture_x(named[0])
                assert (across < 0) == (q.answer == "left") and abs(across) >= 0.15 and len(named) == 1
            if q.kind == "exists":
                color, shape = (w.text for w in q.words)
                assert (q.answer == "yes") == any((t.color, t.shape) == (color, shape) for t in scene.toys)
            if q.kind == "count" and "toys are" in q.text and "many toys" in q.text:
                assert q.answer == NUMBERS[toys]


def test_drawing_is_deterministic_and_balanced():
    draws = [sample_question(SCENE, np.random.default_rng(i)) for i in range(300)]
    assert draws == [sample_question(SCENE, np.random.default_rng(i)) for i in range(300)]
    kinds = [q.kind for q in draws]
    assert all(30 <= kinds.count(kind) <= 75 for kind in QUESTION_KINDS)
    yes = [q.answer for q in draws if q.kind == "exists"]
    assert 0.3 < yes.count("yes") / len(yes) < 0.7


def test_json():
    for q in questions_about(SCENE)[::7]:
        assert Question.from_json(q.to_json()) == q
    for text in ("{}", "no", '{"kind": "color"}', "[]"):
        with pytest.raises(BadInput):
            Question.from_json(text)


def test_refusals():
    with pytest.raises(UnknownName, match="color"):
        questions_about(SCENE, ["colour"])
    with pytest.raises(BadInput, match="side"):
        sample_question(SCENE.remove(0).remove(0), np.random.default_rng(0), ["side"])
