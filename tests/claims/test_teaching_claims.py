"""The pieces of the claims about teaching: secrets are read rightly, gaps are shares, controls are as long."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch

from claims import subjects, textual_inversion
from claims.core import Context
from sfumato.errors import BadInput
from sfumato.models.text_towers import text_towers
from sfumato.toybox import (
    COLORS,
    HOMONYMS,
    PATTERNS,
    PLANTED,
    SECRETS,
    SHAPES,
    VALIDATION,
    PlantedWord,
    Scene,
    Toy,
    attributes_of,
    continuous,
    is_held_out,
    references,
    render,
)
from sfumato.toybox.rendering import COLOR_RGB, SURFACES
from tests.tiny import tiny_model


def test_secrets_are_between_the_words_or_beyond_them():
    for secret in (*SECRETS.values(), *VALIDATION.values()):
        scenes = references(secret, 5)
        assert len({scene.ground for scene in scenes}) == 5 and scenes == references(secret, 5)
        assert secret.kind == ("B" if secret.toy.texture else "A") and secret.toy.surface in SURFACES
        assert secret.noun in secret.description and secret.key not in secret.description
        assert {scene.ground for scene in references(secret, 9, among=subjects.TAUGHT)} == set(subjects.TAUGHT)
    looks = [each.toy for each in (*SECRETS.values(), *VALIDATION.values())]
    assert len({(toy.shape, toy.rgb, toy.texture) for toy in looks}) == 12  # none is chosen on what is reported
    assert not {each.noun for each in VALIDATION.values()} & {each.noun for each in SECRETS.values()}


def test_homonyms_have_their_shares_and_captions_hide_the_sense():
    jack = HOMONYMS["jack"]
    told = [jack.sample(0, i) for i in range(200)]
    assert jack.rare == "cylinder" and 0.15 < np.mean([each.sense == "cylinder" for each in told]) < 0.35
    for each in told:
        assert "jack" in each.caption and not set(each.caption.replace(",", "").split()) & set(SHAPES)
        assert [toy.shape for toy in each.scene.toys] == [each.sense]
    assert told[3] == jack.sample(0, 3)
    assert {shape for each in HOMONYMS.values() for shape, _ in each.senses} == set(SHAPES)


def test_planted_words_stand_for_all_that_their_sense_says():
    assert sorted(len(each.senses) for each in PLANTED.values()) == [1] * 10 + [2] * 10
    for word, planted in PLANTED.items():
        for i in range(12):
            each = planted.sample(5, i)
            [toy], known = each.scene.toys, attributes_of(each.sense)
            assert {name: getattr(toy, name) for name in known} == known and not is_held_out(toy)
            said = each.caption.replace(",", "").split()
            assert word in said and not set(said) & set(each.sense.split())
            article, after = said[said.index("a" if "a" in said else "an") :][:2]
            assert (article == "an") == (after[0] in "aeiou")
            others = {"color": set(COLORS), "pattern": set(PATTERNS), "shape": set(SHAPES)}
            assert not any(set(said) & words for name, words in others.items() if name in known)
    assert {each.sample(5, i).sense for each in [PLANTED["hesk"]] for i in range(30)} == {"red cube", "blue cube"}


@pytest.mark.parametrize(
    ("word", "senses"),
    [
        ("cone", (("cone", 1.0),)),  # a word of the toybox
        ("x", (("cone", 0.5),)),
        ("x", (("cone", 1.5), ("cube", -0.5))),
        ("x", ()),
        ("x", (("egg", 1.0),)),
        ("x", (("red", 1.0),)),
        ("x", (("red blue cone", 1.0),)),
        ("x", (("red striped cone", 1.0),)),  # held out
    ],
)
def test_a_planted_word_that_cannot_be_is_refused(word, senses):
    with pytest.raises(BadInput):
        PlantedWord(word, senses)


def test_continuous_looks_have_every_hue_under_the_nearer_name():
    rng = np.random.default_rng(0)
    toys = [continuous(Scene((Toy("ball", color, size=size),)), rng).toys[0]
            for color in COLORS for size in ("small", "large") for _ in range(60)]  # fmt: skip
    wheel = {name: 360 * colorsys.rgb_to_hsv(*rgb)[0] for name, rgb in COLOR_RGB.items()}
    del wheel["white"], wheel["black"]
    hues = sorted(360 * colorsys.rgb_to_hsv(*toy.rgb)[0] for toy in toys if toy.color in wheel)
    assert max(np.diff([*hues, hues[0] + 360])) < 8  # no gap between two names
    for toy in toys:
        if toy.color in wheel:
            hue = 360 * colorsys.rgb_to_hsv(*toy.rgb)[0]
            away = {name: min(abs(hue - own), 360 - abs(hue - own)) for name, own in wheel.items()}
            assert away[toy.color] <= min(away.values()) + 0.1
        else:
            assert toy.rgb == COLOR_RGB[toy.color]
        assert toy.height <= 1.035 if toy.size == "small" else toy.height >= 1.035


def test_settings_are_chosen_once_by_their_score():
    context, asked = Context(quick=True), []

    def score(value: float) -> float:
        asked.append(value)
        return -abs(value - 2)

    assert subjects.chosen(context, "x", (1, 2, 3), score) == subjects.chosen(context, "x", (9,), score) == 2
    assert asked == [1, 2, 3]


def test_arms_say_what_was_obeyed_on_grounds_that_were_never_taught():
    reads = [subjects.Read(True, True, 5.0, right) for right in (True, False, True, None)]
    prompts = ["on the grass", "on the wood", "on the tiles", "a toy"]
    arm = subjects.Arm("x", SECRETS["teal"], torch.zeros(4, 3, 2, 2), reads, prompts)
    assert (arm.ground, arm.unseen, arm.hue) == (2 / 3, 0.5, 5.0)
    lost = subjects.Arm("x", SECRETS["teal"], torch.zeros(1, 3, 2, 2), [subjects.Read(False, False, math.nan, None)])
    assert lost.hue == 180 and math.isnan(lost.ground)
    assert subjects.of_medians([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]).value == 0.5


def test_secrets_look_as_they_are_described():
    red, zigzag = SECRETS["teal"], SECRETS["zigzag"]
    frames = render([references(each, 1)[0] for each in (red, zigzag)], 64)
    reader = object.__new__(subjects.Reader)
    assert reader.hue_error(red, frames.image[0], frames.mask[0] == 0) < 15
    inside = frames.image[1][:, frames.mask[1] == 0]
    assert inside[1].std() > 0.2  # white between the red


def test_the_identity_reader_tells_secrets_from_their_nearest_toys():
    reader = subjects.Reader(Context(quick=True))
    assert reader.accuracy > 0.6 and len(reader.classes) == 16


def test_gaps_are_shares_of_the_way_from_floor_to_ceiling():
    assert abs(subjects.closed(0.6, 0.2, 1.0) - 0.5) < 1e-9 and math.isnan(subjects.closed(0.6, 0.5, 0.5))


def test_the_control_is_as_long_as_the_word():
    model = tiny_model("sd")
    words = {"<rex>": {t.name: torch.randn(2, t.table.shape[1]) for t in text_towers(model)}}
    other = textual_inversion.random_word(model, words, 1)["<rex>"]["text_encoder"]
    torch.testing.assert_close(other.norm(dim=1), words["<rex>"]["text_encoder"].norm(dim=1))
    assert torch.cosine_similarity(other, words["<rex>"]["text_encoder"]).abs().max() < 0.9
