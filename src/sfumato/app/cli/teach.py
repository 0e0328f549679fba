"""Teach a model that exists, from a few pictures: a word, a subject, a style, a class - or a classifier to look at the
thing, or a flow that makes an autoencoder follow texts. Ctrl-C or --minutes leave a checkpoint that --resume goes on
from."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import options, show
from sfumato.app.cli.commands import command
from sfumato.errors import BadInput, WorkInterrupted


@command()
def teach(
    data: Annotated[
        str, typer.Argument(help="A folder of pictures, tar shards, or what else the system takes, such as toybox.")
    ],
    by: Annotated[
        str | None,
        typer.Option(metavar="KEY:name=value,...", help="The system that teaches: see sfumato methods --verb teach."),
    ] = None,
    model: options.Model = None,
    name: Annotated[str | None, typer.Option(help="The new word, such as <rex>.")] = None,
    class_: Annotated[str | None, typer.Option("--class", help="What the pictures show, such as ball.")] = None,
    steps: Annotated[int | None, typer.Option(help="How many steps at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order, noise and sentences; another seed, another run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Stop after so much time with a resumable checkpoint.")] = None,
    per_class: Annotated[
        int | None, typer.Option(min=1, max=20, help="toybox: how many pictures of each shape.")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The adapter's .safetensors, or a taught model's new folder.")
    ] = None,
    config: options.Config = None,
) -> None:
    from sfumato import app

    if out is None:
        raise BadInput("nowhere to write: give -o, such as -o rex.safetensors.")
    values = {"name": name, "class_noun": class_, "steps": steps, "seed": seed, "per_class": per_class}
    given: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    if model is not None:
        given["model"] = model
    with show.bar("steps") as bar:

        def report(step: int, steps: int, log: dict[str, float]) -> None:
            bar(step, steps, 0.0, f"{step}/{steps}, loss {log['loss']:.4g}")

        try:
            found = app.teach(
                data, by=by, dtype=dtype, device=device, config=config, out=out, resume=resume, minutes=minutes,
                on_progress=report, **given,
            )  # fmt: skip
        except WorkInterrupted as error:
            again = shlex.join(["sfumato", *(each for each in sys.argv[1:] if each != "--resume"), "--resume"])
            raise WorkInterrupted(f"{str(error).split(';')[0].rstrip('.')}; go on with: {again}") from None
    for path in getattr(found, "files", [out]):  # none in a process that does not write
        typer.echo(path)
