"""The seam: one way into every attention of diffusers and transformers, without replacing a single processor.

Nearly all attention of both libraries ends in ``torch.nn.functional.scaled_dot_product_attention``. Forward hooks on
the wanted modules (*sites*) switch on a ``TorchFunctionMode`` while such a module runs; the mode sees that one call as
``q, k, v`` in ``b k n d`` layout (b batch, k heads, n queries, d features; keys are counted with t), shows it to
observers and lets editors change values, scores or probabilities. Modules without taps never see the mode.

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.attention.bypass import refuse_bypassing_attention
from sfumato.attention.call import Call
from sfumato.attention.tap import STAGES, Tap
from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported
from sfumato.markup import described
from sfumato.models.site import Site

__all__ = ["AttentionSeam", "Forward", "StopForward"]


class StopForward(BaseException):
    """Leaves a forward pass whose remainder is not needed. Not an Exception, so that no library code swallows it."""

    def __init__(self, forward: Forward):
        super().__init__("forward pass stopped after the last wanted attention site")
        self.forward = forward


_REPLACE = dict(
    zip(STAGES, (Call.replace_values, Call.replace_scores, Call.replace_probs, Call.replace_map), strict=True)
)


@dataclass(eq=False)
class Forward:
    """One forward pass under the seam. ``stopped`` is True if it was left early (there is no output then);
    ``calls`` counts the attention calls seen per site path; ``sites`` and ``places`` as in :meth:`forward`."""

    step: Any = None
    rows: dict[str, slice] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    places: Callable[[Site], Tensor | None] | None = None
    stopped: bool = False
    calls: dict[str, int] = field(default_factory=dict)
    entered: set[str] = field(default_factory=set)
    thread: int = field(default_factory=threading.get_ident)
    _placed: dict[tuple[str, tuple[int, int]], Tensor | None] = field(default_factory=dict)

    __repr__ = described

    def places_at(self, site: Site) -> Tensor | None:
        """What ``places`` says of a site, asked once for all sites of one kind and image range."""
        if self.places is None:
            return None
        key = site.kind, site.image
        if key not in self._placed:
            self._placed[key] = self.places(site)
        return self._placed[key]


class _Frame(TorchFunctionMode):
    """The mode that is on while one wanted module runs. Its first attention call belongs to the taps; further ones,
    such as those of image-prompt adapters, pass untouched."""

    def __init__(self, seam: AttentionSeam, path: str, module: nn.Module):
        super().__init__()
        self.seam, self.path, self.module, self.attended = seam, path, module, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or self.attended:
            return func(*args, **(kwargs or {}))
        self.attended = True
        return self.seam._attend(self.path, self.module, *args, **(kwargs or {}))


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
        refuse_bypassing_attention(self.module, self._modules)
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._opener(path)))
            self._handles.append(module.register_forward_hook(self._close, always_call=True))
        return self

    def __exit__(self, *exc: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _opener(self, path: str) -> Callable[[nn.Module, Any], None]:
        def open_frame(module: nn.Module, args: Any) -> None:
            if self._forward is None or self._forward.thread != threading.get_ident():
                return
            frame = _Frame(self, path, module)
            self._frames.append(frame)
            self._forward.entered.add(path)
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
    def forward(
        self,
        step: Any = None,
        rows: dict[str, slice] | None = None,
        sites: Iterable[Site] = (),
        places: Callable[[Site], Tensor | None] | None = None,
    ) -> Iterator[Forward]:
        """Surrounds one call of the module.

        ``rows`` tells which part of the batch is which branch: ``{"uncond": slice(0, b), "cond": slice(b, 2 * b)}``;
        it is never guessed. ``sites``: those of this pass where they differ from the seam's own, as with a text of
        another length. ``places(site)``: where the positions of the site's sequence lie in this pass (b n), if not in
        the same place in every row; asked once for all sites of one kind and image range. Taps see all rows in the
        order of the site. If the pass ends early the statements after the module's call are skipped and
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
        forward = Forward(step, dict(rows or {}), {site.path: site for site in sites} or self._sites, places)
        AttentionSeam._running.add(key)
        self._forward = forward
        try:
            yield forward
            self.forwards += 1
            self._raise_if_unseen(forward)
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

    def _attend(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        forward = self._forward
        assert forward is not None
        site = forward.sites[path]
        call = Call(*args, **kwargs, site=site, module=module, step=forward.step)
        places = forward.places_at(site)
        if places is not None:
            call.rearrange(places)
        _check_layout(call)
        call.rows = _expand_rows(forward.rows, call.q.shape[0], site)
        taps = self._taps_at[site.path]
        for tap in taps:
            if tap.observe and tap.raw:
                tap.observe(call)
        for stage in STAGES:
            for tap in taps:
                if (edit := getattr(tap, stage)) and (new := edit(call)) is not None:
                    _REPLACE[stage](call, new)
        for tap in taps:
            if tap.observe and not tap.raw:
                tap.observe(call)
        out = call.attend()
        forward.calls[site.path] = forward.calls.get(site.path, 0) + 1
        for tap in taps:
            self._calls[tap][site.path] = self._calls[tap].get(site.path, 0) + 1
        return out

    def _raise_if_unseen(self, forward: Forward) -> None:
        unseen = [path for path in self._modules if path not in forward.calls]
        if not unseen:
            return
        ran = [path for path in unseen if path in forward.entered]
        observed = ", ".join(forward.calls) or "none"
        if ran:
            processor = getattr(self._modules[ran[0]], "processor", None)
            how = f" (its processor is {type(processor).__name__})" if processor is not None else ""
            raise NoMatch(
                f"attention site {ran[0]}{how} ran without calling scaled_dot_product_attention, so nothing of it can "
                f"be seen; {_way_back(self._modules[ran[0]])}. Sites seen: {observed}."
            )
        raise NoMatch(
            f"attention site {unseen[0]} did not run in this forward pass; if a cache or a wrapper skips its block, "
            f"take that off or load the model again. Sites seen: {observed}."
        )


def _way_back(module: nn.Module) -> str:
    """How a module is brought back to attention that can be seen."""
    if type(module).__name__ == "Attention" and not getattr(module, "added_kv_proj_dim", None):
        # diffusers' set_default_attn_processor would choose one that does not call it either
        return "call model.denoiser.set_attn_processor(AttnProcessor2_0()) of diffusers, or load the model again"
    return "load the model again, and leave its processors as they are"


def _check_layout(call: Call) -> None:
    """A wrong table of text and image ranges gives plausible, false maps: check what can be checked."""
    site = call.site
    if call.q.dim() != 4:
        raise NotSupported(f"attention site {site.path} has {call.q.dim()}-dimensional queries; b k n d is expected.")
    n, t = call.q.shape[2], call.k.shape[2]
    start, stop = site.image
    if stop > n or (site.grid is not None and stop - start not in site.possible_queries):
        raise NotSupported(
            f"attention site {site.path} has {n} queries, which do not hold a grid of {site.shape} at {start}:{stop}; "
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
    if fold % site.fold:  # a multiple is well: sites found by running a module know of no folding
        raise NotSupported(
            f"attention site {site.path} has {fold} rows a sample, but {site.frames} frames of {site.grid} need "
            f"{site.fold}; were the sites made for another number of frames?"
        )
    return {name: slice(part.start * fold, part.stop * fold) for name, part in rows.items()}
