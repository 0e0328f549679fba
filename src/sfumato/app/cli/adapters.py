"""Say what adapter files hold (LoRA, taught words, weights) and which models they fit."""

from __future__ import annotations

from typing import Annotated, Any

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

    found = app.adapters(files, model)
    if json_:
        show.json_text(found)
        return
    for each in found:
        typer.echo(f"{each['path']}: {_headline(each)}")
        rows = [("hash", each["hash"]), *each["metadata"].items()]
        rows += [(f"fits {name}", told) for name, told in each["fits"].items()]
        for name, value in rows:
            typer.echo(f"  {name}: {value}")


def _headline(each: dict[str, Any]) -> str:
    parts = [f"{each['kind']} ({', '.join(each['dialects'])})" if each["dialects"] else each["kind"]]
    if each["kind"] == "lora":
        parts[0] = f"{'/'.join(each['algebras'])} ({', '.join(each['dialects'])})"
        parts.append(f"rank {'/'.join(each['ranks']) or 'whole'}")
        parts += [f"alpha {'/'.join(f'{alpha:g}' for alpha in each['alphas'])}"] if each["alphas"] else []
        parts.append(", ".join(f"{count} modules of {network}" for network, count in each["modules"].items()))
    elif each["kind"] == "word":
        for word, places in each["words"].items():
            parts.append(f"{word} = " + ", ".join(f"{k} x {d} for {place}" for place, (k, d) in places.items()))
    else:
        parts.append(f"{each['parameters']} tensors")
    return "; ".join(parts + ([f"made for {each['base']}"] if each["base"] else []))
