"""One step altered by Attend-and-Excite on a full-size SD1.5 U-Net: ours against diffusers' deprecated pipeline.

Time is that of the processor, which other work on the machine changes least.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial

import torch
from diffusers import DDIMScheduler, StableDiffusionAttendAndExcitePipeline, UNet2DConditionModel
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.core import Figure, interleaved, ratio
from benchmarks.daam import GUIDANCE, LATENT, full_size
from sfumato.models import Model, architectures
from sfumato.models.quiet import quiet
from sfumato.sampling import generate
from sfumato.steer.attend_excite import AttendExcite

PROMPT, WORDS, TOKENS = "a red cube and a blue ball", ["cube", "ball"], [3, 7]
ROUNDS = 2
REFINEMENTS = 2  # of the 20 that both do at most


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

    def altered(refinements: int = 0):
        never = [(0.0, 1.0)] if refinements else []  # a threshold that is not met
        given = {"words": WORDS, "thresholds": never, "tries": refinements, "resolution": resolution}
        return ours(AttendExcite(**given, sharpness=100.0))  # as theirs

    def theirs(refinements: int = 0):
        refine = pipe._perform_iterative_refinement_step
        pipe._perform_iterative_refinement_step = partial(refine, max_refinement_steps=refinements)
        try:
            with quiet():
                return pipe(
                    PROMPT, TOKENS, num_inference_steps=1, guidance_scale=GUIDANCE, latents=noise, height=pixels,
                    width=pixels, max_iter_to_alter=1, thresholds={0: 1.0} if refinements else {},
                    attn_res=(resolution, resolution), output_type="latent",
                ).images  # fmt: skip
        finally:
            pipe._perform_iterative_refinement_step = refine
            model.pipe.unet.set_attn_processor(dict(before))  # it empties what it is given

    return {
        "plain": ours, "ours": altered, "pipeline": theirs,
        "ours refined": partial(altered, REFINEMENTS), "pipeline refined": partial(theirs, REFINEMENTS),
    }  # fmt: skip


class _Seen(Exception):
    """The last map that is read has been computed."""


def operations() -> tuple[float, float]:
    """Multiplications and additions that the gradient of the maps of a quarter of the latents' side takes, in forward
    passes of one branch: on the way to the last such map, and back from it to the latents."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(architectures.config_of("sd1", "unet")).requires_grad_(False)
        context = torch.randn(1, 77, unet.config.cross_attention_dim)
        x, t = torch.randn(1, unet.config.in_channels, LATENT, LATENT), torch.tensor([10])
    maps = []

    def look(attention, args, kwargs):
        q, k = (
            attention.head_to_batch_dim(each)
            for each in (attention.to_q(args[0]), attention.to_k(kwargs["encoder_hidden_states"]))
        )
        if q.shape[1] == (LATENT // 4) ** 2:
            maps.append(functional.softmax(q @ k.transpose(1, 2) * attention.scale, -1))
            if len(maps) == 5:  # of two blocks on the way down and three on the way up
                raise _Seen

    def count(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def forward():
        with contextlib.suppress(_Seen):
            unet(x, t, context)

    whole = count(forward)
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_pre_hook(look, with_kwargs=True)
    x.requires_grad_(True)
    there = count(forward)
    back = count(lambda: torch.autograd.grad(sum(each.sum() for each in maps), x))
    return there / whole, back / whole


def run() -> list[Figure]:
    """Ratios of whole steps, the guided prediction included."""
    seconds = interleaved(contestants(full_size(), LATENT, LATENT // 4), ROUNDS, warmup=0, clock=time.process_time)
    against, plain = ratio(seconds, "ours", "pipeline"), ratio(seconds, "ours", "plain")
    least, refined = ratio(seconds, "plain", "pipeline"), ratio(seconds, "ours refined", "pipeline refined")
    there, back = operations()
    pipelines = 2 + 1 + back  # its pass goes on to the end; ours stops at the last map
    counted = (
        f"counted on SD1.5's U-Net without weights; a pass to the last map {there:.2f}, back from there {back:.2f}"
    )
    detail = (
        f"1 altered step with its guided prediction at {LATENT}x{LATENT} latents, no refinement, {ROUNDS} rounds, "
        f"{sum(seconds['ours']) / ROUNDS:.0f} s and {sum(seconds['pipeline']) / ROUNDS:.0f} s each"
    )
    return [
        Figure(
            "Attend-and-Excite / diffusers' pipeline", against.text(), "0.45 or less", against.median <= 0.45, detail,
            {"seconds": seconds},
        ),
        Figure(
            "Attend-and-Excite / diffusers' pipeline, a step that refines", refined.text(), "0.45 or less",
            refined.median <= 0.45, f"as above, at a threshold that {REFINEMENTS} refinements do not meet",
        ),
        Figure("Attend-and-Excite / plain step", plain.text(), "for comparison", None, detail),
        Figure("plain step / diffusers' pipeline, the least there is", least.text(), "for comparison", None, detail),
        Figure(
            "the gradient's arithmetic / that of a pass of one branch", f"{there + back:.2f}",
            f"at most {0.45 * 2 / least.median - 2:.2f} for the bar above on this machine", None, counted,
        ),
        Figure(
            "a step's arithmetic / that of diffusers' pipeline", f"{(2 + there + back) / pipelines:.2f}",
            "for comparison", None, "what is below that is fused attention and memory that is not moved",
        ),
    ]  # fmt: skip
