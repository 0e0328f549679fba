"""Arguments that users of diffusers, A1111 and ComfyUI expect of ``generate``, each with the pipeline's own result."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from sfumato import dialects
from sfumato.app.cli import flags
from sfumato.app.jobs import JobOptions
from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models import quiet
from sfumato.sampling import generate, recipe_args
from sfumato.sampling.options import ELSEWHERE, Options
from tests.tiny import length_of, tiny_model, tiny_pipeline

PROMPT = "a photo of a big blue dog on the left"
CLIP = ("sd", "sdxl", "sd3")
SIZES: dict[str, Any] = {
    "original_size": (320, 640),
    "crops_coords_top_left": (24, 8),
    "target_size": (64, 96),
}
NEGATIVE: dict[str, Any] = {
    "negative_original_size": (100, 50),
    "negative_crops_coords_top_left": (4, 2),
    "negative_target_size": (48, 32),
}
#: what is said -> what its pipeline must be told: sizes are height and width there
MICRO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "original": ({"original_size": (320, 640)}, {"original_size": (640, 320)}),
    "all": (SIZES, {}),
    "both branches": (SIZES | NEGATIVE, {}),
    "one of the negative": (
        {"negative_original_size": (100, 50)},
        {"negative_original_size": (50, 100), "negative_target_size": (32, 48)},
    ),
}


def theirs(kind: str, scheduler: Any = None, **given: Any) -> torch.Tensor:
    """Final latents of the pipeline for one sample of 48x32."""
    model = tiny_model(kind)
    pipe = model.pipe
    if scheduler is not None:
        pipe = type(pipe)(**{**pipe.components, "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
    if "clip_skip" in given:  # with transformers 5 the pipelines of diffusers 0.4x do not find the norm of a CLIP
        pipe = tiny_pipeline(kind, fresh=True)
        if not hasattr(pipe.text_encoder, "text_model"):
            vars(pipe.text_encoder)["text_model"] = pipe.text_encoder
    with quiet():
        out = pipe(
            PROMPT, generator=torch.Generator().manual_seed(3), output_type="latent", width=48, height=32, **given,
            **length_of(model),
        )  # fmt: skip
    return pipe._unpack_latents(out.images, 32, 48, pipe.vae_scale_factor) if kind == "flux" else out.images


def ours(kind: str, **given: Any) -> Any:
    return generate(tiny_model(kind), PROMPT, seed=3, size=(48, 32), decode=False, **given)


@pytest.mark.parametrize("kind", CLIP)
def test_clip_skip(kind: str):
    peer = theirs(kind, num_inference_steps=2, guidance_scale=3.0, negative_prompt="green", clip_skip=1)
    made = ours(kind, steps=2, guidance=3.0, negative="green", clip_skip=1)
    assert torch.equal(made.latents, peer)
    again = generate(tiny_model(kind), **recipe_args(made.recipe), decode=False)
    assert torch.equal(again.latents, peer)
    assert tiny_model(kind).family.encoding.clip_skip is None
    assert not torch.equal(ours(kind, steps=2, guidance=3.0, negative="green").latents, peer)


@pytest.mark.parametrize("kind", ["flux", "pixart", "amused", "chroma"])
def test_no_clip_to_skip(kind: str):
    with pytest.raises(BadInput, match="clip_skip means nothing"):
        generate(tiny_model(kind), PROMPT, clip_skip=1)


@pytest.mark.parametrize(("kind", "most"), [("sd", 2), ("sdxl", 1), ("sd3", 1)])
def test_more_layers_than_there_are(kind: str, most: int):
    ours(kind, steps=1, clip_skip=most)
    with pytest.raises(BadInput, match=f"clip_skip is {most + 1}; .* has {most} layers"):
        ours(kind, steps=1, clip_skip=most + 1)


@pytest.mark.parametrize("case", MICRO)
def test_sizes_that_sdxl_is_told(case: str):
    said, told = MICRO[case]
    told = told or {name: value if "crops" in name else value[::-1] for name, value in said.items()}
    peer = theirs("sdxl", num_inference_steps=1, guidance_scale=3.0, **told)
    made = ours("sdxl", steps=1, guidance=3.0, **said)
    assert torch.equal(made.latents, peer)
    assert torch.equal(generate(tiny_model("sdxl"), **recipe_args(made.recipe), decode=False).latents, peer)
    assert not torch.equal(ours("sdxl", steps=1, guidance=3.0).latents, peer)


def test_composed_texts_are_told_the_same_sizes():
    alone = ours("sdxl", steps=1, guidance=3.0, **SIZES)
    composed = ours("sdxl", steps=1, guidance=1.5, compose=[(PROMPT, 1.5)], **SIZES)
    torch.testing.assert_close(composed.latents, alone.latents, rtol=1e-4, atol=1e-4)


def test_sizes_mean_nothing_elsewhere():
    with pytest.raises(BadInput, match="target_size means nothing to tiny-sd: only SDXL"):
        ours("sd", target_size=(64, 64))


#: kind, scheduler of the pipeline, what is said in both languages
SCHEDULES = {
    "timesteps": ("sd", EulerDiscreteScheduler, {"timesteps": [999, 300]}),
    "sigmas": ("sd", EulerDiscreteScheduler, {"sigmas": [14.6, 1.3, 0.0]}),
    "of sdxl": ("sdxl", None, {"timesteps": [900, 100]}),
    "of a shifted flow": ("sd3", None, {"sigmas": [1.0, 0.6]}),
    "of a flow shifted by size": ("flux", None, {"sigmas": [1.0, 0.6]}),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedule_of_ones_own(case: str):
    kind, scheduler, given = SCHEDULES[case]
    made = None if scheduler is None else scheduler.from_config(tiny_model(kind).pipe.scheduler.config)
    peer = theirs(kind, made, guidance_scale=3.0, **given)
    result = ours(kind, guidance=3.0, scheduler=None if made is None else "euler", **given)
    assert torch.equal(result.latents, peer)
    levels = next(iter(given.values()))
    assert result.recipe["steps"] == len(levels) - (levels[-1] == 0)
    assert torch.equal(generate(tiny_model(kind), **recipe_args(result.recipe), decode=False).latents, peer)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("sd", {"timesteps": [9, 5], "sigmas": [9.0, 0.0]}, "timesteps and sigmas are both given"),
        ("sd", {"timesteps": [5, 9], "scheduler": "euler"}, "each must be smaller"),
        ("sd", {"timesteps": [], "scheduler": "euler"}, "give 1 to 1001 numbers"),
        ("sd", {"timesteps": [900, 5], "scheduler": "ddim"}, "takes no timesteps of one's own; use euler"),
        ("sd", {"sigmas": [9, 5], "scheduler": "dpm++"}, "takes no sigmas of one's own; give timesteps"),
        ("sd", {"timesteps": [900.5, 5], "scheduler": "dpm++"}, "give whole numbers"),
        ("sd", {"timesteps": [900, 5], "steps": 3, "scheduler": "euler"}, "steps is 3, but the timesteps given make 2"),
        ("sd3", {"timesteps": [900, 5]}, "give sigmas"),
        ("amused", {"sigmas": [1.0, 0.5]}, "sigmas means nothing"),
    ],
)
def test_schedules_that_cannot_be(kind: str, given: dict[str, Any], message: str):
    with pytest.raises((BadInput, NotSupported), match=message):
        generate(tiny_model(kind), PROMPT, decode=False, **given)


def test_guidance_of_a_model_distilled_without():
    with pytest.warns(UserWarning, match="distilled to draw without guidance; guidance 3.5 takes a second pass"):
        made = ours("schnell", steps=1, guidance=3.5)
    assert made.cost == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours("schnell", steps=1).cost == 1


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_of_other_libraries_say_what_they_are_called_here(name: str):
    with pytest.raises(UnknownName, match=re.escape(f"{name!r}. Here it is {ELSEWHERE[name]}.")):
        generate(tiny_model("sd"), PROMPT, **{name: 1})
    here = ELSEWHERE[name].partition("=")[0].partition(",")[0]
    taken = {*Options.model_fields, "on_step", "decode", "reference"}
    assert here in taken or here.startswith(("a system: ", "nothing: "))


def test_flags_of_the_command_line():
    typed = flags.parsed(
        {"original_size": "320x640", "crops_coords_top_left": "24|8", "timesteps": ["999|500", "1"], "clip_skip": 1}
    )
    job = JobOptions(prompt=PROMPT, **typed)
    assert (job.original_size, job.crops_coords_top_left) == ((320, 640), (24, 8))
    assert (job.timesteps, job.clip_skip) == ([999, 500, 1], 1)
    with pytest.raises(BadInput, match="--target-size is '64'"):
        flags.parsed({"target_size": "64"})


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        ("DPM++ SDE", "dpm_sde"),
        ("DPM++ SDE Karras", "dpm_sde_karras"),
        ("DPM++ 2M SDE Karras", "dpm++_sde_karras"),
        ("DPM++ 2M SDE", "dpm++_sde"),
    ],
)
def test_samplers_both_ways(sampler: str, name: str):
    text = f"a dog\nSteps: 4, Sampler: {sampler}, CFG scale: 7, Seed: 5, Size: 64x64, Clip skip: 2"
    recipe = dialects.parse_a1111(text)
    assert (recipe["scheduler"], recipe["clip_skip"]) == (name, 1)
    assert dialects.parse_a1111(dialects.a1111_text(recipe)) == recipe
    assert name in tiny_model("sd").schedulers


def test_dpm_sde_by_name_is_the_scheduler_given():
    pytest.importorskip("torchsde")
    from diffusers import DPMSolverSDEScheduler

    with quiet():
        given = DPMSolverSDEScheduler.from_config(tiny_model("sd").pipe.scheduler.config)
    peer = ours("sd", steps=2, scheduler=given)
    assert torch.equal(ours("sd", steps=2, scheduler="dpm_sde").latents, peer.latents)
