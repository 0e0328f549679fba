"""Sites that read the text and do not: all their attention lies at the start token and the padding, as in a sink.

A site that has nothing to say learns to look where nothing is said (Xiao et al. 2023, https://arxiv.org/abs/2309.17453)
and stays there, since what gets no attention gets no gradient. Its maps are then zero for every word. A penalty on the
logarithm of the words' share has a gradient at any share; it teaches queries and keys of the sites, nothing else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

LEAST = 0.05  # of a site's attention, the mean over heads and places, below which words are too little heard


def text_sites(net: nn.Module) -> list[Attention]:
    """The cross-attention of a U-Net."""
    return [m for m in net.modules() if isinstance(m, Attention) and m.is_cross_attention]


@contextlib.contextmanager
def word_shares(sites: Sequence[Attention], words: Tensor) -> Iterator[list[Tensor]]:
    """Within: gathers at every call of a site the logarithm of the attention that the ``words`` (b t, bool) get, of the
    rows that have words: (b')."""
    found: list[Tensor] = []
    rows = words.any(1)  # of nothing there is no logarithm, nor a gradient

    def share(site: Attention, hidden: Tensor, context: Tensor) -> Tensor:
        query = site.to_q(hidden).unflatten(2, (site.heads, -1)).transpose(1, 2)
        key = site.to_k(context).unflatten(2, (site.heads, -1)).transpose(1, 2)
        scores = (query @ key.transpose(2, 3)).float() * site.scale
        told = scores.masked_fill(~words[rows][:, None, None], -math.inf).logsumexp(3) - scores.logsumexp(3)
        return told.flatten(1).logsumexp(1) - math.log(told.shape[1] * told.shape[2])

    def look(site: Attention, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = (args[0] if args else kwargs["hidden_states"])[rows].detach()
        context = kwargs["encoder_hidden_states"][rows].detach()
        with torch.no_grad():
            seen = share(site, hidden, context)
        # where enough is heard there is no gradient, and none is prepared
        found.append(share(site, hidden, context) if (seen < math.log(LEAST)).any() else seen)

    handles = [site.register_forward_pre_hook(look, with_kwargs=True) for site in sites]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def sink_loss(shares: Sequence[Tensor]) -> Tensor:
    """How far words stay below ``LEAST``, in nats, the mean over sites and rows: a scalar."""
    return torch.stack([F.relu(math.log(LEAST) - share).sum() / max(len(share), 1) for share in shares]).mean()
