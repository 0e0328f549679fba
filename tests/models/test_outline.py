"""Models without weights: the same facts as of the loaded ones, and those of the published sizes."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.errors import NotSupported
from sfumato.models import Model, architectures, load, quiet
from sfumato.models.outline import add_memory, described, outline
from sfumato.sampling.footprint import adds
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
    facts = described(model)
    assert sum(row["calls"] for row in facts["sites"]) == len(loaded.sites())
    assert facts["parameters"] == {
        key: sum(p.numel() for p in part.parameters()) for key, part in loaded.modules.items()
    }


KLEIN = {"guidance_embeds": False, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
HIDREAM = {
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096],
    "axes_dims_rope": (64, 32, 32), "llama_layers": [*range(32), *[31] * 16],
}  # fmt: skip
#: name -> (tiny kind, its denoiser's published configuration: a shipped one, or what differs from the default; calls
#: and heads of attention by kind, billions of parameters as published)
PUBLISHED: dict[str, tuple[str, Any, dict[str, tuple[int, set[int]]], float | None]] = {
    "sd1": ("sd", "sd1", {"self": (16, {8}), "cross": (16, {8})}, 0.86),
    "sd2": ("sd2", "sd2", {"self": (16, {5, 10, 20}), "cross": (16, {5, 10, 20})}, 0.866),
    "sdxl": ("sdxl", "sdxl", {"self": (70, {10, 20}), "cross": (70, {10, 20})}, 2.567),
    "sdxl refiner": ("refiner", "sdxl-refiner", {"self": (44, {12, 24}), "cross": (44, {12, 24})}, 2.3),
    "sd3": ("sd3", "sd3", {"joint": (24, {24})}, 2.0),
    "sd3.5 medium": ("sd3", "sd35-medium", {"joint": (24, {24}), "self": (13, {24})}, 2.5),
    "sd3.5 large": ("sd3", "sd35-large", {"joint": (38, {38})}, 8.1),
    "flux dev": ("flux", "flux-dev", {"joint": (19 + 38, {24})}, 11.9),
    "chroma": ("chroma", "chroma", {"joint": (19 + 38, {24})}, 8.9),
    "flux.2 dev": ("flux2", {}, {"joint": (8 + 48, {48})}, 32),
    "flux.2 klein 4B": ("klein", {**KLEIN, "joint_attention_dim": 7680}, {"joint": (5 + 20, {24})}, 4),
    "pixart": ("pixart", {"caption_channels": 4096}, {"self": (28, {16}), "cross": (28, {16})}, 0.6),
    "sana 1.6B": ("sana", {}, {"cross": (20, {20})}, 1.6),
    "lumina 2": ("lumina2", {"cap_feat_dim": 2304}, {"self": (2, {24}), "joint": (26, {24})}, 2.6),
    "auraflow": ("auraflow", {"pos_embed_max_size": 9216}, {"joint": (4 + 32, {12})}, 6.8),
    "hidream": ("hidream", HIDREAM, {"joint": (16 + 32, {20})}, 17),
    "qwen-image": ("qwenimage", {}, {"joint": (60, {24})}, 20),
    "z-image": ("z_image", {}, {"self": (2, {30}), "joint": (30, {30})}, 6),
    "wan 14B": ("wan", {}, {"self": (40, {40}), "cross": (40, {40})}, 14),
    "ltx 2B": ("ltx", {}, {"self": (28, {32}), "cross": (28, {32})}, 2),
    "cogvideox 2B": ("cogvideox", {}, {"joint": (30, {30})}, None),
    "hunyuan": ("hunyuan", {}, {"joint": (20 + 40, {24})}, 13),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sites_of_the_published_sizes(name: str):
    kind, config, expected, billions = PUBLISHED[name]
    pipe = copy.copy(tiny_pipeline(kind))
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    if isinstance(config, str):
        config = architectures.config_of(config, part)
    with quiet(), torch.device("meta"):
        denoiser = type(getattr(pipe, part)).from_config(config)
    pipe.register_modules(**{part: denoiser})
    model = Model(pipe, card=tiny_model(kind).card)
    found: dict[str, tuple[int, set[int]]] = {}
    for site in model.sites():
        calls, heads = found.get(site.kind, (0, set()))
        found[site.kind] = (calls + 1, heads | {site.heads})
    assert found == expected
    count = sum(p.numel() for p in denoiser.parameters()) / 1e9
    assert billions is None or abs(count - billions) < 0.13 * billions


def test_a_whole_folder_of_the_published_size_is_told_in_seconds(tmp_path: Path):
    """Stable Diffusion 1 with its own text encoder: facts, and the memory of systems."""
    folder = saved("sd", tmp_path)
    (folder / "sfumato.json").unlink()
    for part in ("unet", "text_encoder", "vae"):
        vocabulary = json.loads((folder / part / "config.json").read_text()).get("vocab_size")
        config = architectures.config_of("sd1", part) | ({"vocab_size": vocabulary} if vocabulary else {})
        (folder / part / "config.json").write_text(json.dumps(config))
    began = time.process_time()
    model = outline(folder)
    facts = described(model)
    add_memory(facts, adds(model, keys=("daam", "attend_excite")))
    assert time.process_time() - began < 30
    assert facts["parameters"]["unet"] == 859_520_964 and facts["size"] == "512x512"
    memory = {row["system"]: row["adds"] for row in facts["systems"]}
    assert memory["concept_attention"] is None  # does not run there
    assert 0 < memory["daam"] < 20 and 200 < memory["attend_excite"] < 1_500


def test_an_unknown_pipeline_is_refused_with_the_known_ones(tmp_path: Path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "UnheardOfPipeline"}))
    with pytest.raises(NotSupported, match="'UnheardOfPipeline' is not supported; known: .*QwenImagePipeline"):
        outline(tmp_path)


def test_a_pipeline_that_cannot_be_had_is_refused_with_the_reason(tmp_path: Path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    with pytest.raises(NotSupported, match="KolorsPipeline is not supported: .*sentencepiece.*no word could be found"):
        outline(tmp_path)
