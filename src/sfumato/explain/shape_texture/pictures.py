"""The pictures that nets are shown: rendered toys."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from sfumato.toybox import render


@functools.lru_cache(maxsize=12)  # several nets are shown the same pictures
def rendered(scenes: tuple[Any, ...], side: int) -> Tensor:
    """Pictures (n 3 side side) of toybox scenes."""
    return render(list(scenes), side).image
