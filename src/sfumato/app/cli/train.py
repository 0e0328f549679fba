"""Train a recipe; Ctrl-C or --minutes leave a checkpoint that --resume goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import show
from sfumato.app.cli.commands import command
from sfumato.errors import WorkInterrupted


@command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after so much time, all in all, with a resumable checkpoint.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the exported model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
) -> None:
    from sfumato import app

    with show.bar("steps", after=0) as bar:
        loss = ""

        def report(progress: Any) -> None:
            nonlocal loss
            found = progress.logs.get("loss")
            loss = loss if found is None else f", loss {found:.4g}"
            doing = progress.doing and f", {progress.doing}"
            bar(progress.step, progress.steps, 0.0, f"{progress.step}/{progress.steps} steps{loss}{doing}")

        result = app.train(recipe, resume=resume, minutes=minutes, out=out, device=device, on_progress=report)
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if result.interrupted:
        raise WorkInterrupted(
            f"interrupted after step {result.step}, checkpoint in {result.folder}; "
            f"go on with: sfumato train {recipe} --resume"
        )
    if result.finished:
        typer.echo(result.exported)
    else:
        typer.echo(f"stopped after step {result.step}; go on with: sfumato train {recipe} --resume")
