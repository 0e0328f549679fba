"""Relevancy algebra: how much each token of a model's input led to each token of its output, from attention maps.

Chefer, Gur, Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers"
(ICCV 2021, arXiv 2103.15679), section 3; rule numbers are the paper's equations. Attention flow by rollout: Abnar &
Zuidema 2020. Everything is batched (b first), on any device, and differentiable when its inputs are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadInput, UnknownName

__all__ = ["Relevancy", "fuse_heads", "normalised", "resampling", "rollout", "self_relevance", "with_residual"]


def fuse_heads(probs: Tensor, gradients: Tensor) -> Tensor:
    """Rule 5: mean over heads of the positive part of gradient times map; both (b k n t), result (b n t)."""
    return (probs * gradients).clamp_min(0).mean(1)


def normalised(own: Tensor) -> Tensor:
    """Eqs. 8 and 9: a self matrix (b n n), its identity set apart, with rows that sum to 1, and the identity again.

    A row that nothing has been added to stays the identity's alone (the published code divides zero by zero there).
    """
    eye = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    gained = own - eye
    total = gained.sum(-1, keepdim=True)
    return torch.where(total > 0, gained / torch.where(total > 0, total, 1.0), 0.0) + eye


def with_residual(own: Tensor, row_sums: bool = True) -> Tensor:
    """A map (b n n) with the residual connection added, and rows that sum to 1 unless ``row_sums`` is False."""
    mixed = own + torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    return mixed / mixed.sum(-1, keepdim=True) if row_sums else mixed


def rollout(maps: Iterable[Tensor], row_sums: bool = True) -> Tensor:
    """Attention rollout: the product, last leftmost, of maps (b n n) :func:`with_residual`."""
    out: Tensor | None = None
    for each in maps:
        mixed = with_residual(each, row_sums)
        out = mixed if out is None else mixed @ out
    if out is None:
        raise BadInput("rollout needs at least one attention map.")
    return out


def resampling(old: tuple[int, int], new: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How relevance changes its grid: rows (new cells, old cells) and columns (old cells, new cells).

    A new row is the mean of the old cells it covers. A column shares its relevance out over the new cells on it.
    """
    cells = torch.eye(old[0] * old[1]).view(-1, 1, *old)
    small = new[0] <= old[0] and new[1] <= old[1]
    moved = F.adaptive_avg_pool2d(cells, new) if small else F.interpolate(cells, size=new, mode="nearest")
    rows = moved.flatten(1).T  # new cells x old cells, every row sums to 1
    columns = rows.T / rows.T.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return rows, columns


class Relevancy:
    """Matrices R[s, q] (b, tokens of s, tokens of q): how much each token of q led to each token of s so far.

    ``sizes`` name the token sets and say how many tokens each has. R[s, s] begins as the identity, the others as zero.
    Call the methods in the order in which the model attends. ``normalise=False`` uses self matrices as they are in rule
    10, ``mix=False`` leaves them out of it, ``add=False`` replaces instead of adding: the paper's ablations.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        like: Tensor,
        *,
        normalise: bool = True,
        mix: bool = True,
        add: bool = True,
    ):
        self.normalise, self.mix, self.add = normalise, mix, add
        batch = like.shape[0]
        self.matrices: dict[tuple[str, str], Tensor] = {}
        for s, rows in sizes.items():
            for q, columns in sizes.items():
                start = torch.eye(rows) if s == q else torch.zeros(rows, columns)
                self.matrices[s, q] = start.to(like).expand(batch, rows, columns)

    def __getitem__(self, pair: tuple[str, str]) -> Tensor:
        if pair not in self.matrices:
            raise UnknownName("token set", pair[0], {s for s, _ in self.matrices})
        return self.matrices[pair]

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(s for s, _ in self.matrices))

    def _plus(self, old: Tensor, gain: Tensor) -> Tensor:
        return old + gain if self.add else gain

    def attend_self(self, s: str, fused: Tensor) -> None:
        """Rules 6 and 7: the tokens of ``s`` attend to one another by ``fused`` (b n n)."""
        old = {q: self.matrices[s, q] for q in self.sets}
        for q, before in old.items():
            self.matrices[s, q] = self._plus(before, fused @ before)

    def cross_gain(self, s: str, q: str, fused: Tensor) -> tuple[Tensor, Tensor]:
        """Rules 10 and 11: what R[s, q] and R[s, s] gain when ``s`` attends to ``q`` by ``fused`` (b n m)."""
        across = fused
        if self.mix:
            own, other = self.matrices[s, s], self.matrices[q, q]
            if self.normalise:
                own, other = normalised(own), normalised(other)
            across = own.transpose(-1, -2) @ fused @ other
        return across, fused @ self.matrices[q, s]

    def attend_cross(self, s: str, q: str, fused: Tensor) -> None:
        """``s`` attends to ``q``. Where ``q`` never attends to ``s`` (a decoder), rule 11 adds nothing."""
        across, own = self.cross_gain(s, q, fused)
        self.matrices[s, q] = self._plus(self.matrices[s, q], across)
        self.matrices[s, s] = self.matrices[s, s] + own

    def attend_both(self, s: str, q: str, there: Tensor, back: Tensor) -> None:
        """Co-attention: ``s`` attends to ``q`` by ``there``, ``q`` to ``s`` by ``back``, both from the old matrices."""
        gains = {(s, q): self.cross_gain(s, q, there), (q, s): self.cross_gain(q, s, back)}
        for (a, b), (across, own) in gains.items():
            self.matrices[a, b] = self._plus(self.matrices[a, b], across)
            self.matrices[a, a] = self.matrices[a, a] + own

    def resample(self, s: str, old: tuple[int, int], new: tuple[int, int]) -> None:
        """The tokens of ``s``, a grid ``old``, become a grid ``new`` (a U-Net's change of resolution; ours)."""
        rows, columns = (part.to(self.matrices[s, s]) for part in resampling(old, new))
        eye_old = torch.eye(rows.shape[1]).to(rows)
        eye_new = torch.eye(rows.shape[0]).to(rows)
        for q in self.sets:
            if q == s:
                self.matrices[s, s] = eye_new + rows @ (self.matrices[s, s] - eye_old) @ columns
            else:
                self.matrices[s, q] = rows @ self.matrices[s, q]
                self.matrices[q, s] = self.matrices[q, s] @ columns

    def of(self, s: str) -> dict[tuple[str, str], Tensor]:
        """The rows of ``s``, to be put back by :meth:`join`."""
        return {pair: matrix for pair, matrix in self.matrices.items() if pair[0] == s}

    def join(self, before: Mapping[tuple[str, str], Tensor]) -> None:
        """A skip connection: rows become the mean of what they are and what they were ``before`` (ours)."""
        for pair, matrix in before.items():
            self.matrices[pair] = (self.matrices[pair] + matrix) / 2


def self_relevance(maps: Iterable[Tensor], gradients: Iterable[Tensor]) -> Tensor:
    """(b n n): how much every token rests on every other after these layers of self-attention, in their order."""
    state: Relevancy | None = None
    for probs, gradient in zip(maps, gradients, strict=True):
        fused = fuse_heads(probs, gradient)
        state = state or Relevancy({"tokens": fused.shape[-1]}, fused)
        state.attend_self("tokens", fused)
    if state is None:
        raise BadInput("self_relevance needs the maps of one layer at least.")
    return state["tokens", "tokens"]
