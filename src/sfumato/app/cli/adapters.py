"""Say what adapter files hold (LoRA, taught words, weights) and which models they fit; or convert one:
adapters convert IN OUT --to kohya."""

from __future__ import annotations

from typing import Annotated

import typer

from sfumato.app.cli import show
from sfumato.app.cli.commands import command
from sfumato.errors import BadInput


@command()
def adapters(
    files: Annotated[
        list[str], typer.Argument(help="Files, or names in the cache's adapters folder; or: convert IN OUT.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Say whether they fit this model. Default: the built-in ones.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="convert: diffusers, kohya, comfyui, old-diffusers, attn-procs, peft, pivotal, custom-diffusion, "
            "delta, compvis, checkpoint."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="convert: another name for a taught word.")] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    from sfumato import app
    from sfumato.adapters.inspection import headline

    if files[0] == "convert":
        if len(files) != 3 or to is None:
            raise BadInput("convert takes two files and a dialect: sfumato adapters convert IN OUT --to kohya.")
        for path in app.convert(files[1], files[2], to, model, name):
            typer.echo(path)
        return
    if to is not None or name:
        raise BadInput("--to and --name are for sfumato adapters convert IN OUT.")
    found = app.adapters(files, model)
    if json_:
        show.json_text(found)
        return
    for each in found:
        typer.echo(f"{each['path']}: {headline(each)}")
        rows = [("hash", each["hash"]), *each["metadata"].items()]
        rows += [(f"fits {name}", fit) for name, fit in each["fits"].items()]
        for name, value in rows:
            typer.echo(f"  {name}: {value}")
