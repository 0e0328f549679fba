"""Show where words are: in a picture made from a prompt, or in one that exists. Or what a net's layers know
(--by shape_texture), or what words a concept is made of (--by conceptor)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import options, show
from sfumato.app.cli.frame import command
from sfumato.app.cli.make import deliver
from sfumato.errors import BadInput


@command()
def explain(
    what: Annotated[
        str,
        typer.Argument(help="A prompt to make a picture from, a picture file, or a net; for conceptor also a folder."),
    ],
    prompt: Annotated[str | None, typer.Option(help="What the picture file shows. Default: the prompt in it.")] = None,
    words: Annotated[
        list[str] | None, typer.Option(help="A word or phrase to look for; repeatable. Default: every word.")
    ] = None,
    by: Annotated[str, typer.Option(metavar="KEY:name=value,...", help="The system that explains.")] = "daam",
    maps: Annotated[bool, typer.Option("--maps", help="Also write the maps as numbers (.safetensors).")] = False,
    n: Annotated[int | None, typer.Option("-n", help="How many pictures to make. Default: 1.")] = None,
    model: options.Model = None,
    steps: options.Steps = None,
    guidance: options.Scale = None,
    size: options.Size = None,
    seed: options.Seed = None,
    scheduler: options.Scheduler = None,
    out: options.Out = Path("out"),
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
) -> None:
    from sfumato import app, cards

    typed: dict[str, Any] = {
        "n": n,
        "steps": steps,
        "guidance": guidance,
        "size": None if size is None else options.pixels(size),
        "seed": seed,
        "scheduler": scheduler,
    }
    typed = {name: value for name, value in typed.items() if value is not None}
    order = app.Order([], model, [], dtype, device, maps=maps)
    words = [word for text in words or [] for word in text.split("|")]
    if hasattr(cards.method(cards.parse_with(by)[0]), "explain_model"):
        if typed or words or prompt is not None or maps or model is not None:
            raise BadInput(
                f"{by.partition(':')[0]} explains a net: give its name and the parameters of --by, nothing else."
            )
        lines, paths = app.explain_net(what, by, order, out)
        for line in (*lines, *paths):
            typer.echo(line)
        return
    if app.examines(by):
        unused = [f"--{name}" if len(name) > 1 else f"-{name}" for name in ("n", "size") if name in typed]
        if unused or words or maps:
            named = " and ".join(unused + ["--words"] * bool(words) + ["--maps"] * maps)
            raise BadInput(f"{named} cannot be given with --by {by.partition(':')[0]}; see: sfumato methods {by}.")
        with show.bar("steps") as bar:
            for path in app.examine_into(what, prompt, by, order, out, typed, bar):
                typer.echo(path)
        return
    if prompt is None and not app.is_picture(what) and not app.is_read(by, order):
        key, params = cards.parse_with(by)
        order.with_ = [{"method": key, "params": {**params, **({"words": words} if words else {})}}]
        order.jobs = [app.JobOptions(prompt=what, **typed)]
        deliver(order, out)
        return
    unused = [f"--{name}" if len(name) > 1 else f"-{name}" for name in ("n", "guidance") if name in typed]
    if unused:
        raise BadInput(f"{' and '.join(unused)} cannot be given for a picture that exists; it is not made anew.")
    text = prompt is None and not app.is_picture(what)
    for path in app.explain_file(Path(what), prompt, by, words, order, out, typed, text):
        typer.echo(path)
