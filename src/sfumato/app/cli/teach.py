"""Teach a model that exists: a classifier, from a few masked pictures, to look at the thing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.app.cli import show
from sfumato.app.cli.frame import command
from sfumato.errors import BadInput


@command()
def teach(
    by: Annotated[
        str,
        typer.Argument(metavar="KEY:name=value,...", help="The system that teaches: see sfumato methods --verb teach."),
    ],
    model: Annotated[str, typer.Option(help="The model: a built-in name or a folder.")],
    data: Annotated[
        str, typer.Option(help="A folder whose metadata.jsonl has file_name, mask and label, or toybox.")
    ] = "toybox",
    per_class: Annotated[int, typer.Option(min=1, max=20, help="toybox: how many pictures of each shape.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="toybox: another seed, other pictures.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the taught model.")] = Path("taught"),
) -> None:
    from sfumato import app

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"output folder {str(out)!r} is not empty; name a new one.")
    with show.bar("epochs") as bar:

        def report(epoch: int, epochs: int, log: dict[str, float]) -> None:
            bar(epoch, epochs, 0.0, f"{epoch}/{epochs} epochs, loss {log['loss']:.4g}")

        app.teach(by, model, data, per_class=per_class, seed=seed, out=out, on_progress=report)
    typer.echo(out)
