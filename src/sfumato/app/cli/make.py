"""Make pictures or clips from a prompt. Each file carries its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import flags, options, show
from sfumato.app.cli.commands import command
from sfumato.app.cli.flags import with_flags
from sfumato.app.jobs import JobOptions
from sfumato.errors import BadInput, WorkInterrupted


@command()
@with_flags(("Options", flags.of_schema(JobOptions, without=("prompt", "batch_size"))))
def make(
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.")] = None,
    model: options.Model = None,
    with_: options.With = None,
    out: options.Out = Path("out"),
    like: Annotated[
        Path | None, typer.Option(help="Repeat this picture by its recipe; other options override it.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A JSONL file, or - for a pipe, with one {prompt, negative, seed, n} per line. Goes on where it was "
            "stopped."
        ),
    ] = None,
    allow: options.Allow = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture to begin from instead of noise; --size says how large.")
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(help="A picture to draw by, with models that look at some beside the prompt; may be repeated."),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also write all pictures as one.")] = False,
    ray: options.Ray = False,
    workers: options.NWorkers = None,
    config: options.Config = None,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    **given: Any,
) -> None:
    from sfumato import app

    if sum(source is not None for source in (prompts, like)) == 2:
        raise BadInput("--like and --prompts cannot be given together.")
    if prompt is not None and prompts is not None:
        raise BadInput("give the prompt or --prompts, not both.")
    if ray and prompts is None:
        raise BadInput("--ray spreads the lines of a prompts file: give --prompts.")
    if workers is not None and not ray:
        raise BadInput("--workers are Ray's: give --ray too.")
    if prompt is None and prompts is None and like is None:
        raise BadInput('nothing to make: give a prompt, such as sfumato make "a red cube", or --like or --prompts.')
    values = flags.parsed(given)
    if prompt is not None:
        values["prompt"] = prompt
    if allow and like is None:
        raise BadInput("--allow is for the systems in a recipe: give --like.")
    batch = app.JobBatch(
        [], model, with_ or [], dtype, device, image, list(reference or ()), config, allow=list(allow or ())
    )
    if like is not None:
        batch = app.like(like, values, batch)
    elif prompts is not None:
        run_prompts(prompts, values, batch, out, grid, ray, workers)
        return
    else:
        batch.jobs = [app.JobOptions(**values)]
    run_batch(batch, out, grid)


def run_batch(batch: Any, out: Path, grid: bool = False) -> None:
    """Make the files of a batch: a bar on the terminal, each file's path on stdout as soon as the file is whole."""
    from sfumato import app

    with show.bar("pictures") as bar:
        finished = show.written(app.make_files(batch, out, bar), out)
    if grid and finished:
        typer.echo(app.write_grid(finished))


def run_prompts(
    prompts: Path, values: dict[str, Any], batch: Any, out: Path, grid: bool, ray: bool, workers: int | None
) -> None:
    """The same for a prompts file: what is there already is not made again, bad lines are reported at the end."""
    from sfumato import app

    total = sum(1 for line in prompts.open("rb") if line.strip()) if prompts.is_file() else 0  # pipes are read once
    spread: dict[str, Any] = {"ray": True, "workers": workers} if ray else {}
    finished: list[Path] = []
    made = there = 0
    try:
        with show.bar("lines") as bar:
            for picture in app.make_prompts(app.read_prompts(prompts, values), batch, out, bar, total, **spread):
                there += picture.there
                if grid:
                    finished.append(picture.paths[0])
                if not picture.there:
                    made += 1
                    for path in picture.paths:
                        typer.echo(path)
    except (KeyboardInterrupt, WorkInterrupted):
        kept = f"{made + there} finished pictures are in {out}, the same command goes on from there"
        raise WorkInterrupted(f"interrupted; {kept}.") from None
    finally:
        if there:
            typer.echo(f"{there} pictures were there already.", err=True)
    if grid and finished:
        typer.echo(app.write_grid(finished))
