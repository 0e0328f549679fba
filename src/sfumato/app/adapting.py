"""Adapters: what files hold, and which models they fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfumato import registry


def adapters(files: Sequence[str | Path], model: str | Path | None = None) -> list[dict[str, Any]]:
    """What each file holds (see :func:`sfumato.adapters.inspection.described`), with ``fits``: model -> in a few words
    whether it fits, for the built-in models that draw pictures, or for ``model`` alone.

    Raises BadInput for a file that is missing, BadWeights for pickles and damaged ones, and for ``model`` whatever
    :func:`load` raises.
    """
    from sfumato.adapters.inspection import described, fits, index_of_folder

    found = [described(str(file)) for file in files]
    if model is None:
        built_in = {name: registry.folder() / name for name in registry.names()}
        drawing = {name: folder for name, folder in built_in.items() if (folder / "model_index.json").is_file()}
        indices = {name: index_of_folder(folder) for name, folder in drawing.items()}
    else:
        folder = registry.find(str(model)) or Path(model)
        if (folder / "model_index.json").is_file():
            indices = {str(model): index_of_folder(folder)}
        else:
            from sfumato.adapters.lora import index_of
            from sfumato.app.jobs import load

            indices = {str(model): index_of(load(model))}
    return [
        {**each, "fits": {name: fits(str(file), index) for name, index in indices.items()}}
        for file, each in zip(files, found, strict=True)
    ]
