"""The randomness of one training step: everything drawn is a pure function of seed, step, rank and name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.rng import hashed


@dataclass(frozen=True)
class Draw:
    """The randomness of one step. Everything drawn is a pure function of (seed, step, rank, stream name).

    ``rank`` of ``world``: which share of the step's batch this is. Processes have shares, and so do the parts of an
    accumulated gradient.
    """

    seed: int
    step: int
    rank: int = 0
    world: int = 1

    def number(self, stream: str, *more: int) -> int:
        """A 63-bit seed for the named stream."""
        text = ":".join(map(str, (self.seed, self.step, self.rank, stream, *more)))
        return hashed(text)

    def generator(self, stream: str) -> torch.Generator:
        """A fresh CPU generator for the named stream."""
        return torch.Generator().manual_seed(self.number(stream))

    def indices(self, n: int, batch: int) -> Tensor:
        """This share of a batch of ``batch`` out of ``n`` samples, (b,) int64: epochs of a seeded shuffle."""
        place = torch.arange(self.step * batch + self.rank, (self.step + 1) * batch, self.world)
        out = torch.empty_like(place)
        for epoch in (place // n).unique().tolist():
            seed = Draw(self.seed, epoch).number("shuffle")
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            chosen = place // n == epoch
            out[chosen] = order[place[chosen] % n]
        return out


def shuffled(n: int, batch: int, epochs: int, seed: int) -> list[Tensor]:
    """The rows (b,) of every step of ``epochs`` passes over ``n`` samples, each in a new order of one seeded generator;
    the last batch of a pass may be smaller. For a few samples; :meth:`Draw.indices` for data sets."""
    generator = torch.Generator().manual_seed(seed)
    return [rows for _ in range(epochs) for rows in torch.randperm(n, generator=generator).split(batch)]
