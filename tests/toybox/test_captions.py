from __future__ import annotations

import numpy as np
import pytest

from sfumato.errors import UnknownName
from sfumato.toybox import VOCABULARY, Scene, Toy, caption, sample_scene


def test_full_caption_reads_as_expected():
    scene = Scene((Toy("cube", "orange", "striped", "small", x=-0.8), Toy("ball", "red", x=0.8)), "snow", "night")
    told = caption(scene)
    assert told.text == "a small orange striped cube to the left of a large red ball on the snow at night"
    assert caption(scene, style="short").text == "an orange cube and a red ball"
    assert caption(scene, style="plain").text == "an orange striped cube and a red ball on the snow"


def spans_hold(told):
    for phrase in told.phrases:
        assert told.text[phrase.start : phrase.end] == phrase.text
        for word in (phrase.head, *phrase.modifiers):
            assert told.text[word.start : word.end] == word.text
            assert phrase.start <= word.start < word.end <= phrase.end
    for edge in told.dependencies:
        for word in (edge.head, edge.dependent):
            assert told.text[word.start : word.end] == word.text


def test_spans_phrases_and_dependencies_hold_for_random_captions():
    rng = np.random.default_rng(0)
    relations = set()
    for _ in range(300):
        scene = sample_scene(rng)
        told = caption(scene, rng, "random")
        spans_hold(told)
        assert set(told.text.replace(",", " ,").split()) <= set(VOCABULARY)
        toys = [p for p in told.phrases if p.object is not None]
        assert sorted(p.object for p in toys) == list(range(len(scene.toys)))
        for p in toys:
            toy = scene.toys[p.object]
            assert p.head.text == toy.shape
            assert {m.text for m in p.modifiers} <= {toy.color, toy.pattern, toy.size}
            assert toy.color in {m.text for m in p.modifiers}
        relations |= {d.relation for d in told.dependencies}
        # a tree: nobody hangs on two heads
        dependents = [d.dependent for d in told.dependencies]
        assert len(dependents) == len(set(dependents))
    assert relations == {"det", "amod", "conj", "cc", "nmod", "case"}


def test_colours_are_left_out_when_asked():
    rng, told, toys = np.random.default_rng(1), 0, 0
    for _ in range(300):
        scene, seed = sample_scene(rng), int(rng.integers(1000))
        some = caption(scene, np.random.default_rng(seed), "random", colorless=0.2)
        spans_hold(some)
        for p in (p for p in some.phrases if p.object is not None):
            told, toys = told + (scene.toys[p.object].color in p.text.split()), toys + 1
        bare = caption(scene, np.random.default_rng(seed), "random", colorless=1.0)
        named = {toy.color for toy in scene.toys} & set(bare.text.replace(",", "").split())
        assert not named and len(bare.phrases) == len(some.phrases)
        assert caption(scene, colorless=1.0) == caption(scene)  # styles that tell all
    assert 0.75 < told / toys < 0.85


def test_relation_words_follow_the_order_told():
    scene = Scene((Toy("cube", "green", x=-0.8), Toy("ball", "red", x=0.8)))
    seen = set()
    for seed in range(60):
        text = caption(scene, np.random.default_rng(seed), "random").text
        if " of " in text:
            seen.add(text.index("cube") < text.index("ball"))
            assert ("left" in text) == (text.index("cube") < text.index("ball"))
    assert seen == {True, False}


def test_empty_scene_and_bad_style():
    assert caption(Scene((), "sand", "fog")).text == "the sand in the fog"
    with pytest.raises(UnknownName, match="'full'"):
        caption(Scene(()), style="ful")
