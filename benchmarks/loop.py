"""Our sampling loop against the diffusers pipeline on the same weights, and what idle interventions cost."""

from __future__ import annotations

import torch

from benchmarks.core import Figure, interleaved, ratio
from benchmarks.workloads import Idle
from sfumato import registry
from sfumato.models import load
from sfumato.sampling import Intervention, generate

PROMPTS = [
    "a red cube and a blue ball on the grass",
    "a small green striped cone",
    "a white ring",
    "a black cross by day",
]
STEPS, GUIDANCE, ROUNDS = 20, 4.0, 9


def run() -> list[Figure]:
    """Every built-in generator whose weights are there."""
    return [figure for name in registry.names() if name in ("toy-sd", "toy-sd3") for figure in compare(name)]


def compare(name: str) -> list[Figure]:
    """Times whole generations, text encoding and decoding included."""
    model = load(name)
    pipe = model.pipe
    pipe.set_progress_bar_config(disable=True)
    # as our loop asks it: by default the pipeline adds 256 empty tokens of the absent third encoder
    extra = {"max_sequence_length": 0} if "transformer" in pipe.components else {}
    latents: dict[str, torch.Tensor] = {}

    def ours(*interventions: Intervention):
        result = generate(model, PROMPTS, steps=STEPS, guidance=GUIDANCE, seed=0, interventions=interventions)
        latents["ours"] = result.latents

    def theirs():
        generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        pipe(
            PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="pt", **extra
        )

    def five_idle():
        ours(*[Idle() for _ in range(5)])

    with torch.no_grad():
        seconds = interleaved({"loop": ours, "pipeline": theirs, "idle": five_idle}, ROUNDS)
    against, idle = ratio(seconds, "loop", "pipeline"), ratio(seconds, "idle", "loop")
    detail = f"{len(PROMPTS)} pictures, {STEPS} steps, guidance {GUIDANCE}, {ROUNDS} rounds"
    return [
        Figure(
            name=f"{name}: loop / diffusers pipeline",
            value=against.text(),
            aim="1.00, never above 1.03",
            met=against.median <= 1.03,
            detail=detail,
            data={"seconds": seconds},
        ),
        Figure(
            name=f"{name}: five idle interventions / none",
            value=idle.text(),
            aim="1.01 or less",
            met=idle.median <= 1.01,
            detail=detail,
        ),
    ]
