"""Say what adapter files hold (LoRA, taught words, weights) and which models they fit."""

from __future__ import annotations

from typing import Annotated

import typer

from sfumato.app.cli import show
from sfumato.app.cli.frame import command


@command()
def adapters(
    files: Annotated[list[str], typer.Argument(help="Files, or names in the cache's adapters folder.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Say whether they fit this model. Default: the built-in ones.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    from sfumato import app
    from sfumato.adapters.inspection import headline

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
