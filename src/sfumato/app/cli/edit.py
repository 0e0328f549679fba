"""Change a picture by its words and keep the rest of it. The PNG carries its recipe.

With --mask and an inpainting model, or with a system that redraws regions (--with), the region is drawn anew from the
prompt alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import options, show
from sfumato.app.cli.frame import command
from sfumato.errors import BadInput


@command()
def edit(
    image: Annotated[Path, typer.Argument(help="A PNG made by sfumato, or any other picture together with --from.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What it shall show; several make several pictures.")
    ] = None,
    from_: Annotated[str | None, typer.Option("--from", help="What it shows now. Default: the prompt in it.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A picture that is white where this one may change.")] = None,
    seed: Annotated[int | None, typer.Option(help="Regions drawn anew: where the noise comes from.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="replace (word for word) or refine (words added). Default: by the prompts.")
    ] = None,
    reweight: Annotated[
        list[str] | None, typer.Option(metavar="WORD=FACTOR", help="Turn a word up or down; repeatable.")
    ] = None,
    blend: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD", help="Change the picture only where these words act; repeatable."),
    ] = None,
    with_: options.With = None,
    model: options.Model = None,
    steps: options.Steps = None,
    guidance: options.Scale = None,
    size: options.Size = None,
    inner: Annotated[
        int | None, typer.Option(help="Null-text iterations per step for an inverted picture, 0 none. Default: 10.")
    ] = None,
    refine: Annotated[
        int | None, typer.Option(help="Fixed-point iterations per step of inversion. Default: 0.")
    ] = None,
    invert: Annotated[bool, typer.Option("--invert", help="Invert the picture even if it carries its recipe.")] = False,
    like: Annotated[Path | None, typer.Option(help="Repeat this edit of IMAGE by its recipe.")] = None,
    out: options.Out = Path("out"),
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
) -> None:
    from sfumato import app

    typed: dict[str, Any] = {
        "prompt": prompt or None,
        "from_": from_,
        "mode": mode,
        "reweight": reweight,
        "blend": [word for text in blend or [] for word in text.split("|")] or None,
        "steps": steps,
        "guidance": guidance,
        "size": None if size is None else options.pixels(size),
        "inner": inner,
        "refine": refine,
        "invert": invert or None,
        "seed": seed,
    }
    typed = {name: value for name, value in typed.items() if value is not None}
    with_ = with_ or []
    if like is not None:
        if typed or with_:
            raise BadInput("--like repeats an edit as it was; give only IMAGE, --mask, --model and -o with it.")
        typed = app.edit_like(like, image, mask)
        with_ = typed.pop("with_")
    elif not prompt:
        raise BadInput('nothing to do: say what the picture shall show, such as sfumato edit toys.png "a blue cube".')
    order = app.Order([], model, with_, dtype, device)
    with show.bar("steps") as bar:

        def heard(step: Any) -> None:
            bar(step.i + 1, step.total)

        for path in app.edit_file(image, mask, typed, order, out, heard):
            typer.echo(path)
