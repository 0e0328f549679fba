"""Bias mitigation (section 5): the factor on some words at which a measured share is what it should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfumato.errors import NoMatch
from sfumato.explain.conceptor.decomposition import Decomposition
from sfumato.models import Model


@dataclass(frozen=True)
class Balance:
    """What :func:`balance` found: the ``factor``, the ``decomposition`` with it, the measured share, and all (factor,
    share) it tried."""

    factor: float
    share: float
    decomposition: Decomposition
    tried: tuple[tuple[float, float], ...]


def balance(
    model: Model,
    found: Decomposition,
    words: Sequence[str],
    measure: Callable[[Tensor], float],
    *,
    seeds: Sequence[int],
    target: float = 0.5,
    tolerance: float = 0.05,
    most: float = 4.0,
    rounds: int = 8,
    **drawing: Any,
) -> Balance:
    """The factor on the coefficients of ``words`` at which ``measure(pixels (b 3 H W))``, a share that grows with them,
    is ``target``: bisection from 0 to ``most``, on pictures of ``seeds``.

    Raises NoMatch when even the ends do not reach the target.
    """

    def at(factor: float) -> float:
        changed = found.changed(**dict.fromkeys(words, factor))
        return measure(changed.draw(model, seeds, **drawing))

    tried = [(0.0, at(0.0)), (1.0, at(1.0))]
    low, high = (0.0, 1.0) if tried[1][1] >= target else (1.0, most)
    if tried[0][1] > target + tolerance:
        raise NoMatch(f"without {' and '.join(words)} the share still is {tried[0][1]:.2f}; other words carry it too.")
    for _ in range(rounds):
        factor, share = min(tried, key=lambda each: abs(each[1] - target))
        if abs(share - target) <= tolerance:
            break
        factor = (low + high) / 2
        tried.append((factor, at(factor)))
        low, high = (low, factor) if tried[-1][1] >= target else (factor, high)
    factor, share = min(tried, key=lambda each: abs(each[1] - target))
    return Balance(factor, share, found.changed(**dict.fromkeys(words, factor)), tuple(tried))
