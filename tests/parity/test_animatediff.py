"""AnimateDiff: the loop makes the clips of the diffusers pipeline, bit for bit on a CPU, on the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, MotionAdapter, UNet2DConditionModel
from torch import Tensor

from sfumato.models import Model, load, quiet
from sfumato.sampling import generate
from tests.tiny import tiny_model, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

PROMPTS = ["a red cube", "a photo of a big blue dog on the left"]


def pipeline_clips(pipe: Any, prompts: list[str], seeds: list[int], kind: str = "latent", **given: Any) -> Tensor:
    given = {"num_inference_steps": 2, "num_frames": 2, "width": 32, "height": 32, "guidance_scale": 4.0, **given}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with quiet():
        return pipe(prompts, generator=generators, output_type=kind, **given).frames


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"guidance_scale": 1.0}, {"guidance": 1.0}),
        ({"num_frames": 3, "width": 48}, {"frames": 3, "size": (48, 32)}),
        ({"negative_prompt": ["green", "a cone"]}, {"negative": ["green", "a cone"]}),
        ({"num_frames": 1}, {"frames": 1}),
    ],
    ids=["guided", "unguided", "three wide frames", "negatives", "one frame"],
)
def test_latents(theirs: dict[str, Any], ours: dict[str, Any]):
    peer = pipeline_clips(tiny_pipeline("animatediff"), PROMPTS, [7, 3], **theirs)
    ours = {"steps": 2, "guidance": 4.0, "frames": 2, **ours}
    result = generate(tiny_model("animatediff"), PROMPTS, seed=[7, 3], decode=False, **ours)
    assert result.latents.shape == peer.shape and result.latents.dim() == 5
    assert torch.equal(result.latents, peer)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_other_schedulers(scheduler: Any):
    pipe = tiny_pipeline("animatediff", fresh=True)
    with quiet():
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    peer = pipeline_clips(pipe, PROMPTS, [1, 2], num_inference_steps=3)
    result = generate(Model(pipe), PROMPTS, seed=[1, 2], steps=3, guidance=4.0, size=(32, 32), frames=2, decode=False)
    assert torch.equal(result.latents, peer)


def test_clips_as_bytes():
    frames = pipeline_clips(tiny_pipeline("animatediff"), PROMPTS, [7, 3], "np")
    result = generate(tiny_model("animatediff"), PROMPTS, seed=[7, 3], steps=2, guidance=4.0, frames=2)
    assert result.pixels.shape == (2, 3, 2, 32, 32)
    assert [clip.shape for clip in result.clips] == [(2, 32, 32, 3)] * 2
    assert np.array_equal(np.stack(result.clips), (np.asarray(frames) * 255).round().astype(np.uint8))
    for clip, image in zip(result.clips, result.images, strict=True):
        assert np.array_equal(np.asarray(image), clip[0])


def test_loaded_from_a_folder(tmp_path):
    """As diffusers saves it, and as users put it together: a folder of Stable Diffusion with a motion adapter."""
    pipe = tiny_pipeline("animatediff")
    with quiet():
        pipe.save_pretrained(tmp_path / "whole")
        pipe.save_pretrained(tmp_path / "parts")
        tiny_pipeline("sd").unet.save_pretrained(tmp_path / "parts" / "unet")
    index = tmp_path / "parts" / "model_index.json"
    index.write_text(index.read_text().replace("UNetMotionModel", "UNet2DConditionModel"))
    given = {"steps": 2, "guidance": 4.0, "seed": 7, "size": (32, 32), "frames": 2, "decode": False}
    expected = generate(tiny_model("animatediff"), PROMPTS[0], **given).latents
    whole = load(tmp_path / "whole")
    assert whole.family.name == "animatediff" and whole.frames() == 8  # its motion modules know no more
    assert torch.equal(generate(whole, PROMPTS[0], **given).latents, expected)
    parts = load(tmp_path / "parts")
    assert type(parts.pipe.motion_adapter) is MotionAdapter and type(parts.denoiser) is not UNet2DConditionModel
    with quiet():
        peer = type(pipe)(
            **{**pipe.components, "unet": tiny_pipeline("sd").unet, "motion_adapter": pipe.motion_adapter}
        )
    peer.set_progress_bar_config(disable=True)
    assert torch.equal(
        generate(parts, PROMPTS[0], **given).latents, pipeline_clips(peer, PROMPTS[:1], [7], guidance_scale=4.0)
    )
