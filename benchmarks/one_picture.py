"""One picture as a whole process: the command line beside a script that does the same with plain diffusers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.core import Figure, Spread, fresh, interleaved, ratio
from sfumato import registry

ROUNDS = 5
PROMPT = "a red cube and a blue ball"
PLAIN = """
import sys
import torch
from diffusers import StableDiffusionPipeline

folder, out, prompt, steps, guidance = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
settings = dict(num_inference_steps=int(steps), guidance_scale=float(guidance))
pipe(prompt, **settings, generator=torch.Generator().manual_seed(0)).images[0].save(out)
"""


def run() -> list[Figure]:
    """Seconds of fresh interpreters, from start to exit, in pairs."""
    settings = registry.card("toy-sd")["sampling"]
    steps, guidance = str(settings["steps"]), str(settings["guidance"])
    with tempfile.TemporaryDirectory() as folder:
        whole = registry.export("toy-sd", Path(folder) / "toy-sd")
        seconds = interleaved(
            {
                "sfumato": fresh("-m", "sfumato", "make", PROMPT, "-o", f"{folder}/ours.png"),
                "diffusers": fresh("-c", PLAIN, str(whole), f"{folder}/theirs.png", PROMPT, steps, guidance),
            },
            ROUNDS,
        )
    spread = ratio(seconds, "sfumato", "diffusers")
    ours, theirs = (Spread.of(seconds[name]).median for name in ("sfumato", "diffusers"))
    return [
        Figure(
            name="`sfumato make` / the same with plain diffusers, whole process",
            value=spread.text(),
            aim="0.95 or less",
            met=spread.median <= 0.95,
            detail=f"{ours:.2f} s and {theirs:.2f} s; toy-sd, {steps} steps, {ROUNDS} pairs",
            data={"seconds": seconds},
        )
    ]
