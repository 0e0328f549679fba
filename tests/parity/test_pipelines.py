"""The loop makes the latents of the diffusers pipeline, bit for bit on a CPU, on the same weights: every family,
guidance, batches, sizes, schedulers, image-to-image. The peer is the genuine pipeline, called as a user calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor

from sfumato.models import Model, quiet
from sfumato.sampling import generate
from tests.tiny import length_of, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*", "ignore:__array_wrap__")

PROMPTS = ["a red cube", "a photo of a big blue dog on the left"]
NEGATIVES = ["green", "a small cone"]
FAMILIES = ("sd", "sd2", "sdxl", "sd3", "sd35", "sd3clip", "flux", "schnell", "pixart", "pixart_alpha")
DISTILLED = ("flux", "schnell")


def pipeline_latents(
    model: Model, kind: str, prompts: list[str], seeds: list[int], size: tuple[int, int], pipe: Any = None, **given: Any
) -> Tensor:
    """Final latents (b c h w) of the diffusers pipeline; ``given`` in its own words."""
    if kind.startswith("pixart"):
        given.update(use_resolution_binning=False, clean_caption=False)
    given |= length_of(model)
    with quiet():
        latents = (pipe or model.pipe)(
            prompts,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            **({} if "image" in given else {"width": size[0], "height": size[1]}),
            **given,
        ).images
    if kind in DISTILLED:
        latents = model.pipe._unpack_latents(latents, size[1], size[0], model.pipe.vae_scale_factor)
    return latents


@pytest.mark.filterwarnings("ignore::sfumato.sampling.request.GuidanceCosts")
@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_two_prompts_with_their_generators(kind: str, guidance: float):
    """... and without guidance with texts as long as the pipeline has them by itself."""
    model = tiny_model(kind, own_length=guidance == 1 and kind != "sd3clip")
    theirs: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": guidance}
    if kind == "schnell" and guidance > 1:  # its guidance_scale does nothing; true guidance needs a negative prompt
        theirs = {"num_inference_steps": 3, "true_cfg_scale": guidance, "negative_prompt": ["", ""]}
    peer = pipeline_latents(model, kind, PROMPTS, [7, 3], (32, 32), **theirs)
    ours = generate(model, PROMPTS, steps=3, guidance=guidance, seed=[7, 3], size=(32, 32), decode=False)
    assert torch.equal(ours.latents, peer)
    assert ours.latents.abs().sum() > 0
    assert ours.cost == 3 * (2 if guidance > 1 and kind != "flux" else 1)


@pytest.mark.filterwarnings("ignore::sfumato.sampling.request.GuidanceCosts")
@pytest.mark.parametrize("kind", FAMILIES)
def test_negative_prompts_and_a_non_square_size(kind: str):
    model = tiny_model(kind)
    if kind in DISTILLED:
        theirs: dict[str, Any] = {"true_cfg_scale": 3.0, "guidance_scale": 2.5}
        own = {"guidance": 2.5, "true_guidance": 3.0} if kind == "flux" else {"guidance": 3.0}
    else:
        theirs, own = {"guidance_scale": 3.0}, {"guidance": 3.0}
    peer = pipeline_latents(
        model, kind, PROMPTS, [1, 2], (48, 32), num_inference_steps=2, negative_prompt=NEGATIVES, **theirs
    )
    ours = generate(model, PROMPTS, negative=NEGATIVES, steps=2, seed=[1, 2], size=(48, 32), decode=False, **own)
    assert torch.equal(ours.latents, peer)


SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpm2": (KDPM2DiscreteScheduler, {}),
    "dpm2_a": (KDPM2AncestralDiscreteScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm++_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_single": (DPMSolverSinglestepScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}
NOISY = ("ddpm", "euler_a", "dpm2_a", "dpm++_sde", "lcm")


def with_scheduler(kind: str, name: str) -> tuple[Model, Any]:
    """A model and its pipeline with another scheduler put in, as a user would do it."""
    model = tiny_model(kind)
    factory, settings = SCHEDULERS[name]
    with quiet():
        scheduler = factory.from_config(model.pipe.scheduler.config, **{"clip_sample": False, **settings})
    return model, type(model.pipe)(**{**model.pipe.components, "scheduler": scheduler})


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name: str):
    model, pipe = with_scheduler("sd", name)
    pipe.set_progress_bar_config(disable=True)
    peer = pipeline_latents(
        model, "sd", PROMPTS, [5, 6], (16, 16), pipe, num_inference_steps=4, guidance_scale=5.0, guidance_rescale=0.7
    )
    given = {"steps": 4, "guidance": 5.0, "rescale": 0.7, "seed": 5, "size": (16, 16), "decode": False}
    ours = generate(model, PROMPTS, scheduler=name, **given)
    assert torch.equal(ours.latents, peer)


def test_ddim_with_fresh_noise():
    model, pipe = with_scheduler("sd", "ddim")
    pipe.set_progress_bar_config(disable=True)
    peer = pipeline_latents(model, "sd", PROMPTS, [5, 6], (32, 32), pipe, num_inference_steps=3, eta=0.8)
    ours = generate(model, PROMPTS, steps=3, seed=5, scheduler="ddim", eta=0.8, decode=False)
    assert torch.equal(ours.latents, peer)


def test_second_order_flow_scheduler():
    model = tiny_model("sd3")
    scheduler = FlowMatchHeunDiscreteScheduler.from_config(model.pipe.scheduler.config)
    pipe = type(model.pipe)(**{**model.pipe.components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    peer = pipeline_latents(model, "sd3", PROMPTS, [5, 6], (32, 32), pipe, num_inference_steps=3)
    ours = generate(model, PROMPTS, steps=3, seed=5, scheduler="flow_heun", decode=False)
    assert torch.equal(ours.latents, peer)
    assert ours.cost == 2 * 5


def test_several_images_per_prompt_and_given_latents():
    model = tiny_model("sdxl")
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    peer = pipeline_latents(
        model, "sdxl", PROMPTS, [0, 1, 2, 3], (32, 32), num_inference_steps=2, num_images_per_prompt=2, latents=noise
    )
    ours = generate(model, PROMPTS, n=2, steps=2, latents=noise, decode=False)
    assert torch.equal(ours.latents, peer)
    assert ours.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2


def test_half_precision():
    model = tiny_model("sd", fresh=True)
    model.to(dtype=torch.bfloat16)
    peer = pipeline_latents(model, "sd", PROMPTS, [7, 3], (32, 32), num_inference_steps=2)
    ours = generate(model, PROMPTS, steps=2, seed=[7, 3], decode=False)
    assert ours.latents.dtype == torch.bfloat16
    assert torch.equal(ours.latents, peer)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "pixart"])
def test_pictures(kind: str):
    model = tiny_model(kind)
    given = {"use_resolution_binning": False, "clean_caption": False} if kind == "pixart" else {}
    generators = [torch.Generator().manual_seed(4)]
    with quiet():
        peer = model.pipe(
            PROMPTS[:1], num_inference_steps=2, generator=generators, height=32, width=48, **given, **length_of(model)
        ).images[0]
    ours = generate(model, PROMPTS[0], steps=2, seed=4, size=(48, 32)).images[0]
    assert ours.size == (48, 32)
    assert ours.tobytes() == peer.tobytes()


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


# strength 0.5 of 5 steps: diffusion pipelines keep 2 of them, flow pipelines 3
@pytest.mark.parametrize(
    ("kind", "name", "strength"),
    [
        ("sd", None, 0.5),
        ("sd", None, 1.0),
        ("sd", "heun", 0.5),
        ("sd", "euler_a", 0.7),
        ("sdxl", None, 0.5),
        ("sd3", None, 0.5),
        ("flux", None, 0.5),
    ],
)
def test_image_to_image(kind: str, name: str | None, strength: float):
    model, pipe = with_scheduler(kind, name) if name else (tiny_model(kind), tiny_model(kind).pipe)
    variant = AutoPipelineForImage2Image.from_pipe(pipe)
    variant.set_progress_bar_config(disable=True)
    pictures = [picture(1, (48, 32)), picture(2, (48, 32))]
    own_size = {"width": 48, "height": 32} if kind in ("sd3", "flux") else {}
    given = {"num_inference_steps": 5, "guidance_scale": 4.0, "strength": strength, **own_size}
    peer = pipeline_latents(model, kind, PROMPTS, [5, 6], (48, 32), variant, image=pictures, **given)
    ours = generate(
        model, PROMPTS, image=pictures, strength=strength, steps=5, guidance=4.0, seed=5, scheduler=name, decode=False
    )
    assert torch.equal(ours.latents, peer)
