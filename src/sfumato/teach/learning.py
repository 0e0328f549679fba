"""A run that teaches: its folder, which only one run may use at a time, its checkpoints, its log, and when to stop."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato import valid, writing
from sfumato.errors import BadInput, Conflict, NotSupported
from sfumato.models import Model
from sfumato.protocol import Work
from sfumato.training import BestTensors, FitResult, Player, Progress, checkpoint, fit
from sfumato.training.processes import processes

__all__ = ["learn", "recomputed", "refuse_other_run", "run_settings", "several_processes"]


@contextlib.contextmanager
def opened(work: Work, settings: Mapping[str, Any]) -> Iterator[Path | None]:
    """Within: the folder of the checkpoints is this run's alone; None where nothing is kept.

    Raises Conflict where another process is in it, where it holds a run and ``resume`` was not asked for, or a run with
    other ``settings`` (JSON values); BadInput where there is nothing to resume.
    """
    if work.folder is None or not work.first:  # of several processes the first one looks
        yield None if work.folder is None else work.folder / "checkpoints"
        return
    record, checkpoints = work.folder / "run.json", work.folder / "checkpoints"
    with work.alone():
        refuse_other_run(work, settings)
        if not work.resume:
            writing.write_text(record, valid.json_text(dict(settings), indent=1))
        try:
            yield checkpoints
        except BaseException:
            if not checkpoint.listing(checkpoints):  # nothing is kept: the next one may begin with other settings
                shutil.rmtree(checkpoints, ignore_errors=True)
                record.unlink(missing_ok=True)
            raise


def run_settings(system: Any, model: Model, **data: Any) -> dict[str, Any]:
    """What a run is told by when it is resumed: the system with its parameters, the model, and ``data``, what it learns
    from (JSON values)."""
    params = system.params.model_dump(mode="json")
    return {"method": system.CARD.key, "params": params, "model": model.weight_hash, **data}


def refuse_other_run(work: Work, settings: Mapping[str, Any]) -> None:
    """Raises what :func:`opened` does for what is in the folder, before anything slow is done for it."""
    if work.folder is None or not work.first:
        return
    record = work.folder / "run.json"
    if work.resume and not record.is_file():
        raise BadInput(f"there is nothing to resume: {work.folder} holds no run.")
    if record.is_file() and not work.resume:
        raise Conflict(f"{work.folder} holds a run that was not finished: give --resume, or remove the folder.")
    if work.resume:
        _same(record, json.loads(json.dumps(dict(settings))))


def _same(record: Path, now_settings: dict[str, Any]) -> None:
    try:
        before = valid.loads(record.read_bytes())
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise Conflict(f"{record} is damaged, so its run cannot be resumed; remove {record.parent} to begin anew.")
    other = [name for name in now_settings if before.get(name) != now_settings[name]]
    if other:
        name = other[0]
        was, now = before.get(name), now_settings[name]
        if isinstance(was, dict) and isinstance(now, dict):
            name = next(key for key in {**was, **now} if was.get(key) != now.get(key))
            was, now = was.get(name), now.get(name)
        raise Conflict(
            f"{record.parent} holds a run with another {name} ({was!r}, now {now!r}): ask for the same, or remove the "
            "folder to begin anew."
        )


@contextlib.contextmanager
def recomputed(model: Any, wanted: bool) -> Iterator[None]:
    """Within: the denoiser keeps no activations and computes them anew on the way back, if that is ``wanted``. Raises
    NotSupported for one that cannot."""
    if not wanted:
        yield
        return
    denoiser = model.denoiser
    if not getattr(denoiser, "_supports_gradient_checkpointing", False):
        raise NotSupported(f"{model.name} cannot recompute activations: leave checkpointing out.")
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()


@dataclass
class LearnResult:
    """What :func:`learn` did. ``log``: figures of every step; ``measured``: what was measured, by step; ``enough``: it
    ended, on its last step or because there was no more progress, rather than being stopped."""

    fitted: FitResult
    log: list[dict[str, float]]
    measured: list[dict[str, float]]
    enough: bool


def several_processes(device: torch.device) -> Any:
    """accelerate's accelerator for tensors on ``device`` where several processes were launched, else None."""
    if processes() < 2:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def learn(
    player: Player,
    steps: int,
    *,
    name: str,
    work: Work,
    settings: Mapping[str, Any],
    best: BestTensors | None = None,
    measure: Callable[[int], dict[str, float]] | None = None,
    every: int = 50,
    patience: int = 0,
    accumulate: int = 1,
    seed: int = 0,
    after: Callable[[int], dict[str, float]] | None = None,
    stop: Callable[[int], bool] | None = None,
    checkpoint_every: int = 100,
) -> LearnResult:
    """Lets ``player`` learn for ``steps`` steps, with the folder and the limits of ``work``.

    Args:
        settings: what must be the same when a run is resumed.
        best, measure: given together, or neither: what is measured at a step, every ``every`` steps; "probe" of it is
            the figure that is to be low, and ``best`` keeps what is best by it; with ``patience`` the run ends when so
            many measurements in a row were no better. The best are put in place.
        after: called after each step with the number of steps done; returns further entries of the log.
        stop: called after each step (after ``after``): whether to end here.

    Raises Conflict (see :func:`opened`), BadInput for a loss that is not finite.
    """
    state: dict[str, Any] = {"log": [], "figures": [], "measured": []}
    accelerator = several_processes(next(iter(player.parameters.values())).device)
    main = accelerator is None or accelerator.is_main_process
    over, begun = False, False

    def look(best: BestTensors, step: int) -> float:
        """Measures, keeps the tensors if they are the best, and returns the figure."""
        assert measure is not None
        found = measure(step)
        best.measured(step, found["probe"])
        state["figures"] = best.figures
        state["measured"].append({"step": step, **found})
        return found["probe"]

    def begin() -> None:
        """Takes the figures of the checkpoint, if there was one."""
        nonlocal begun
        if best is not None and not begun:
            best.figures = [(int(step), float(value)) for step, value in state["figures"]]
        begun = True

    def progressed(progress: Progress) -> None:
        nonlocal over
        begin()
        entry = {"step": float(progress.step), **progress.logs}
        if after is not None:
            entry |= after(progress.step)
        last = progress.step == steps
        if best is not None and (progress.step % every == 0 or last):
            entry["probe"] = look(best, progress.step)
            over = bool(patience) and best.over(patience)
        state["log"].append(entry)
        if work.on_progress is not None and main:
            work.on_progress(progress.step, steps, {**entry})

    def ended(progress: Progress) -> bool:
        return over or (stop is not None and stop(progress.step))

    with opened(work, settings) as folder:
        if best is not None:
            look(best, 0)
        fitted = fit(
            player, steps, seed=seed, accumulate=accumulate, minutes=work.minutes, on_progress=progressed, stop=ended,
            stays=True, folder=folder, checkpoint_every=checkpoint_every, state=state, accelerator=accelerator,
            name=name,
        )  # fmt: skip
    begin()  # where all was learnt already
    if best is not None:
        best.take()
    return LearnResult(fitted, state["log"], state["measured"], fitted.finished or fitted.ended)
