"""One step altered by Attend-and-Excite on a full-size SD1.5 U-Net: ours against diffusers' deprecated pipeline.

Time is that of the processor, which other work on the machine changes least.
"""

from __future__ import annotations

import time

import torch
from diffusers import DDIMScheduler, StableDiffusionAttendAndExcitePipeline

from benchmarks.core import Figure, interleaved, ratio
from benchmarks.daam import GUIDANCE, LATENT, full_size
from sfumato.models import Model
from sfumato.models.quiet import quiet
from sfumato.sampling import generate
from sfumato.steer.attend_excite import AttendExcite

PROMPT, WORDS, TOKENS = "a red cube and a blue ball", ["cube", "ball"], [3, 7]
ROUNDS = 2


def pipeline_of(model: Model) -> StableDiffusionAttendAndExcitePipeline:
    """diffusers' pipeline around the same networks."""
    parts = {name: part for name, part in model.pipe.components.items() if name != "image_encoder"}
    scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config, clip_sample=False)
    with quiet():
        pipe = StableDiffusionAttendAndExcitePipeline(
            **{**parts, "scheduler": scheduler}, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def contestants(model: Model, side: int, resolution: int) -> dict:
    """A plain step of both branches, and the same step altered by us and by the pipeline; latents of ``side``."""
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    pipe, before = pipeline_of(model), dict(model.pipe.unet.attn_processors)
    pixels = side * model.family.scale
    options = {"steps": 1, "guidance": GUIDANCE, "scheduler": "ddim", "latents": noise, "decode": False}

    def ours(*systems):
        with torch.no_grad():
            return generate(model, PROMPT, interventions=systems, **options).latents

    def altered():
        return ours(AttendExcite(words=WORDS, thresholds=[], resolution=resolution))

    def theirs():
        try:
            with quiet():
                return pipe(
                    PROMPT, TOKENS, num_inference_steps=1, guidance_scale=GUIDANCE, latents=noise, height=pixels,
                    width=pixels, max_iter_to_alter=1, thresholds={}, attn_res=(resolution, resolution),
                    output_type="latent",
                ).images  # fmt: skip
        finally:
            model.pipe.unet.set_attn_processor(dict(before))  # it empties what it is given

    return {"plain": ours, "ours": altered, "pipeline": theirs}


def run() -> list[Figure]:
    """Ratios of whole steps, the guided prediction included."""
    seconds = interleaved(contestants(full_size(), LATENT, LATENT // 4), ROUNDS, warmup=0, clock=time.process_time)
    against, plain = ratio(seconds, "ours", "pipeline"), ratio(seconds, "ours", "plain")
    least = ratio(seconds, "plain", "pipeline")
    detail = (
        f"1 altered step with its guided prediction at {LATENT}x{LATENT} latents, no refinement, {ROUNDS} rounds, "
        f"{sum(seconds['ours']) / ROUNDS:.0f} s and {sum(seconds['pipeline']) / ROUNDS:.0f} s each"
    )
    return [
        Figure(
            "Attend-and-Excite / diffusers' pipeline", against.text(), "0.45 or less", against.median <= 0.45, detail,
            {"seconds": seconds},
        ),
        Figure("Attend-and-Excite / plain step", plain.text(), "for comparison", None, detail),
        Figure("plain step / diffusers' pipeline, the least there is", least.text(), "for comparison", None, detail),
    ]  # fmt: skip
