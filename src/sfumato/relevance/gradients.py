"""Relevance: what an output of a transformer rests on, from its attention maps and their gradients.

Maps and gradients of real modules, for the rules of Chefer, Gur and Wolf 2021 (arXiv 2103.15679), which
:mod:`sfumato.relevance.rules` holds. Everything is differentiable, so that relevance can be a loss.

    >>> out, maps = recorded(vit, find_sites(vit, once), lambda: vit(pixels).logits)
    >>> relevance = self_relevance(maps, map_gradients(out[:, 3], maps))  # what class 3 rests on
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from sfumato.attention.call import Call
from sfumato.attention.seam import AttentionSeam
from sfumato.attention.tap import Tap
from sfumato.errors import BadInput
from sfumato.models.site import Site
from sfumato.relevance.rules import Relevancy, fuse_heads

__all__ = ["map_gradients", "recorded", "self_relevance"]

Output = TypeVar("Output")


def recorded(module: nn.Module, sites: Sequence[Site], call: Callable[[], Output]) -> tuple[Output, list[Tensor]]:
    """What ``call()`` returns, which must run ``module`` once, and the attention maps (b k n t) of ``sites`` in it.

    The maps are what the output is computed from, in float32 and by explicit attention, so gradients with respect to
    them exist, of any order. Call it where gradients are recorded. Raises as :class:`AttentionSeam`.
    """
    kept: dict[str, Tensor] = {}

    def keep(seen: Call) -> Tensor:
        maps = seen.probs()
        if not maps.requires_grad:  # nothing below takes part in the graph: it begins here
            maps = maps.detach().requires_grad_(True)
        kept[seen.site.path] = maps
        return maps

    if not torch.is_grad_enabled():
        raise BadInput("recorded: attention maps for relevance are needed where gradients are recorded.")
    paths = {site.path for site in sites}
    tap = Tap(lambda site: site.path in paths, edit_probs=keep, name="relevance")
    with AttentionSeam(module, sites, [tap]) as seam, seam.forward():
        out = call()
    return out, [kept[site.path] for site in sites]


def map_gradients(target: Tensor, maps: Sequence[Tensor], second_order: bool = False) -> list[Tensor]:
    """Gradients of ``target``, one number per sample, with respect to attention maps (b k n t), in float32.

    Samples must not mix in the model, so that one pass over their sum serves all. ``second_order``: the gradients can
    themselves be differentiated, which a loss on relevance needs; the graph is kept either way.
    """
    return list(torch.autograd.grad(target.float().sum(), maps, create_graph=second_order, retain_graph=True))


def self_relevance(maps: Iterable[Tensor], gradients: Iterable[Tensor]) -> Tensor:
    """(b n n): how much every token rests on every other after these layers of self-attention, in their order."""
    state: Relevancy | None = None
    for seen, gradient in zip(maps, gradients, strict=True):
        fused = fuse_heads(seen, gradient)
        state = state or Relevancy({"tokens": fused.shape[-1]}, fused)
        state.attend_self("tokens", fused)
    if state is None:
        raise BadInput("self_relevance needs the maps of one layer at least.")
    return state["tokens", "tokens"]
