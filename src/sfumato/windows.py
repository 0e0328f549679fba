"""Windows: shares of a run's progress, from 0 (pure noise) to 1 (done), one type for all parameters."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

__all__ = ["Window", "inside", "ordered"]


def ordered(window: tuple[float, float]) -> tuple[float, float]:
    """The window itself. Raises ValueError unless 0 <= start < end <= 1."""
    start, end = window
    if not 0 <= start < end <= 1:
        raise ValueError("it must be a start below an end, both from 0 to 1")
    return window


def inside(progress: float, window: tuple[float, float]) -> bool:
    """Whether a fraction of progress lies in [start, end)."""
    return window[0] <= progress < window[1]


#: [start, end) in fractions of progress; the type of a field of ``Params``
Window = Annotated[tuple[float, float], AfterValidator(ordered)]
