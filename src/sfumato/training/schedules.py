"""Learning-rate schedules: the share of the peak at a step, as :class:`~sfumato.training.players.Player` wants it.

Those of transformers begin their warm-up at zero, so that the first step changes nothing; these begin one step up.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi


def warmup_decay(steps: int, warmup: int = 0, decay: str = "none", fraction: float = 0.3) -> Callable[[int], float]:
    """A linear warm-up of ``warmup`` steps, then ``decay`` to zero at ``steps``: "none", "linear", "cosine", or "wsd"
    (warm-up, stable, decay: linear over the last ``fraction`` of what follows the warm-up; Hu et al. 2024)."""

    def share(step: int) -> float:
        up = min(1.0, (step + 1) / warmup) if warmup else 1.0
        done = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
        down = {
            "none": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1 + cos(pi * done)),
            "wsd": min(1.0, (1 - done) / fraction),
        }[decay]
        return up * down

    return share


def polynomial(steps: int, power: float = 0.9) -> Callable[[int], float]:
    """(1 - step / steps)^power, as for segmentation (Chen et al. 2017)."""
    return lambda step: (1 - step / steps) ** power
