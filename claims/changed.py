"""The exact answer to an edit, beside what a method makes of it: the scene itself changed, rendered, and coded.

Edits of codes are judged by a probe that reads decoded pictures. What it reads of these is the most that any method can
reach, but by luck: the rest is the autoencoder's and the probe's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from claims import codes
from claims.core import Context
from sfumato.toybox import Scene, render
from sfumato.toybox.rendering import to_uint8


def exact_codes(context: Context, scenes: Sequence[Scene]) -> Tensor:
    """toy-ae's codes (b 64) of scenes, rendered as all of its pictures were."""
    parts = [render(list(scenes[i : i + 50]), codes.SIDE).image for i in range(0, len(scenes), 50)]
    pixels = to_uint8(torch.cat(parts)).float() / 127.5 - 1
    return codes.autoencoder(context).vectors(pixels)[0]
