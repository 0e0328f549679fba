"""Adapters: what files hold, and which models they fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfumato import registry
from sfumato.errors import BadInput


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
    source: str | Path, target: str | Path, to: str, model: str | Path | Any | None = None, name: str = ""
) -> list[Path]:
    """Write an adapter's file in another dialect (:func:`sfumato.adapters.convert.convert`); returns the files.

    Args:
        to: a dialect of :data:`sfumato.adapters.convert.DIALECTS`, such as ``diffusers`` or ``kohya``;
            ``checkpoint``: the whole ``model`` with the adapter in its weights, as one file.
        model: the model it is for, where the file's names alone do not tell the places.
        name: of a taught word, another one.
    """
    from sfumato.adapters.convert import convert

    if to == "checkpoint":
        return [_checkpoint(source, target, model)]
    return convert(source, target, to, None if model is None else _index(model), name)


def _checkpoint(source: str | Path, target: str | Path, model: Any) -> Path:
    from sfumato import cards
    from sfumato.adapters.checkpoint import save_checkpoint
    from sfumato.adapters.formats import find_file, read_contents
    from sfumato.app.jobs import load

    if model is None:
        raise BadInput("a checkpoint is a whole model: say which model the adapter goes into, with --model.")
    kind = read_contents(find_file(str(source))).kind
    keys = [key for key in cards.methods("adapters") if getattr(cards.method(key), "kind", "") == kind]
    if not keys:
        raise BadInput(f"{source} is no adapter that can be merged into a model.")
    loaded = load(model) if isinstance(model, str | Path) else model
    merged = cards.method(keys[0])(file=str(source)).merge(loaded)
    try:
        return save_checkpoint(loaded, target)
    finally:
        merged.undo()


def _index(model: str | Path | Any) -> Any:
    from sfumato.adapters.inspection import index_of_folder

    if not isinstance(model, str | Path):
        from sfumato.adapters.lora import index_of

        return index_of(model)
    folder = registry.find(str(model)) or Path(model)
    if (folder / "model_index.json").is_file():
        return index_of_folder(folder)
    from sfumato.adapters.lora import index_of
    from sfumato.app.jobs import load

    return index_of(load(model))
