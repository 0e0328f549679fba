"""Models without weights: the same facts as of the loaded ones, and those of the published sizes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from sfumato.errors import NotSupported
from sfumato.models import load, quiet
from sfumato.models.outline import described, outline
from tests.tiny import tiny_model, tiny_pipeline


def saved(kind: str, folder: Path) -> Path:
    with quiet():
        tiny_pipeline(kind).save_pretrained(folder)
    (folder / "sfumato.json").write_text(json.dumps(tiny_model(kind).card))
    return folder


@pytest.mark.parametrize("kind", ["sd", "flux", "qwenimage", "z_image", "wan", "amused"])
def test_the_sites_are_those_of_the_loaded_model(kind: str, tmp_path: Path):
    folder = saved(kind, tmp_path)
    loaded = load(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    model = outline(folder)
    assert model.sites() == loaded.sites() and model.layers == loaded.layers
    assert model.text_length == loaded.text_length and model.family.name == loaded.family.name
    facts = described(folder)
    assert sum(row["calls"] for row in facts["sites"]) == len(loaded.sites())
    assert facts["parameters"] == {
        key: sum(p.numel() for p in part.parameters()) for key, part in loaded.modules.items()
    }


# the configuration that diffusers has by default is the published one: blocks, heads, and the width of the text
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, int]]]] = {
    "flux": ({"guidance_embeds": True}, {"joint": (19 + 38, 24)}),
    "qwenimage": ({}, {"joint": (60, 24)}),
    "wan": ({}, {"self": (40, 40), "cross": (40, 40)}),
    "hunyuan": ({"guidance_embeds": True}, {"joint": (20 + 40, 24)}),
    "z_image": ({}, {"self": (2, 30), "joint": (30, 30)}),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_sizes_are_told_in_seconds(kind: str, tmp_path: Path):
    folder = saved(kind, tmp_path)
    changes, expected = PUBLISHED[kind]
    path = folder / "transformer" / "config.json"
    name = json.loads(path.read_text())["_class_name"]
    path.write_text(json.dumps({"_class_name": name, **changes}))
    began = time.process_time()
    facts = described(folder)
    assert time.process_time() - began < 20
    found = {row["kind"]: (row["calls"], row["heads"]) for row in facts["sites"]}
    assert found == expected
    assert facts["parameters"]["transformer"] > 5e9
    assert {row["system"]: row["runs"] for row in facts["systems"]}["daam"] == "+"


def test_an_unknown_pipeline_is_refused_with_the_known_ones(tmp_path: Path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "UnheardOfPipeline"}))
    with pytest.raises(NotSupported, match="'UnheardOfPipeline' is not supported; known: .*QwenImagePipeline"):
        outline(tmp_path)
