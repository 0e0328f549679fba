"""A map that stands in for a call's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class MapReplacement:
    """A map in place of a call's own, in some ``rows`` of its batch, without materialising it.

    ``attend(own)`` gives the output (b k n d) of those rows, ``probs(own, queries)`` their map (b k n t) for some
    queries, asked only by those who look; ``own`` is the
    :class:`~sfumato.attention.call.Call` of those rows as edited so far.
    """

    rows: slice
    attend: Callable[[Any], Tensor]
    probs: Callable[[Any, slice], Tensor]
