"""Running sums of attention maps, reduced online at each site's own resolution: memory does not grow with the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadInput, NoMatch
from sfumato.markup import described
from sfumato.models.site import Site

__all__ = ["LayerMaps", "MapStore", "upscale"]


@dataclass(frozen=True)
class LayerMaps:
    """Maps of one site and one sample: ``maps`` (s k c h w), float32 on the CPU, for c columns; (s k c f h w) where the
    site has several frames.

    s counts kept steps and k kept heads; both are 1 where they were averaged. ``calls`` says over how many attention
    calls each of the s maps is the mean; ``heads`` how many heads the site has, ``steps`` which steps of the schedule
    the s maps stand for (empty where averaged).
    """

    site: Site
    maps: Tensor
    heads: int
    calls: tuple[int, ...]
    steps: tuple[int, ...] = ()

    __repr__ = described

    def mean(self, steps: Sequence[int] | None = None, heads: Sequence[int] | None = None) -> Tensor:
        """(k c [f] h w): mean over the calls of all or some steps, for all or some of the kept heads.

        Raises NoMatch for steps or heads that were not kept.
        """
        maps, weights = self.maps, torch.tensor(self.calls, dtype=torch.float32)
        if steps is not None:
            index = [self._index("step", step, self.steps) for step in steps]
            maps, weights = maps[index], weights[index]
        if heads is not None:
            maps = maps[:, [self._index("head", head, range(self.heads if maps.shape[1] > 1 else 0)) for head in heads]]
        if len(maps) == 1:
            return maps[0]
        return (maps * (weights / weights.sum()).view(-1, *[1] * (maps.dim() - 1))).sum(0)

    def _index(self, what: str, wanted: int, recorded: Sequence[int]) -> int:
        if wanted not in recorded:
            known = (
                f"it has {', '.join(map(str, recorded))}"
                if len(recorded)
                else f"its {what}s were averaged while recording"
            )
            raise NoMatch(f"{what} {wanted} of {self.site.path} was not kept; {known}.")
        return list(recorded).index(wanted)


class MapStore:
    """Sums maps (b k n c) call by call.

    ``heads`` and ``steps``: keep each head, or each step, apart instead of summing over it; the latter lets memory grow
    with the steps. Sums (b k n c) live in float32 where the maps do; nothing else is held.
    """

    def __init__(self, heads: bool = False, steps: bool = False):
        self.heads, self.steps = heads, steps
        self._sites: dict[str, Site] = {}
        self._head_count: dict[str, int] = {}
        self._sums: dict[str, dict[int, Tensor]] = {}
        self._calls: dict[str, dict[int, int]] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, site: Site, maps: Tensor, step: int = 0) -> None:
        """Add the maps (b k n c) of one call; n must be the cells of the site, in all its frames: see
        :meth:`Site.unfold`. Raises BadInput otherwise."""
        if maps.shape[2] != site.cells:
            given = f"maps of {maps.shape[2]} queries"
            raise BadInput(f"{given} do not fit the grid {site.shape} of attention site {site.path}.")
        slot = step if self.steps else 0
        sums, calls = self._sums.setdefault(site.path, {}), self._calls.setdefault(site.path, {})
        self._sites[site.path], self._head_count[site.path] = site, maps.shape[1]
        maps = maps.detach().float()
        maps = maps if self.heads else maps.mean(1, keepdim=True)
        if slot in sums:
            sums[slot] += maps
        else:
            sums[slot] = maps.clone()  # the first one may share memory with the caller's
        calls[slot] = calls.get(slot, 0) + 1

    def take(self, sample: int) -> list[LayerMaps]:
        """The mean maps of one sample, per site in the order in which sites were first seen, on the CPU."""
        layers = []
        for path, sums in self._sums.items():
            slots = sorted(sums)
            calls = tuple(self._calls[path][slot] for slot in slots)
            maps = torch.stack([sums[slot][sample].cpu() / n for slot, n in zip(slots, calls, strict=True)])
            site = self._sites[path]
            maps = maps.transpose(-1, -2).unflatten(-1, site.shape).contiguous()  # (s k n c) -> (s k c [f] h w)
            steps = tuple(slots) if self.steps else ()
            layers.append(LayerMaps(site, maps, self._head_count[path], calls, steps))
        return layers


def upscale(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (... h w) at another ``size`` (H, W) by bicubic interpolation, clamped at 0, since bicubic undershoots."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps.clamp_min(0)
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size=tuple(size), mode="bicubic").clamp_min(0).reshape(*maps.shape[:-2], *size)
