"""The h-space: what a denoiser holds between its two halves, read, replaced, and what moves it."""

from __future__ import annotations

from sfumato.hspace.basis import Basis, Directions, Encoder, Jacobian, local_basis
from sfumato.hspace.tap import bottleneck_of, layer_of, tapped

__all__ = [
    "Basis",
    "Directions",
    "Encoder",
    "Jacobian",
    "bottleneck_of",
    "layer_of",
    "local_basis",
    "tapped",
]
