"""Sampling: the one loop between noise and latents, and what takes part in it."""

from __future__ import annotations

from sfumato.sampling.guidance import Guidance
from sfumato.sampling.intervention import ROLES, Coverage, Intervention, Stack
from sfumato.sampling.inversion import Trajectory, invert
from sfumato.sampling.loop import Result, generate
from sfumato.sampling.noise import Path
from sfumato.sampling.recipe import recipe_args
from sfumato.sampling.run import Prediction, Run, Step

__all__ = [
    "ROLES",
    "Coverage",
    "Guidance",
    "Intervention",
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
