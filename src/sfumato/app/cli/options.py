"""Options that several commands share."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from sfumato.errors import BadInput


def literal(text: str) -> str:
    """Help text whose square brackets are shown as they are: to rich they would be markup."""
    return text.replace("[", "\\[")


MODEL_HELP = "Built-in name, diffusers folder, .safetensors file or hub id. Default: toy-sd."
Model = Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP)]
Config = Annotated[
    str | None,
    typer.Option(help="For a single-file model: a diffusers folder with its configuration, tokenizers, missing parts."),
]
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
Allow = Annotated[
    list[Path] | None,
    typer.Option(help="A file, or a folder of files, that systems in a recipe may open; repeatable."),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the model's own.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")]

Real = Annotated[Path | None, typer.Option("--real", help="A folder of real pictures to compare with.")]
RealBefore = Annotated[Path | None, typer.Option("--reference", hidden=True, help="The earlier name of --real.")]
Ray = Annotated[bool, typer.Option("--ray", help="Spread the work over Ray workers; the result is the same.")]
NWorkers = Annotated[int | None, typer.Option("--workers", help="How many with --ray. Default: one per CPU there.")]


class Renamed(UserWarning):
    """An option is given by its earlier name."""


def real_pictures(real: Path | None, before: Path | None) -> Path | None:
    """The folder given as --real, or by its earlier name, with a note. Raises BadInput for both."""
    if before is None:
        return real
    if real is not None:
        raise BadInput("--reference is the earlier name of --real; give --real alone.")
    warnings.warn(f"--reference is called --real here: --real {before}.", Renamed, stacklevel=2)
    return before
