"""The one loop of everything that learns: players take turns until their steps are done, time is up or somebody stops.

    >>> net = nn.Linear(3, 1)
    >>> def loss(draw):
    ...     rows = draw.indices(len(x), 8)
    ...     return F.mse_loss(net(x[rows]), y[rows])
    >>> fit(Player(loss, torch.optim.Adam(net.parameters(), lr=1e-2), net), steps=200)

Two networks that learn from each other are two players, with the step's batch made once for both:

    >>> critic = Player(critic_loss, torch.optim.Adam(d.parameters(), lr=4e-4), d, name="critic")
    >>> generator = Player(generator_loss, torch.optim.Adam(g.parameters(), lr=1e-4), g, name="generator", ema=0.999)
    >>> fit([critic, generator], steps=1000, data=lambda draw: pictures[draw.indices(len(pictures), 16)])

Recipes (:mod:`sfumato.training.runs`) walk by the same :class:`Trainer`, with a folder for checkpoints, log and grids.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput, BadWeights
from sfumato.interrupts import raise_if_asked
from sfumato.training import checkpoint
from sfumato.training.draw import Draw
from sfumato.training.players import Player


@dataclass(frozen=True)
class Progress:
    """Where a training is after a logged step, and what its losses are. ``doing``: what it does now besides steps, such
    as "preparing"."""

    step: int
    steps: int
    logs: dict[str, float]
    seconds: float
    doing: str = ""


@dataclass
class FitResult:
    """What :func:`fit` did. ``finished`` is False where it was stopped before its last step; what was learnt until then
    is in place. ``ended``: because ``stop`` said so, also before a checkpoint that it went on from. ``history``: every
    logged step with its scalars."""

    step: int
    finished: bool
    interrupted: bool
    seconds: float
    ended: bool = False
    history: list[Progress] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Trainer:
    """Walks ``players`` through their steps, one turn each, in order.

    Args:
        data: makes the step's batch from its :class:`Draw`; players' losses get it as their first argument.
        seed: of the draws.
        accumulate: parts that each step's batch is cut into, whose gradients are added up: each part is a draw of its
            own, with a share of ``Draw.indices``.
        accelerator: accelerate's, where several processes train.
        averages: gradients are averaged over the processes here, because no loss is one of accelerate's modules.
        name: for messages.
    """

    def __init__(
        self,
        players: Player | Sequence[Player],
        data: Callable[[Draw], Any] | None = None,
        *,
        seed: int = 0,
        accumulate: int = 1,
        accelerator: Any = None,
        averages: bool = False,
        name: str = "training",
    ):
        self.players = [players] if isinstance(players, Player) else list(players)
        names = [player.name for player in self.players]
        if not names or len(set(names)) < len(names):
            raise BadInput(f"{name} needs players with names of their own, got {', '.join(names) or 'none'}.")
        if accumulate < 1:
            raise BadInput(f"accumulate must be at least 1, got {accumulate}.")
        self.data, self.seed, self.accumulate, self.accelerator, self.name = data, seed, accumulate, accelerator, name
        self.averages = averages and accelerator is not None and accelerator.num_processes > 1
        self.step, self.seconds = 0, 0.0
        self._stop = threading.Event()

    # one step ---------------------------------------------------------------------------------------------------------
    def draws(self) -> list[Draw]:
        """The randomness of this process's parts of the present step."""
        rank, world = 0, 1
        if self.accelerator is not None:
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
        parts = self.accumulate
        return [Draw(self.seed, self.step, rank + world * i, world * parts) for i in range(parts)]

    def train_step(self) -> dict[str, Tensor]:
        """A turn of every player; returns scalars for the log, under the players' names if there are several."""
        draws = self.draws()
        torch.manual_seed(draws[0].number("global"))  # dropout and the like; the noise has generators of its own
        samples = [(draw,) if self.data is None else (self.data(draw), draw) for draw in draws]
        backward: Callable[..., None] = torch.Tensor.backward
        if self.accelerator is not None:
            backward = self._averaged_backward if self.averages else self.accelerator.backward
        logs: dict[str, Tensor] = {}
        with torch.enable_grad():
            for player in self.players:
                if self.step % player.every == 0:
                    found = player.update(self.step, samples, backward)
                    head = f"{player.name}." if len(self.players) > 1 else ""
                    logs |= {head + key: value for key, value in found.items()}
        self.step += 1
        return {key: self.accelerator.reduce(value, "mean") for key, value in logs.items()} if self.averages else logs

    def _averaged_backward(self, loss: Tensor, inputs: list[Tensor]) -> None:
        """Adds the gradients' mean over all processes; none of a tensor counts as zeros, or the others would wait."""
        found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        for tensor, gradient in zip(inputs, found, strict=True):
            mean = self.accelerator.reduce(gradient, "mean")
            tensor.grad = mean if tensor.grad is None else tensor.grad + mean

    def scalars(self, logs: dict[str, Tensor]) -> dict[str, float]:
        """The log of a step as numbers.

        Raises:
            BadInput: a loss is not finite.
        """
        values = {key: float(value) for key, value in logs.items()}
        if not all(isfinite(value) for key, value in values.items() if key.split(".")[-1] == "loss"):
            raise BadInput(f"{self.name} diverged at step {self.step}: lower the learning rate (lr).")
        return values

    # many steps -------------------------------------------------------------------------------------------------------
    def walk(self, steps: int, after: Callable[[dict[str, Tensor]], None], minutes: float | None = None) -> bool:
        """Steps until ``steps`` are done, ``minutes`` are over (not before one is done: a run that is resumed comes
        on) or :meth:`stop` was called; ``after`` sees the log of each. Returns whether all are done."""
        start, before, first = time.monotonic(), self.seconds, self.step
        while self.step < steps and not self._over(start, None if self.step == first else minutes):
            logs = self.train_step()
            self.seconds = before + time.monotonic() - start
            after(logs)
        return self.step >= steps

    def stop(self) -> None:
        """Ends the walk after the present step."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def _over(self, start: float, minutes: float | None) -> bool:
        over = self.stopped or (minutes is not None and time.monotonic() - start > 60 * minutes)
        if self.accelerator is not None and self.accelerator.num_processes > 1:  # all ranks leave at the same step
            flag = torch.tensor([float(over)], device=self.accelerator.device)
            over = bool(self.accelerator.reduce(flag, "sum").item())
        return over

    @contextlib.contextmanager
    def signals(self, *which: signal.Signals) -> Iterator[None]:
        """Within: Ctrl-C stops after the present step; a second one interrupts at once. So do signals that are named,
        unless they are ignored as under nohup, and SIGTERM and SIGHUP where the program stops by them anyway."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(*_: Any) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stop()

        named = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        also = {each for each in which if signal.getsignal(each) is not signal.SIG_IGN}
        also |= {each for each in named if callable(signal.getsignal(each))}
        old = {each: signal.signal(each, handle) for each in (signal.SIGINT, *also)}
        try:
            yield
        finally:
            for each, handler in old.items():
                signal.signal(each, handler)

    # its state --------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within: averaged parameters where a player keeps an average, eval mode, no gradients, random numbers of its
        own. Afterwards everything is as it was."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for player in self.players:
                stack.enter_context(player.averaged())
            yield

    def save(self, folder: Path, state: dict[str, Any]) -> Path:
        """Writes a checkpoint of everything the next step depends on, with ``state`` (JSON) beside it."""
        tensors = {key: value for player in self.players for key, value in player.tensors().items()}
        return checkpoint.save(folder, self.step, tensors, {**state, "seconds": self.seconds})

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Goes back to a checkpoint.

        Raises:
            BadWeights: it does not fit the players.
        """
        try:
            for player in self.players:
                player.restore(tensors)
        except (RuntimeError, KeyError, ValueError) as error:
            raise BadWeights(f"the checkpoint does not fit: {error}") from None
        self.step, self.seconds = int(state["step"]), float(state["seconds"])


def fit(
    players: Player | Sequence[Player],
    steps: int,
    data: Callable[[Draw], Any] | None = None,
    *,
    seed: int = 0,
    accumulate: int = 1,
    minutes: float | None = None,
    log_every: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Callable[[Progress], bool] | None = None,
    stays: bool = False,
    folder: Path | str | None = None,
    checkpoint_every: int = 500,
    state: dict[str, Any] | None = None,
    accelerator: Any = None,
    name: str = "training",
) -> FitResult:
    """Trains ``players`` for ``steps``, in memory; the module's page has examples.

    Ctrl-C ends it after the present step with what was learnt until then (``interrupted`` in the record; without a
    folder and within :func:`~sfumato.interrupts.interruptions_raised` it is raised then); a second one interrupts at
    once. Players that keep an average hold it at the end. Global random numbers are drawn from ``seed``
    within and are afterwards what they were.

    Args:
        data, seed, accumulate, name: see :class:`Trainer`.
        minutes: ends after so much time.
        log_every: steps between entries of the history, of which ``on_progress`` and ``stop`` are called with each.
        stop: says whether to end here.
        stays: where ``stop`` ended it, it also ends when that checkpoint is read again, instead of going on.
        folder: keeps checkpoints every ``checkpoint_every`` steps, and goes on from the newest one that is there; for
            players whose losses depend on their draws alone the result is that of an uninterrupted run.
        state: plain values (JSON) of the caller's that belong to a checkpoint: written with each, put back into this
            dict when one is read.
        accelerator: accelerate's, where several processes train: gradients and logs are their mean, the first one
            writes.

    Raises:
        BadInput: a loss that is not finite, or arguments out of range.
        BadWeights: the checkpoints do not fit, or all are damaged.
    """
    if steps < 0 or log_every < 1 or checkpoint_every < 1 or (minutes is not None and not minutes > 0):
        raise BadInput(f"{name}: steps, log_every, checkpoint_every and minutes must be above 0.")
    trainer = Trainer(
        players, data, seed=seed, accumulate=accumulate, accelerator=accelerator, averages=True, name=name
    )
    extra: dict[str, Any] = {} if state is None else state
    main = accelerator is None or accelerator.is_main_process
    result = FitResult(0, False, False, 0.0)
    checkpoints = None if folder is None else Path(folder)
    if checkpoints is not None and (found := checkpoint.load_latest(checkpoints)):
        trainer.restore(found[0], found[1])
        extra.update(found[1].get("state", {}))
        result.ended = stays and bool(found[1].get("ended"))
        result.warnings = found[2]

    def save() -> None:
        if checkpoints is not None and main:
            trainer.save(checkpoints, {"state": extra, "ended": result.ended})

    def after(logs: dict[str, Tensor]) -> None:
        last = trainer.step == steps
        if last or trainer.step % log_every == 0:
            progress = Progress(trainer.step, steps, trainer.scalars(logs), trainer.seconds)
            result.history.append(progress)
            if on_progress:
                on_progress(progress)
            if stop is not None and stop(progress):
                result.ended = True
                trainer.stop()
        if last or trainer.step % checkpoint_every == 0:
            save()

    cuda = {p.device for player in trainer.players for p in player.parameters.values() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(cuda, key=str)), trainer.signals():
        if not result.ended:
            result.finished = trainer.walk(steps, after, minutes)
            if not result.finished:
                save()
        for player in trainer.players:
            player.take_average()
    result.step, result.seconds = trainer.step, trainer.seconds
    result.interrupted = trainer.stopped and not result.ended
    if result.interrupted and checkpoints is None:  # nobody can go on from it
        raise_if_asked()
    return result
