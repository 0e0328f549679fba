"""The one trainer: reads a recipe, walks its schedule, can stop anywhere and go on to the same losses."""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato import registry
from sfumato.errors import BadInput, BadWeights, Conflict, UnknownName
from sfumato.models.precision import fast_bf16
from sfumato.training import checkpoint
from sfumato.training.card import write_card
from sfumato.training.objective import Draw, Objective, build_objective
from sfumato.training.optim import build_optimizer
from sfumato.training.recipe import Recipe, TrainOptions, load_recipe


@dataclass(frozen=True)
class Progress:
    """Told after every logged step: where the run is and what it sees."""

    step: int
    steps: int
    logs: dict[str, float]
    seconds: float


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
    complaints: list[str] = field(default_factory=list)


def rate(step: int, options: TrainOptions) -> float:
    """The learning rate at ``step`` as a share of its peak."""
    up = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
    done = min(1.0, max(0.0, (step - options.warmup) / max(1, options.steps - options.warmup)))
    down = {
        "none": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1 + cos(pi * done)),
        "wsd": min(1.0, (1 - done) / options.decay_fraction),
    }[options.decay]
    return up * down


class ExplicitAttention(TorchFunctionMode):
    """Within: attention as two products and a softmax.

    In bfloat16 on a CPU the backward pass of the fused kernel takes four times as long as that of this one.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and not self._special(kwargs):
            query, key, value = args
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            return ((query * scale) @ key.transpose(-1, -2)).softmax(-1).to(value.dtype) @ value
        return func(*args, **kwargs)

    def _special(self, kwargs: dict[str, Any]) -> bool:
        mask, dropout, causal = (kwargs.get(key) for key in ("attn_mask", "dropout_p", "is_causal"))
        return mask is not None or bool(dropout) or bool(causal) or bool(kwargs.get("enable_gqa"))


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
    """The objective's loss as a module, so that distributed wrappers see parameters and forward."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.parts = nn.ModuleDict(objective.modules)
        self.objective = objective

    def forward(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.loss(batch, draw)


class Trainer:
    """Trains ``recipe`` in ``folder`` (checkpoints, log, grids). See :func:`run` for the usual way in."""

    def __init__(self, recipe: Recipe, folder: Path, snapshots: Path | None = None):
        self.recipe, self.options, self.folder, self.snapshots = recipe, recipe.train, folder, snapshots
        # launched by torchrun, accelerate finds its ranks in the environment by itself
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.device = self.accelerator.device
        wanted = self.options.precision
        self.bf16 = wanted == "bf16" or (wanted == "auto" and fast_bf16(self.device.type))
        if self.options.batch % self.accelerator.num_processes:
            raise BadInput(
                f"recipe key train.batch: {self.options.batch} is not divisible by"
                f" {self.accelerator.num_processes} processes."
            )
        self.objective = build_objective(recipe)
        if recipe.init_from:
            self.objective.load(start_folder(recipe.init_from))
        self.objective.setup(self.device)
        if self.options.channels_last:
            for module in self.objective.modules.values():
                module.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.objective, self.options, torch.bfloat16 if self.bf16 else torch.float32)
        self.model = self.accelerator.prepare_model(_Loss(self.objective))
        self.average = {key: value.detach().clone() for key, value in self._parameters()} if self.options.ema else {}
        self.step, self.seconds = 0, 0.0
        self.plans = [self._plan()]
        self._stop = threading.Event()

    def _plan(self) -> dict[str, Any]:
        """What a resumed run may change, and from which step on it holds."""
        return {"from_step": self.step, "train": self.options.model_dump(), "loss": self.recipe.loss}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, module in self.objective.modules.items():
            for key, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{name}.{key}", parameter

    # one step ---------------------------------------------------------------------------------------------------------
    def train_step(self) -> dict[str, Tensor]:
        """One optimiser step; returns its log scalars."""
        draw = Draw(self.recipe.seed, self.step, self.accelerator.process_index, self.accelerator.num_processes)
        torch.manual_seed(draw.number("global"))  # dropout and the like; the noise has generators of its own
        share = rate(self.step, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["peak"]
        batch = {key: value.to(self.device) for key, value in self.objective.batch(draw).items()}
        explicit = ExplicitAttention() if self.bf16 and self.device.type == "cpu" else contextlib.nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), explicit:
            loss, logs = self.model(batch, draw)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_([p for _, p in self._parameters()], self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average:
            weight = max(1 - self.options.ema, 9 / (9 + self.step))  # a young average follows more closely
            values = [p.detach() for _, p in self._parameters()]
            torch._foreach_lerp_(list(self.average.values()), values, weight)
        return {"loss": loss.detach(), "norm": norm, "rate": torch.tensor(share), **logs}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within: the averaged weights, eval mode, no gradients. Afterwards everything is as it was."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            live = {key: p.detach().clone() for key, p in self._parameters()} if self.average else {}
            modes = {name: module.training for name, module in self.objective.modules.items()}
            for key, p in self._parameters() if self.average else ():
                p.copy_(self.average[key])
            try:
                for module in self.objective.modules.values():
                    module.eval()
                yield
            finally:
                for key, p in self._parameters() if self.average else ():
                    p.copy_(live[key])
                for name, module in self.objective.modules.items():
                    module.train(modes[name])

    # checkpoints ------------------------------------------------------------------------------------------------------
    def save(self) -> None:
        """Writes a checkpoint of everything the next step depends on."""
        if not self.accelerator.is_main_process:
            return
        tensors = {
            f"weights.{name}.{k}": v for name, m in self.objective.modules.items() for k, v in m.state_dict().items()
        }
        tensors |= {f"average.{key}": value for key, value in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"moments.{index}.{key}": value for key, value in state.items()}
        tensors = {key: value.detach().cpu().clone() for key, value in tensors.items()}  # tied weights may share memory
        state = {"recipe": self.recipe.model_dump(), "seconds": self.seconds, "plans": self.plans}
        checkpoint.save(self.folder / "checkpoints", self.step, tensors, state)

    def restore(self) -> list[str]:
        """Goes back to the newest sound checkpoint, if any; returns complaints about damaged ones.

        Raises:
            Conflict: the checkpoint was made by a recipe with another model, objective or data.
            BadWeights: every checkpoint is damaged, or the tensors do not fit.
        """
        found = checkpoint.load_latest(self.folder / "checkpoints")
        if found is None:
            return []
        tensors, state, complaints = found
        now = self.recipe.model_dump()
        changed = [key for key in ("name", "objective", "model", "data", "seed") if state["recipe"][key] != now[key]]
        changed += ["train.optimizer"] if state["recipe"]["train"]["optimizer"] != self.options.optimizer else []
        if changed:
            raise Conflict(
                f"{self.folder} holds a run with another {', '.join(changed)}; resume needs the same recipe."
            )
        try:
            for name, module in self.objective.modules.items():
                head = f"weights.{name}."
                module.load_state_dict({k[len(head) :]: v for k, v in tensors.items() if k.startswith(head)})
            for key in self.average:
                self.average[key].copy_(tensors[f"average.{key}"])
        except (RuntimeError, KeyError) as error:
            raise BadWeights(f"the checkpoint in {self.folder} does not fit the recipe: {error}") from None
        packed = self.optimizer.state_dict()
        packed["state"] = {}
        for key, value in tensors.items():
            if key.startswith("moments."):
                _, index, entry = key.split(".", 2)
                packed["state"].setdefault(int(index), {})[entry] = value
        self.optimizer.load_state_dict(packed)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.plans = state.get("plans") or [
            {"from_step": 0, "train": state["recipe"]["train"], "loss": state["recipe"]["loss"]}
        ]
        now_planned = self._plan()
        if {**self.plans[-1], "from_step": self.step} != now_planned:
            self.plans.append(now_planned)
        return complaints

    # the run ----------------------------------------------------------------------------------------------------------
    def fit(self, minutes: float | None, on_progress: Callable[[Progress], None] | None) -> RunResult:
        """Walks the schedule from where it stands to its end, ``minutes`` from now, or an interruption."""
        start, before = time.monotonic(), self.seconds
        snapshot = start
        main = self.accelerator.is_main_process
        self._keep_stage()
        while self.step < self.options.steps and not self._over(start, minutes):
            logs = self.train_step()
            self._keep_stage()
            self.seconds = before + time.monotonic() - start
            last = self.step == self.options.steps
            if last or self.step % self.options.log_every == 0:
                values = {key: float(value) for key, value in logs.items()}
                if not isfinite(values["loss"]):
                    raise BadInput(
                        f"training {self.recipe.name} diverged at step {self.step}: lower train.lr in the recipe."
                    )
                if main:
                    self._log({"step": self.step, "seconds": round(self.seconds, 2), **values})
                    if on_progress:
                        on_progress(Progress(self.step, self.options.steps, values, self.seconds))
            if main and (last or self.step % self.options.evaluate_every == 0):
                with self.averaged():
                    self._log({"step": self.step, "quality": self.objective.evaluate()})
            if main and (last or self.step % self.options.grid_every == 0):
                with self.averaged():
                    picture = self.objective.grid()
                if picture:
                    picture.save(self.folder / f"grid_{self.step:08d}.png")
            if last or self.step % self.options.checkpoint_every == 0:
                self.save()
            if self.snapshots and time.monotonic() - snapshot > 60 * self.options.snapshot_minutes:
                snapshot = time.monotonic()
                self.export(self.snapshots, quality={})
        finished = self.step == self.options.steps
        if not finished:
            self.save()
        return RunResult(self.recipe.name, self.folder, self.step, finished, self._stop.is_set(), self.seconds)

    def _keep_stage(self) -> None:
        """Keeps the averaged weights as they are now, if the recipe wants a stage here (``train.stages``)."""
        wanted = {round(share * self.options.steps) for share in self.options.stages}
        if self.step not in wanted or not self.accelerator.is_main_process:
            return
        target = self.folder / "stages" / f"step_{self.step:06d}"
        beside = target.with_name(f".writing_{target.name}")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        with self.averaged():
            self.objective.export(beside)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)

    def _over(self, start: float, minutes: float | None) -> bool:
        over = self._stop.is_set() or (minutes is not None and time.monotonic() - start > 60 * minutes)
        if self.accelerator.num_processes > 1:  # all ranks leave at the same step
            flag = torch.tensor([float(over)], device=self.device)
            over = bool(self.accelerator.reduce(flag, "sum").item())
        return over

    def _log(self, entry: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def export(self, target: Path, quality: dict[str, float]) -> Path | None:
        """Writes the averaged weights with card to ``target``, beside and renamed; main process only."""
        if not self.accelerator.is_main_process:
            return None
        beside = target.with_name(f".{target.name}.writing")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            with self.averaged():
                extra = self.objective.export(beside)
            for stage in sorted((self.folder / "stages").glob("step_*")):
                shutil.copytree(stage, beside / "stages" / stage.name)
            write_card(beside, self.recipe, self.step, self.seconds, self.plans, quality, extra)
            shutil.rmtree(target, ignore_errors=True)
            beside.rename(target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return target

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within: Ctrl-C and SIGTERM ask the run to stop after the current step and save."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {s: signal.signal(s, lambda *_: self._stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for which, handler in old.items():
                signal.signal(which, handler)


def run(
    recipe: str | Path,
    resume: bool = False,
    minutes: float | None = None,
    out: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    snapshots: Path | None = None,
) -> RunResult:
    """Trains a recipe (a TOML file or a shipped one by name) and exports the averaged weights when its schedule ends.

    Args:
        resume: go on from the newest sound checkpoint of this recipe; the losses are those of an uninterrupted run.
        minutes: stop after so much time with a resumable checkpoint.
        out: folder of the exported model; default ``<cache>/runs/<recipe>/export``.
        on_progress: called with a :class:`Progress` after every logged step.
        snapshots: a folder that is replaced by an export of the averaged weights every ``train.snapshot_minutes``.

    Raises:
        UnknownName, BadInput: the recipe is not known or not valid.
        Conflict: the run folder already holds a run and ``resume`` was not asked for, or holds another recipe.
        BadWeights: no checkpoint is sound.
    """
    if minutes is not None and not minutes > 0:
        raise BadInput(f"minutes must be above 0, got {minutes}.")
    loaded = load_recipe(recipe)
    folder = registry.cache_folder() / "runs" / loaded.name
    if not resume and checkpoint.listing(folder / "checkpoints"):
        raise Conflict(
            f"{folder} already holds a run of {loaded.name!r}: resume it, or remove the folder to start anew."
        )
    folder.mkdir(parents=True, exist_ok=True)
    random_state = torch.random.get_rng_state()
    keep_memory()
    try:
        trainer = Trainer(loaded, folder, snapshots)
        complaints = trainer.restore() if resume else []
        with trainer.signals():
            result = trainer.fit(minutes, on_progress)
        result.complaints = complaints
        if result.finished:
            with trainer.averaged():
                result.quality = trainer.objective.measure() if trainer.accelerator.is_main_process else {}
            result.exported = trainer.export(out or folder / "export", result.quality)
        record = {**asdict(result), "folder": str(folder), "exported": str(result.exported or "")}
        (folder / "result.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        return result
    finally:
        torch.random.set_rng_state(random_state)
