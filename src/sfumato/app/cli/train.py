"""``sfumato train`` and ``sfumato teach``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import show
from sfumato.app.cli.frame import app
from sfumato.errors import BadInput, WorkInterrupted


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Stop after so much time with a resumable checkpoint.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the exported model.")] = None,
) -> None:
    """Train a recipe; Ctrl-C or --minutes leave a checkpoint that --resume goes on from."""
    from sfumato import app

    with show.bar("steps") as bar:

        def told(progress: Any) -> None:
            loss = progress.logs.get("loss")
            note = f"{progress.step}/{progress.steps} steps" + (f", loss {loss:.4g}" if loss is not None else "")
            bar(progress.step, progress.steps, 0.0, note)

        result = app.train(recipe, resume=resume, minutes=minutes, out=out, on_progress=told)
    for complaint in result.complaints:
        typer.echo(f"warning: {complaint}", err=True)
    if result.interrupted:
        raise WorkInterrupted(
            f"interrupted after step {result.step}, checkpoint in {result.folder}; "
            f"go on with: sfumato train {recipe} --resume"
        )
    if result.finished:
        typer.echo(result.exported)
    else:
        typer.echo(f"stopped after step {result.step}; go on with: sfumato train {recipe} --resume")


@app.command()
def teach(
    by: Annotated[str, typer.Argument(metavar="KEY:name=value,...", help="The system that teaches: robust_vit.")],
    model: Annotated[str, typer.Option(help="A classifier: a built-in name or a transformers folder.")],
    data: Annotated[
        str, typer.Option(help="A folder whose metadata.jsonl has file_name, mask and label, or toybox.")
    ] = "toybox",
    per_class: Annotated[int, typer.Option(min=1, max=20, help="toybox: how many pictures of each shape.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="toybox: another seed, other pictures.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the taught model.")] = Path("taught"),
) -> None:
    """Teach a classifier, from a few masked pictures, to look at the thing instead of its surroundings."""
    from sfumato import app

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"output folder {str(out)!r} is not empty; name a new one.")
    with show.bar("epochs") as bar:

        def told(epoch: int, epochs: int, log: dict[str, float]) -> None:
            bar(epoch, epochs, 0.0, f"{epoch}/{epochs} epochs, loss {log['loss']:.4g}")

        app.teach(by, model, data, per_class=per_class, seed=seed, out=out, on_progress=told)
    typer.echo(out)
