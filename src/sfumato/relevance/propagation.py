"""Layer-wise relevance propagation through any PyTorch model, by autograd: no module is written again.

While :class:`Propagation` is on, every function with weights, every product, sum and activation is computed as always,
but its *backward* hands relevance on instead of gradients, by the rules of Chefer, Gur and Wolf 2021 (arXiv 2012.09838,
section 3.1). ``torch.autograd.grad(score, tensors)`` is then the relevance of these tensors: forks add up by themselves
(the paper's clone rule), views and transposes pass it on unchanged.

| function | rule |
|---|---|
| linear, convolution | alpha-beta (deep Taylor for alpha = 1); bounded inputs (pictures) by z-beta |
| product of two activations (Q K^T, A V, gates) | in proportion, half to each factor (normalised, equation 9) |
| sum of two activations (skip connections) | in proportion, then normalised by what each got (equation 9) |
| GELU, LayerNorm, softmax and other activations | unchanged |
| mean, sum, pooling | in proportion |

A function that has no rule is refused by name: its gradient would silently stand in for relevance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.errors import BadInput, NotSupported
from sfumato.models.hooks import Running, running
from sfumato.models.modes import evaluation, with_gradients
from sfumato.relevance.capture import refuse_hidden_attention
from sfumato.relevance.propagation_rules import (
    AlphaBetaRule,
    IdentityRule,
    ProductRule,
    ProportionalRule,
    RelevanceRecord,
    Rules,
    SumRule,
    ZBetaRule,
    totals,
)

__all__ = ["Propagation", "prepared", "eval_with_gradients"]


#: functions that move values without changing them, or by constants only: autograd is their rule
_MOVES = set(
    "view reshape transpose permute flatten unflatten contiguous expand expand_as repeat squeeze unsqueeze cat concat "
    "stack chunk split tensor_split unbind to type float double clone swapaxes swapdims movedim index_select select "
    "narrow gather roll embedding pad view_as reshape_as type_as __getitem__ t masked_fill where repeat_interleave "
    "requires_grad_ dropout zero_pad2d adjoint".split()
)
_UNCHANGED = set(
    "gelu relu relu_ silu mish elu leaky_relu hardswish hardtanh tanh sigmoid softplus layer_norm group_norm "
    "batch_norm rms_norm".split()
)
_PRODUCTS = set("matmul __matmul__ bmm mul __mul__ __rmul__ multiply einsum".split())
_SUMS = set("add __add__ __radd__ __iadd__".split())
_SCALES = set("div __truediv__ true_divide divide sub __sub__ subtract".split())
_SHARES = set("mean sum max_pool2d avg_pool2d adaptive_avg_pool2d max_pool1d avg_pool1d adaptive_avg_pool1d".split())
#: what is asked of a tensor carries no relevance
_READS = set("size dim shape numel is_floating_point is_complex item tolist detach".split())


class Propagation(TorchFunctionMode):
    """Within: what a model computes propagates relevance backward. ``maps`` are the attention maps (b k n t) it went
    through, in order, ``records`` what each function did in the backward pass.
    """

    def __init__(self, rules: Rules | None = None):
        super().__init__()
        self.rules = rules or Rules()
        self.maps: list[Tensor] = []
        self.embedded: list[tuple[Tensor, Tensor]] = []  # (indices, what they were looked up as)
        self.records: list[RelevanceRecord] = []
        self.paths: list[str] = []  # of the modules that computed the maps
        self.stack: list[Running] = []
        self.name = ""
        self._sources: set[int] = set()

    @property
    def _path(self) -> str:
        """The module that runs, by the model's own name at its top."""
        return (self.stack[-1].path or self.name) if self.stack else ""

    def source(self, tensor: Tensor) -> Tensor:
        """Names a tensor as the input of the model: a picture's first layer follows the rule of bounded inputs."""
        self._sources.add(id(tensor))
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if func is F.scaled_dot_product_attention:
            with self:
                return self._attention(*args, **kwargs)
        if name in ("softmax", "_softmax") and _grows(args):
            return self._softmax(func, args, kwargs)
        if name == "__get__" or name in _READS:
            return func(*args, **kwargs)
        if not any(map(_grows, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        return self._ruled(func, name, args, kwargs)

    # -- which rule ----------------------------------------------------------------------------------------------------
    def _ruled(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        if name in _UNCHANGED:
            return self._unchanged(func, name, args, kwargs)
        if name == "linear":
            x, w, b = _bound(("input", "weight", "bias"), args, kwargs)
            return self._weighted("linear", x, w, b, F.linear, lambda s, v: s @ v)
        if name == "addmm":  # bias + x @ w
            b, x, w = args[:3]
            return self._weighted("linear", x, w.T, b, F.linear, lambda s, v: s @ v)
        if name == "conv2d":
            return self._convolution(args, kwargs)
        if name in _PRODUCTS:
            return self._product(func, name, args, kwargs)
        if name in _SUMS and len(args) == 2 and not kwargs:
            return self._sum(*args)
        if name in _SCALES:
            if isinstance(args[1], Tensor) and _carries(args[1]):
                raise NotSupported(self._refusal(f"{name} of two activations"))
            return self._unchanged(func, name, args, kwargs)
        if name in _SHARES:
            return ProportionalRule.apply(args[0], lambda x: func(x, *args[1:], **kwargs), self._note(name))
        if name in _MOVES:
            out = func(*args, **kwargs)
            if name == "embedding":
                self.embedded.append((args[0], out))
            return out
        out = func(*args, **kwargs)
        if any(_grows(part) for part in (out if isinstance(out, tuple | list) else (out,))):
            raise NotSupported(self._refusal(name))
        return out

    def _refusal(self, name: str) -> str:
        where = f" in {self._path}" if self._path else ""
        return f"no relevance rule for {name}{where}; those of attention, linear layers and convolutions are known."

    def _unchanged(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        given = args[0] if args else kwargs.pop("input")
        if not (isinstance(given, Tensor) and _grows(given)):  # constant - activation
            raise NotSupported(self._refusal(f"{name} of a constant and an activation"))
        plain = [each.detach() if isinstance(each, Tensor) else each for each in args[1:]]
        names = {key: value.detach() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        name = name.rstrip("_") if name == "relu_" else name
        return IdentityRule.apply(given, lambda x: func(x, *plain, **names), self._note(name))

    def _weighted(self, name: str, x: Tensor, w: Tensor, b: Tensor | None, op: Callable, back: Callable) -> Tensor:
        b = None if b is None else b.detach()
        return AlphaBetaRule.apply(x, w.detach(), b, op, back, self.rules, self._note(name))

    def _convolution(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        x, w, b, *rest = _bound(names, args, kwargs)
        fixed = {name: value for name, value in zip(names[3:], rest, strict=True) if value is not None}
        if isinstance(fixed.get("padding"), str):
            raise NotSupported(self._refusal(f"conv2d with padding={fixed['padding']!r}"))

        def op(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            return F.conv2d(x, w, b, **fixed)

        def back(s: Tensor, w: Tensor) -> Tensor:
            return torch.nn.grad.conv2d_input(x.shape, w, s, **fixed)

        if self.rules.bounds is not None and id(x) in self._sources:
            return ZBetaRule.apply(
                x, w.detach(), None if b is None else b.detach(), op, back, self.rules, self._note("conv2d")
            )
        return self._weighted("conv2d", x, w, b, op, back)

    def _product(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        head, factors = ((args[0],), args[1:]) if name == "einsum" else ((), args)
        if len(factors) != 2:
            raise NotSupported(self._refusal(f"{name} of {len(factors)} operands"))
        first, second = factors
        if _carries(first) and _carries(second):
            return ProductRule.apply(first, second, lambda u, v: func(*head, u, v, **kwargs), self._note(name))
        if name in ("matmul", "__matmul__", "bmm") and isinstance(second, Tensor) and _carries(first):
            return self._weighted(name, first, second.mT, None, lambda x, w, b=None: x @ w.mT, lambda s, w: s @ w)
        if name in ("einsum", "matmul", "__matmul__", "bmm"):
            raise NotSupported(self._refusal(f"{name} with weights first"))
        given, factor = (first, second) if _carries(first) else (second, first)
        factor = factor.detach() if isinstance(factor, Tensor) else factor
        return IdentityRule.apply(given, lambda x: x * factor, self._note(name))

    def _sum(self, first: Any, second: Any) -> Tensor:
        both = isinstance(first, Tensor) and isinstance(second, Tensor) and first.requires_grad and second.requires_grad
        if both and first.shape != () and second.shape != ():
            return SumRule.apply(first, second, self.rules, self._note("add"))
        given, other = (first, second) if isinstance(first, Tensor) and first.requires_grad else (second, first)
        return IdentityRule.apply(given, lambda x: x + other, self._note("add of a constant"))

    # -- attention -----------------------------------------------------------------------------------------------------
    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The fused kernel as the functions that it stands for (this runs under the mode itself)."""
        if enable_gqa and key.shape[1] != query.shape[1]:
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(unseen, -torch.inf)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -torch.inf)
            else:
                scores = scores + attn_mask
        return scores.softmax(-1) @ value

    def _softmax(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        out = self._unchanged(func, "softmax", args, kwargs)
        if out.ndim == 4:
            self.maps.append(out)
            self.paths.append(self._path)
        return out

    def _note(self, op: str) -> Callable[[Tensor, tuple[Tensor, ...]], None]:
        path = self._path

        def note(given: Tensor, passed: tuple[Tensor, ...]) -> None:
            parts = torch.cat([part.flatten() for part in passed])
            total = parts.abs().sum()
            negative = float(parts.clamp_max(0).abs().sum() / total) if total > 0 else 0.0
            handed = torch.stack([totals(part, len(given)) for part in passed]).sum(0)
            peak = float(parts.abs().max()) if parts.numel() else 0.0
            self.records.append(RelevanceRecord(path, op, totals(given, len(given)), handed, peak, negative))

        return note


@contextlib.contextmanager
def eval_with_gradients(model: nn.Module) -> Iterator[None]:
    """Within: ``model`` in eval mode, gradients recorded in full precision, also those of every parameter, so that the
    relevance of position embeddings and class tokens is followed whatever was frozen. Afterwards all is as before.

    Raises BadInput for half precision, NotSupported in inference mode and for compiled models.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise BadInput(f"relevance underflows in half precision ({name} is {kind}); use model.float().")
    kind = next((p.device.type for p in model.parameters() if p.is_floating_point()), "cpu")
    with evaluation(model), with_gradients(model), torch.enable_grad(), torch.autocast(kind, enabled=False):
        refuse_hidden_attention(model)
        yield


@contextlib.contextmanager
def prepared(model: nn.Module, mode: Propagation) -> Iterator[Propagation]:
    """Within: ``model`` is :func:`eval_with_gradients`, ``mode`` is on and knows which module runs."""
    with eval_with_gradients(model), running(model) as stack:
        mode.stack, mode.name = stack, type(model).__name__
        with mode:
            yield mode


def _grows(value: Any) -> bool:
    """Whether anything in a value takes part in the graph."""
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, tuple | list) and any(map(_grows, value))


def _carries(value: Any) -> bool:
    """Whether a value is an activation: it takes part in the graph and is not a weight."""
    return isinstance(value, Tensor) and value.requires_grad and not _is_weight(value)


def _is_weight(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) or isinstance(value._base, nn.Parameter)


def _bound(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """Arguments in the order of ``names``, None for those that were not given."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
