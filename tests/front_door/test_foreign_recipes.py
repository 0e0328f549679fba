"""``make --like`` of pictures that other programs made: what is understood is followed, what is not is named."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.app.batch import JobBatch, RecipeDiffers, like


def png(path, **texts):
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    Image.new("RGB", (64, 64)).save(path, pnginfo=chunks)
    return path


def order(picture, **typed):
    with pytest.warns(RecipeDiffers) as notes:
        found = like(picture, typed, JobBatch(jobs=[]))
    return found.jobs[0], str(notes[0].message)


def test_a_negative_at_cfg_1_is_left_out_with_a_note(tmp_path):
    text = "a red cube\nNegative prompt: blue\nSteps: 4, Sampler: Euler, CFG scale: 1, Seed: 5, Size: 64x64"
    job, note = order(png(tmp_path / "a.png", parameters=text))
    assert (job.prompt, job.negative, job.guidance, job.scheduler) == ("a red cube", None, 1.0, "euler")
    assert "negative prompt, which has no effect at CFG 1" in note
    job, note = order(png(tmp_path / "b.png", parameters=text), guidance=3.0)
    assert job.negative == "blue" and "left out" not in note


def test_lines_behind_the_settings_and_what_is_dropped(tmp_path):
    text = (
        "a red cube\nNegative prompt: blue\nSteps: 4, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 64x64, "
        "Model: foo, Clip skip: 2\nTemplate: a {red|blue} cube"
    )
    job, note = order(png(tmp_path / "a.png", parameters=text))
    assert (job.prompt, job.negative, job.scheduler, job.size) == ("a red cube", "blue", "dpm++_karras", (64, 64))
    assert job.clip_skip == 1  # they count the last layer as 1
    assert "left out: Template" in note and "made with 'foo'" in note


def test_a_comfy_graph(tmp_path):
    graph = {
        "3": {
            "class_type": "KSampler",
            "inputs": {"seed": 5, "steps": 4, "cfg": 7, "sampler_name": "euler", "positive": ["6", 0]},
        },
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red cube"}},
    }
    job, _ = order(png(tmp_path / "a.png", prompt=json.dumps(graph), workflow="{}"))
    assert (job.prompt, job.steps, job.guidance, job.seed, job.scheduler) == ("a red cube", 4, 7.0, 5, "euler")
