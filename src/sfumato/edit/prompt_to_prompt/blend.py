"""Local blend: where the words of either prompt act, outside of which the source's latents are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.attention.call import Call
from sfumato.edit.prompt_to_prompt.values import has
from sfumato.text.words import Reading


class LocalBlend:
    """Sums the maps of words over heads, sites and steps, in the source (first) and in the edited picture (second).

    ``readings``: per sample both prompts. ``words`` act; where ``without`` act is taken out of that. ``grid`` (h w):
    that of the sites.
    """

    def __init__(
        self,
        readings: Sequence[tuple[Reading, Reading]],
        words: Sequence[str],
        without: Sequence[str],
        grid: tuple[int, int],
    ):
        self.samples, self.grid = len(readings), grid
        self.columns = {(which, side): _columns([both[side] for both in readings], given)
                        for which, given in (("in", words), ("out", without)) for side in (0, 1)}  # fmt: skip
        self.sums: dict[tuple[str, int], Tensor] = {}

    def add(self, source: Call, own: Call) -> None:
        """Adds the maps of one site and step."""
        for (which, side), columns in self.columns.items():
            if columns is None:
                continue
            positions, weights = columns
            call = (source, own)[side]
            maps = call.word_probs([call.text.start + p for p in positions]).mean(1)  # over heads
            summed = torch.einsum("bnc,bc->bn", maps, weights.to(maps))
            self.sums[which, side] = self.sums.get((which, side), 0.0) + summed

    def mask(self, size: tuple[int, int], threshold: float, without_threshold: float) -> Tensor:
        """True where the edit may act, (b 1 h w) at ``size``: thresholds are shares of a map's maximum."""
        mask = self._where("in", size, threshold, pooled=True)
        assert mask is not None
        without = self._where("out", size, without_threshold, pooled=False)
        return mask if without is None else mask & ~without

    def _where(self, which: str, size: tuple[int, int], threshold: float, pooled: bool) -> Tensor | None:
        """Where some words act in either picture; None where there are no such words."""
        mask = None
        for side in (0, 1):
            summed = self.sums.get((which, side))
            if summed is None:
                continue
            maps = summed.float().view(self.samples, 1, *self.grid)
            if pooled:
                maps = F.max_pool2d(maps, 3, 1, 1)
            maps = F.interpolate(maps, size=size)
            here = maps / maps.amax((-2, -1), keepdim=True).clamp_min(1e-12) > threshold
            mask = here if mask is None else mask | here
        return mask


def _columns(readings: Sequence[Reading], words: Sequence[str]) -> tuple[list[int], Tensor] | None:
    """Positions of some words on the text axis, and which samples (b c) have them; None where no prompt has any."""
    found = [
        {p for word in words if has(reading, word) for span in reading.find(word) for p in span.positions}
        for reading in readings
    ]
    positions = sorted(set().union(*found))
    if not positions:
        return None
    return positions, torch.tensor([[float(p in own) for p in positions] for own in found])
