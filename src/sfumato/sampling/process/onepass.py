"""One pass: a network that makes the picture from noise at once (GANs, feed-forward generators)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.models import Model
from sfumato.sampling.options import Options
from sfumato.sampling.process.base import Process, taken


class OnePass(Process):
    """The state is noise (b ...) before the only step and the network's output, which the codec decodes, behind it."""

    name = "onepass"
    title = "one pass"
    takes = frozenset({"steps"})
    differentiable = True
    keeps_shape = False

    def prepare(self, backward: bool) -> None:
        self.timesteps = torch.zeros(1, device=self.model.device)

    @classmethod
    def steps(cls, model: Model, options: Options) -> int:
        if options.steps not in (None, 1):
            raise BadInput(f"steps is {options.steps}; {model.name} makes a picture in one: leave it out.")
        return 1

    def initial(self, rows: slice) -> Tensor:
        if self.source.latents is None:
            return self.noise()
        given = taken(self.source.latents, rows, len(self.generators))
        return given.to(device=self.model.device, dtype=self.model.dtype)

    def advance(self, output: Tensor, i: int, x: Tensor, options: dict[str, Any]) -> Tensor:
        return output
