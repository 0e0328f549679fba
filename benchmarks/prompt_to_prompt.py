"""What an edit costs beside drawing a picture: the first one, which draws its source, and every further one."""

from __future__ import annotations

import torch

from benchmarks.core import Figure, interleaved, ratio
from sfumato import zoo
from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.models import load
from sfumato.sampling import generate

SOURCE, TARGET = "a red cube and a blue ball on the grass", "a green cube and a blue ball on the grass"
STEPS, GUIDANCE, ROUNDS = 20, 4.0, 15


def run() -> list[Figure]:
    """Every built-in generator whose weights are there."""
    return [figure for name in zoo.names() if name in ("toy-sd", "toy-sd3") for figure in compare(name)]


def compare(name: str) -> list[Figure]:
    """Times whole generations of one picture, text encoding and decoding included."""
    model = load(name)
    options = {"steps": STEPS, "guidance": GUIDANCE, "seed": 0}

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

        seconds = interleaved({"plain": plain, "first": first, "again": again}, ROUNDS)
    further, whole = ratio(seconds, "again", "plain"), ratio(seconds, "first", "plain")
    detail = f"{STEPS} steps, guidance {GUIDANCE}, {ROUNDS} rounds"
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
