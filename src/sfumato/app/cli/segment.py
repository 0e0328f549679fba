"""Type the name of an object, get masks of it and a network that segments it. No mask is drawn by anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import options, show
from sfumato.app.cli.frame import command
from sfumato.errors import BadInput


@command()
def segment(
    what: Annotated[str, typer.Argument(help="The name of an object; or a segmenter.safetensors made before.")],
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Pictures or a folder of them. None: pictures are made.")
    ] = None,
    model: options.Model = None,
    remover: Annotated[
        str | None, typer.Option(help="The model that redraws pictures without it. Default: an inpainting one.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the pictures show, {} for the name. Default: a {}")] = None,
    background: Annotated[
        list[str] | None, typer.Option(help="What is there without the object; repeatable. Default: the remover's own.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="How many pictures to make. Default: 200.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Training steps of the segmenter. Default: 400.")] = None,
    steps: options.Steps = None,
    guidance: options.Scale = None,
    size: options.Size = None,
    seed: options.Seed = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that is empty or not there yet.")] = Path(
        "segmented"
    ),
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
) -> None:
    from sfumato import app

    if n is not None and pictures:
        raise BadInput("-n is how many pictures to make; it cannot be given with pictures.")
    typed: dict[str, Any] = {
        "prompt": prompt,
        "background": background,
        "n": n,
        "iterations": iterations,
        "steps": steps,
        "guidance": guidance,
        "size": None if size is None else options.pixels(size),
        "seed": seed,
    }
    typed = {name: value for name, value in typed.items() if value is not None}
    with show.bar("steps") as bar:

        def told(stage: str, done: int, total: int) -> None:
            bar(done, total, 0.0, f"{done}/{total} {stage}")

        for path in app.segment_files(what, pictures or [], out, model, remover, dtype, device, told, **typed):
            typer.echo(path)
