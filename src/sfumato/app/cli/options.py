"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.errors import BadInput


def literal(text: str) -> str:
    """Help text whose square brackets are shown as they are: to rich they would be markup."""
    return text.replace("[", "\\[")


MODEL_HELP = "Built-in name, diffusers folder, .safetensors file or hub id. Default: toy-sd."
Model = Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP)]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's own.")]
Scale = Annotated[float | None, typer.Option("--guidance", help="Classifier-free guidance. Default: the model's own.")]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="Width x height in pixels. Default: the model's own.")]
Frames = Annotated[int | None, typer.Option(help="Frames of a clip. Default: the model's own.")]
Fps = Annotated[float | None, typer.Option(help="Frames per second of a clip. Default: the model's own.")]
Negative = Annotated[str | None, typer.Option(help="What the picture should not show.")]
Scheduler = Annotated[str | None, typer.Option(help="ddim, euler, dpm++, ... Default: the model's own.")]
Seed = Annotated[int | None, typer.Option(help="Where the noise comes from. Default: 0.")]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="KEY:name=value,...",
        help=literal("A system that takes part; repeatable. Lists: words=[red cube|ball]."),
    ),
]
By = Annotated[
    str | None,
    typer.Option("--by", metavar="KEY:name=value,...", help="The system that does it: see sfumato methods."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the files, or the name of one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the model's own.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")]


Ray = Annotated[bool, typer.Option("--ray", help="Spread the work over Ray workers; the result is the same.")]
NWorkers = Annotated[int | None, typer.Option("--workers", help="How many with --ray. Default: one per CPU there.")]


def pixels(text: str) -> tuple[int, int]:
    """Width and height from ``64x64``."""
    width, x, height = text.lower().partition("x")
    if not (x and width.strip().isdecimal() and height.strip().isdecimal()):
        raise BadInput(f"--size is {text!r}; write width x height in pixels, such as 64x64.")
    return int(width), int(height)
