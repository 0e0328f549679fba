"""The built-in models as shipped, their recipes and their tokenizer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from sfumato import registry
from sfumato.errors import BadInput, BadWeights, UnknownName
from sfumato.toybox import VOCABULARY, caption, sample_scene
from sfumato.training.objective import build_objective
from sfumato.training.recipe import load_recipe
from sfumato.zoo.tokenizer import build_tokenizer


def test_registry_finds_models_and_refuses_unknown_ones() -> None:
    for name in registry.names():
        assert registry.find(name) == registry.folder() / name and registry.card(name)["name"] == name
    assert registry.find("toy-nothing") is None and registry.find("../weights") is None and registry.find("") is None
    with pytest.raises(UnknownName, match="Did you mean"):
        registry.card("toy-vaee")


def test_registry_is_light() -> None:
    code = "import sys, sfumato.registry as r; r.names(); print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_shipped_weights_are_small_safetensors_with_cards() -> None:
    files = [path for path in registry.folder().rglob("*") if path.is_file()]
    for path in files:
        assert path.stat().st_size <= 15 * 2**20, path
        assert path.suffix in (".json", ".safetensors", ".md", ".txt"), path
    assert sum(path.stat().st_size for path in files) <= 75 * 2**20
    for name in registry.names():
        card = json.loads((registry.folder() / name / "sfumato.json").read_text())
        assert card["quality"] and card["recipe"]["name"] == name
        assert name in (registry.folder() / name / "MODEL_CARD.md").read_text()


def test_every_shipped_recipe_is_valid_and_builds_its_modules() -> None:
    assert set(registry.names()) <= set(registry.recipes())
    for name in registry.recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        if recipe.objective != "judge":
            assert build_objective(recipe).modules


# tokenizer ------------------------------------------------------------------------------------------------------------
def bare(text: str) -> str:
    """What a CLIP tokenizer keeps: normal form, lower case, no white space."""
    return "".join(unicodedata.normalize("NFC", text).lower().split())


def test_every_toybox_word_is_one_token_and_captions_fit() -> None:
    tokenizer = build_tokenizer()
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in VOCABULARY]
    assert all(len(one) == 1 for one in ids) and len({one[0] for one in ids}) == len(VOCABULARY)
    rng = np.random.default_rng(0)
    for style in ("full", "random"):
        for _ in range(200):
            text = caption(sample_scene(rng, 3), rng, style).text
            words = text.replace(",", " ,").split()
            assert len(tokenizer(text).input_ids) == len(words) + 2 <= tokenizer.model_max_length


def test_any_text_tokenizes_and_comes_back() -> None:
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(1)
    texts = [
        "",
        "zebra's 42 Äpfel",
        "中文 и русский",
        "🦊🎨 e\u0301",
        "a\tred\ncube",
        "<|endoftext|>x",
        "tortoise!!! (no)",
        "reds greener",
    ]
    texts += [
        "".join(chr(c) for c in rng.integers(33, 0x2FFF, 20) if unicodedata.category(chr(c))[0] in "LNPS")
        for _ in range(40)
    ]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert all(0 <= i < len(tokenizer) for i in ids)
        assert bare(tokenizer.decode(ids)) == bare(text), text


def test_tokenizer_survives_saving(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    for text in ("a red cube", "Größe 7", ""):
        assert again(text).input_ids == tokenizer(text).input_ids
    row = again("a red cube", padding="max_length").input_ids
    assert len(row) == again.model_max_length == 32 and row[5:] == [again.eos_token_id] * 27


# parts shared with another model --------------------------------------------------------------------------------------
@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of two pipelines with the same ``vae``, which is also a model by itself, and a ``unet`` each; the second
    one's two text encoders are the same."""
    root = tmp_path / "weights"
    texts = (("text_encoder", "text"), ("text_encoder_2", "text"))
    for name, more in (("first", ()), ("second", texts)):
        for part, content in (("vae", "same"), ("unet", name), *more):
            (root / name / part).mkdir(parents=True)
            (root / name / part / "weights").write_text(content)
            (root / name / part / "config.json").write_text(json.dumps({"width": 8, "_name_or_path": f"runs/{name}"}))
        (root / name / "sfumato.json").write_text(json.dumps({"name": name}))
        (root / name / "model_index.json").write_text("{}")
    shutil.copytree(root / "first" / "vae", root / "codec")
    (root / "codec" / "sfumato.json").write_text(json.dumps({"name": "codec"}))
    (root / "codec" / "MODEL_CARD.md").write_text("A codec.")
    monkeypatch.setattr(registry, "folder", lambda: root)
    return root


def test_shared_parts_are_taken_from_their_owner_and_exported_whole(weights: Path, tmp_path: Path) -> None:
    second = weights / "second"
    assert registry.share(second, "first") == {"text_encoder_2": "second/text_encoder", "vae": "first/vae"}
    assert sorted(p.name for p in second.iterdir() if p.is_dir()) == ["text_encoder", "unet"]
    assert registry.part(second, "vae") == weights / "first" / "vae"
    assert registry.part(second, "text_encoder_2") == registry.part(second, "text_encoder") == second / "text_encoder"
    assert registry.part(second, "unet") == second / "unet"
    assert registry.part(second, "nothing") == second / "nothing"
    whole = registry.export("second", tmp_path / "whole")
    written = {p.name: (p / "weights").read_text() for p in whole.iterdir() if p.is_dir()}
    assert written == {"vae": "same", "unet": "second", "text_encoder": "text", "text_encoder_2": "text"}
    assert json.loads((whole / "sfumato.json").read_text()) == {"name": "second"}
    with pytest.raises(BadInput, match="not empty"):
        registry.export("second", whole)
    assert not list(tmp_path.glob("*.part*"))


def test_what_was_shared_before_stays_so(weights: Path) -> None:
    second = weights / "second"
    registry.share(second)
    registry.share(second, "first")
    assert registry.share(second, "first", "codec") == {}
    shared = json.loads((second / "sfumato.json").read_text())["shared"]
    assert {name: entry["folder"] for name, entry in shared.items()} == {
        "text_encoder_2": "second/text_encoder", "vae": "first/vae",
    }  # fmt: skip
    shutil.copytree(weights / "first" / "vae", second / "vae")  # of its own again, with another content
    (second / "vae" / "weights").write_text("own")
    assert registry.share(second, "first") == {} and registry.part(second, "vae") == second / "vae"
    assert list(json.loads((second / "sfumato.json").read_text())["shared"]) == ["text_encoder_2"]


def test_a_part_that_is_a_model_by_itself_is_shared_and_so_is_what_a_base_shares(weights: Path, tmp_path: Path) -> None:
    assert registry.share(weights / "first", "codec") == {"vae": "codec"}
    assert registry.share(weights / "second", "first")["vae"] == "codec"  # its owner, not who shares it
    for name in ("first", "second"):
        assert registry.part(weights / name, "vae") == weights / "codec"
        whole = registry.export(name, tmp_path / name)
        # what tells of the model itself is no part of the component
        assert sorted(p.name for p in (whole / "vae").iterdir()) == ["config.json", "weights"]


def test_where_a_component_came_from_does_not_tell_it_from_another(weights: Path) -> None:
    (weights / "second" / "vae" / "config.json").write_text(json.dumps({"width": 9}))
    assert "vae" not in registry.share(weights / "second", "first")
    (weights / "second" / "vae" / "config.json").write_text(json.dumps({"_name_or_path": "other", "width": 8}))
    assert registry.share(weights / "second", "first")["vae"] == "first/vae"


def test_an_owner_that_changed_or_is_gone_is_refused(weights: Path, tmp_path: Path) -> None:
    registry.share(weights / "second", "first")
    (weights / "first" / "vae" / "weights").write_text("new!")
    for action in (
        lambda: registry.part(weights / "second", "vae"),
        lambda: registry.export("second", tmp_path / "whole"),
    ):
        with pytest.raises(BadWeights, match="another vae than first/vae is now.*sfumato train second"):
            action()
    assert not (tmp_path / "whole").exists() and not list(tmp_path.glob("*.part*"))
    card = json.loads((weights / "second" / "sfumato.json").read_text())
    for folder in ("first/none", "first/../codec", "first/vae/..", "none"):
        card["shared"]["vae"]["folder"] = folder
        (weights / "second" / "sfumato.json").write_text(json.dumps(card))
        with pytest.raises(BadWeights, match=f"from '{folder}', which is not among the built-in models"):
            registry.part(weights / "second", "vae")
    card["shared"]["vae"]["folder"] = "first/vae"
    (weights / "second" / "sfumato.json").write_text(json.dumps(card))
    (weights / "first" / "sfumato.json").unlink()
    with pytest.raises(BadWeights, match="not among the built-in models"):
        registry.part(weights / "second", "vae")


@pytest.mark.parametrize("card", ["{", "[]", '{"shared": 3}', '{"shared": {"vae": 3, "unet": {"folder": "first"}}}'])
def test_a_card_that_tells_nothing_of_shared_parts_shares_none(weights: Path, card: str) -> None:
    (weights / "second" / "sfumato.json").write_text(card)
    shutil.rmtree(weights / "second" / "vae")
    assert registry.part(weights / "second", "vae") == weights / "second" / "vae"


def test_every_built_in_pipeline_exports_to_a_folder_that_diffusers_loads(tmp_path: Path) -> None:
    for name in registry.names():
        whole = registry.export(name, tmp_path / name)
        index = whole / "model_index.json"
        if index.is_file():
            entries = json.loads(index.read_text())
            parts = {key: value[0] for key, value in entries.items() if isinstance(value, list)}
            assert all((whole / part).is_dir() for part, library in parts.items() if library)
            if "shared" in registry.card(name):
                from diffusers import DiffusionPipeline

                absent = {part: None for part, library in parts.items() if library is None}
                pipe = DiffusionPipeline.from_pretrained(whole, **absent)
                assert type(pipe).__name__ == entries["_class_name"]
                assert type(pipe).__name__ == registry.card(name).get("pipeline", type(pipe).__name__)
