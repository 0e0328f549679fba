"""Recipes of AUTOMATIC1111 and ComfyUI: every form that is met, and anything at all without an error."""

from __future__ import annotations

import json

import numpy as np
import pytest
from diffusers import EDMEulerScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.dialects import SAMPLERS, a1111_text, parse_a1111, parse_comfy
from sfumato.files import read_recipe
from sfumato.models.schedulers import make_scheduler, scheduler_names
from tests.tiny import tiny_pipeline

SETTINGS = "Steps: 4, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x48"
READ = {"steps": 4, "scheduler": "euler", "guidance": 7.0, "seed": 5, "size": [64, 48]}
KEYS = {"prompt", "negative", "steps", "guidance", "seed", "size", "scheduler", "named_model", "dropped"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a red cube\n{SETTINGS}", {"prompt": "a red cube", **READ}),
        (f"a red cube\nNegative prompt: blue\n{SETTINGS}", {"prompt": "a red cube", "negative": "blue", **READ}),
        (f"{SETTINGS}", {"prompt": "", **READ}),
        # lines of extensions behind the settings belong to no prompt
        (
            f"a red cube\nNegative prompt: blue\n{SETTINGS}, Model: foo\nTemplate: a {{red|blue}} cube",
            {"prompt": "a red cube", "negative": "blue", **READ, "named_model": "foo", "dropped": ["Template"]},
        ),
        (
            f"a cube\n{SETTINGS}\nTemplate: a {{red|blue}} cube\nNegative Template: {{x}}",
            {"prompt": "a cube", **READ, "dropped": ["Template", "Negative Template"]},
        ),
        # quoted values hold commas, quotes and line breaks
        (
            f'a cube\n{SETTINGS}, Wildcard prompt: "a __colour__,\n\\"cube\\"", Clip skip: 2',
            {"prompt": "a cube", **READ, "clip_skip": 1, "dropped": ["Wildcard prompt"]},
        ),
        # a last line of the prompt that looks like settings
        (f"walk\nSteps: 3, then turn\n{SETTINGS}", {"prompt": "walk\nSteps: 3, then turn", **READ}),
        ("walk\nSteps: 3, then turn", {"prompt": "walk\nSteps: 3, then turn"}),
        ("a cube,\na ball: red", {"prompt": "a cube,\na ball: red"}),
        # schedule types
        (
            "x\nSteps: 4, Sampler: DPM++ 2M Karras, Seed: 1",
            {"prompt": "x", "steps": 4, "scheduler": "dpm++_karras", "seed": 1},
        ),
        (
            "x\nSteps: 4, Sampler: DPM++ 2M, Schedule type: Karras, Seed: 1",
            {"prompt": "x", "steps": 4, "scheduler": "dpm++_karras", "seed": 1},
        ),
        (
            "x\nSteps: 4, Sampler: Euler, Schedule type: Automatic, Seed: 1",
            {"prompt": "x", "steps": 4, "scheduler": "euler", "seed": 1},
        ),
        (
            "x\nSteps: 4, Sampler: Euler, Schedule type: Exponential, Seed: 1",
            {"prompt": "x", "steps": 4, "scheduler": "euler", "seed": 1, "dropped": ["schedule 'exponential'"]},
        ),
        (
            "x\nSteps: 4, Sampler: Restart, Seed: 1",
            {"prompt": "x", "steps": 4, "seed": 1, "dropped": ["sampler 'restart'"]},
        ),
    ],
)
def test_parameters(text, expected):
    assert parse_a1111(text) == expected


def test_every_scheduler_has_a_name_both_ways():
    assert {row[0] for row in SAMPLERS} == set(scheduler_names("diffusion"))
    for name, *_ in SAMPLERS:
        recipe = {"prompt": "a cube", "steps": 4, "seed": 3, "scheduler": name, "guidance": 2.0}
        assert parse_a1111(a1111_text(recipe)) == recipe
    for kind, own in (("flow", tiny_pipeline("sd3").scheduler), ("edm", EDMEulerScheduler())):
        for name in scheduler_names(kind):  # under A1111's names for the like, which such models understand
            read = parse_a1111(a1111_text({"steps": 4, "seed": 3, "scheduler": name}))["scheduler"]
            assert type(make_scheduler(own, read)) is type(make_scheduler(own, name))


GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": ["9", 0], "steps": 4, "cfg": 7, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0,
            "positive": ["8", 0], "negative": ["7", 0], "latent_image": ["5", 0], "model": ["4", 0],
        },
    },
    "4": {"class_type": "LoraLoader", "inputs": {"lora_name": "ink.safetensors", "model": ["1", 0], "clip": ["1", 1]}},
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 48, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red cube", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blue", "clip": ["4", 1]}},
    "8": {"class_type": "ConditioningSetArea", "inputs": {"conditioning": ["6", 0], "width": 8}},
    "9": {"class_type": "Seed (rgthree)", "inputs": {"seed": 5}},
    "10": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
    "11": {"class_type": "SaveImage", "inputs": {"images": ["10", 0]}},
}  # fmt: skip


def test_a_comfy_graph():
    assert parse_comfy(json.dumps(GRAPH)) == {
        "prompt": "a red cube",
        "negative": "blue",
        "steps": 4,
        "guidance": 7.0,
        "seed": 5,
        "scheduler": "dpm++_karras",
        "size": [64, 48],
        "named_model": "sd15.safetensors",
        "dropped": ["LoRA 'ink.safetensors'"],
    }


def test_of_two_samplers_the_saved_one_counts():
    other = {"class_type": "KSampler", "inputs": {**GRAPH["3"]["inputs"], "steps": 99, "positive": ["7", 0]}}
    recipe = parse_comfy(json.dumps({"2": other, **GRAPH}))
    assert recipe["steps"] == 4 and recipe["prompt"] == "a red cube" and "sampler node 2" in recipe["dropped"]


def test_graphs_in_circles_end():
    graph = {
        "1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0], "steps": ["3", 0]}},
        "2": {"class_type": "Pass", "inputs": {"conditioning": ["2", 0], "more": ["1", 0]}},
        "3": {"class_type": "Int", "inputs": {"value": ["3", 0]}},
    }
    assert parse_comfy(json.dumps(graph)) is None


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))


@pytest.mark.parametrize("code", [b"UNICODE\0" + "a cube\nSteps: 4, Seed: 5, Size: 8x8".encode("utf-16-be"),
                                  b"UNICODE\0" + "a cube\nSteps: 4, Seed: 5, Size: 8x8".encode("utf-16-le"),
                                  b"ASCII\0\0\0" + b"a cube\nSteps: 4, Seed: 5, Size: 8x8"])  # fmt: skip
@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_comments_of_jpeg_and_webp(tmp_path, code, suffix):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = code
    noise().save(tmp_path / f"a.{suffix}", exif=exif)
    assert read_recipe(tmp_path / f"a.{suffix}") == ({"prompt": "a cube", "steps": 4, "seed": 5, "size": [8, 8]}, False)


def test_comfy_in_png_and_webp(tmp_path):
    chunks = PngInfo()
    chunks.add_text("prompt", json.dumps(GRAPH))
    chunks.add_text("workflow", "{}")
    noise().save(tmp_path / "a.png", pnginfo=chunks)
    exif = Image.Exif()
    exif[0x010F] = "prompt:" + json.dumps(GRAPH)
    noise().save(tmp_path / "a.webp", exif=exif)
    for name in ("a.png", "a.webp"):
        recipe, exact = read_recipe(tmp_path / name)
        assert recipe["prompt"] == "a red cube" and recipe["scheduler"] == "dpm++_karras" and not exact


_PIECES = st.sampled_from(
    ["Steps: 4", ", ", "\n", "Negative prompt:", "Sampler: DPM++ 2M", '"', "\\", "Seed: -1", ": ", "é", "Size: 9x9"]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(st.text(max_size=200), st.lists(_PIECES, max_size=30).map("".join)))
def test_any_parameters_text_is_read_without_error(text):
    assert set(parse_a1111(text)) <= KEYS


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["1", "2"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["1", "2", "text", "width"]), inner, max_size=3)
    ),
    max_leaves=8,
)
_NODE = st.fixed_dictionaries(
    {
        "class_type": st.sampled_from(["KSampler", "CLIPTextEncode", "SaveImage", "EmptyLatentImage"]),
        "inputs": st.dictionaries(
            st.sampled_from(
                ["positive", "negative", "steps", "seed", "cfg", "text", "width", "height", "sampler_name", "denoise"]
            ),
            _JSON | st.sampled_from([["1", 0], ["2", 0], ["3", 0]]),
            max_size=6,
        ),
    }
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(_JSON, st.dictionaries(st.sampled_from(["1", "2", "3"]), _NODE, max_size=3)))
def test_any_graph_is_read_without_error(graph):
    recipe = parse_comfy(json.dumps(graph))
    assert recipe is None or set(recipe) <= KEYS


def test_long_texts_take_no_longer_than_they_should():
    for text in ('"' * 50_000, "Steps: 1, " * 20_000, "a: " * 50_000, "\n" * 100_000 + "Steps: 1", "[" * 100_000):
        parse_a1111(text)
        parse_comfy(text)
