"""The SDXL refiner: the latents of its pipeline, bit for bit, by itself and behind the base model, and where its words
lie."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import BadInput
from sfumato.explain.daam import DAAM
from sfumato.models import load, quiet
from sfumato.sampling import generate
from sfumato.sampling.attached import attached
from tests.parity.test_families import planted_keys, sites_of, token_of
from tests.pipelines import assert_same_maps
from tests.tiny import tiny_model, tiny_pipeline

PROMPTS, NEGATIVES, SEEDS = ["a red cube", "a big dog on the left"], ["green", "a cone"], [7, 3]
SIZE = (48, 32)
PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8))


def piped(pipe: Any, **given: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with quiet():
        return pipe(PROMPTS, generator=generators, output_type="latent", **given).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_pictures_are_finished_as_by_its_pipeline(dtype: torch.dtype):
    model = tiny_model("refiner") if dtype == torch.float32 else tiny_model("refiner", fresh=True).to(dtype=dtype)
    given: dict[str, Any] = {"image": [PICTURE] * 2, "strength": 0.5}
    with attached(model.pipe, DAAM(per_head=True)) as own_loop:
        peer = piped(model.pipe, num_inference_steps=5, guidance_scale=4.0, negative_prompt=NEGATIVES, **given)
    ours = generate(
        model, PROMPTS, steps=5, guidance=4.0, negative=NEGATIVES, seed=SEEDS, decode=False,
        interventions=(daam := DAAM(per_head=True)), **given,
    )  # fmt: skip
    assert torch.equal(ours.latents, peer) and ours.latents.dtype == peer.dtype == dtype
    assert ours.cost == 4 and ours.coverage == own_loop.coverage
    assert_same_maps(daam.maps, own_loop.maps)


@pytest.mark.parametrize(("steps", "guidance"), [(5, 1.0), (8, 5.0)])
def test_the_base_hands_over(steps: int, guidance: float):
    """The base model draws the first 0.6 of the noise levels, the refiner the others."""
    base, refiner = tiny_model("sdxl"), tiny_model("refiner")
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    begun = piped(base.pipe, denoising_end=0.6, width=SIZE[0], height=SIZE[1], **given)
    peer = piped(refiner.pipe, image=begun, denoising_start=0.6, **given)
    own: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": SEEDS, "decode": False}
    seen, last = DAAM(words=["red"]), DAAM(words=["red"])
    only = [text.replace("dog", "red dog") for text in PROMPTS]
    first = generate(base, PROMPTS, denoising_end=0.6, size=SIZE, **own)
    assert torch.equal(first.latents, begun)
    second = generate(refiner, PROMPTS, latents=first.latents, denoising_start=0.6, **own)
    assert torch.equal(second.latents, peer)
    assert first.cost + second.cost == steps * (2 if guidance > 1 else 1)
    traced = generate(base, only, denoising_end=0.6, size=SIZE, interventions=seen, **own)
    generate(refiner, only, latents=traced.latents, denoising_start=0.6, interventions=last, **own)
    both = [part.coverage()["steps"] for part in (seen, last)]  # one schedule, each step drawn by one of them
    assert sorted(both[0] + both[1]) == list(range(steps)) and both[0] and both[1]


@pytest.mark.parametrize("scheduler", ["heun", "dpm++"])
def test_other_schedulers_hand_over(scheduler: str):
    base, refiner = tiny_model("sdxl"), tiny_model("refiner")
    pipes = []
    for model in (base, refiner):
        pipe = copy.copy(model.pipe)
        pipe.register_modules(scheduler=model.make_scheduler(scheduler))
        pipes.append(pipe)
    begun = piped(pipes[0], denoising_end=0.55, num_inference_steps=4, width=SIZE[0], height=SIZE[1])
    peer = piped(pipes[1], image=begun, denoising_start=0.55, num_inference_steps=4, guidance_scale=5.0)
    own: dict[str, Any] = {"steps": 4, "guidance": 5.0, "seed": SEEDS, "scheduler": scheduler, "decode": False}
    first = generate(base, PROMPTS, denoising_end=0.55, size=SIZE, **own)
    assert torch.equal(first.latents, begun)
    assert torch.equal(generate(refiner, PROMPTS, latents=begun, denoising_start=0.55, **own).latents, peer)


def test_a_saved_folder(tmp_path: Any):
    with quiet():
        tiny_pipeline("refiner").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.family.name == "sdxl_refiner" and model.family.has("text_attention")
    with quiet():
        peer = model.pipe(
            PROMPTS[0], image=PICTURE, strength=0.6, num_inference_steps=3, generator=torch.Generator().manual_seed(4)
        ).images[0]
    ours = generate(model, PROMPTS[0], image=PICTURE, strength=0.6, steps=3, seed=4)
    assert ours.images[0].tobytes() == peer.tobytes()


def test_one_token_reaches_one_key():
    model = tiny_model("refiner")
    sites = sites_of(model, "refiner", PROMPTS[:1])
    position = token_of(model, "refiner", PROMPTS[0], "cube")
    found = planted_keys(model, "refiner", position)
    assert set(found) == {site.path for site in sites}
    assert all(found[site.path] == ([position] if site.text else []) for site in sites)


@pytest.mark.parametrize(
    ("kind", "given", "why"),
    [
        ("refiner", {}, "finishes pictures and draws none: give it an image, or latents"),
        ("refiner", {"latents": torch.zeros(1, 4, 16, 16)}, "finishes pictures"),
        ("refiner", {"image": PICTURE, "denoising_start": 0.5}, "no latents are given to go on from"),
        ("sdxl", {"denoising_start": 0.5}, "no latents are given to go on from"),
        ("sdxl", {"latents": torch.zeros(1, 4, 16, 16), "start": 1, "denoising_start": 0.5}, "start is given too"),
        ("sdxl", {"latents": torch.zeros(1, 4, 16, 16), "denoising_start": 0.9999}, "leaves no step"),
        ("sdxl", {"latents": torch.zeros(1, 4, 16, 16), "start": 2, "denoising_end": 0.2}, "the walk begins later"),
        ("sdxl", {"denoising_end": 1.0}, "denoising_end"),
        ("amused", {"denoising_end": 0.5}, "denoising_end means nothing to tiny-amused"),
    ],
)
def test_what_means_nothing_is_refused(kind: str, given: dict[str, Any], why: str):
    with pytest.raises(BadInput, match=why):
        generate(tiny_model(kind), PROMPTS[0], steps=3, decode=False, **given)
