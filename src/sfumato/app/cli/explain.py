"""Show where words are: in a picture made from a prompt, or in one that exists. With other systems (--by): what an
answer rests on, what a net's layers know, what words a concept is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import options, show
from sfumato.app.cli.frame import command


@command()
def explain(
    what: Annotated[
        str,
        typer.Argument(help="A prompt to make a picture from, a picture file, a net, or a folder."),
    ],
    prompt: Annotated[str | None, typer.Option(help="What the picture file shows. Default: the prompt in it.")] = None,
    words: Annotated[
        list[str] | None, typer.Option(help="A word or phrase to look for; repeatable. Default: every word.")
    ] = None,
    by: options.By = None,
    maps: Annotated[bool, typer.Option("--maps", help="Also write the maps as numbers (.safetensors).")] = False,
    n: Annotated[int | None, typer.Option("-n", help="How many pictures to make. Default: 1.")] = None,
    model: options.Model = None,
    steps: options.Steps = None,
    guidance: options.Scale = None,
    size: options.Size = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    seed: options.Seed = None,
    scheduler: options.Scheduler = None,
    out: options.Out = Path("out"),
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
) -> None:
    from sfumato import app

    typed: dict[str, Any] = {
        "prompt": prompt,
        "words": [word for text in words or [] for word in text.split("|")] or None,
        "n": n,
        "steps": steps,
        "guidance": guidance,
        "size": None if size is None else options.pixels(size),
        "frames": frames,
        "fps": fps,
        "seed": seed,
        "scheduler": scheduler,
    }
    typed = {name: value for name, value in typed.items() if value is not None}
    job = app.Explaining(what, by, app.Order([], model, [], dtype, device, maps=maps), typed)
    with show.bar("pictures") as bar:
        show.written(app.explain_into(job, out, bar), out)
