"""What walks: a process knows the state to begin with, the levels it passes, and how a prediction becomes the next
state. The loop, interventions and guidance are the same for all.

One object belongs to one batch. Randomness comes from one generator per sample and never crosses samples, so that a
sample is the same alone and among others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.errors import BadInput, NotSupported
from sfumato.markup import described
from sfumato.models import Model
from sfumato.models.families import families_with
from sfumato.sampling.noise import Path
from sfumato.sampling.options import Options

#: options that only some processes have a meaning for; each process names its own
OF_SOME = {
    "steps", "timesteps", "sigmas", "scheduler", "eta", "temperature", "top_k", "top_p", "start", "strength",
    "denoising_start", "denoising_end",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What the walk begins with: a state drawn from the seeds (nothing given), given ``latents`` (1 or b, ...), at step
    ``start`` of the schedule or behind the share ``after`` of its noise levels, or ``pixels`` (1 or b, 3 H W) noised to
    ``strength`` of it."""

    latents: Tensor | None = None
    start: int = 0
    after: float | None = None
    pixels: Tensor | None = None
    strength: float | None = None

    __repr__ = described


class Process:
    """Base of the four. ``timesteps``: what the network receives at each prediction, all of the schedule."""

    #: as a family's ``process``
    name: ClassVar[str]
    #: for messages: a model "draws by ..."
    title: ClassVar[str]
    #: those of :data:`OF_SOME` that mean something here
    takes: ClassVar[frozenset[str]] = frozenset()
    #: whether states lie on a path (alpha, sigma) between data and noise: ``path``, ``step.x0``, ``step.eps``
    noise_path: ClassVar[bool] = False
    #: whether a loss can be differentiated with respect to the state: ``step.grad``, ``keeps_graph``
    differentiable: ClassVar[bool] = False
    #: whether states have the same shape before and after every step
    keeps_shape: ClassVar[bool] = True
    #: whether a picture can be taken as the beginning
    takes_image: ClassVar[bool] = False

    timesteps: Tensor
    begin: int = 0
    #: the step before which the walk stops; None: it goes to the end of the schedule
    until: int | None = None

    def __init__(
        self,
        model: Model,
        options: Options,
        source: Source,
        size: tuple[int, int],
        generators: Sequence[torch.Generator],
        backward: bool = False,
    ):
        """``options``, ``source``: of the request; ``size``: (width, height) in pixels; one generator per sample.
        ``backward``: the walk goes from the schedule's last step to its first. Raises BadInput, NotSupported."""
        self.model, self.options, self.source, self.size = model, options, source, size
        self.generators = list(generators)
        self.step_options: dict[str, Any] = {}  # settings of every step
        if backward and not self.noise_path:
            raise self.lacks("way back from a picture")
        self.prepare(backward)

    def prepare(self, backward: bool) -> None:
        """Set ``timesteps``, ``begin`` and what else the walk needs; part of making the object."""
        raise NotImplementedError

    # --- before the walk ---------------------------------------------------------------------------------------------

    @classmethod
    def check(cls, model: Model, options: Options, given: Iterable[str]) -> None:
        """Refuse what means nothing here. ``given``: names of the options and of the other arguments of ``generate``
        that were given with a value of their own. Raises BadInput."""
        for name in sorted(given):
            if (name in OF_SOME and name not in cls.takes) or (name == "image" and not cls.takes_image):
                raise BadInput(f"{name} means nothing to {model.name}, which draws by {cls.title}.")

    @classmethod
    def steps(cls, model: Model, options: Options) -> int:
        """How many steps a request of these options takes."""
        return int(model.defaults["steps"]) if options.steps is None else options.steps

    def initial(self, rows: slice) -> Tensor:
        """The states (b ...) of the request's ``rows``, those of this batch, that the walk begins with."""
        raise NotImplementedError

    def noise(self) -> Tensor:
        """Unit noise (b ...) in the shape of the state, each sample from its own generator."""
        model = self.model
        frames = model.frames(self.options.frames) or 1
        return model.family.noise(self.generators, *model.grid(self.size[1], self.size[0]), frames)

    # --- during the walk ---------------------------------------------------------------------------------------------

    def shown(self, x: Tensor, t: Tensor) -> Tensor:
        """The state as the network reads it."""
        return x

    def advance(self, output: Tensor, i: int, x: Tensor, options: dict[str, Any]) -> Tensor:
        """The state after step ``i``, which read ``x`` and predicted ``output`` (b ...). ``options``: what an
        intervention wants otherwise in this step."""
        raise NotImplementedError

    def seek(self, i: int) -> None:
        """The next step is ``i``, whatever came before."""

    def fork(self) -> Process:
        """The same again from ``begin``, with generators in the same state: for a walk of its own."""
        generators = [generator.clone_state() for generator in self.generators]
        other = type(self)(self.model, self.options, self.source, self.size, generators)
        other.begin = self.begin
        return other

    def refuse(self, x: Tensor, who: str) -> None:
        """Raise BadInput where ``who`` has made something of the state that it cannot be."""

    # --- what some lack ----------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The noise path. Raises NotSupported where there is none."""
        raise self.lacks("noise path")

    @property
    def scheduler(self) -> Any:
        """The diffusers scheduler. Raises NotSupported where there is none."""
        raise self.lacks("scheduler")

    def scheduler_at(self, i: int) -> Any:
        """A fresh diffusers scheduler that takes its next step at index ``i``. NotSupported where there is none."""
        raise self.lacks("scheduler")

    @classmethod
    def require_path(cls, model: Model, who: str) -> None:
        """Raise NotSupported where this process has no noise path, which ``who`` needs."""
        if not cls.noise_path:
            raise _lacking(cls, model, "noise path", who)

    def lacks(self, what: str, who: str = "it") -> NotSupported:
        """The error for something that this process does not have and ``who`` asked for."""
        return _lacking(type(self), self.model, what, who)


def _lacking(process: type[Process], model: Model, what: str, who: str) -> NotSupported:
    need = {"noise path": "noise_path", "gradient with respect to the state": "differentiable_state"}.get(what)
    end = f"; {families_with(need)}" if need else ""
    return NotSupported(f"{who} needs a {what}, but {model.name} draws by {process.title}{end}.")


def fewest(steps: int) -> str:
    """The smallest strength, in a few digits, that leaves one step out of so many."""
    return f"{math.ceil(1e6 / steps) / 1e6:g}"


def taken(rows: Tensor, part: slice, b: int) -> Tensor:
    """Those of (1 or b, ...) that belong to a batch, one row each."""
    return rows[part] if len(rows) > 1 else repeated(rows, b)


def repeated(row: Tensor, b: int) -> Tensor:
    """One row (1 ...) b times (b ...), in memory of its own: kernels may round otherwise where rows share it."""
    return row.repeat(b, *[1] * (row.dim() - 1))
