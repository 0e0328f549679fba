"""Models that look at pictures and texts instead of making them: CLIP, classifiers, detectors, question answerers."""

from __future__ import annotations

from sfumato.models.readers.clip import NOISED, PLAIN, Clip, clip_for, load_clip
from sfumato.models.readers.loading import is_reader
from sfumato.models.readers.net import PictureNet, load_net
from sfumato.models.readers.preprocessing import Preprocessing
from sfumato.models.readers.reader import Reader, load_reader, wrap

__all__ = [
    "NOISED",
    "PLAIN",
    "Clip",
    "PictureNet",
    "Preprocessing",
    "Reader",
    "clip_for",
    "is_reader",
    "load_clip",
    "load_net",
    "load_reader",
    "wrap",
]
