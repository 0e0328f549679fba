"""``make --like`` of pictures that other programs made: what is understood is followed, what is not is named."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.app.batch import JobBatch, RecipeDiffers, like
from sfumato.dialects import parse_a1111, parse_comfy, parse_json
from sfumato.files import read_recipe


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


# --- settings as A1111's kin write them ------------------------------------------------------------------------------

OF_ALL = {"prompt": "a red cube", "negative": "blue", "steps": 20, "guidance": 7.0, "seed": 5, "size": [512, 768]}
HEAD = "a red cube\nNegative prompt: blue\n"
KIN = {
    "Forge": (
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 512x768, Hires upscale: 2",
        {"scheduler": "dpm++_karras", "dropped": ["Hires upscale"]},
    ),
    "Forge with a distilled model": (
        "Steps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 5, "
        "Size: 512x768, Module 1: ae",
        {
            "scheduler": "euler",
            "guidance": 3.5,
            "negative": None,
            "dropped": ["Module 1", "the negative prompt, which has no effect at CFG 1"],
        },
    ),
    "SD.Next": (
        "Sampler: DPM SDE, Steps: 20, Seed: 5, CFG scale: 7, Size: 512x768, CFG rescale: 0.7",
        {"scheduler": "dpm_sde", "dropped": ["CFG rescale"]},
    ),
    "Fooocus": (
        "Steps: 20, Sampler: DPM++ 2M SDE Karras, Seed: 5, Size: 512x768, CFG scale: 7, Sharpness: 2, "
        'ADM Guidance: "(1.5, 0.8, 0.3)", Scheduler: karras',
        {"scheduler": "dpm++_sde_karras", "dropped": ["Sharpness", "ADM Guidance"]},
    ),
    "Draw Things": (
        "Steps: 20, Sampler: Euler a, Guidance Scale: 7.0, Seed: 5, Size: 512x768, Model: foo.ckpt, Strength: 1.0",
        {"scheduler": "euler_a", "named_model": "foo.ckpt", "dropped": ["Strength"]},
    ),
    "Civitai": (
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x768, "
        'Civitai resources: [{"type":"checkpoint","modelName":"x, y"}], Clip skip: 2',
        {"scheduler": "euler_a", "clip_skip": 1, "dropped": ["Civitai resources"]},
    ),
    "lower case": (
        "steps: 20, sampler: k_dpmpp_2m, cfg scale: 7, seed: 5, size: 512 x 768",
        {"scheduler": "dpm++"},
    ),
    "a schedule of its own": (
        "Steps: 20, Sampler: DPM++ 2M SDE SGMUniform, CFG scale: 7, Seed: 5, Size: 512x768",
        {"scheduler": "dpm++_sde", "dropped": ["schedule 'sgm uniform'"]},
    ),
}


@pytest.mark.parametrize("program", KIN)
def test_settings_of_a1111s_kin(program):
    text, own = KIN[program]
    expected = {name: value for name, value in (OF_ALL | own).items() if value is not None}
    assert parse_a1111(HEAD + text) == expected


def test_a_setting_that_cannot_be_read_is_named():
    found = parse_a1111(HEAD + "Steps: 20, Seed: many, Size: large, CFG scale: 7")
    assert found["dropped"] == ["Seed", "Size"] and not {"seed", "size"} & set(found)


# --- graphs ----------------------------------------------------------------------------------------------------------


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


TEXTS = {"6": node("CLIPTextEncode", text="a red cube"), "7": node("CLIPTextEncode", text="blue")}
SIZE = {"5": node("EmptyLatentImage", width=512, height=768)}
SAMPLER = {"steps": 20, "cfg": 7, "seed": 5, "sampler_name": "euler", "scheduler": "normal"}
LINKS = {"positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
SAVED = {"8": node("VAEDecode", samples=["3", 0]), "9": node("SaveImage", images=["8", 0])}
GRAPHS = {
    "a sampler in parts": (
        {
            **TEXTS, "5": node("EmptySD3LatentImage", width=512, height=768),
            "3": node("SamplerCustomAdvanced", noise=["10", 0], guider=["11", 0], sampler=["12", 0], sigmas=["13", 0],
                      latent_image=["5", 0]),
            "10": node("RandomNoise", noise_seed=5), "11": node("BasicGuider", conditioning=["14", 0]),
            "12": node("KSamplerSelect", sampler_name="euler"),
            "13": node("BasicScheduler", scheduler="simple", steps=20, denoise=1.0),
            "14": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
        },
        {"guidance": 3.5, "scheduler": "euler"}, "negative",
    ),
    "advanced": (
        {
            "3": node("KSamplerAdvanced", noise_seed=5, steps=20, cfg=7, sampler_name="dpmpp_2m_sde_gpu",
                      scheduler="karras", start_at_step=0, **LINKS),
            "6": node("CLIPTextEncodeSDXL", text_g="a red cube", text_l="cube", width=1024, height=1024),
            "7": node("CLIPTextEncode", text=["10", 0]), "10": node("PrimitiveString", value="blue"), **SIZE,
        },
        {"scheduler": "dpm++_sde_karras"}, "",
    ),
    "texts put together": (
        {
            "3": node("KSampler", **SAMPLER, **LINKS), **TEXTS, **SIZE, "6": node("CLIPTextEncode", text=["10", 0]),
            "10": node("StringConcatenate", string_a="a red", string_b=["11", 0], delimiter=" "),
            "11": node("PrimitiveString", value="cube"),
        },
        {"scheduler": "euler"}, "",
    ),
    "several texts": (
        {
            "3": node("KSampler", **{**SAMPLER, **LINKS, "positive": ["10", 0]}), **TEXTS, **SIZE,
            "10": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["11", 0]),
            "11": node("CLIPTextEncode", text="a ball"),
        },
        {"scheduler": "euler", "dropped": ["the text 'a ball'"]}, "",
    ),
    "no negative": (
        {
            "3": node("KSampler", **{**SAMPLER, **LINKS, "negative": ["10", 0]}), **TEXTS, **SIZE,
            "10": node("ConditioningZeroOut", conditioning=["6", 0]),
        },
        {"scheduler": "euler"}, "negative",
    ),
    "refined": (
        {
            "2": node("KSampler", **SAMPLER, **LINKS), **TEXTS, **SIZE, **SAVED,
            "4": node("LatentUpscale", width=1024, height=1536, samples=["2", 0]),
            "3": node("KSampler", **{**SAMPLER, **LINKS, "latent_image": ["4", 0], "seed": 6, "denoise": 0.5}),
        },
        {"scheduler": "euler", "dropped": ["sampler node 3"]}, "",
    ),
    "through nodes of both": (
        {
            "3": node("KSampler", **{**SAMPLER, **LINKS, "positive": ["10", 0], "negative": ["10", 1]}),
            **TEXTS, **SIZE, "10": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0]),
        },
        {"scheduler": "euler", "dropped": ["ControlNetApplyAdvanced"]}, "",
    ),
    "a loader that holds the texts": (
        {
            "3": node("KSampler (Efficient)", **{**SAMPLER, "positive": ["1", 1], "negative": ["1", 2]}), **SIZE,
            "1": node("Efficient Loader", ckpt_name="x.safetensors", positive="a red cube", negative="blue"),
        },
        {"scheduler": "euler", "named_model": "x.safetensors"}, "size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAPHS)
def test_graphs_of_comfyui(case):
    graph, own, lacks = GRAPHS[case]
    expected = {name: value for name, value in OF_ALL.items() if name != lacks}
    assert parse_comfy(json.dumps(graph)) == expected | own


# --- flat JSON -------------------------------------------------------------------------------------------------------

JSON = {
    "Fooocus": ("parameters", {
        "prompt": "a red cube", "negative_prompt": "blue", "steps": 20, "guidance_scale": 7, "seed": "5",
        "resolution": "(512, 768)", "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras", "base_model": "x",
        "sharpness": 2.0, "version": "Fooocus v2.5.5",
    }, {"scheduler": "dpm++_sde_karras", "named_model": "x", "dropped": ["sharpness"]}),
    "SwarmUI": ("parameters", {"sui_image_params": {
        "prompt": "a red cube", "negativeprompt": "blue", "steps": 20, "cfgscale": 7.0, "seed": 5, "width": 512,
        "height": 768, "sampler": "euler_ancestral", "scheduler": "normal", "model": "x", "aspectratio": "2:3",
    }}, {"scheduler": "euler_a", "named_model": "x", "dropped": ["aspectratio"]}),
    "InvokeAI": ("invokeai_metadata", {
        "positive_prompt": "a red cube", "negative_prompt": "blue", "steps": 20, "cfg_scale": 7.0, "seed": 5,
        "width": 512, "height": 768, "scheduler": "dpmpp_2m_k", "model": {"name": "x", "hash": "y"}, "loras": [],
        "cfg_rescale_multiplier": 0.5,
    }, {"scheduler": "dpm++_karras", "named_model": "x", "dropped": ["cfg_rescale_multiplier"]}),
}  # fmt: skip


@pytest.mark.parametrize("program", JSON)
def test_flat_json(program, tmp_path):
    chunk, given, own = JSON[program]
    assert read_recipe(png(tmp_path / "a.png", **{chunk: json.dumps(given)})) == (OF_ALL | own, False)


@pytest.mark.parametrize("text", ["{red|blue} cube", "[]", '{"a": 1}', '{"prompt": "x"}', "[" * 50_000, "3"])
def test_what_is_no_such_json(text):
    assert parse_json(text) is None
