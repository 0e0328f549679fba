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
        indices = {str(model): _index(model)}
    return [
        {**each, "fits": {name: fits(str(file), index) for name, index in indices.items()}}
        for file, each in zip(files, found, strict=True)
    ]


def convert(
    source: str | Path, target: str | Path, to: str, model: str | Path | None = None, name: str = ""
) -> list[Path]:
    """Write an adapter's file in another dialect (:func:`sfumato.adapters.convert.convert`); returns the files.

    Args:
        to: ``diffusers``, ``kohya``, ``comfyui``, ``old-diffusers``, ``peft``, ``pivotal`` or ``custom-diffusion``.
        model: the model it is for, where the file's names alone do not tell the places.
        name: of a taught word, another one.
    """
    from sfumato.adapters.convert import convert

    return convert(source, target, to, None if model is None else _index(model), name)


def _index(model: str | Path) -> Any:
    from sfumato.adapters.inspection import index_of_folder

    folder = registry.find(str(model)) or Path(model)
    if (folder / "model_index.json").is_file():
        return index_of_folder(folder)
    from sfumato.adapters.lora import index_of
    from sfumato.app.jobs import load

    return index_of(load(model))
