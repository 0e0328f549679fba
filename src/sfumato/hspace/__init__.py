"""The h-space: what a denoiser holds between its two halves, read, replaced, and measured as a curved space."""

from __future__ import annotations

from sfumato.hspace.geometry import Basis, Directions, Encoder, Jacobian, geodesic_distance, local_basis
from sfumato.hspace.tap import bottleneck_of, layer_of, slerp, tapped

__all__ = [
    "Basis",
    "Directions",
    "Encoder",
    "Jacobian",
    "bottleneck_of",
    "geodesic_distance",
    "layer_of",
    "local_basis",
    "slerp",
    "tapped",
]
