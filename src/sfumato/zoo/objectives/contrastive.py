"""The contrastive loss of CLIP (Radford et al. 2021) with hard negatives of each picture."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Contrast", "contrastive"]


class Contrast(NamedTuple):
    """``loss``, a scalar; ``right`` and ``duel`` (b,): whether a picture's own caption has the largest logit of all, or
    of it and its hard negatives; ``duel`` is None where these have no loss of their own."""

    loss: Tensor
    right: Tensor
    duel: Tensor | None


def contrastive(logits: Tensor, same: Tensor, hard: float = 0.0) -> Contrast:
    """Two-way cross-entropy of ``logits`` (b, m): row i belongs to column i, the columns from b on are the hard
    negatives of row 0, of row 1 ...; ``same`` (b, m) marks columns that are no negatives of a row. ``hard`` weighs
    another cross-entropy, of each row against its own hard negatives alone."""
    b = len(logits)
    own = torch.arange(b, device=logits.device)
    twins = same.clone()
    twins[own, own] = False
    logits = logits.masked_fill(twins, -1e4)
    loss = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, :b].T, own))
    right = logits.detach().argmax(1) == own
    if not hard or logits.shape[1] == b:
        return Contrast(loss, right, None)
    rivals = logits[:, b:].unflatten(1, (b, -1))[own, own]
    duel = torch.cat([logits[own, own, None], rivals], 1)
    loss = loss + hard * F.cross_entropy(duel, torch.zeros_like(own))
    return Contrast(loss, right, duel.detach().argmax(1) == 0)
