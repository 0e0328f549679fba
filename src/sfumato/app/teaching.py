"""Training from recipes and teaching models that exist."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import cards
from sfumato.errors import NotSupported, UnknownName

if TYPE_CHECKING:
    from collections.abc import Callable


def train(
    recipe: str | Path,
    *,
    resume: bool = False,
    minutes: float | None = None,
    out: str | Path | None = None,
    on_progress: Callable[..., Any] | None = None,
) -> Any:
    """Train a recipe (a TOML file, or the name of a shipped one) and export the averaged weights at its end.

    Args:
        resume: go on from the newest sound checkpoint; the losses are those of an uninterrupted run.
        minutes: stop after so much time with a resumable checkpoint.
        out: folder of the exported model.
        on_progress: called with step, steps, logs and seconds after every logged step.

    Raises:
        UnknownName, BadInput: the recipe is not known or not valid. Conflict: its folder holds a run already.
    """
    from sfumato.training import run

    return run(recipe, resume=resume, minutes=minutes, out=None if out is None else Path(out), on_progress=on_progress)


def teach(
    by: str,
    model: str | Path | Any,
    data: str | Path = "toybox",
    *,
    per_class: int = 3,
    seed: int = 0,
    out: str | Path | None = None,
    on_progress: Callable[..., None] | None = None,
) -> Any:
    """Teach a classifier better habits from a few masked pictures, by a system such as ``robust_vit``.

    Args:
        by: the system, as for ``--with`` (``"robust_vit:lr=3e-5,epochs=30"``).
        model: a built-in name, a transformers folder, or a :class:`~sfumato.models.readers.Reader`; it is not changed.
        data: an imagefolder whose ``metadata.jsonl`` names ``file_name``, ``mask`` and ``label``, or "toybox": pictures
            whose backdrop gives the shape away, ``per_class`` of each drawn by ``seed``.
        out: a new folder for the taught model.
        on_progress: called with epoch, epochs and what is logged.

    Returns the system's record; its ``model`` is the taught copy. Raises BadInput, UnknownName, NotSupported.
    """
    from sfumato.models.readers import load_reader
    from sfumato.teach.examples import read_examples, toybox_examples

    key, params = cards.parse_with(by)
    system = cards.method(key)(**params)
    work = getattr(importlib.import_module(type(system).__module__), "teach", None)
    if work is None or type(system).CARD.verb != "teach":  # type: ignore[attr-defined]
        raise UnknownName("system that teaches", key, cards.methods("teach"))
    reader = load_reader(model) if isinstance(model, str | Path) else model
    if reader.kind != "classifier" or reader.preprocessing.size is None:
        raise NotSupported(f"{key} teaches classifiers of pictures; {reader.name} is none.")
    if str(data) == "toybox":
        examples, held = toybox_examples(per_class, seed), toybox_examples(per_class, seed, "val")
        validation = (reader.pixels(held.pictures), held.masks, held.labels)
    else:
        examples, validation = read_examples(data, reader.preprocessing.size), None
    given = system.params.model_dump()
    pixels = reader.pixels(examples.pictures)
    found = work(
        reader.module, pixels, examples.masks, examples.labels, validation=validation, on_progress=on_progress, **given
    )
    found.facts |= {"model": reader.name, "data": str(data), "labels": list(examples.labels)}
    if out is not None:
        found.save(out)
    return found
