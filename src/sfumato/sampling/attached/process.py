"""Steps and process of a pipeline's own loop as attached systems see them, and which systems these do not suffice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.attention.tap import Tap
from sfumato.errors import Conflict, NotSupported
from sfumato.models import Condition, Model
from sfumato.sampling.intervention import Intervention, overridden
from sfumato.sampling.noise import Path
from sfumato.sampling.process.base import Process
from sfumato.sampling.run import Prediction, Run, Step

__all__ = ["PipelineProcess", "PipelineStep", "refuse_own_loop_only", "require_unchanged"]

HOW = "sfumato.make(...), or generate(model, ..., interventions=...), draws with it"

_REASONS = {
    "path": "it replaces the trajectory",
    "steerer": "it moves the latents by gradients or by extra denoiser calls",
    "guider": "it changes the prediction by gradients with respect to the latents",
    "conditioner": "it changes the texts that are encoded, or those of each step",
}


def refuse_own_loop_only(parts: Sequence[Intervention]) -> None:
    """Raise NotSupported, with the reason, for a system that cannot act in a loop of others."""
    for part in parts:
        reason = part.needs_own_loop or _REASONS.get(part.role, "")
        if part.keeps_graph:
            reason = "it needs gradients with respect to the latents"
        if overridden([part], "on_decode"):
            reason = reason or "it changes the decoded picture"
        if reason:
            raise NotSupported(f"{part.name} cannot be attached to a pipeline: {reason}; {HOW}.")


def require_unchanged(part: Intervention, what: str, before: Any, after: Any) -> None:
    """Raise NotSupported where a system put something else in place of what only our loop can exchange."""
    if after is not before:
        raise NotSupported(f"{part.name} changed {what}, which is not possible in a pipeline's own loop; {HOW}.")


@dataclass
class _PipelineOptions:
    frames: int | None


class PipelineProcess(Process):
    """The pipeline's own scheduler, to be looked at. It makes no step for us."""

    name = "pipeline"
    title = "the loop of its own pipeline"

    def __init__(self, model: Model, generators: Sequence[torch.Generator]):
        self.model = model
        self.generators = list(generators)
        self.options: Any = _PipelineOptions(None)
        self.begin = 0
        self._path: Path | None = None

    @property
    def scheduler(self) -> Any:
        return self.model.pipe.scheduler

    @property
    def timesteps(self) -> Tensor:  # type: ignore[override]
        return self.scheduler.timesteps

    @property
    def noise_path(self) -> bool:  # type: ignore[override]
        return self.model.family.has("noise_path")

    @property
    def path(self) -> Path:
        if self._path is None:
            self._path = Path(self.scheduler)
        return self._path

    def fork(self) -> Process:
        raise self.lacks("run of its own with the same noise", "drawing a second picture beside the first")


class PipelineStep(Step):
    """A step of the pipeline. ``x`` is exact from ``after_predict`` on; before, it is what the last step gave."""

    def __init__(self, run: Run, i: int, x: Tensor):
        super().__init__(run, i, x)
        #: the call that held the prompt, once more with other texts (b t d) and other taps
        self.repeat: Callable[[Tensor, Sequence[Tap]], dict[str, Tensor]] | None = None

    def predict(
        self,
        x: Tensor | None = None,
        *,
        t: Tensor | None = None,
        branches: Sequence[str] = ("cond",),
        condition: Condition | None = None,
        taps: Sequence[Tap] = (),
        edited: bool = True,
    ) -> Prediction:
        """The pipeline's call of the denoiser that held the prompt, once more, with the embeddings of ``condition`` in
        place of the prompt's. NotSupported for other latents, times or branches, and before that call."""
        if x is not None or t is not None or tuple(branches) != ("cond",) or self.repeat is None:
            raise self._needs("a denoiser call of other latents, times or branches than the pipeline's")
        taps = [*self.active_taps(editors=True), *taps] if edited else list(taps)
        outputs = self.repeat((condition or self.condition).cond["embeds"], taps)
        return Prediction(self.run, self.x, self.t, outputs)

    def grad(self, *args: Any, **kwargs: Any) -> Tensor:
        raise self._needs("a gradient with respect to the latents")

    def goto(self, i: int) -> None:
        raise Conflict(f"{self._who} goes to another step, which is not possible in a pipeline's own loop; {HOW}.")

    @property
    def _who(self) -> str:
        return self.actor.name if self.actor is not None else "this system"

    def _needs(self, what: str) -> NotSupported:
        return NotSupported(f"{self._who} needs {what}, which a pipeline's own loop does not offer; {HOW}.")

    def predicted(self, x: Tensor, output: Tensor) -> None:
        """The scheduler was given ``output`` for the state ``x``."""
        self.x = self._predicted_at = x
        self._output = output
