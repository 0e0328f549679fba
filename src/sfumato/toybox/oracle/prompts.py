"""Prompt sets in the manner of GenEval over the toybox's grammar: the same for everybody from the same seed.

Ghosh et al. 2023 (https://arxiv.org/abs/2310.11513), section 3, has six tasks; the same here. Its prompts name things
without colour where colour is not the point; the toybox's captions always tell it, so the default does too and scores
only what the task is about (``bare=True`` leaves it out). Counts are spelt out thing by thing, as the grammar knows no
numerals.

==================  ========================================  ==========================================================
task                prompt                                    solved when
==================  ========================================  ==========================================================
one                 a red cube                                a cube is there
two                 a red cube and a blue ball                both shapes are there
colors              a red cube                                a red cube is there
counting            a red cube, a red cube and a red cube     exactly three red cubes are there
position            a red cube to the left of a blue ball     red cube and blue ball are there and stand so
color_attribution   a red cube and a blue ball                both are there, each in its own colour
==================  ========================================  ==========================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sfumato import valid, writing
from sfumato.errors import BadInput, UnknownName
from sfumato.rng import sequence
from sfumato.toybox import COLORS, GROUNDS, SHAPES

TASKS = ("one", "two", "colors", "counting", "position", "color_attribution")
_POSITIONS = ("to the left of", "to the right of", "in front of", "behind")


@dataclass(frozen=True)
class TaskPrompt:
    """A prompt and the task it belongs to."""

    prompt: str
    task: str
    seed: int = 0


def prompt_set(
    tasks: Sequence[str] = TASKS, n: int = 20, seed: int = 0, scenery: bool = True, bare: bool = False
) -> list[TaskPrompt]:
    """``n`` prompts of every task; within a task their own seeds count up from ``seed``.

    A task's prompts are drawn without repetition until all its combinations are used up; the first k of n are those of
    a set of k. ``scenery`` adds a ground. Raises UnknownName for a task, BadInput for n < 1.
    """
    for task in tasks:
        if task not in TASKS:
            raise UnknownName("task", task, TASKS)
    valid.whole(n, "n", 1, 100_000)
    valid.whole(seed, "seed", 0, 2**62 - 1)
    if not tasks:
        raise BadInput(f"no task is named; the tasks are {', '.join(TASKS)}.")
    out = []
    for task in dict.fromkeys(tasks):
        rng = sequence("toybox.task", seed, TASKS.index(task))
        choices = _sizes(task, bare)
        total = int(np.prod(choices))
        order, grounds = rng.permutation(total), rng.integers(len(GROUNDS), size=n)
        for i in range(n):
            numbers = [int(number) for number in np.unravel_index(int(order[i % total]), choices)]
            ground = f" on the {GROUNDS[grounds[i]]}" if scenery else ""
            out.append(TaskPrompt(_text(task, numbers, bare) + ground, task, seed + i))
    return out


def write_prompts(path: Path, prompts: Sequence[TaskPrompt]) -> Path:
    """Writes a file for ``sfumato make --prompts``: one JSON object with prompt, task and seed per line."""
    writing.write_text(path, "".join(json.dumps(asdict(each)) + "\n" for each in prompts))
    return path


def _sizes(task: str, bare: bool) -> tuple[int, ...]:
    """How many choices a task has in each respect: shapes, colours, and one of its own."""
    pair, colors = (len(SHAPES), len(SHAPES) - 1), (len(COLORS), len(COLORS) - 1)
    if task in ("one", "colors"):
        return (len(SHAPES), 1 if bare and task == "one" else len(COLORS))
    if task == "counting":
        return (len(SHAPES), 1 if bare else len(COLORS), 3)
    if bare and task in ("two", "position"):
        colors = (1, 1)
    return (*pair, *colors, len(_POSITIONS) if task == "position" else 1)


def _text(task: str, numbers: Sequence[int], bare: bool) -> str:
    plain = bare and task not in ("colors", "color_attribution")
    if task in ("one", "colors", "counting"):
        toy = _toy(SHAPES[numbers[0]], None if plain else COLORS[numbers[1]])
        many = [toy] * (numbers[2] + 2) if task == "counting" else [toy]
        return ", ".join(many[:-1]) + (" and " if many[1:] else "") + many[-1]
    shapes, colors = _distinct(SHAPES, numbers[0], numbers[1]), _distinct(COLORS, numbers[2], numbers[3])
    first, second = (_toy(shape, None if plain else color) for shape, color in zip(shapes, colors, strict=True))
    return f"{first} {_POSITIONS[numbers[4]] if task == 'position' else 'and'} {second}"


def _distinct(words: Sequence[str], first: int, second: int) -> tuple[str, str]:
    """The first word, and the second of those that remain."""
    return words[first], words[second + (second >= first)]


def _toy(shape: str, color: str | None) -> str:
    words = f"{color} {shape}" if color else shape
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
