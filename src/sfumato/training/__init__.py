"""Training: one loop for whatever learns. :func:`fit` in memory, :func:`run` from a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.startup import lazy

if TYPE_CHECKING:
    from sfumato.training.best import BestTensors
    from sfumato.training.draw import Draw, shuffled
    from sfumato.training.losses import denoising_loss
    from sfumato.training.players import Player
    from sfumato.training.runs import RunResult, run
    from sfumato.training.trainer import FitResult, Progress, fit

__all__ = ["BestTensors", "Draw", "FitResult", "Player", "Progress", "RunResult"]
__all__ += ["denoising_loss", "fit", "run", "shuffled"]
_HOME = {"BestTensors": "best", "Draw": "draw", "shuffled": "draw", "denoising_loss": "losses", "Player": "players"}
_HOME |= {"RunResult": "runs", "run": "runs", "FitResult": "trainer", "Progress": "trainer", "fit": "trainer"}


__getattr__, __dir__ = lazy(__name__, _HOME)
