"""Training from recipes and teaching models that exist."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import cards, protocol, writing
from sfumato.app.arguments import TeachArguments
from sfumato.app.jobs import DEFAULT_MODEL, load
from sfumato.cards.signatures import with_signature
from sfumato.errors import BadInput, NotSupported, UnknownName, WorkInterrupted

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Unpack

    from sfumato.models import Model
    from sfumato.models.readers import Reader
    from sfumato.training import Progress, RunResult


def train(
    recipe: str | Path,
    *,
    resume: bool = False,
    minutes: float | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> RunResult:
    """Train a recipe (a TOML file, or the name of a shipped one) and export the averaged weights at its end.

    Args:
        resume: go on from the newest sound checkpoint; the losses are those of an uninterrupted run.
        minutes: stop after so much time, preparation included, with a resumable checkpoint.
        out: folder of the exported model.
        device: "cpu" or "cuda"; None: a CUDA device if there is one.
        on_progress: called with step, steps, logs, seconds and what is being done, from the first second on.

    Raises:
        UnknownName, BadInput: the recipe is not known or not valid. Conflict: its folder holds a run already.
    """
    from sfumato.training import run

    target = None if out is None else Path(out)
    return run(recipe, resume=resume, minutes=minutes, out=target, device=device, on_progress=on_progress)


@with_signature(TeachArguments, cards.parameters(cards.default("teach")))
def teach(
    data: str | Path,
    *,
    by: str | None = None,
    model: str | Path | Model | Reader = DEFAULT_MODEL,
    dtype: str | None = None,
    device: str = "cpu",
    out: str | Path | None = None,
    resume: bool = False,
    minutes: float | None = None,
    per_class: int | None = None,
    config: str | Path | None = None,
    on_progress: Callable[[int, int, dict[str, float]], None] | None = None,
    **given: Unpack[TeachArguments],
) -> protocol.TeachingResult:
    """Teach a model that exists by a system of the verb teach; the model itself is not changed.

    Parameters that are not given are those that the model's card advises for the system (``teaching``), if any, else
    the system's own.

    Args:
        data: a folder of pictures, or what else the system takes, such as "toybox".
        by: the system with its parameters, as for ``--with``; None: a new word.
        model: a name, a folder, or a loaded model of the kind that the system teaches.
        dtype, device: of a model that is loaded here, as for ``make``; what learns is in full precision in any case.
            With "cuda" each of several processes takes a card of its own.
        out: where the result goes: an adapter's .safetensors file, or the new folder of a taught model. While it runs,
            the folder ``<out>.training`` beside it holds its checkpoints.
        resume: go on from them; the losses are those of an uninterrupted run.
        minutes: stop after so much time, with a checkpoint.
        on_progress: called with steps done, steps in all and what is logged.
        per_class: with "toybox": how many pictures of each shape.
        config: for a model that is a single file: a diffusers folder with its configuration and missing parts.
        given: parameters of the system that ``by`` does not have yet (those of the default one are shown).

    Raises BadInput, UnknownName, NotSupported, Conflict; WorkInterrupted for a run that
    was stopped and can be resumed, whose ``result`` is the record.
    """
    key, params = cards.parse_with(by or cards.default("teach"))
    cls = cards.method(key)
    fields = cls.Params.model_fields
    values: dict[str, Any] = {**given} | ({} if per_class is None else {"per_class": per_class})
    params |= {name: value for name, value in values.items() if name in fields}
    options = {name: value for name, value in values.items() if name not in fields}
    system = cls(**params)
    if not isinstance(system, protocol.Teaches):
        raise UnknownName("system that teaches", key, cards.methods("teach"))
    if minutes is not None and not minutes > 0:
        raise BadInput(f"minutes must be above 0, got {minutes}.")
    if not system.RESUMES:
        if resume or minutes is not None:
            raise NotSupported(f"{key} keeps no checkpoints: leave resume and minutes out.")
        if dtype is not None or device != "cpu" or config is not None:
            raise NotSupported(f"{key} teaches a model as it was loaded: leave dtype, device and config out.")
        known = [*fields, *(set(inspect.signature(system.teach).parameters) - {"model", "data", "on_progress"})]
        if odd := [name for name in options if name not in known]:
            raise UnknownName(f"parameter of {key}", odd[0], known)
        if out is not None:
            writing.refuse_filled(writing.only_folder(out, "the files of a model"))
        taught = system.teach(model, data, on_progress=on_progress, **options)
        if out is not None:
            taught.save(out)
        return taught
    if options:
        raise UnknownName(f"parameter of {key}", next(iter(options)), fields)
    target = None if out is None else fresh(Path(out))
    if resume and target is None:
        raise BadInput("resume needs out: the run's checkpoints are beside it.")
    from sfumato.training.processes import processes

    processes()  # refuses a launch that is none before anything is loaded
    folder = None if target is None else target.with_name(f"{target.name}.training")
    if resume and folder is not None and not folder.is_dir():
        raise BadInput(f"there is nothing to resume: there is no {folder}.")
    work = protocol.Work(folder, resume, minutes, on_progress)
    if not isinstance(model, str | Path) and (dtype is not None or device != "cpu" or config is not None):
        raise BadInput("dtype, device and config are for a model that is loaded here; this one was loaded before.")
    if device == "cuda" and (rank := os.environ.get("LOCAL_RANK")):
        device = f"cuda:{rank}"
    loaded = load(model, dtype, device, config=config) if isinstance(model, str | Path) else model

    from sfumato.sampling.intervention import refuse_unfit

    refuse_unfit([system], loaded)
    if advised := getattr(loaded, "card", {}).get("teaching", {}).get(key):
        system = cls(**{**advised, **params})
    with work.alone():
        if target is not None and work.first:
            fresh(target)  # once more: another run of that name may have ended in the meantime
        learnt: Any = system.teach(loaded, data, work=work)
        if learnt.interrupted:
            where = f"; {folder} holds the checkpoint, go on with --resume" if folder else ""
            error = WorkInterrupted(f"stopped after step {learnt.step}{where}.")
            error.result = learnt
            raise error
        if target is not None and work.first:
            learnt.files = learnt.save(target)
            work.remove()
    return learnt


def fresh(target: Path) -> Path:
    """A path for a file that is not there yet, in a folder that can be written to. Raises BadInput."""
    if target.suffix != ".safetensors":
        raise BadInput(f"-o {str(target)!r} must end in .safetensors: that is what every program reads.")
    from sfumato.adapters.naming import word_beside

    if there := next((path for path in (target, word_beside(target)) if path.exists()), None):
        raise BadInput(f"{there} exists; name a new file.")
    if not target.absolute().parent.is_dir():
        raise BadInput(f"-o {str(target)!r}: there is no folder {target.absolute().parent}; make it first.")
    return target
