"""Relevance: what an output of a transformer rests on, from its attention maps and their gradients.

The update rules of Chefer, Gur and Wolf 2021 (arXiv 2103.15679) as plain functions of tensors, b batch, k heads, n rows
(who attends), t columns (who is attended to). Relevance of tokens among themselves starts as the identity, that of one
kind of tokens for another as zero; layers are walked in the order of execution. Everything is differentiable, so that
relevance can be a loss.

    >>> out, maps = recorded(vit, find_sites(vit, once), lambda: vit(pixels).logits)
    >>> relevance = self_relevance(maps, map_gradients(out[:, 3], maps))  # what class 3 rests on
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from sfumato.attention.seam import AttentionSeam, Call, Tap
from sfumato.errors import BadInput
from sfumato.models.site import Site

__all__ = [
    "cross_update",
    "head_mean",
    "identity",
    "map_gradients",
    "normalized",
    "recorded",
    "self_relevance",
    "self_update",
]

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


def head_mean(maps: Tensor, gradients: Tensor) -> Tensor:
    """Attention (b n t) as far as it speaks for the target: the mean over heads of (gradient x map)^+ (rule 5)."""
    return (gradients * maps).clamp_min(0).mean(1)


def identity(like: Tensor) -> Tensor:
    """(b n n): every token relevant to itself alone, for maps (b ... n)."""
    n = like.shape[-1]
    return torch.eye(n, dtype=like.dtype, device=like.device).expand(like.shape[0], n, n)


def self_update(weights: Tensor, *relevances: Tensor) -> list[Tensor]:
    """R + A R for each relevance (b n m) of the attending tokens, by their self-attention ``weights`` (b n n) (rules 6
    and 7)."""
    return [relevance + weights @ relevance for relevance in relevances]


def self_relevance(maps: Iterable[Tensor], gradients: Iterable[Tensor]) -> Tensor:
    """(b n n): how much every token rests on every other after these layers of self-attention, in their order."""
    relevance: Tensor | None = None
    for seen, gradient in zip(maps, gradients, strict=True):
        weights = head_mean(seen, gradient)
        relevance = identity(weights) if relevance is None else relevance
        [relevance] = self_update(weights, relevance)
    if relevance is None:
        raise BadInput("self_relevance needs the maps of one layer at least.")
    return relevance


def normalized(relevance: Tensor) -> Tensor:
    """Self-relevance (b n n) with the part that came from others scaled to sum 1 per row (equations 8 and 9); a row to
    which nothing came stays as it is."""
    own = identity(relevance)
    rest = relevance - own
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp_min(torch.finfo(rest.dtype).tiny), 0) + own


def cross_update(weights: Tensor, own: Tensor, other: Tensor, back: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What to add to R_sq (b n t) and R_ss (b n n) where tokens s attend to tokens q with ``weights`` (b n t).

    ``own`` and ``other`` are R_ss (b n n) and R_qq (b t t) before the layer, ``back`` is R_qs (b t n), None where q
    never attended to s (rules 10 and 11).
    """
    added = normalized(own).transpose(-1, -2) @ weights @ normalized(other)
    return added, torch.zeros_like(own) if back is None else weights @ back
