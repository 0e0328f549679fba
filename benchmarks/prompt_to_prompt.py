"""What an edit costs beside drawing a picture: the first one, which draws its source, and every further one."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.core import Figure, interleaved, ratio
from benchmarks.daam import full_size
from sfumato import zoo
from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.models import Model, load
from sfumato.sampling import generate

SOURCE, TARGET = "a red cube and a blue ball on the grass", "a green cube and a blue ball on the grass"
STEPS, GUIDANCE, ROUNDS = 20, 4.0, 15
FULL = {"steps": 4, "size": (256, 256)}  # of a U-Net as large as SD1.5's


def run() -> list[Figure]:
    """Every built-in generator whose weights are there, and a network of full size, beside which hooks cost nothing."""
    toys = [name for name in zoo.names() if name in ("toy-sd", "toy-sd3")]
    figures = [figure for name in toys for figure in compare(name, load(name), {"steps": STEPS}, ROUNDS)]
    return figures + compare("SD1.5's U-Net, random weights, 32x32 latents", full_size(), FULL, 3)


def compare(name: str, model: Model, given: dict[str, Any], rounds: int) -> list[Figure]:
    """Times whole generations of one picture, text encoding and decoding included."""
    options = {**given, "guidance": GUIDANCE, "seed": 0}

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

        seconds = interleaved({"plain": plain, "first": first, "again": again}, rounds)
    further, whole = ratio(seconds, "again", "plain"), ratio(seconds, "first", "plain")
    detail = f"{given['steps']} steps, guidance {GUIDANCE}, {rounds} rounds"
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
