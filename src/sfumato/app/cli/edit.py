"""Change a picture by its words and keep the rest of it. With --mask and an inpainting model, or with a system that
redraws regions (--by), the region is drawn anew from the prompt alone. The PNG carries its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato import cards
from sfumato.app.cli import flags, options, show
from sfumato.app.cli.commands import command
from sfumato.app.cli.flags import with_flags
from sfumato.app.editing import EditOptions
from sfumato.errors import BadInput

EDITOR = cards.default("edit")


@command()
@with_flags(
    ("Options", flags.of_schema(EditOptions, without=("prompt",))),
    (f"Parameters of {EDITOR} (of others: in --with)", flags.of_system(EDITOR, ("source", "mask"))),
)
def edit(
    image: Annotated[Path, typer.Argument(help="A PNG made by sfumato, or any other picture together with --from.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What it shall show; several make several pictures.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="A picture that is white where this one may change.")] = None,
    with_: options.With = None,
    by: options.By = None,
    model: options.Model = None,
    like: Annotated[Path | None, typer.Option(help="Repeat this edit of IMAGE by its recipe.")] = None,
    allow: options.Allow = None,
    out: options.Out = Path("out"),
    config: options.Config = None,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    **given: Any,
) -> None:
    from sfumato import app

    values = flags.parsed(given)
    if prompt:
        values["prompt"] = prompt
    with_ = with_ or []
    if like is not None:
        if values or with_ or by:
            raise BadInput("--like repeats an edit as it was: with it go IMAGE, --mask, --model, --allow and -o only.")
        values = app.edit_like(like, image, mask, allow or ())
        with_ = values.pop("with_")
    elif not prompt:
        raise BadInput('nothing to do: say what the picture shall show, such as sfumato edit toys.png "a blue cube".')
    if by is not None:
        values["by"] = by
    batch = app.JobBatch([], model, with_, dtype, device, config=config, allow=list(allow or ()))
    with show.bar("steps") as bar:

        def report(step: Any) -> None:
            bar(step.i + 1, step.total)

        for path in app.edit_file(image, mask, values, batch, out, report):
            typer.echo(path)
