"""One attention call: its queries, keys and values, the maps they make, and what editors put in their place."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.attention.map_replacement import MapReplacement
from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported
from sfumato.models.site import Site

__all__ = ["Call"]

#: Up to this many keys an explicit softmax costs less than a second fused call.
FEW_KEYS = 128
#: Queries handled at once where scores have to be materialised only to be reduced again.
QUERY_CHUNK = 512


class Call:
    """One attention call: softmax(scale q k^T + mask) v.

    ``q`` (b k n d), ``k`` and ``v`` (b k t d; fewer heads with grouped queries), ``mask`` broadcastable to (b k n t) or
    None, boolean (True = attend) or additive. ``site`` and ``module`` say where, ``step`` is whatever the caller of
    :meth:`AttentionSeam.forward` handed over, ``rows`` maps branches ("cond", "uncond") to slices of the batch axis.
    Maps are computed in float32 (float64 for float64 inputs) and are differentiable. Where frames or cells of a clip
    are folded into the batch axis, b and ``rows`` count these too: see :attr:`Site.fold` and :meth:`Site.unfold`.

    A call is read through :meth:`scores`, :meth:`probs`, :meth:`word_probs` and :meth:`attend`; it is changed in place
    through the ``replace_`` methods, which the seam calls with what editors return; ``with_values`` and ``of_queries``
    give another call and leave this one alone.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        site: Site,
        module: nn.Module,
        step: Any = None,
        rows: dict[str, slice] | None = None,
    ):
        self.q, self.k, self.v = query, key, value
        self.mask, self.dropout, self.is_causal, self.enable_gqa = attn_mask, dropout_p, is_causal, enable_gqa
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.site, self.module, self.step = site, module, step
        self.rows = rows or {}
        self.given_scale = scale  # None: the default, which the fused kernel works out itself
        self._records_grad = torch.is_grad_enabled()
        self._scores: Tensor | None = None  # these three: what stands in for the call's own
        self._probs: Tensor | None = None
        self._other: MapReplacement | None = None
        self._fused: tuple[Tensor, Tensor] | None = None  # (output, log-sum-exp) of the fused kernel, whole batch
        # the call this one shows rows of; none for a call of its own: a reference to itself would keep tensors
        # until the collector of cycles comes by
        self._whole: Call | None = None
        self._part = slice(None)
        self._came: tuple[Call, Tensor, Tensor] | None = None  # before `rearrange`, with the places, and `v` behind it

    # -- where things are ----------------------------------------------------------------------------------------------

    @property
    def text(self) -> slice:
        """The text columns among the keys. NotSupported at a site without text."""
        if self.site.text is None:
            raise NotSupported(f"attention site {self.site.path} ({self.site.kind}) has no text keys.")
        return slice(*self.site.text)

    @property
    def image(self) -> slice:
        """The image rows among the queries."""
        return slice(*self.site.image)

    def branch(self, name: str) -> Call:
        """The same call for the rows of one branch only, such as "cond"; shares the work already done."""
        if name not in self.rows:
            raise NoMatch(f"no rows of branch {name!r} in this forward pass; it has: {', '.join(self.rows) or 'none'}.")
        return self._view(self.rows[name])

    def _view(self, part: slice, plain: bool = False) -> Call:
        """The call of some rows; ``plain``: as it is without the map that stands in for its own."""
        mask = self.mask
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask[part]
        view = Call(
            self.q[part], self.k[part], self.v[part], mask, self.dropout, self.is_causal, self.given_scale,
            self.enable_gqa, site=self.site, module=self.module, step=self.step,
        )  # fmt: skip
        view._scores = None if self._scores is None else self._scores[part]
        view._probs = None if self._probs is None else self._probs[part]
        first = self._part.start or 0  # a view of a view
        view._whole, view._part = self._whole or self, slice(first + part.start, first + part.stop)
        other = None if plain else self._other
        if other is not None and other.rows.start < part.stop and part.start < other.rows.stop:
            if other.rows != part:
                raise NotSupported(f"rows {part} of {self.site.path} are partly those of another map, {other.rows}.")
            view._other = MapReplacement(slice(0, part.stop - part.start), other.attend, other.probs)
        return view

    def _around(self, other: MapReplacement, of: Callable[[Call], Tensor], instead: Callable[[Call], Tensor]) -> Tensor:
        """``instead`` of the rows that have another map, ``of`` the rows before and behind them, as one tensor."""
        start, stop, b = other.rows.start, other.rows.stop, self.q.shape[0]
        parts = [of(self._view(slice(0, start), plain=True))] if start else []
        parts.append(instead(self._view(other.rows, plain=True)))
        parts += [of(self._view(slice(stop, b), plain=True))] if stop < b else []
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # -- edits ---------------------------------------------------------------------------------------------------------

    def replace_values(self, values: Tensor) -> None:
        """Pay the map out to other ``values``, in the shape of ``v``. Raises BadInput for another shape."""
        self._check_shape("edit_values", values, self.v.shape)
        self.v, self._fused = values, None

    def replace_scores(self, scores: Tensor) -> None:
        """Put ``scores`` (b k n t), before the mask, in place of q k^T. Raises BadInput for another shape."""
        self._check_shape("edit_scores", scores, self._map_shape)
        self._scores = scores

    def replace_probs(self, probs: Tensor) -> None:
        """Put ``probs`` (b k n t) in place of the softmax; rows need not sum to 1. Raises BadInput for another
        shape."""
        self._check_shape("edit_probs", probs, self._map_shape)
        self._probs = probs

    def replace_map(self, other: MapReplacement) -> None:
        """Let another map act in some rows. Raises Conflict where one does already."""
        if self._other is not None:
            raise Conflict(f"two editors put another map in place of the one at {self.site.path}; only one can.")
        self._other = other

    def rearrange(self, places: Tensor) -> None:
        """Show every row in the order of the site: its i-th query, key and value is the one at ``places`` (b n). The
        output stays in the order in which the call came, and its bits unless something is edited."""
        came = copy.copy(self)

        def ordered(x: Tensor) -> Tensor:
            return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        self.q, self.k, self.v = ordered(self.q), ordered(self.k), ordered(self.v)
        if self.mask is not None and self.mask.dim() == 4:
            mask = self.mask.expand(len(places), *self.mask.shape[1:])
            if mask.shape[-2] > 1:
                mask = mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            self.mask = mask.gather(3, places[:, None, None].expand(-1, *mask.shape[1:3], -1))
        self._came = came, places, self.v

    def with_values(self, values: Tensor) -> Call:
        """The same map paid out to other ``values`` (b k t d), whose heads may be shared; a call of its own."""
        call = copy.copy(self)
        call.v, call._fused, call._came = values, None, None
        return call

    def of_queries(self, queries: slice) -> Call:
        """The call of some queries only, edits included. NotSupported where the mask is causal."""
        if self.is_causal:
            raise NotSupported(f"attention site {self.site.path} is causal; its queries cannot be taken apart.")
        if queries == slice(0, self.q.shape[2]):
            return self
        call = copy.copy(self)
        call.q, call._fused = self.q[:, :, queries], None
        call._scores = None if self._scores is None else self._scores[:, :, queries]
        call._probs = None if self._probs is None else self._probs[:, :, queries]
        if self.mask is not None and self.mask.dim() > 1 and self.mask.shape[-2] > 1:
            call.mask = self.mask[..., queries, :]
        call._whole, call._part, call._came = None, slice(None), None
        return call

    @property
    def _map_shape(self) -> torch.Size:
        return torch.Size((*self.q.shape[:3], self.k.shape[2]))

    def _check_shape(self, stage: str, new: Tensor, shape: torch.Size) -> None:
        if new.shape != shape:
            raise BadInput(f"{stage} at {self.site.path} returned shape {tuple(new.shape)}, expected {tuple(shape)}.")

    # -- maps ----------------------------------------------------------------------------------------------------------

    def scores(self, queries: slice = slice(None), keys: slice | Tensor = slice(None)) -> Tensor:
        """scale q k^T (b k n t), edits included, *before* the mask: no edit can revive a masked key."""
        if self._scores is not None:
            return self._scores[:, :, queries][..., keys]
        with _full_precision(self.q):
            q, k = self.q[:, :, queries], _repeat_heads(self.k, self.q.shape[1])[:, :, keys]
            q, k = _wide(q), _wide(k)
            if q.shape[2] > k.shape[2]:  # scale the smaller one
                return q @ (k * self.scale).transpose(-1, -2)
            return (q * self.scale) @ k.transpose(-1, -2)

    def probs(self, queries: slice = slice(None)) -> Tensor:
        """softmax over all keys (b k n t), edits included; a query that may look nowhere gets zeros."""
        if (other := self._other) is not None:
            return self._around(other, lambda call: call.probs(queries), lambda own: other.probs(own, queries))
        if self._probs is not None:
            return self._probs[:, :, queries]
        return self._softmax(self._masked(self.scores(queries), queries))

    def word_probs(
        self, columns: Sequence[int] | slice, queries: slice | None = None, within: tuple[int, int] | None = None
    ) -> Tensor:
        """Probabilities of a few keys, (b k n c) for c ``columns``, exactly, without the whole matrix.

        ``queries`` defaults to the image rows. ``within`` renormalises over the keys [start, stop), such as the text
        keys of a joint attention; without it the softmax runs over all keys. The way is chosen by what it costs: the
        log-sum-exp of the fused call itself, an explicit softmax over few keys, else a second fused call whose values
        are one-hot columns (which is differentiable).
        """
        queries = self.image if queries is None else queries
        index = self._index(columns)
        if self._other is not None:
            chunks = []
            for part in _chunks(queries, self.q.shape[2]):
                probs = self.probs(part)
                total = probs[..., slice(*within)].sum(-1, keepdim=True) if within else None
                chunk = probs[..., index]
                chunks.append(chunk if total is None else chunk / total.clamp_min(torch.finfo(chunk.dtype).tiny))
            return torch.cat(chunks, 2)
        if self._probs is not None:
            total = self._probs[:, :, queries, slice(*within)].sum(-1, keepdim=True) if within else None
            part = self._probs[:, :, queries][..., index]
            return part if total is None else part / total.clamp_min(torch.finfo(part.dtype).tiny)
        if within is None and self._scores is None:
            if (lse := self._log_sum_exp()) is not None:
                scores = self._masked(self.scores(queries, index), queries, index)
                return scores.sub_(lse[:, :, queries, None]).exp_()  # no gradients here, and the scores are fresh
            if self.k.shape[2] > FEW_KEYS:
                return self._by_value_substitution(index, queries)
        keys = slice(*within) if within else slice(None)
        inside = index if within is None else self._index(columns, within[0])
        chunks = []
        for part in _chunks(queries, self.q.shape[2]):
            chunks.append(self._softmax(self._masked(self.scores(part, keys), part, keys))[..., inside])
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 2)

    # -- the output ----------------------------------------------------------------------------------------------------

    def attend(self) -> Tensor:
        """The output (b k n d) in the dtype of ``q``: the fused kernel's own unless the map was edited."""
        if self._came is not None:
            came, places, values = self._came
            if self.v is values and self._scores is None and self._probs is None and self._other is None:
                return came.attend()
            out = self.with_values(self.v).attend()
            return torch.empty_like(out).scatter(2, places[:, None, :, None].expand_as(out), out)
        if self._other is not None:
            return self._around(self._other, Call.attend, self._other.attend).to(self.q.dtype)
        if self._scores is None and self._probs is None:
            if self._fused is not None:
                return self._fused[0]
            return F.scaled_dot_product_attention(
                self.q, self.k, self.v, attn_mask=self.mask, dropout_p=self.dropout, is_causal=self.is_causal,
                scale=self.given_scale, enable_gqa=self.enable_gqa,
            )  # fmt: skip
        probs = self.probs()
        if self.dropout:
            probs = F.dropout(probs, self.dropout)
        with _full_precision(self.q):
            return (probs @ _wide(_repeat_heads(self.v, self.q.shape[1]))).to(self.q.dtype)

    def _index(self, columns: Sequence[int] | slice, origin: int = 0) -> slice | Tensor:
        """The columns, counted from ``origin``, as a slice where they follow each other (a view costs nothing), else as
        an index."""
        n = self.k.shape[2]
        chosen = range(*columns.indices(n)) if isinstance(columns, slice) else columns
        if len(chosen) and (min(chosen) < 0 or max(chosen) >= n):
            raise BadInput(f"columns {list(chosen)} reach outside the {n} keys of attention site {self.site.path}.")
        first = chosen[0] - origin if len(chosen) else 0
        if all(column == chosen[0] + i for i, column in enumerate(chosen)):
            return slice(first, first + len(chosen))
        return torch.tensor([column - origin for column in chosen], device=self.q.device)

    def _masked(self, scores: Tensor, queries: slice, keys: slice | Tensor = slice(None)) -> Tensor:
        """Scores of some queries and keys with the mask and the causal rule applied."""
        if self.mask is not None:
            mask = self.mask
            if mask.dim() > 1 and mask.shape[-2] > 1:
                mask = mask[..., queries, :]
            if mask.shape[-1] > 1:
                mask = mask[..., keys]
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + _wide(mask)
        if self.is_causal:
            rows = torch.arange(self.q.shape[2], device=scores.device)[queries]
            columns = torch.arange(self.k.shape[2], device=scores.device)[keys]
            scores = scores.masked_fill(columns[None] > rows[:, None], float("-inf"))
        return scores

    def _softmax(self, masked: Tensor) -> Tensor:
        probs = masked.softmax(-1)
        if self.mask is None and not self.is_causal and self._scores is None:
            return probs
        return probs.masked_fill(masked.isneginf().all(-1, keepdim=True), 0.0)

    def _log_sum_exp(self) -> Tensor | None:
        """log sum exp of the masked scores, (b k n), as a by-product of the fused call, or None where there is none.

        Only where the kernel that ``scaled_dot_product_attention`` would itself choose hands it out, so that the output
        keeps its bits, and only without gradients (the kernel treats the log-sum-exp as a constant). With bfloat16 or
        float16 inputs it is good to a relative 1e-4, far below what such inputs carry.
        """
        whole = self._whole or self
        if whole._fused is None and whole._kernel_gives_lse():
            mask = whole.mask
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=whole.q.dtype).masked_fill_(~mask, float("-inf"))
            whole._fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                whole.q, whole.k, whole.v, 0.0, whole.is_causal, attn_mask=mask, scale=whole.given_scale
            )
        return None if whole._fused is None else whole._fused[1][self._part]

    def _kernel_gives_lse(self) -> bool:
        q, k, v, mask = self.q, self.k, self.v, self.mask
        return (
            q.device.type == k.device.type == v.device.type == "cpu"
            and self.dropout == 0
            and q.shape[1] == k.shape[1]
            and not (self._records_grad and any(x.requires_grad for x in (q, k, v, mask) if x is not None))
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._are_functorch_transforms_active()
            and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
            and torch._fused_sdp_choice(q, k, v, mask, 0.0, self.is_causal, scale=self.given_scale) == 1  # 1: flash
        )

    def _by_value_substitution(self, index: slice | Tensor, queries: slice) -> Tensor:
        """Fused attention with one-hot values: its output *is* the wanted columns of the probabilities."""
        d = self.v.shape[-1]
        q, k = _wide(self.q[:, :, queries]), _wide(_repeat_heads(self.k, self.q.shape[1]))
        mask = self.mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask[..., queries, :]
        if self.is_causal:  # the kernel counts queries from the first; here they may start later
            causal = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype, device=q.device)
            mask = self._masked(causal, queries)
        elif mask is not None and mask.dtype != torch.bool:
            mask = _wide(mask)
        out = []
        with _full_precision(q):
            for columns in torch.arange(k.shape[2], device=q.device)[index].split(d):
                onehot = torch.zeros(k.shape[2], d, dtype=q.dtype, device=q.device)
                onehot[columns, torch.arange(len(columns), device=q.device)] = 1.0
                values = onehot.expand(*k.shape[:2], -1, -1)
                mapped = F.scaled_dot_product_attention(q, k, values, attn_mask=mask, scale=self.given_scale)
                out.append(mapped[..., : len(columns)])
        return out[0] if len(out) == 1 else torch.cat(out, -1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # some devices know of none
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: each key head serves several neighbouring query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _chunks(queries: slice, n: int) -> list[slice]:
    start, stop, _ = queries.indices(n)
    return [slice(i, min(i + QUERY_CHUNK, stop)) for i in range(start, stop, QUERY_CHUNK)]
