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
    slopes = torch.autograd.grad(y.sum(), maps)

What the module returns is what it returns otherwise, up to rounding (1e-5 in float32, tested).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.attention.call import Call
from sfumato.errors import NotSupported
from sfumato.models.site import Site

__all__ = ["Attended", "captured", "refuse_no_attention"]


@dataclass(eq=False)
class Attended:
    """One attention call: ``probs`` (b k n t) float32 (or float64), on the gradient's way to the output.

    ``path`` is the module that computed it; a module that attends several times (LXMERT's co-attention) counts its
    ``turn`` from 0. ``inputs`` are the hidden states (b n d) the module was called with, in their order.
    """

    path: str
    turn: int
    module: nn.Module
    probs: Tensor
    inputs: tuple[Tensor, ...] = field(repr=False, default=())

    @property
    def queries(self) -> int:
        return self.probs.shape[2]

    @property
    def keys(self) -> int:
        return self.probs.shape[3]


@contextlib.contextmanager
def captured(module: nn.Module) -> Iterator[list[Attended]]:
    """Within: forward passes of ``module`` append their attention calls to the list that is handed out.

    Gradients are on within, whatever they were outside; weights need not require them. On leaving every hook is gone,
    also after an exception. NotSupported where attention would hide: compiled modules, gradient checkpointing,
    inference mode.
    """
    _refuse_what_hides(module)
    calls: list[Attended] = []
    running: list[_Running] = []
    handles = []

    def enter(path: str) -> Any:
        def hook(part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            running.append(_Running(path, part, _hidden(args, kwargs)))

        return hook

    def leave(*_: Any) -> None:
        running.pop()

    try:
        for path, part in module.named_modules():
            handles.append(part.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(part.register_forward_hook(leave, always_call=True))
        with torch.enable_grad(), _Capture(running, calls):
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def refuse_no_attention(module: nn.Module, calls: list[Attended]) -> None:
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


@dataclass(eq=False)
class _Running:
    path: str
    module: nn.Module
    inputs: tuple[Tensor, ...]


class _Capture(TorchFunctionMode):
    def __init__(self, running: list[_Running], calls: list[Attended]):
        super().__init__()
        self.running, self.calls = running, calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.running:
            if func is F.scaled_dot_product_attention:
                return self._fused(*args, **kwargs)
            if func in _SOFTMAX and _over_keys(*args, **kwargs):
                return self._by_hand(func, args[0], kwargs.get("dtype"))
        return func(*args, **kwargs)

    def _fused(self, *args: Any, **kwargs: Any) -> Tensor:
        now = self.running[-1]
        query, key = args[0] if args else kwargs["query"], args[1] if len(args) > 1 else kwargs["key"]
        if query.dim() != 4:
            raise NotSupported(f"attention at {now.path} has {query.dim()}-dimensional queries; b k n d is expected.")
        n, heads = query.shape[2], query.shape[1]
        site = Site(now.path, "self" if n == key.shape[2] else "cross", None, None, (0, n), heads, now.path, 0)
        call = Call(*args, **kwargs, site=site, module=now.module)
        call.replace_probs(self._keep(now, call.probs()))
        return call.attend()

    def _by_hand(self, func: Any, scores: Tensor, dtype: torch.dtype | None) -> Tensor:
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        return self._keep(self.running[-1], func(scores, dim=-1, dtype=wide)).to(dtype or scores.dtype)

    def _keep(self, now: _Running, probs: Tensor) -> Tensor:
        if not probs.requires_grad:  # frozen weights: the map itself is where gradients begin
            probs = probs.detach().requires_grad_()
        turn = sum(call.path == now.path for call in self.calls)
        self.calls.append(Attended(now.path, turn, now.module, probs, now.inputs))
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


def _refuse_what_hides(module: nn.Module) -> None:
    if torch.is_inference_mode_enabled():
        raise NotSupported("attention cannot be explained in inference mode, which has no gradients; leave it.")
    for path, part in module.named_modules():
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise NotSupported(
                f"{path or type(part).__name__} is compiled by torch.compile, which hides attention; "
                f"use the uncompiled module."
            )
        if getattr(part, "gradient_checkpointing", False) and part.training:
            raise NotSupported("gradient checkpointing runs attention twice, so its maps are lost; disable it first.")
