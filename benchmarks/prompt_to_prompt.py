"""What an edit costs beside drawing a picture: the first one, which draws its source, and every further one."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.core import Figure, interleaved, ratio
from benchmarks.daam import full_size
from sfumato import registry
from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.models import Model, load
from sfumato.sampling import generate

SOURCE, TARGET = "a red cube and a blue ball on the grass", "a green cube and a blue ball on the grass"
GUIDANCE = 4.0
SIDE = 32
"""Of the full-size network's latents."""


def run() -> list[Figure]:
    """A full-size SD1.5, randomly initialised, and every built-in generator whose weights are there: the smaller the
    network, the more a hook in its attention weighs."""
    figures = compare(full_size(), "full-size SD1.5", steps=4, rounds=3, size=(8 * SIDE, 8 * SIDE), decode=False)
    for name in registry.names():
        if name in ("toy-sd", "toy-sd3"):
            figures += compare(load(name), name, steps=20, rounds=15)
    return figures


def compare(model: Model, name: str, steps: int, rounds: int, **more: Any) -> list[Figure]:
    """Times whole generations of one picture, text encoding included, and decoding unless it is told otherwise."""
    options = {"steps": steps, "guidance": GUIDANCE, "seed": 0, **more}

    def plain() -> None:
        generate(model, TARGET, **options)

    def first() -> PromptToPrompt:
        edit = PromptToPrompt(source=SOURCE)
        generate(model, TARGET, interventions=edit, **options)
        return edit

    with torch.no_grad():
        recording = first().recording
        assert recording is not None

        def again() -> None:
            generate(model, TARGET, interventions=PromptToPrompt(recording), **options)

        seconds = interleaved(
            {"plain": plain, "first": first, "again": again}, rounds, warmup=int(name in registry.names())
        )
    further, whole = ratio(seconds, "again", "plain"), ratio(seconds, "first", "plain")
    size = f" at {SIDE}x{SIDE} latents" if "size" in more else ""
    detail = f"{steps} steps{size}, guidance {GUIDANCE}, {rounds} rounds"
    megabytes = recording.nbytes / 2**20
    return [
        Figure(
            name=f"{name}: a further edit / a plain generation",
            value=further.text(),
            aim="1.10 or less",
            met=further.median <= 1.10,
            detail=f"{detail}; the recording takes {megabytes:.1f} MiB",
            data={"seconds": seconds, "bytes": recording.nbytes},
        ),
        Figure(
            name=f"{name}: the first edit, source included / a plain generation",
            value=whole.text(),
            aim="2.10 or less",
            met=whole.median <= 2.10,
            detail=detail,
        ),
    ]
