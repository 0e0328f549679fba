"""The best of what was learnt so far, by a figure that is measured now and then."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["BestTensors"]


class BestTensors(nn.Module):
    """The tensors that learn, and copies of them where a figure was best: what a player's checkpoint holds. Where no
    figure is taken a plain ``nn.ParameterList`` does.

    ``figures``: (step, figure) of every measurement, lowest is best, one that is not a number never; :meth:`over` says
    whether the last ``patience`` of them were no better than the best before by a share ``least``.
    """

    def __init__(self, tensors: Mapping[str, nn.Parameter]):
        super().__init__()
        self.learning = nn.ParameterList(list(tensors.values()))
        for i, tensor in enumerate(tensors.values()):
            self.register_buffer(f"best_{i}", tensor.detach().clone())
        self.figures: list[tuple[int, float]] = []

    @property
    def lowest(self) -> tuple[float, int]:
        """The best figure and its step; infinity and 0 before any."""
        return min(((figure, step) for step, figure in self.figures if not math.isnan(figure)), default=(math.inf, 0))

    @property
    def step(self) -> int:
        """Where the figure was best."""
        return self.lowest[1]

    @torch.no_grad()
    def measured(self, step: int, figure: float) -> bool:
        """Notes a figure; returns whether it is the lowest, and then keeps the tensors."""
        better = figure < self.lowest[0]
        self.figures.append((step, figure))
        if better:
            self.keep()
        return better

    @torch.no_grad()
    def keep(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Makes these the best, in the order of those that learn; None: the tensors as they are now."""
        for i, tensor in enumerate(self.learning if tensors is None else tensors):
            getattr(self, f"best_{i}").copy_(tensor)

    @torch.no_grad()
    def take(self) -> None:
        """Puts the best in the place of the last."""
        for i, tensor in enumerate(self.learning):
            tensor.copy_(getattr(self, f"best_{i}"))

    def over(self, patience: int, least: float = 0.005) -> bool:
        values = [value for _, value in self.figures]
        return len(values) > patience and min(values[-patience:]) > (1 - least) * min(values[:-patience])
