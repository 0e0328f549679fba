"""Models: one face over the diffusers families. `load` a checkpoint, or wrap a pipeline of your own in `Model`."""

from __future__ import annotations

from sfumato.models.condition import Condition, Encoding, TruncatedPrompt
from sfumato.models.families import Family, TextStream
from sfumato.models.load import family_at, load
from sfumato.models.model import Model
from sfumato.models.quiet import quiet
from sfumato.models.site import Layer, Site

__all__ = [
    "Condition",
    "Family",
    "Layer",
    "Model",
    "Site",
    "TextStream",
    "Encoding",
    "TruncatedPrompt",
    "family_at",
    "load",
    "quiet",
]
