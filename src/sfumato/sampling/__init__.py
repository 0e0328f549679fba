"""Sampling: the one loop from nothing to a picture or clip, and what takes part in it. Loaded on first use: the options
alone need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.startup import lazy

if TYPE_CHECKING:
    from sfumato.sampling.guidance import Guidance
    from sfumato.sampling.intervention import ROLES, Coverage, Intervention, Stack
    from sfumato.sampling.inversion import Trajectory, invert
    from sfumato.sampling.loop import generate
    from sfumato.sampling.noise import Path
    from sfumato.sampling.options import Options
    from sfumato.sampling.recipe import recipe_args
    from sfumato.sampling.result import Result
    from sfumato.sampling.run import Prediction, Run, Step

_HOME = {
    "Guidance": "guidance",
    "ROLES": "intervention",
    "Coverage": "intervention",
    "Intervention": "intervention",
    "Stack": "intervention",
    "Trajectory": "inversion",
    "invert": "inversion",
    "Result": "result",
    "generate": "loop",
    "Path": "noise",
    "Options": "options",
    "recipe_args": "recipe",
    "Prediction": "run",
    "Run": "run",
    "Step": "run",
}

__all__ = [
    "ROLES",
    "Coverage",
    "Guidance",
    "Intervention",
    "Options",
    "Path",
    "Prediction",
    "Result",
    "Run",
    "Stack",
    "Step",
    "Trajectory",
    "generate",
    "invert",
    "recipe_args",
]


__getattr__, __dir__ = lazy(__name__, _HOME)
