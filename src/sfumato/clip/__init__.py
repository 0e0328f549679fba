"""CLIP as a guide: encoders with gradients, objectives in its space, and how it reads noised latents."""

from __future__ import annotations

from sfumato.clip.encoder import NOISED, PLAIN, Clip, clip_for, load_clip
from sfumato.clip.noised import PLANES, codec_mark, noise_level, noised_input
from sfumato.clip.objectives import (
    Cutouts,
    cosine,
    log_probability,
    out_of_range,
    shares,
    total_variation,
    weighted,
)

__all__ = [
    "NOISED",
    "PLAIN",
    "PLANES",
    "Clip",
    "Cutouts",
    "clip_for",
    "codec_mark",
    "cosine",
    "load_clip",
    "log_probability",
    "noise_level",
    "noised_input",
    "out_of_range",
    "shares",
    "total_variation",
    "weighted",
]
