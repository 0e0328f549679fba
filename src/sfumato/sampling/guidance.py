"""How strongly, when and how the branches (no text, text, further texts) are mixed; the arithmetic is the family's
(``Family.combine``), linear in the network's outputs but for the families that renormalise."""

from __future__ import annotations

import math
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
    conditional branch runs (Kynkaanniemi et al. 2024). ``off``: the scale at which the family's pipeline leaves the
    unconditional branch out.
    """

    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    off: float = 1.0

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
        return self.scale > self.off

    def covers(self, progress: float) -> bool:
        """Whether guidance acts at this fraction of progress (0 = pure noise, 1 = done)."""
        return self.interval[0] <= progress < self.interval[1]


def rescaled(guided: Tensor, cond: Tensor, amount: float) -> Tensor:
    """``guided`` (b c h w) with its per-sample spread moved by ``amount`` of the way to ``cond``'s (Lin et al.
    2023)."""
    axes = list(range(1, cond.dim()))
    matched = guided * (cond.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return amount * matched + (1 - amount) * guided
