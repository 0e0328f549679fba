"""Peak memory of a generation with word maps on and off, at 10 and at 50 steps: it must not grow with the steps."""

from __future__ import annotations

import statistics

from benchmarks.core import Figure, in_process

SIDE, ROUNDS = 128, 3
CODE = """
import json, resource, sys
import torch

from sfumato.explain.daam import DAAM
from sfumato.models import load
from sfumato.sampling import generate

name, steps, on, side = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "on", int(sys.argv[4])
model = load(name)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    generate(model, "a red cube and a blue ball on the grass", steps=steps, size=(side, side), decode=False,
             interventions=[DAAM()] if on else [])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"before": before / 1024, "peak": peak / 1024}))
"""


def run() -> list[Figure]:
    """Peaks of the resident set of fresh processes, in MiB."""
    peaks: dict[tuple[int, str], list[float]] = {}
    for _ in range(ROUNDS):
        for steps in (10, 50):
            for mode in ("off", "on"):
                got = in_process(CODE, "toy-sd", str(steps), mode, str(SIDE))
                peaks.setdefault((steps, mode), []).append(got["peak"])
    middle = {key: statistics.median(values) for key, values in peaks.items()}
    extra = {steps: middle[steps, "on"] - middle[steps, "off"] for steps in (10, 50)}
    growth = extra[50] - extra[10]
    noise = max(max(values) - min(values) for values in peaks.values())
    return [
        Figure(
            name="extra peak memory of the maps, 50 steps minus 10 steps",
            value=f"{growth:+.1f} MiB",
            aim="no growth (within the spread of repeated runs, at least 4 MiB)",
            met=growth <= max(4.0, noise),
            detail=(
                f"extra {extra[10]:.1f} MiB at 10 steps, {extra[50]:.1f} MiB at 50, of {middle[10, 'off']:.0f} MiB "
                f"without; {SIDE // 4}x{SIDE // 4} latents, {ROUNDS} processes each, spread {noise:.1f} MiB"
            ),
            data={f"{steps} steps, {mode}": values for (steps, mode), values in peaks.items()},
        )
    ]
