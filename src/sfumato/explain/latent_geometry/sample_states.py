"""Where samples are at some steps of their way: what their geometry is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sfumato.markup import described
from sfumato.models import Condition, Layer
from sfumato.sampling import Intervention, Step
from sfumato.sampling.intervention import Coverage


@dataclass
class SampleStates:
    """Where samples are at timestep ``t``: latents (1 c h w) in unit scaling and conditions, one each."""

    t: Tensor
    x: list[Tensor]
    conditions: list[Condition]

    __repr__ = described


class StateRecorder(Intervention):
    """Records the places of all samples at some ``steps``; ``layer`` is whose features they are looked at for."""

    layer: Layer

    def __init__(self, steps: Sequence[int], layer: Layer):
        self.steps, self.layer = list(steps), layer
        self.places: dict[int, SampleStates] = {}
        self.activity = Coverage()

    def before_predict(self, step: Step) -> None:
        if step.i in self.steps:
            x = (step.x / step.path.scale(step.t)).detach()
            self.places[step.i] = SampleStates(
                step.t, list(x.split(1)), [step.condition.rows([i]) for i in range(len(x))]
            )
            self.mark(step, sites=[self.layer.path])
