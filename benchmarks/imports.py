"""What it costs to start: importing the package, and asking the command line for help."""

from __future__ import annotations

from benchmarks.core import Figure, Spread, fresh, interleaved, ratio

ROUNDS = 7


def run() -> list[Figure]:
    """Seconds of fresh interpreters."""
    seconds = interleaved(
        {
            "nothing": fresh("-c", "pass"),
            "sfumato": fresh("-c", "import sfumato"),
            "torch": fresh("-c", "import torch"),
            "help": fresh("-m", "sfumato", "--help"),
        },
        ROUNDS,
    )
    ours, help_ = ratio(seconds, "sfumato", "torch"), Spread.of(seconds["help"])
    spent = {name: Spread.of(values).median for name, values in seconds.items()}
    return [
        Figure(
            name="`import sfumato` / `import torch`",
            value=ours.text(),
            aim="0.5 or less",
            met=ours.median <= 0.5,
            detail=f"{spent['sfumato']:.2f} s and {spent['torch']:.2f} s; nothing at all {spent['nothing']:.2f} s",
            data={"seconds": seconds},
        ),
        Figure(
            name="`sfumato --help`",
            value=f"{help_.text(2)} s",
            aim="below 0.5 s",
            met=help_.median < 0.5,
            detail=f"{ROUNDS} rounds",
        ),
    ]
