"""The seam: one way into every attention of diffusers and transformers, without replacing a single processor.

Nearly all attention of both libraries ends in ``torch.nn.functional.scaled_dot_product_attention``. Forward hooks on
the wanted modules (*sites*) switch on a ``TorchFunctionMode`` while such a module runs; the mode sees that one call as
``q, k, v`` in ``b k n d`` layout (b batch, k heads, n queries, d features; keys are counted with t), shows it to
observers and lets editors change values, scores or probabilities. Modules nobody asked for never see the mode.

::

    def look(call: Call) -> None:
        maps.append(call.branch("cond").word_probs([2, 5]))

    taps = [Tap(lambda site: site.kind == "cross", observe=look)]
    with AttentionSeam(unet, sites, taps) as seam:
        for t in timesteps:
            with seam.forward(step=t, rows={"uncond": slice(0, 1), "cond": slice(1, 2)}):
                noise = unet(x, t, embeddings).sample

What holds, and is tested: an observed site returns the very bits of the unobserved one, because maps are computed
beside the fused kernel; explicit attention is computed only where an editor really returned something; an editor that
returns None leaves the fused call alone; attention that would bypass the seam is refused instead of yielding nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported
from sfumato.models.site import Site

__all__ = ["AttentionSeam", "Call", "Forward", "StopForward", "Tap"]

#: Up to this many keys an explicit softmax costs less than a second fused call.
FEW_KEYS = 128
#: Queries handled at once where scores have to be materialised only to be reduced again.
QUERY_CHUNK = 512

Callback = Callable[["Call"], Any]

#: Editors of a tap, in the order in which they act.
STAGES = ("edit_values", "edit_scores", "edit_probs", "edit_map")


class StopForward(BaseException):
    """Leaves a forward pass whose remainder nobody needs. Not an Exception, so that no library code swallows it."""

    def __init__(self, forward: Forward):
        super().__init__("forward pass stopped after the last wanted attention site")
        self.forward = forward


@dataclass(eq=False)
class Tap:
    """What one party wants from attention.

    ``where`` selects sites (a predicate on :class:`~sfumato.models.site.Site`; None for all). Every callback takes a
    :class:`Call`. ``observe`` returns nothing and sees the map after all edits (``raw=True``: before). Editors return
    the new tensor, in the shape of ``call.v`` / ``call.scores()`` / ``call.probs()``, or for ``edit_map`` an
    :class:`OtherMap`; or None to leave the call alone. Several taps on one site compose: first all ``edit_values`` in
    the order of the taps, then all ``edit_scores``, then all ``edit_probs``, at last ``edit_map``; each sees what those
    before it made. ``stop_after=True`` says that this tap needs nothing of the
    forward pass beyond its sites; the pass ends early once that is true of all taps.
    """

    where: Callable[[Site], bool] | None = None
    observe: Callback | None = None
    edit_values: Callback | None = None
    edit_scores: Callback | None = None
    edit_probs: Callback | None = None
    edit_map: Callback | None = None
    raw: bool = False
    stop_after: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if not (self.observe or self.edits):
            raise BadInput(f"Tap {self.name!r} does nothing: give observe, {', '.join(STAGES[:-1])} or {STAGES[-1]}.")
        if self.stop_after and self.edits:
            raise BadInput(
                f"Tap {self.name!r} edits attention, so the rest of the forward pass is needed: drop stop_after."
            )

    @property
    def edits(self) -> bool:
        """Whether this tap may change attention."""
        return any(getattr(self, stage) is not None for stage in STAGES)


@dataclass(eq=False)
class OtherMap:
    """A map in place of a call's own, in some ``rows`` of its batch, without materialising it.

    ``attend(own)`` gives the output (b k n d) of those rows, ``probs(own, queries)`` their map (b k n t) for some
    queries, asked only by those who look; ``own`` is the call of those rows as edited so far.
    """

    rows: slice
    attend: Callable[[Call], Tensor]
    probs: Callable[[Call, slice], Tensor]


class Call:
    """One attention call: softmax(scale q k^T + mask) v.

    ``q`` (b k n d), ``k`` and ``v`` (b k t d; fewer heads with grouped queries), ``mask`` broadcastable to (b k n t) or
    None, boolean (True = attend) or additive. ``site`` and ``module`` say where, ``step`` is whatever the caller of
    :meth:`AttentionSeam.forward` handed over, ``rows`` maps branches ("cond", "uncond") to slices of the batch axis.
    Maps are computed in float32 (float64 for float64 inputs) and are differentiable.
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
        self._given_scale = scale
        self._records_grad = torch.is_grad_enabled()
        self._scores: Tensor | None = None  # set by editors
        self._probs: Tensor | None = None
        self._other: OtherMap | None = None
        self._fused: tuple[Tensor, Tensor] | None = None  # (output, log-sum-exp) of the fused kernel, whole batch
        # the call this one shows rows of; none for a call of its own: a reference to itself would keep tensors alive
        # until the collector of cycles comes by
        self._whole: Call | None = None
        self._part = slice(None)

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
            self.q[part], self.k[part], self.v[part], mask, self.dropout, self.is_causal, self._given_scale,
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
            view._other = OtherMap(slice(0, part.stop - part.start), other.attend, other.probs)
        return view

    def _around(self, other: OtherMap, of: Callable[[Call], Tensor], instead: Callable[[Call], Tensor]) -> Tensor:
        """``instead`` of the rows that have another map, ``of`` the rows before and behind them, as one tensor."""
        start, stop, b = other.rows.start, other.rows.stop, self.q.shape[0]
        parts = [of(self._view(slice(0, start), plain=True))] if start else []
        parts.append(instead(self._view(other.rows, plain=True)))
        parts += [of(self._view(slice(stop, b), plain=True))] if stop < b else []
        return parts[0] if len(parts) == 1 else torch.cat(parts)

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
        if self._other is not None:
            return self._around(self._other, Call.attend, self._other.attend).to(self.q.dtype)
        if self._scores is None and self._probs is None:
            if self._fused is not None:
                return self._fused[0]
            return F.scaled_dot_product_attention(
                self.q, self.k, self.v, attn_mask=self.mask, dropout_p=self.dropout, is_causal=self.is_causal,
                scale=self._given_scale, enable_gqa=self.enable_gqa,
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
                whole.q, whole.k, whole.v, 0.0, whole.is_causal, attn_mask=mask, scale=whole._given_scale
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
            and torch._fused_sdp_choice(q, k, v, mask, 0.0, self.is_causal, scale=self._given_scale) == 1  # 1: flash
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
                mapped = F.scaled_dot_product_attention(q, k, values, attn_mask=mask, scale=self._given_scale)
                out.append(mapped[..., : len(columns)])
        return out[0] if len(out) == 1 else torch.cat(out, -1)


@dataclass(eq=False)
class Forward:
    """One forward pass under the seam. ``stopped`` is True if it was left early (there is no output then);
    ``calls`` counts the attention calls seen per site path."""

    step: Any = None
    rows: dict[str, slice] = field(default_factory=dict)
    stopped: bool = False
    calls: dict[str, int] = field(default_factory=dict)
    entered: set[str] = field(default_factory=set)
    thread: int = field(default_factory=threading.get_ident)


class _Frame(TorchFunctionMode):
    """The mode that is on while one wanted module runs. Its first attention call belongs to the taps; further ones,
    such as those of image-prompt adapters, pass untouched."""

    def __init__(self, seam: AttentionSeam, site: Site, module: nn.Module):
        super().__init__()
        self.seam, self.site, self.module, self.seen = seam, site, module, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or self.seen:
            return func(*args, **(kwargs or {}))
        self.seen = True
        return self.seam._attend(self.site, self.module, *args, **(kwargs or {}))


class AttentionSeam:
    """Taps attached to a module; a context manager that leaves no trace.

    Hooks sit on the modules of the wanted sites between ``__enter__`` and ``__exit__`` and act only inside
    :meth:`forward`, in the thread that opened it. Raises NoMatch when a tap's ``where`` selects no site, NotSupported
    when a wanted site would bypass the seam (compiled modules, cached blocks, foreign attention backends), Conflict
    when two seams are in a forward pass of the same module at once.
    """

    _running: set[tuple[int, int]] = set()  # (module, thread) pairs inside a forward pass, over all seams

    def __init__(self, module: nn.Module, sites: Iterable[Site], taps: Iterable[Tap]):
        self.module, self.taps = module, list(taps)
        self._modules: dict[str, nn.Module] = {}
        self._taps_at: dict[str, list[Tap]] = {}
        self._calls: dict[Tap, dict[str, int]] = {tap: {} for tap in self.taps}
        self.forwards = 0
        self._handles: list[Any] = []
        self._frames: list[_Frame] = []
        self._forward: Forward | None = None
        sites = list(sites)
        self._sites = {site.path: site for site in sites}
        for tap in self.taps:
            chosen = [site for site in sites if tap.where is None or tap.where(site)]
            if not chosen:
                known = ", ".join(f"{s.path} ({s.kind})" for s in sites[:8]) + (", ..." if len(sites) > 8 else "")
                raise NoMatch(
                    f"the tap {tap.name!r} matches none of the {len(sites)} attention sites: {known or 'none'}."
                )
            for site in chosen:
                self._taps_at.setdefault(site.path, []).append(tap)
        for path in self._taps_at:
            try:
                self._modules[path] = module.get_submodule(path)
            except AttributeError:
                raise NoMatch(f"{type(module).__name__} has no module {path!r} to look into.") from None

    # -- attach and detach ---------------------------------------------------------------------------------------------

    def __enter__(self) -> AttentionSeam:
        if self._handles:
            raise Conflict("this attention seam is already attached.")
        _refuse_what_bypasses(self.module, self._modules)
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._opener(self._sites[path])))
            self._handles.append(module.register_forward_hook(self._close, always_call=True))
        return self

    def __exit__(self, *exc: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _opener(self, site: Site) -> Callable[[nn.Module, Any], None]:
        def open_frame(module: nn.Module, args: Any) -> None:
            if self._forward is None or self._forward.thread != threading.get_ident():
                return
            frame = _Frame(self, site, module)
            self._frames.append(frame)
            self._forward.entered.add(site.path)
            frame.__enter__()

        return open_frame

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = self._forward
        if forward is None or forward.thread != threading.get_ident() or not self._frames:
            return
        if self._frames[-1].module is not module:
            return
        self._frames.pop().__exit__(None, None, None)
        if len(forward.calls) == len(self._modules) and all(tap.stop_after for tap in self.taps):
            raise StopForward(forward)

    # -- one forward pass ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def forward(self, step: Any = None, rows: dict[str, slice] | None = None) -> Iterator[Forward]:
        """Surrounds one call of the module.

        ``rows`` tells which part of the batch is which branch: ``{"uncond": slice(0, b), "cond": slice(b, 2 * b)}``;
        it is never guessed. If the pass ends early the statements after the module's call are skipped and
        ``forward.stopped`` is True. Raises NoMatch when a wanted site was not seen.
        """
        if not self._handles and self._modules:
            raise Conflict("the attention seam is not attached; use it as a context manager.")
        key = (id(self.module), threading.get_ident())
        if key in AttentionSeam._running:
            raise Conflict("another attention seam is in a forward pass of this model; give all taps to one seam.")
        if torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in self.module.modules()):
            raise NotSupported(
                "gradient checkpointing runs attention twice, which attention taps cannot follow; "
                "call disable_gradient_checkpointing() first."
            )
        forward = Forward(step, dict(rows or {}))
        AttentionSeam._running.add(key)
        self._forward = forward
        try:
            yield forward
            self.forwards += 1
            self._complain_if_unseen(forward)
        except StopForward as stop:
            if stop.forward is not forward:
                raise
            self.forwards += 1
            forward.stopped = True
        finally:
            while self._frames:  # only after an exception that skipped the hooks, such as KeyboardInterrupt
                self._frames.pop().__exit__(None, None, None)
            self._forward = None
            AttentionSeam._running.discard(key)

    def coverage(self, tap: Tap | None = None) -> dict[str, Any]:
        """How much one tap, or all together, saw: ``sites`` (paths with a call), ``calls``, ``forwards``."""
        taps = self.taps if tap is None else [tap]
        paths = dict.fromkeys(path for each in taps for path in self._calls[each])
        calls = sum(max(self._calls[each].get(path, 0) for each in taps) for path in paths)
        return {"sites": list(paths), "calls": calls, "forwards": self.forwards}

    # -- inside a call -------------------------------------------------------------------------------------------------

    def _attend(self, site: Site, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        forward = self._forward
        assert forward is not None
        call = Call(*args, **kwargs, site=site, module=module, step=forward.step)
        _check_layout(call)
        call.rows = _expand_rows(forward.rows, call.q.shape[0], site)
        taps = self._taps_at[site.path]
        for tap in taps:
            if tap.observe and tap.raw:
                tap.observe(call)
        for stage in STAGES:
            for tap in taps:
                if (edit := getattr(tap, stage)) and (new := edit(call)) is not None:
                    _apply(call, stage, new)
        for tap in taps:
            if tap.observe and not tap.raw:
                tap.observe(call)
        out = call.attend()
        forward.calls[site.path] = forward.calls.get(site.path, 0) + 1
        for tap in taps:
            self._calls[tap][site.path] = self._calls[tap].get(site.path, 0) + 1
        return out

    def _complain_if_unseen(self, forward: Forward) -> None:
        unseen = [path for path in self._modules if path not in forward.calls]
        if not unseen:
            return
        ran = [path for path in unseen if path in forward.entered]
        seen = ", ".join(forward.calls) or "none"
        if ran:
            processor = getattr(self._modules[ran[0]], "processor", None)
            how = f" (its processor is {type(processor).__name__})" if processor is not None else ""
            raise NoMatch(
                f"attention site {ran[0]}{how} ran without calling scaled_dot_product_attention, so nothing of it can "
                f"be seen; restore the default processors (set_default_attn_processor, attn_implementation='sdpa'). "
                f"Sites seen: {seen}."
            )
        raise NoMatch(f"attention site {unseen[0]} did not run in this forward pass. Sites seen: {seen}.")


# -- helpers -----------------------------------------------------------------------------------------------------------


def _apply(call: Call, stage: str, new: Any) -> None:
    """Store what an editor returned. Edits of scores come before edits of probabilities, so none is ever lost."""
    if stage == "edit_map":
        if call._other is not None:
            raise Conflict(f"two editors put another map in place of the one at {call.site.path}; only one can.")
        call._other = new
        return
    if stage == "edit_values":
        shape = call.v.shape
    else:
        heads, queries, keys = call.q.shape[1], call.q.shape[2], call.k.shape[2]
        shape = torch.Size((call.q.shape[0], heads, queries, keys))
    if new.shape != shape:
        raise BadInput(f"{stage} at {call.site.path} returned shape {tuple(new.shape)}, expected {tuple(shape)}.")
    if stage == "edit_values":
        call.v, call._fused = new, None
    elif stage == "edit_scores":
        call._scores = new
    else:
        call._probs = new


def _check_layout(call: Call) -> None:
    """A wrong table of text and image ranges gives plausible, false maps: check what can be checked."""
    site = call.site
    if call.q.dim() != 4:
        raise NotSupported(f"attention site {site.path} has {call.q.dim()}-dimensional queries; b k n d is expected.")
    n, t = call.q.shape[2], call.k.shape[2]
    start, stop = site.image
    if stop > n or (site.grid is not None and site.kind != "temporal" and site.grid[0] * site.grid[1] != stop - start):
        raise NotSupported(
            f"attention site {site.path} has {n} queries, which do not hold a grid of {site.grid} at {start}:{stop}; "
            f"were the sites made for another picture size?"
        )
    if site.text is not None and site.text[1] > t:
        raise NotSupported(
            f"attention site {site.path} has {t} keys, but its text should reach to {site.text[1]}; "
            f"were the sites made for another prompt length?"
        )


def _expand_rows(rows: dict[str, slice], batch: int, site: Site) -> dict[str, slice]:
    """Rows of the caller's batch as rows of this call: frames or pixels may be folded into the batch axis behind it."""
    if not rows:
        return {}
    total = max(part.stop for part in rows.values())
    if batch % total:
        raise BadInput(f"rows speak of {total} samples, but attention site {site.path} has a batch of {batch}.")
    fold = batch // total
    return {name: slice(part.start * fold, part.stop * fold) for name, part in rows.items()}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: each key head serves several neighbouring query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _chunks(queries: slice, n: int) -> list[slice]:
    start, stop, _ = queries.indices(n)
    return [slice(i, min(i + QUERY_CHUNK, stop)) for i in range(start, stop, QUERY_CHUNK)]


#: diffusers' own backends that still end in scaled_dot_product_attention.
_SEEN_BACKENDS = {"native", "_native_math", "_native_efficient", "_native_flash", "_native_cudnn"}


def _refuse_what_bypasses(module: nn.Module, wanted: dict[str, nn.Module]) -> None:
    """Raise NotSupported where attention at a wanted site would never reach the seam."""
    for path, target in wanted.items():
        for above, part in _ancestors(module, path):
            if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
                raise NotSupported(
                    f"{above or type(part).__name__} is compiled by torch.compile, which hides attention from taps; "
                    f"use the uncompiled module."
                )
            registry = getattr(part, "_diffusers_hook", None)
            for name, hook in getattr(registry, "hooks", {}).items():
                if hasattr(
                    hook, "new_forward"
                ):  # pre/post hooks (offloading, casting) are harmless, replacements are not
                    raise NotSupported(
                        f"the diffusers hook {name!r} on {above or type(part).__name__} may skip attention at {path}; "
                        f"call disable_cache() or remove the hook first."
                    )
        processor = getattr(target, "processor", None)
        if getattr(processor, "_parallel_config", None) is not None:
            raise NotSupported(f"context-parallel attention at {path} bypasses attention taps; run it on one device.")
        if processor is not None and hasattr(processor, "_attention_backend"):
            backend = processor._attention_backend or _default_backend()
            name = str(getattr(backend, "value", backend))
            if name not in _SEEN_BACKENDS:
                raise NotSupported(
                    f"attention backend {name!r} at {path} bypasses attention taps; "
                    f"call set_attention_backend('native') on the model first."
                )
        implementation = getattr(getattr(target, "config", None), "_attn_implementation", None)
        if implementation not in (None, "sdpa"):
            raise NotSupported(
                f"attention implementation {implementation!r} at {path} bypasses attention taps; "
                f"load the model with attn_implementation='sdpa'."
            )


def _ancestors(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield "", module
    names = path.split(".") if path else []
    for i, name in enumerate(names):
        module = getattr(module, name)
        yield ".".join(names[: i + 1]), module


def _default_backend() -> Any:
    from diffusers.models import attention_dispatch

    return attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
