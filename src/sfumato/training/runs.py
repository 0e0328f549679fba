"""Training runs from recipes: a folder with checkpoints, log and grids; measuring; the export of what was learnt."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sfumato import registry, writing
from sfumato.errors import BadInput, Conflict, UnknownName
from sfumato.models.quiet import quiet
from sfumato.training import checkpoint
from sfumato.training.card import write_card
from sfumato.training.draw import Draw
from sfumato.training.objective import PlayerLoss, build_objective
from sfumato.training.optim import build_optimizer
from sfumato.training.players import Player
from sfumato.training.precision import autocast, wants_bf16
from sfumato.training.processes import processes
from sfumato.training.recipe import Recipe, TrainOptions, load_recipe
from sfumato.training.schedules import warmup_decay
from sfumato.training.trainer import Progress, Trainer

STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass
class RunResult:
    """What a run left behind. ``finished`` is False when time ran out or the run was interrupted; resume goes on."""

    recipe: str
    folder: Path
    step: int
    finished: bool
    interrupted: bool
    seconds: float
    quality: dict[str, float] = field(default_factory=dict)
    exported: Path | None = None
    warnings: list[str] = field(default_factory=list)


def keep_memory() -> None:
    """Asks glibc to keep freed memory: otherwise a tenth and more of a CPU step is spent on page faults."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in ((-1, 2**31 - 1), (-2, 2**28), (-3, 2**25)):  # trim threshold, top pad, mmap threshold
            mallopt(option, size)


def start_folder(name: str) -> Path:
    """The weights that ``init_from`` names: a built-in model, the export of a finished run, or a folder.

    Raises:
        UnknownName: none of them.
    """
    for folder in (registry.find(name), registry.trained().get(name), Path(name)):
        if folder is not None and folder.is_dir():
            return folder
    raise UnknownName("built-in model, finished run or folder", name, [*registry.names(), *registry.trained()])


class _Loss(nn.Module):
    """A player's loss as a module, so that distributed wrappers see parameters and forward."""

    def __init__(self, spec: PlayerLoss, modules: dict[str, nn.Module], bf16: bool, device: str):
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.spec, self.bf16, self.device = spec, bf16, device

    def forward(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(self.device, self.bf16):
            return self.spec.loss(batch, draw)


class TrainingRun:
    """One recipe in ``folder``: the objective, the trainer, and what is kept on disk. See :func:`run` for the usual way
    in."""

    def __init__(self, recipe: Recipe, folder: Path, snapshots: Path | None = None, device: str | None = None):
        self.recipe, self.options, self.folder, self.snapshots = recipe, recipe.train, folder, snapshots
        # launched by torchrun, accelerate finds its ranks in the environment by itself
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        shares = self.accelerator.num_processes * self.options.accumulate
        if self.options.batch % shares:
            raise BadInput(
                f"recipe key train.batch: {self.options.batch} is not divisible by {self.accelerator.num_processes}"
                f" processes with {self.options.accumulate} parts each."
            )
        self.objective = build_objective(recipe)
        if recipe.init_from:
            self.objective.load(start_folder(recipe.init_from))
        self.objective.setup(self.device)
        if self.options.channels_last:
            for module in self.objective.modules.values():
                module.to(memory_format=torch.channels_last)
        players = [self._player(name, spec) for name, spec in self.objective.players().items()]
        self.trainer = Trainer(
            players,
            self._batch,
            seed=recipe.seed,
            accumulate=self.options.accumulate,
            accelerator=self.accelerator,
            name=f"training {recipe.name}",
        )
        self.plans = [self._plan()]

    def _player(self, name: str, spec: PlayerLoss) -> Player:
        o, objective = self.options, self.objective
        modules = {key: objective.modules[key] for key in spec.modules or objective.modules}
        bf16 = wants_bf16(o.precision, self.device.type)
        optimizer = build_optimizer(modules, o, objective.takes_muon, objective.rates)
        loss = self.accelerator.prepare_model(_Loss(spec, modules, bf16, self.device.type))
        schedule = warmup_decay(o.steps, o.warmup, o.decay, o.decay_fraction)
        return Player(loss, optimizer, modules, name=name, schedule=schedule, clip=o.clip, every=spec.every, ema=o.ema)

    def _batch(self, draw: Draw) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in self.objective.batch(draw).items()}

    def _plan(self) -> dict[str, Any]:
        """What a resumed run may change, and from which step on it holds."""
        return {"from_step": self.trainer.step, "train": self.options.model_dump(), "loss": self.recipe.loss}

    # checkpoints ------------------------------------------------------------------------------------------------------
    def save(self) -> None:
        """Writes a checkpoint of everything the next step depends on."""
        if self.main:
            state = {"recipe": self.recipe.model_dump(), "plans": self.plans}
            self.trainer.save(self.folder / "checkpoints", state)

    def restore(self) -> list[str]:
        """Goes back to the newest sound checkpoint, if any; returns warnings about damaged ones.

        Raises:
            Conflict: the checkpoint was made by a recipe with another model, objective or data.
            BadWeights: every checkpoint is damaged, or the tensors do not fit.
        """
        found = checkpoint.load_latest(self.folder / "checkpoints")
        if found is None:
            return []
        tensors, state, warnings = found
        then = Recipe.model_validate(state["recipe"])  # fields that came later have their defaults
        changed = [
            key
            for key in ("name", "objective", "model", "data", "seed")
            if getattr(then, key) != getattr(self.recipe, key)
        ]
        changed += ["train.optimizer"] if then.train.optimizer != self.options.optimizer else []
        if changed:
            raise Conflict(
                f"{self.folder} holds a run with another {', '.join(changed)}; resume needs the same recipe."
            )
        # checkpoints from before there were several players
        tensors = {re.sub(r"^moments\.(?=\d)", "moments.model.", key): value for key, value in tensors.items()}
        self.trainer.restore(tensors, state)
        self.plans = state.get("plans") or [{"from_step": 0, "train": state["recipe"]["train"], "loss": then.loss}]
        last = self.plans[-1]
        if TrainOptions.model_validate(last["train"]) != self.options or last["loss"] != self.recipe.loss:
            self.plans.append(self._plan())
        return warnings

    # the run ----------------------------------------------------------------------------------------------------------
    def fit(self, minutes: float | None, on_progress: Callable[[Progress], None] | None) -> RunResult:
        """Walks the schedule from where it stands to its end, ``minutes`` from now, or an interruption."""
        trainer, options = self.trainer, self.options
        snapshot = time.monotonic()
        self._keep_stage()

        def doing(what: str) -> None:
            if self.main and on_progress:
                on_progress(Progress(trainer.step, options.steps, {}, trainer.seconds, what))

        doing("")

        def after(logs: dict[str, Tensor]) -> None:
            nonlocal snapshot
            self._keep_stage()
            step = trainer.step
            last = step == options.steps
            if last or step == 1 or step % options.log_every == 0:
                values = trainer.scalars(self._over_processes(logs))
                if self.main:
                    self._log({"step": step, "seconds": round(trainer.seconds, 2), **values})
                    if on_progress:
                        on_progress(Progress(step, options.steps, values, trainer.seconds))
            if self.main and (last or step % options.evaluate_every == 0):
                doing("evaluating")
                with trainer.averaged():
                    self._log({"step": step, "quality": self.objective.evaluate()})
            if self.main and (last or step % options.grid_every == 0):
                with trainer.averaged():
                    picture = self.objective.grid()
                if picture:
                    picture.save(self.folder / f"grid_{step:08d}.png")
            if last or step % options.checkpoint_every == 0:
                self.save()
            if self.snapshots and time.monotonic() - snapshot > 60 * options.snapshot_minutes:
                snapshot = time.monotonic()
                self.export(self.snapshots, quality={})

        finished = trainer.walk(options.steps, after, minutes)
        if not finished:
            self.save()
        return RunResult(self.recipe.name, self.folder, trainer.step, finished, trainer.stopped, trainer.seconds)

    def _over_processes(self, logs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of each entry over all processes: the log of the whole batch."""
        if self.accelerator.num_processes == 1:
            return logs
        together = torch.stack([value.detach().float().to(self.device) for value in logs.values()])
        return dict(zip(logs, self.accelerator.reduce(together, "mean"), strict=True))

    def _keep_stage(self) -> None:
        """Keeps the averaged weights as they are now, if the recipe wants a stage here (``train.stages``)."""
        step = self.trainer.step
        if step not in {round(share * self.options.steps) for share in self.options.stages} or not self.main:
            return
        target = self.folder / "stages" / f"step_{step:06d}"
        with writing.atomic_folder(target, replace=True) as beside, self.trainer.averaged():
            self.objective.export(beside)

    def _log(self, entry: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def truncate_log(self) -> None:
        """Drops what the log says of steps behind the present one: they are walked again, and of lines cut short."""
        path = self.folder / "log.jsonl"
        if not self.main or not path.is_file():
            return
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= self.trainer.step:
                    lines.append(line + "\n")
        writing.write_text(path, "".join(lines))

    def measure(self) -> dict[str, float]:
        """The quality of the averaged weights, for the card; main process only."""
        if not self.main:
            return {}
        with self.trainer.averaged():
            return self.objective.measure()

    def export(self, target: Path, quality: dict[str, float]) -> Path | None:
        """Writes the averaged weights with card to ``target``, beside and renamed; main process only."""
        if not self.main:
            return None
        with writing.atomic_folder(target, replace=True) as beside:
            with self.trainer.averaged():
                extra = self.objective.export(beside)
            for stage in sorted((self.folder / "stages").glob("step_*")):
                writing.copy_tree(stage, beside / "stages" / stage.name)
            write_card(beside, self.recipe, self.trainer.step, self.trainer.seconds, self.plans, quality, extra)
        return target


def run(
    recipe: str | Path,
    resume: bool = False,
    minutes: float | None = None,
    out: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    snapshots: Path | None = None,
    device: str | None = None,
) -> RunResult:
    """Trains a recipe (a TOML file or a shipped one by name) and exports the averaged weights when its schedule ends.

    Args:
        resume: go on from the newest sound checkpoint of this recipe; the losses are those of an uninterrupted run.
        minutes: stop after so much time, preparation included, with a resumable checkpoint; at least one step is done.
        out: folder of the exported model; default ``<cache>/runs/<recipe>/export``.
        on_progress: called with a :class:`Progress` before anything is prepared, at the start, after the first step,
            after every logged one, and before whatever else takes its time.
        snapshots: a folder that is replaced by an export of the averaged weights every ``train.snapshot_minutes``.
        device: "cpu" or "cuda"; None: a CUDA device if there is one.

    Raises:
        UnknownName, BadInput: the recipe is not known or not valid.
        Conflict: the run folder already holds a run and ``resume`` was not asked for, or holds another recipe.
        BadWeights: no checkpoint is sound.
    """
    if minutes is not None and not minutes > 0:
        raise BadInput(f"minutes must be above 0, got {minutes}.")
    if device not in (None, "cpu", "cuda"):
        raise BadInput(f"device={device!r}: training takes 'cpu' or 'cuda'; CUDA_VISIBLE_DEVICES chooses among cards.")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("device='cuda' is not available here; use 'cpu', or leave device out.")
    if out is not None:
        writing.only_folder(out, "the files of a model")
    processes()  # refuses a launch that is none
    alone = os.environ.get("RANK", "0") == "0"  # the other processes of one run share its folder
    loaded = load_recipe(recipe)
    folder = registry.cache_folder() / "runs" / loaded.name
    if not resume and checkpoint.listing(folder / "checkpoints"):
        raise Conflict(
            f"{folder} already holds a run of {loaded.name!r}: resume it, or remove the folder to start anew."
        )
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    if on_progress and alone:
        on_progress(Progress(0, loaded.train.steps, {}, 0.0, "preparing"))
    random_state = torch.random.get_rng_state()
    keep_memory()
    try:
        # quiet: what the libraries below say while they load and save is not the user's to act on
        with quiet(), writing.reserved(folder, "this training") if alone else contextlib.nullcontext():
            return _run(TrainingRun(loaded, folder, snapshots, device), resume, begun, minutes, out, on_progress)
    finally:
        torch.random.set_rng_state(random_state)


def _run(
    this: TrainingRun,
    resume: bool,
    begun: float,
    minutes: float | None,
    out: Path | None,
    on_progress: Callable[[Progress], None] | None,
) -> RunResult:
    warnings = this.restore() if resume else []
    this.truncate_log()
    with this.trainer.signals(*STOPS):
        result = this.fit(None if minutes is None else minutes - (time.monotonic() - begun) / 60, on_progress)
    result.warnings = warnings
    if result.finished:
        if this.main and on_progress:
            on_progress(Progress(result.step, this.options.steps, {}, result.seconds, "measuring"))
        result.quality = this.measure()
        result.exported = this.export(out or this.folder / "export", result.quality)
    record = {**asdict(result), "folder": str(this.folder), "exported": str(result.exported or "")}
    writing.write_text(this.folder / "result.json", json.dumps(record, indent=1))
    return result
