"""Randomness as named streams: each is a pure function of its name, a seed and a few further numbers.

Two streams of different names do not meet, and a sample's stream is of its own seed alone, so that what is drawn for
one sample depends neither on the batch size nor on its neighbours.

    >>> generator = stream("mgad.crops", seed, step)

A new name needs no entry anywhere: its seed is a hash of the text. Names that were in use before there was one rule
keep the rule they had (:data:`EARLIER`, :data:`SEQUENCES`), so that a seed gives today what it gave then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch

__all__ = ["generators", "hashed", "sequence", "stream", "stream_seed"]

_GOLDEN = 0x9E3779B1

#: names whose seeds follow a rule of their own
EARLIER: dict[str, Callable[..., int]] = {
    "sample": lambda seed: seed,  # the initial noise of a sample, and what stands in for it
    "blend.surroundings": lambda seed: (seed * _GOLDEN + 0x5F0A) % 2**63,
    "shape_guided.fresh": lambda seed: (seed * _GOLDEN + 0x5A9E) % 2**63,
    "no_token_left_behind.views": lambda seed, step: seed * 1009 + step,
    "mgad.crops": lambda seed, step: hashed(f"mgad crops {seed} {step}"),
}

#: names whose numpy streams are seeded by a sequence of numbers, in an order of their own
SEQUENCES: dict[str, Callable[..., tuple[int, ...]]] = {
    "toybox.scene": lambda seed, split, i: (seed, split, i),
    "toybox.caption": lambda seed, split, i: (seed, split, i, 1),
    "toybox.biased": lambda seed, split, i: (seed, 1000 + split, i),
    "toybox.pair": lambda seed, factor, i: (seed, factor, i, 31),
    "toybox.cue": lambda seed, split, i: (seed, split, i, 37),
    "toybox.task": lambda seed, task: (seed, task),
    "teach.examples": lambda seed: (17, seed),
}


def hashed(text: str) -> int:
    """63 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def stream_seed(name: str, seed: int, *at: int) -> int:
    """The seed of the stream ``name`` of ``seed`` at ``at``, such as a step or an index."""
    if name in EARLIER:
        return EARLIER[name](seed, *at)
    return hashed(" ".join(map(str, (name, seed, *at))))


def stream(name: str, seed: int, *at: int) -> torch.Generator:
    """A fresh CPU generator of torch for the stream ``name`` of ``seed`` at ``at``."""
    import torch

    return torch.Generator().manual_seed(stream_seed(name, seed, *at))


def generators(name: str, seeds: Sequence[int], *at: int) -> list[torch.Generator]:
    """One :func:`stream` per sample."""
    return [stream(name, seed, *at) for seed in seeds]


def sequence(name: str, seed: int, *at: int) -> numpy.random.Generator:
    """A fresh generator of numpy for the stream ``name`` of ``seed`` at ``at``."""
    import numpy

    numbers = SEQUENCES[name](seed, *at) if name in SEQUENCES else (hashed(name), seed, *at)
    return numpy.random.default_rng(numbers)
