"""List the built-in models, show one, say what can be looked into, or write one as a folder for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import show
from sfumato.app.cli.commands import command
from sfumato.errors import BadInput

#: parts of what --inspect tells that are tables, with their titles
_TABLES = {
    "sites": ("attention", "calls", "frames", "grid", "heads", "queries", "keys", "explicit map (MiB)"),
    "systems": ("system", "runs", "adds (MiB)"),
}


@command()
def models(
    name: Annotated[str | None, typer.Argument(help="Show one model in full.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the model NAME as a whole folder for diffusers or transformers.")
    ] = None,
    inspect: Annotated[
        bool,
        typer.Option("--inspect", help="What of the model NAME (a folder too) can be looked into; reads no weights."),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the cards as JSON.")] = False,
) -> None:
    from sfumato import app, registry

    if inspect:
        if name is None or export is not None:
            raise BadInput("--inspect needs the name or folder of a model, and nothing besides.")
        from sfumato.models.outline import add_memory, described, outline
        from sfumato.sampling.footprint import adds

        model = outline(name)
        facts = described(model)
        if not json_:  # at once: memory takes half a minute or more
            show.table(("what", ""), [(key, str(value)) for key, value in facts.items() if key not in _TABLES])
            _table(facts, "sites")
        with show.bar("systems", after=0) as bar:
            add_memory(facts, adds(model, on_progress=lambda done, total, key: bar(done, total, 0.0, f"memory: {key}")))
        if json_:
            show.json_text(facts)
        else:
            _table(facts, "systems")
    elif export is not None:
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


def _table(facts: dict[str, Any], key: str) -> None:
    typer.echo()
    show.table(_TABLES[key], [tuple("" if x is None else str(x) for x in row.values()) for row in facts[key]])
