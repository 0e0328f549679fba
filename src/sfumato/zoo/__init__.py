"""The built-in models: names, folders, recipes. Nothing heavy is imported here.

Weights live in ``weights/<name>/`` in the standard folder formats of diffusers and transformers, each with a card
``sfumato.json`` and a ``MODEL_CARD.md``; recipes that reproduce them in ``recipes/<name>.toml``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


def folder() -> Path:
    """The folder that holds the weights of all built-in models."""
    return _HERE / "weights"


def names() -> list[str]:
    """Names of the built-in models whose weights are present, sorted."""
    if not folder().is_dir():
        return []
    return sorted(path.name for path in folder().iterdir() if (path / "sfumato.json").is_file())


def find(name: str) -> Path | None:
    """The folder of the built-in model ``name``, or None when there is no such model."""
    return folder() / name if name in names() else None


def card(name: str) -> dict[str, Any]:
    """The card of a built-in model: recipe, data, measured quality, sampling defaults.

    Raises:
        UnknownName: no built-in model has this name.
    """
    path = find(name)
    if path is None:
        from sfumato.errors import UnknownName

        raise UnknownName("built-in model", name, names())
    return json.loads((path / "sfumato.json").read_text(encoding="utf-8"))


def cache_folder() -> Path:
    """Where training runs and caches live: ``$SFUMATO_CACHE`` or ``~/.cache/sfumato``."""
    return Path(os.environ.get("SFUMATO_CACHE") or Path.home() / ".cache" / "sfumato")


def trained() -> dict[str, Path]:
    """The exports of finished training runs in the cache: name -> folder."""
    return {path.parent.parent.name: path.parent for path in sorted(cache_folder().glob("runs/*/export/sfumato.json"))}


def recipes() -> dict[str, Path]:
    """The shipped training recipes: name -> TOML file."""
    return {path.stem: path for path in sorted((_HERE / "recipes").glob("*.toml"))}
