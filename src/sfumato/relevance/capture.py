"""Every attention map of one forward pass, with gradients: what relevance methods are made of.

The seam (:mod:`sfumato.attention.seam`) attaches to known sites and leaves the fused kernel alone. Here all attention
of *any* module is wanted, unknown beforehand, in the order in which it runs, and the map itself must lie on the
gradient's way. So, inside :func:`captured`, each ``scaled_dot_product_attention`` is computed explicitly through its
map, and modules that compute attention by hand (LXMERT, VisualBERT, ``attn_implementation="eager"``) are seen by their
softmax over ``b k n t`` scores.

::

    with captured(model) as calls:
        y = model(**inputs).logits[:, 3]
    maps = [call.probs for call in calls]
    gradients = gradients_of(y, maps)

What the module returns is what it returns otherwise, up to rounding (1e-5 in float32, tested).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.attention.call import Call
from sfumato.errors import BadInput, NotSupported
from sfumato.markup import described
from sfumato.models.hooks import Running, running
from sfumato.models.site import Site

__all__ = [
    "CapturedAttention",
    "captured",
    "gradients_of",
    "refuse_no_attention",
    "refuse_hidden_attention",
    "refuse_windows",
]


@dataclass(eq=False)
class CapturedAttention:
    """One attention call: ``probs`` (b k n t) float32 (or float64), on the gradient's way to the output.

    ``path`` is the module that computed it; a module that attends several times (LXMERT's co-attention) counts its
    ``index`` from 0. ``inputs`` are the hidden states (b n d) the module was called with, in their order, and ``block``
    the hidden states (b n d) that its layer - the outermost numbered part it belongs to - returned.
    """

    path: str
    index: int
    module: nn.Module
    probs: Tensor
    inputs: tuple[Tensor, ...] = field(repr=False, default=())
    block: Tensor | None = field(repr=False, default=None)

    __repr__ = described

    @property
    def queries(self) -> int:
        return self.probs.shape[2]

    @property
    def keys(self) -> int:
        return self.probs.shape[3]


@contextlib.contextmanager
def captured(module: nn.Module, where: Callable[[str], bool] | None = None) -> Iterator[list[CapturedAttention]]:
    """Within: forward passes of ``module`` append their attention calls to the list that is handed out.

    ``where`` chooses modules by path; the attention of others is left alone. Gradients are on within, whatever they
    were outside; weights need not require them. On leaving every hook is gone, also after an exception. NotSupported
    where attention would hide: compiled modules, gradient checkpointing, inference mode.
    """
    refuse_hidden_attention(module)
    calls: list[CapturedAttention] = []

    def after(done: Running, output: Any) -> None:
        """Remembers what a layer returned beside the attention calls inside it."""
        hidden = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            return
        numbered = re.search(r"(^|\.)\d+$", done.path) is not None
        for call in reversed(calls):
            if call.path != done.path and not call.path.startswith(f"{done.path}." if done.path else ""):
                break
            if hidden.shape[:2] == (call.probs.shape[0], call.queries) and (numbered or call.block is None):
                call.block = hidden

    with running(module, after) as stack, torch.enable_grad(), _Capture(stack, calls, where):
        yield calls


def gradients_of(
    scores: Tensor, tensors: Sequence[Tensor], second_order: bool = False, keep_graph: bool = False
) -> list[Tensor]:
    """Gradients of ``scores``, one number per sample, with respect to ``tensors``; zero where they play no part.

    Samples must not mix in the model, so that one pass over their sum serves all. In float16 the scores are scaled up
    first, for small gradients vanish there. ``second_order``: the gradients can themselves be differentiated, which a
    loss on relevance needs. Raises BadInput where no tensor plays a part.
    """
    scale = 1024.0 if scores.dtype == torch.float16 else 1.0
    wanted = [x for x in tensors if x.requires_grad]
    with torch.enable_grad():
        total = scores.sum(dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32) * scale
    found: Sequence[Tensor | None] = ()
    if total.requires_grad and wanted:
        found = torch.autograd.grad(
            total, wanted, allow_unused=True, create_graph=second_order, retain_graph=keep_graph or second_order
        )
    if all(gradient is None for gradient in found):
        raise BadInput("the target does not depend on any attention of this model; it must come from its outputs.")
    by = {id(x): gradient for x, gradient in zip(wanted, found, strict=True)}
    out = []
    for x in tensors:
        gradient = by.get(id(x))
        out.append(torch.zeros_like(x) if gradient is None else gradient.to(_wide(x.dtype)) / scale)
    return out


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def refuse_no_attention(module: nn.Module, calls: list[CapturedAttention]) -> None:
    """Raises NotSupported, by name, where there is no attention map, or only some of the mixing goes through one."""
    name = type(module).__name__
    linear = [path for path, part in module.named_modules() if _is_linear(part)]
    if linear:
        part = module.get_submodule(linear[0])
        kind = type(getattr(part, "processor", None) or part).__name__
        raise NotSupported(f"{name} has linear attention ({kind} at {linear[0]}), which has no map to explain.")
    if not calls:
        raise NotSupported(
            f"{name} computed no softmax attention in this forward pass, so there is no attention map to explain."
        )


def refuse_windows(shapes: Sequence[tuple[str, torch.Size]], batch: int) -> None:
    """Raises NotSupported unless every attention map (path, shape b k n t) is of all tokens of ``batch`` samples.

    Attention inside windows (Swin and the like) says nothing about tokens of other windows.
    """
    for path, shape in shapes:
        if shape[0] != batch and shape[0] % batch == 0:
            raise NotSupported(
                f"attention at {path or 'the top'} runs over {shape[0]} windows for a batch of {batch}; relevance "
                f"through windowed attention (Swin and the like), which is not global, is not supported."
            )


class _Capture(TorchFunctionMode):
    def __init__(self, stack: list[Running], calls: list[CapturedAttention], where: Callable[[str], bool] | None):
        super().__init__()
        self.stack, self.calls, self.where = stack, calls, where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.stack and (self.where is None or self.where(self.stack[-1].path)):
            if func is F.scaled_dot_product_attention:
                return self._fused(*args, **kwargs)
            if func in _SOFTMAX and _over_keys(*args, **kwargs):
                return self._by_hand(func, args[0], kwargs.get("dtype"))
        return func(*args, **kwargs)

    def _fused(self, *args: Any, **kwargs: Any) -> Tensor:
        now = self.stack[-1]
        query, key = args[0] if args else kwargs["query"], args[1] if len(args) > 1 else kwargs["key"]
        if query.dim() != 4:
            raise NotSupported(f"attention at {now.path} has {query.dim()}-dimensional queries; b k n d is expected.")
        n, heads = query.shape[2], query.shape[1]
        site = Site(now.path, "self" if n == key.shape[2] else "cross", None, None, (0, n), heads, now.path, 0)
        call = Call(*args, **kwargs, site=site, module=now.module)
        call.replace_probs(self._keep(now, call.probs()))
        return call.attend()

    def _by_hand(self, func: Any, scores: Tensor, dtype: torch.dtype | None) -> Tensor:
        return self._keep(self.stack[-1], func(scores, dim=-1, dtype=_wide(scores.dtype))).to(dtype or scores.dtype)

    def _keep(self, now: Running, probs: Tensor) -> Tensor:
        if not probs.requires_grad:  # frozen weights: the map itself is where gradients begin
            probs = probs.detach().requires_grad_()
        turn = sum(call.path == now.path for call in self.calls)
        self.calls.append(CapturedAttention(now.path, turn, now.module, probs, _hidden(now.args, now.kwargs)))
        return probs


_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


def _over_keys(scores: Any, dim: Any = None, *_: Any, **kwargs: Any) -> bool:
    """Whether a softmax is one of attention scores b k n t over the keys."""
    dim = kwargs.get("dim", dim)
    return isinstance(scores, Tensor) and scores.dim() == 4 and scores.is_floating_point() and dim in (-1, 3)


def _hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    given = (*args, *kwargs.values())
    return tuple(x for x in given if isinstance(x, Tensor) and x.dim() == 3 and x.is_floating_point())


def _is_linear(part: nn.Module) -> bool:
    """Whether a module is attention without a softmax, by what it or its processor calls itself."""
    names = (type(part).__name__.lower(), type(getattr(part, "processor", None)).__name__.lower())
    return any("linear" in name and "att" in name for name in names)


def refuse_hidden_attention(module: nn.Module) -> None:
    """Raises NotSupported where a module's attention cannot be seen or has no gradients."""
    if torch.is_inference_mode_enabled():
        raise NotSupported(
            "relevance takes gradients, which inference mode has none of; call it outside of torch.inference_mode()."
        )
    for path, part in module.named_modules():
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise NotSupported(
                f"{path or type(part).__name__} is compiled by torch.compile, which hides attention; "
                f"use the uncompiled module."
            )
        if getattr(part, "gradient_checkpointing", False) and part.training:
            raise NotSupported("gradient checkpointing runs attention twice, so its maps are lost; disable it first.")
