"""How the outputs of the branches (no text, text, further texts) become the one output a scheduler steps with.

All of it is linear in the network's outputs, so it is the same for epsilon, v, x0 and flow predictions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from sfumato.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022) with two refinements.

    ``scale``: strength w in ``u + w (c - u)``; at 1 or below the unconditional branch is not run at all, as in
    diffusers. ``rescale``: pulls the spread of the guided output back to that of the conditional one, 0 off, 1 fully
    (Lin et al. 2023, section 3.4). ``interval``: fractions of progress, [start, end), outside of which only the
    conditional branch runs (Kynkaanniemi et al. 2024).
    """

    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if not (isinstance(self.scale, Real) and math.isfinite(self.scale) and self.scale >= 0):
            raise BadInput(f"guidance is {self.scale!r}; it must be a finite number >= 0 (1 or below: no guidance).")
        if not (isinstance(self.rescale, Real) and 0 <= self.rescale <= 1):
            raise BadInput(f"rescale is {self.rescale!r}; it must lie between 0 and 1.")
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise BadInput(
                f"guidance interval is {self.interval!r}; it must be (start, end) with 0 <= start < end <= 1."
            )

    @property
    def on(self) -> bool:
        return self.scale > 1

    def covers(self, progress: float) -> bool:
        """Whether guidance acts at this fraction of progress (0 = pure noise, 1 = done)."""
        return self.interval[0] <= progress < self.interval[1]


def combine(uncond: Tensor, conds: Sequence[Tensor], weights: Sequence[float], rescale: float = 0.0) -> Tensor:
    """``u + sum_i w_i (c_i - u)`` over branches (b c h w): classifier-free guidance for one condition, composable
    diffusion (Liu et al. 2022, equation 11) for several, where a negative weight means "and not".

    With ``rescale``, the result's standard deviation is moved towards that of the first condition's output.
    """
    guided = uncond
    for cond, weight in zip(conds, weights, strict=True):
        guided = guided + weight * (cond - uncond)
    return rescaled(guided, conds[0], rescale) if rescale > 0 else guided


def rescaled(guided: Tensor, cond: Tensor, amount: float) -> Tensor:
    """``guided`` (b c h w) with its per-sample spread moved by ``amount`` of the way to ``cond``'s (Lin et al.
    2023)."""
    axes = list(range(1, cond.dim()))
    matched = guided * (cond.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return amount * matched + (1 - amount) * guided
