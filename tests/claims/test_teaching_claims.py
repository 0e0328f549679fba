"""The pieces of the claims about teaching: secrets are read rightly, gaps are shares, controls are as long."""

from __future__ import annotations

import math

import torch

from claims import subjects, textual_inversion
from claims.core import Context
from sfumato.models.slot import text_towers
from sfumato.toybox import SECRETS, references, render
from sfumato.toybox.rendering import SURFACES
from tests.tiny import tiny_model


def test_secrets_are_between_the_words_or_beyond_them():
    for secret in SECRETS.values():
        scenes = references(secret, 5)
        assert len({scene.ground for scene in scenes}) == 5 and scenes == references(secret, 5)
        assert secret.kind == ("B" if secret.toy.texture else "A") and secret.toy.surface in SURFACES
        assert secret.noun in secret.description and secret.key not in secret.description


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
