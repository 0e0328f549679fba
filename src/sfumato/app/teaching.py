"""Training from recipes and teaching models that exist."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import cards, protocol
from sfumato.errors import UnknownName

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
    out: str | Path | None = None,
    on_progress: Callable[..., None] | None = None,
    **options: Any,
) -> Any:
    """Teach a model that exists by a system of the verb teach; the model itself is not changed.

    Args:
        by: the system with its parameters, as for ``--with``.
        model: a name, a folder, or a loaded model of the kind that the system teaches.
        data: a folder of examples, or "toybox".
        out: a new folder for the taught model.
        on_progress: called with epoch, epochs and what is logged.
        options: what the system takes besides, such as ``per_class`` and ``seed`` of the toybox's examples.

    Returns the system's record; its ``model`` is the taught copy. Raises BadInput, UnknownName, NotSupported.
    """
    key, params = cards.parse_with(by)
    system = cards.method(key)(**params)
    if not isinstance(system, protocol.Teaches):
        raise UnknownName("system that teaches", key, cards.methods("teach"))
    found = system.teach(model, data, on_progress=on_progress, **options)
    if out is not None:
        found.save(out)
    return found
