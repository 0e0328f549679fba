"""``sfumato models`` and ``sfumato methods``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import show
from sfumato.app.cli.frame import app
from sfumato.cards import ROOMS
from sfumato.errors import BadInput


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="Show one model in full.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the model NAME as a whole folder for diffusers or transformers.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the cards as JSON.")] = False,
) -> None:
    """List the built-in models, show one, or write one as a folder that other programs load."""
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


@app.command()
def methods(
    key: Annotated[str | None, typer.Argument(help="Show one system with its parameters.")] = None,
    verb: Annotated[str | None, typer.Option(help=f"Only those of one verb: {', '.join(ROOMS)}.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print cards as JSON.")] = False,
) -> None:
    """List the systems that --with knows."""
    import dataclasses

    from sfumato import cards

    if key is not None:
        cls: Any = cards.method(key)
        if json_:
            show.json_text({**dataclasses.asdict(cls.CARD), "parameters": cls.Params.model_json_schema()["properties"]})
            return
        for field, value in dataclasses.asdict(cls.CARD).items():
            if value:
                typer.echo(f"{field.replace('_', ' ')}: {', '.join(value) if isinstance(value, tuple) else value}")
        typer.echo()
        show.table(("parameter", "default", "meaning"), cards.parameter_rows(cls.Params))
        return
    found = cards.methods(verb)
    if json_:
        show.json_text({name: dataclasses.asdict(card) for name, card in found.items()})
    else:
        rows = [(name, card.verb, card.summary, f"{_brief(card.authors)} {card.year}") for name, card in found.items()]
        show.table(("key", "verb", "what it does", "paper"), rows)


def _brief(authors: str) -> str:
    names = authors.split(", ")
    return authors if len(names) < 3 else f"{names[0]} et al."
