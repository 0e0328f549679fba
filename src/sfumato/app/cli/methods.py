"""List the systems that --with knows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sfumato.app.cli import show
from sfumato.app.cli.commands import command
from sfumato.cards import ROOMS


@command()
def methods(
    key: Annotated[str | None, typer.Argument(help="Show one system with its parameters.")] = None,
    verb: Annotated[str | None, typer.Option(help=f"Only those of one verb: {', '.join(ROOMS)}.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print cards as JSON.")] = False,
) -> None:
    import dataclasses

    from sfumato import cards, protocol

    if key is not None:
        cls: Any = cards.method(key)
        if json_:
            show.json_text({**dataclasses.asdict(cls.CARD), "parameters": cls.Params.model_json_schema()["properties"]})
            return
        for field, value in dataclasses.asdict(cls.CARD).items():
            if value:
                typer.echo(f"{field.replace('_', ' ')}: {', '.join(value) if isinstance(value, tuple) else value}")
        for verb, ways in protocol.serves(cls).items():
            typer.echo(f"{verb}: {'; '.join(ways)}")
        if cls.CARD.needs:
            from sfumato.models.families import offering

            typer.echo(f"runs on: {', '.join(offering(cls.CARD.needs)) or 'other models'}")
        typer.echo()
        show.table(("parameter", "default", "meaning"), cards.parameter_rows(cls.Params))
        return
    found = cards.methods(verb)
    if json_:
        show.json_text({name: dataclasses.asdict(card) for name, card in found.items()})
    else:
        rows = [(name, card.verb, card.summary, card.paper) for name, card in found.items()]
        show.table(("key", "verb", "what it does", "paper"), rows)
