"""Word maps against none, in our loop and in that of diffusers' pipeline, on SD1.5 and SDXL U-Nets of full size.

Time is that of the processor, which other work on the machine changes least. One step of one branch: what a map costs
is the same in every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from benchmarks.core import Figure, interleaved, ratio
from benchmarks.daam import PROMPT, full_size
from sfumato.explain.daam import DAAM
from sfumato.models import Model
from sfumato.sampling import generate
from sfumato.sampling.attached import attached

LATENT, ROUNDS = 64, 3


def sdxl() -> Model:
    """SDXL's U-Net (2.6 G parameters, random weights) with small text encoders and autoencoder around it."""
    small = full_size(UNet2DConditionModel(block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                           up_block_types=("UpBlock2D",), layers_per_block=1)).pipe  # fmt: skip
    config = small.text_encoder.config.to_dict()
    config |= {"hidden_size": 1280, "num_attention_heads": 20, "projection_dim": 1280}
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    pipe = StableDiffusionXLPipeline(
        vae=small.vae,
        text_encoder=small.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**config)),
        tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer,
        unet=unet.eval().requires_grad_(False),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    return Model(pipe, name="sdxl-random")


def contestants(model: Model, side: int) -> dict[str, Callable[[], Any]]:
    """Both loops, with the maps of every word worked out to the end and without; latents of ``side``."""
    pixels = side * model.family.scale
    model.pipe.set_progress_bar_config(disable=True)

    def maps(daam: DAAM) -> None:
        for span in daam.maps[0].reading.all():
            daam.maps[0].map(span, size=(side, side))

    def loop(*systems: Any) -> None:
        generate(model, PROMPT, steps=1, guidance=1.0, size=(pixels, pixels), decode=False, interventions=systems)

    def pipeline() -> None:
        given = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
        model.pipe(PROMPT, height=pixels, width=pixels, **given)

    def loop_with_maps() -> None:
        loop(daam := DAAM())
        maps(daam)

    def pipeline_with_maps() -> None:
        with attached(model.pipe, daam := DAAM()):
            pipeline()
        maps(daam)

    return {
        "loop": loop,
        "loop with maps": loop_with_maps,
        "pipeline": pipeline,
        "pipeline with maps": pipeline_with_maps,
    }


def figures(name: str, model: Model, side: int = LATENT, rounds: int = ROUNDS) -> list[Figure]:
    """Ratios of a step with maps and without."""
    seconds = interleaved(contestants(model, side), rounds, warmup=1, clock=time.process_time)
    detail = f"1 step of one branch at {side}x{side} latents, {rounds} rounds, {min(seconds['loop']):.0f} s each"
    found = []
    for loop, title in (("loop", "our loop"), ("pipeline", "the pipeline's own loop")):
        share = ratio(seconds, f"{loop} with maps", loop)
        found.append(
            Figure(f"{name}, {title}: maps / none", share.text(), "1.05 or less", share.median <= 1.05, detail,
                   {"seconds": seconds})
        )  # fmt: skip
    return found


def run(names: Sequence[str] = ("SD1.5", "SDXL")) -> list[Figure]:
    """One model after the other: SDXL alone takes 10 GB."""
    makers = {"SD1.5": full_size, "SDXL": sdxl}
    found: list[Figure] = []
    for name in names:
        torch.manual_seed(0)
        found += figures(name, makers[name]())
    return found
