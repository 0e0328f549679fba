"""Which tokens a model's answer is read from, as weights, found by the gradient of the answer.

A class token, two of them (DeiT's distilled classifier), the mean of all patches (BEiT, Data2Vec), both (DINOv2), the
last token of a text: the gradient of the explained score with respect to the last hidden tokens is zero wherever the
head does not look.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import NotSupported

__all__ = ["read_weights", "weighted_rows"]


def read_weights(gradient: Tensor | None, name: str = "this model") -> Tensor:
    """(b n): lengths of the gradients (b n d) of a score with respect to hidden tokens, as shares of their sum.

    Raises NotSupported where the score reads none of the tokens.
    """
    lengths = None if gradient is None else gradient.norm(dim=-1)
    if lengths is None or not bool((lengths.sum(1) > 0).all()):
        raise NotSupported(f"the score that is explained does not read the tokens of {name}'s last attention layer.")
    return lengths / lengths.sum(1, keepdim=True)


def weighted_rows(matrix: Tensor, weights: Tensor) -> Tensor:
    """(b m): the rows of a matrix (b n m) in the proportion of ``weights`` (b n)."""
    return torch.einsum("bn,bnm->bm", weights.to(matrix), matrix)
