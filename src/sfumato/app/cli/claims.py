"""Measure the claims again; options are those of `python -m claims` (needs the repository, not only the package)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sfumato.app.cli.commands import command
from sfumato.errors import NotSupported


@command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def claims(
    context: typer.Context,
    keys: Annotated[list[str] | None, typer.Argument(help="Which claims; all when none is named.")] = None,
) -> None:
    import runpy

    root = next(
        (folder for folder in (Path.cwd(), Path(__file__).parents[4]) if (folder / "claims" / "__main__.py").is_file()),
        None,
    )
    if root is None:
        raise NotSupported(
            "claims are part of the repository, not of the installed package: clone it and run this inside."
        )
    sys.path.insert(0, str(root))
    arguments, sys.argv = sys.argv, ["claims", *(keys or []), *context.args]
    try:
        runpy.run_module("claims", run_name="__main__")
    finally:
        sys.argv = arguments
        sys.path.remove(str(root))
