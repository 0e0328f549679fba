"""Verbs by protocol: what a system serves is read off its methods, and the public face knows no system by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sfumato
from sfumato import app, cards, protocol
from sfumato.bench.judge import judge_folder
from sfumato.errors import NotSupported, UnknownName
from sfumato.training.objective import build_objective
from sfumato.training.recipe import Recipe

ROOM = Path(sfumato.__file__).parent / "app"


@pytest.mark.parametrize("path", sorted(ROOM.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOM)))
def test_no_file_of_the_face_names_a_system(path):
    text = path.read_text(encoding="utf-8")
    # a key that is also a common word may stand in running text (blend, lora), never as a name in quotes
    named = [key for key in cards.methods() if re.search(rf"\b{key}\b" if "_" in key else rf"[\"'`]{key}\b", text)]
    assert named == []


def test_every_system_serves_a_verb():
    for key in cards.methods():
        served = protocol.serves(cards.method(key))
        assert served, f"{key} serves no verb: it has none of the methods of sfumato.protocol"
        assert all(words for words in served.values())


@pytest.mark.parametrize(
    ("key", "verbs"),
    [
        ("daam", {"make", "explain"}),
        ("lrp", {"explain"}),
        ("conceptor", {"make", "explain"}),
        ("prompt_to_prompt", {"make", "edit"}),
        ("blend", {"make", "edit"}),
        ("inject_fusion", {"make"}),
        ("text_to_segmentation", {"segment"}),
        ("robust_vit", {"teach"}),
        ("textual_inversion", {"teach"}),
        ("dreambooth", {"teach"}),
        ("custom_diffusion", {"teach"}),
        ("discriminative_tokens", {"teach"}),
        ("sad_pad", {"judge"}),
        ("iin", {"explain"}),
        ("cnn_invariances", {"explain"}),
        ("net2net", {"edit", "teach"}),
        ("data_biases", {"judge"}),
    ],
)
def test_verbs_of_systems(key, verbs):
    assert set(protocol.serves(cards.method(key))) == verbs


@pytest.mark.parametrize("task", ["explain", "edit", "edit mask", "segment", "teach", "judge"])
def test_every_task_has_one_default(task):
    assert [key for key, card in cards.methods().items() if task in card.default_for] == [cards.default(task)]


def test_an_unknown_task_is_refused():
    with pytest.raises(UnknownName, match="unknown task 'edits'.*'edit'"):
        cards.default("edits")


def test_systems_that_do_not_serve_a_verb_are_refused():
    with pytest.raises(NotSupported, match="daam edits no pictures by itself"):
        app.edit("x.png", "a cube", by="daam")
    with pytest.raises(NotSupported, match="daam does not learn to segment"):
        app.segment("cube", by="daam")
    with pytest.raises(UnknownName, match="unknown system that teaches 'daam'.*robust_vit"):
        app.teach("toybox", by="daam", model="toy-vit")


def test_a_recipe_may_name_a_system_that_trains(monkeypatch):
    monkeypatch.setattr(cards, "_registered", dict(cards._registered))
    facts = {"title": "x", "authors": "A. Nobody", "year": 2026, "needs": (), "defaults_from": "x", "cost": "x"}

    @cards.register
    class Sculptor:
        CARD = cards.Card(key="sculptor", verb="generate", summary="x", **facts)

        class Params(cards.Params):
            pass

        @staticmethod
        def objective(recipe):
            return ("trained by", recipe.name)

    assert protocol.serves(Sculptor) == {"train": ("a model from a recipe that names it as its objective",)}
    recipe = {"name": "clay", "objective": "sculptor", "train": {"steps": 1, "batch": 1}}
    assert build_objective(Recipe.model_validate(recipe)) == ("trained by", "clay")
    for objective in ("daam", "sculpter"):  # a system that trains nothing, and none at all
        with pytest.raises(UnknownName, match=f"unknown objective '{objective}'"):
            build_objective(Recipe.model_validate({**recipe, "objective": objective}))


def test_another_system_may_judge(tmp_path):
    with pytest.raises(NotSupported, match="daam judges no pictures; by default sad_pad does"):
        judge_folder(tmp_path, by="daam")
