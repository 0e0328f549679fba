"""Groups of systems that cover every pair: a run of several systems tests all pairs among them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations


def groups(
    items: Sequence[str],
    together: Callable[[str, str], bool],
    size: int = 8,
    needed: Callable[[str, str], bool] = lambda one, other: True,
) -> list[list[str]]:
    """Groups of at most ``size`` items whose pairs all go ``together``, such that every such pair that is ``needed``
    is in one of them.

    Greedy: a group grows by the item that brings most pairs not yet covered.
    """
    left = {pair for pair in combinations(items, 2) if together(*pair) and needed(*pair)}
    found = []
    while left:
        group = list(min(left, key=lambda pair: (items.index(pair[0]), items.index(pair[1]))))
        while len(group) < size:
            others = [each for each in items if each not in group]
            fitting = [each for each in others if all(together(*_pair(each, g, items)) for g in group)]
            gains = {each: sum(_pair(each, g, items) in left for g in group) for each in fitting}
            best = max(fitting, key=lambda each: gains[each], default=None)
            if best is None or not gains[best]:
                break
            group.append(best)
        group.sort(key=items.index)
        left -= set(combinations(group, 2))
        found.append(group)
    return found


def parties(items: Sequence[str], together: Callable[[str, str], bool]) -> list[list[str]]:
    """The items in few groups, each in one, whose members all go ``together``."""
    found: list[list[str]] = []
    for item in items:
        fitting = next((group for group in found if all(together(item, other) for other in group)), None)
        if fitting is None:
            found.append([item])
        else:
            fitting.append(item)
    return found


def leaving_out(groups: Sequence[Sequence[str]]) -> list[list[int]]:
    """For each group the members (their places) to leave out, one at a time, such that for every two that are together
    in some group each is left out beside the other at least once, in the first group that has both."""
    left = {(one, other) for group in groups for one in group for other in group if one != other}
    found: list[list[int]] = []
    for group in groups:
        found.append([k for k, one in enumerate(group) if any((one, other) in left for other in group)])
        left -= {(group[k], other) for k in found[-1] for other in group}
    return found


def _pair(one: str, other: str, items: Sequence[str]) -> tuple[str, str]:
    return (one, other) if items.index(one) < items.index(other) else (other, one)
