"""Which attention sites: a selector by kind, place and size, and discovery of the sites of any module by behaviour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from sfumato.errors import NoMatch, NotSupported
from sfumato.models.hooks import running
from sfumato.models.site import Site

__all__ = ["Site", "Where", "find_sites"]


@dataclass(frozen=True)
class Where:
    """A predicate on sites; every condition that is given must hold.

    ``kinds`` of "self", "cross", "joint", "temporal"; ``places`` are shell patterns on the block or the module path
    ("up", "mid", "*.attn2"); ``grid`` an exact (h, w); ``min_cells`` and ``max_cells`` bound h w.
    ``text=True`` keeps sites that have text among their keys.
    """

    kinds: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None
    min_cells: int | None = None
    max_cells: int | None = None
    text: bool | None = None

    def __call__(self, site: Site) -> bool:
        cells = site.grid[0] * site.grid[1] if site.grid is not None else None
        return (
            (not self.kinds or site.kind in self.kinds)
            and (not self.places or matches_place(site, self.places))
            and (self.grid is None or site.grid == self.grid)
            and (self.min_cells is None or (cells is not None and cells >= self.min_cells))
            and (self.max_cells is None or (cells is not None and cells <= self.max_cells))
            and (self.text is None or (site.text is not None) == self.text)
        )


def matches_place(site: Site, places: Sequence[str]) -> bool:
    """Whether the block or the module path of a site fits one of the shell patterns; a block also stands for its parts
    ("up" for "up.0", "up.1" ...)."""
    return any(
        fnmatchcase(site.block, place) or fnmatchcase(site.path, place) or site.block.startswith(place + ".")
        for place in places
    )


def find_sites(module: nn.Module, run_once: Callable[[], Any]) -> list[Site]:
    """The attention sites of any module, found by running it once.

    ``run_once`` calls the module on some input; each module that directly reaches ``scaled_dot_product_attention`` is a
    site, in the order of execution. Kind is "self" when queries and keys are equally many, else "cross" (then every key
    counts as text). Grids are unknown here (None). Works on CLIP, ViT, BERT, T5 and whatever else uses that function.
    Raises NoMatch when no call is seen, NotSupported when queries are not in ``b k n d`` layout.
    """
    found: dict[str, Site] = {}

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention and stack and stack[-1].path not in found:
                path = stack[-1].path
                found[path] = _site_of_call(path, len(found), *args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    with running(module) as stack, Spy():
        run_once()
    if not found:
        raise NoMatch(
            f"{type(module).__name__} never called scaled_dot_product_attention; "
            + (
                "call its set_attn_implementation('sdpa')."
                if hasattr(module, "set_attn_implementation")
                else "load it again, and leave its attention processors as they are."
            )
        )
    return list(found.values())


def _site_of_call(path: str, index: int, query: Any, key: Any, *_: Any, **__: Any) -> Site:
    if query.dim() != 4:
        raise NotSupported(f"attention at {path} has {query.dim()}-dimensional queries; b k n d is expected.")
    heads, n, t = query.shape[1], query.shape[2], key.shape[2]
    kind = "self" if n == t else "cross"
    text = (0, t) if kind == "cross" else None
    return Site(path, kind, None, text, (0, n), heads, path, index)
