"""List the built-in models, show one, or write one as a folder that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.app.cli import show
from sfumato.app.cli.frame import command
from sfumato.errors import BadInput


@command()
def models(
    name: Annotated[str | None, typer.Argument(help="Show one model in full.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the model NAME as a whole folder for diffusers or transformers.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the cards as JSON.")] = False,
) -> None:
    from sfumato import app, registry

    if export is not None:
        if name is None:
            raise BadInput("--export needs the name of a model, such as sfumato models toy-sd --export toy-sd.")
        typer.echo(registry.export(name, export))
    elif name is not None:
        show.json_text(registry.card(name))
    elif json_:
        show.json_text(app.models())
    else:
        rows = [
            (key, card.get("pipeline", card.get("objective", "")), card.get("summary", ""))
            for key, card in app.models().items()
        ]
        show.table(("name", "kind", "what it is"), rows)
