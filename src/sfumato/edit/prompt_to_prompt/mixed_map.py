"""The edited map M A + M* diag(b) of a step, from the source's map M and the edited picture's own map M*.

It is linear in both, column by column, so its product with the values V* is attention with the source's queries and
keys to the values A V*, plus own attention to b V*: no map is materialised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.attention.call import Call
from sfumato.markup import described
from sfumato.text.align import Alignment


@dataclass(frozen=True, eq=False)
class StepEdit:
    """The edit of step ``i``: A (b s t) and b (b t) for the text columns; ``image_share``, the share of attention among
    pixels that is the source's. ``words``: whether any word is edited; ``uses_own``: whether b is not all zero;
    ``sums_to_one``: whether rows of A do; ``identity``: whether M A + M diag(b) is M."""

    i: int
    source: Tensor
    own: Tensor
    image_share: float
    words: bool
    uses_own: bool
    sums_to_one: bool
    identity: bool

    __repr__ = described

    @classmethod
    def of(
        cls, i: int, alpha: Tensor, factors: Tensor, alignments: Sequence[Alignment], image_share: float, device: object
    ) -> StepEdit:
        """With c the ``factors`` (b t), R the alignment and r its taken columns, the edit of column j is
        c_j (r_j (M R)_j + (1 - r_j) M*_j), and ``alpha``_j (b t) of it is taken beside (1 - alpha_j) M*_j."""
        taken, matrix = (torch.stack([getattr(a, name) for a in alignments]) for name in ("taken", "matrix"))
        source = matrix * (alpha * factors * taken)[:, None]
        own = alpha * factors * (1 - taken) + (1 - alpha)
        diagonal = torch.diag_embed(torch.diagonal(source, dim1=1, dim2=2))
        one = torch.ones_like(own)
        return cls(
            i,
            source.to(device),
            own.to(device),
            image_share,
            words=bool((alpha > 0).any()),
            uses_own=bool(own.any()),
            sums_to_one=torch.equal(source.abs().sum(2), one),
            identity=torch.equal(source, diagonal) and torch.equal(source.sum(1) + own, one),
        )


class MixedMap:
    """The edited map of one call. ``edit`` None leaves attention to words alone.

    Where image and text share one softmax the edited rows are normalised anew (by the sums of the absolute weights, so
    that factors below zero stay harmless); where the text has its own softmax they are left as they are, as in the
    paper. Text queries of a joint attention keep their own rows.
    """

    def __init__(self, source: Call, edit: StepEdit | None, image_share: float):
        self.source, self.edit, self.image_share = source, edit, image_share
        site = source.site
        self.image = slice(*site.image) if site.kind != "cross" else None
        self.text = slice(*site.text) if site.text is not None else None
        whole = image_share == 1 or self.image is None
        self.uses_own = not whole or (self.text is not None and (edit is None or edit.uses_own))
        # every key's attention goes where it went in the source
        self.as_source = not self.uses_own and (edit is None or edit.identity)
        self.normalises = site.kind == "joint" and (self.uses_own or (edit is not None and not edit.sums_to_one))

    def attend(self, own: Call) -> Tensor:
        """The output (b k n d)."""

        def edited(rows: slice) -> Tensor:
            ours, theirs = own.of_queries(rows), self.source.of_queries(rows)
            out = theirs.with_values(self._from_source(own.v)).attend()
            if self.uses_own:
                out = out + ours.with_values(self._from_own(own.v)).attend()
            if self.normalises:
                ones = torch.ones_like(own.v)
                total = theirs.with_values(self._from_source(ones, absolute=True)).attend()
                total = total + ours.with_values(self._from_own(ones, absolute=True)).attend()
                out = out / total.clamp_min(torch.finfo(out.dtype).tiny)
            return out

        n = own.q.shape[2]
        parts = [
            edited(rows) if inside else own.of_queries(rows).attend() for rows, inside in _split(slice(0, n), own.image)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def probs(self, own: Call, queries: slice) -> Tensor:
        """The map (b k n t) of some queries, materialised for those who look."""
        start, stop, _ = queries.indices(own.q.shape[2])
        parts = []
        for rows, inside in _split(slice(start, stop), own.image):
            probs = own.probs(rows)
            if inside:
                eye = torch.eye(probs.shape[-1], device=probs.device).expand(probs.shape[0], 1, -1, -1)
                source = self.source.probs(rows)
                theirs, ours = self._from_source(eye), self._from_own(eye)
                edited = source @ theirs + (probs @ ours if self.uses_own else 0.0)
                if self.normalises:
                    ones = eye.new_ones(probs.shape[0], 1, probs.shape[-1], 1)
                    total = source @ self._from_source(ones, True) + probs @ self._from_own(ones, True)
                    edited = edited / total.clamp_min(torch.finfo(edited.dtype).tiny)
                probs = edited
            parts.append(probs)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _from_source(self, values: Tensor, absolute: bool = False) -> Tensor:
        """A V: the values (b k t d) as the source's keys find them."""
        if self.as_source:
            return values
        out = torch.zeros_like(values)
        if self.image is not None:
            out[:, :, self.image] = self.image_share * values[:, :, self.image]
        if self.text is not None and self.edit is not None:
            t = self.text.stop - self.text.start  # the text of this call may be shorter than the model's axis
            matrix = (self.edit.source.abs() if absolute else self.edit.source)[:, :t, :t]
            out[:, :, self.text] = (matrix[:, None] @ values[:, :, self.text].float()).to(values.dtype)
        return out

    def _from_own(self, values: Tensor, absolute: bool = False) -> Tensor:
        """diag(b) V: the values (b k t d) as the own keys find them."""
        out = values.clone()
        if self.image is not None:
            out[:, :, self.image] *= 1 - self.image_share
        if self.text is not None and self.edit is not None:
            own = (self.edit.own.abs() if absolute else self.edit.own)[:, : self.text.stop - self.text.start]
            out[:, :, self.text] *= own[:, None, :, None].to(values.dtype)
        return out


def _split(queries: slice, image: slice) -> list[tuple[slice, bool]]:
    """Queries before, in and behind the image, in order, and whether they are of the image."""
    cuts = [(queries.start, image.start, False), (image.start, image.stop, True), (image.stop, queries.stop, False)]
    clipped = [(max(a, queries.start), min(b, queries.stop), inside) for a, b, inside in cuts]
    return [(slice(a, b), inside) for a, b, inside in clipped if a < b]
