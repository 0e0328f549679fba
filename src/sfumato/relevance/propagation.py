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
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.errors import BadInput, NotSupported

__all__ = ["Propagation", "Record", "Rules", "prepared", "settled"]


@dataclass(frozen=True)
class Rules:
    """Which rules.

    Attributes:
        alpha: weight of what speaks for the output; alpha - 1 is the weight of what speaks against it.
        linear: "alpha_beta", or "epsilon": in proportion to signed contributions, bias included.
        normalise: sums keep their total relevance (equation 9); False is plain LRP.
        eps: added to a denominator, away from zero.
        bounds: z-beta at the first convolution: "data" takes each picture's own extremes, as the authors' code does;
            (low, high) those of all pictures; None treats it as any other layer.
    """

    alpha: float = 1.0
    linear: str = "alpha_beta"
    normalise: bool = True
    eps: float = 1e-9
    bounds: str | tuple[float, float] | None = "data"

    def __post_init__(self):
        if self.linear not in ("alpha_beta", "epsilon"):
            raise BadInput(f"rule for linear layers {self.linear!r}; allowed: 'alpha_beta', 'epsilon'.")
        if not self.alpha >= 1:
            raise BadInput(f"alpha of a relevance rule must be 1 or more, got {self.alpha}.")


@dataclass(frozen=True)
class Record:
    """What one function did with relevance: per sample, how much came (``given``) and how much it handed on
    (``passed``); ``peak`` the largest single value, ``negative`` the share of negative relevance."""

    path: str
    op: str
    given: Tensor
    passed: Tensor
    peak: float
    negative: float

    @property
    def error(self) -> float:
        """Largest relative loss or gain over samples."""
        scale = self.given.abs().clamp_min(1e-12)
        return float(((self.passed - self.given).abs() / scale).max())


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
        self.records: list[Record] = []
        self.path: list[str] = []
        self._sources: set[int] = set()

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
            return _Shares.apply(args[0], lambda x: func(x, *args[1:], **kwargs), self._note(name))
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
        where = f" in {self.path[-1]}" if self.path else ""
        return f"no relevance rule for {name}{where}; those of attention, linear layers and convolutions are known."

    def _unchanged(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        given = args[0] if args else kwargs.pop("input")
        if not (isinstance(given, Tensor) and _grows(given)):  # constant - activation
            raise NotSupported(self._refusal(f"{name} of a constant and an activation"))
        plain = [each.detach() if isinstance(each, Tensor) else each for each in args[1:]]
        names = {key: value.detach() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        name = name.rstrip("_") if name == "relu_" else name
        return _Unchanged.apply(given, lambda x: func(x, *plain, **names), self._note(name))

    def _weighted(self, name: str, x: Tensor, w: Tensor, b: Tensor | None, op: Callable, back: Callable) -> Tensor:
        b = None if b is None else b.detach()
        return _Weighted.apply(x, w.detach(), b, op, back, self.rules, self._note(name))

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
            return _Bounded.apply(
                x, w.detach(), None if b is None else b.detach(), op, back, self.rules, self._note("conv2d")
            )
        return self._weighted("conv2d", x, w, b, op, back)

    def _product(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        head, factors = ((args[0],), args[1:]) if name == "einsum" else ((), args)
        if len(factors) != 2:
            raise NotSupported(self._refusal(f"{name} of {len(factors)} operands"))
        first, second = factors
        if _carries(first) and _carries(second):
            return _Product.apply(first, second, lambda u, v: func(*head, u, v, **kwargs), self._note(name))
        if name in ("matmul", "__matmul__", "bmm") and isinstance(second, Tensor) and _carries(first):
            return self._weighted(name, first, second.mT, None, lambda x, w, b=None: x @ w.mT, lambda s, w: s @ w)
        if name in ("einsum", "matmul", "__matmul__", "bmm"):
            raise NotSupported(self._refusal(f"{name} with weights first"))
        given, factor = (first, second) if _carries(first) else (second, first)
        factor = factor.detach() if isinstance(factor, Tensor) else factor
        return _Unchanged.apply(given, lambda x: x * factor, self._note(name))

    def _sum(self, first: Any, second: Any) -> Tensor:
        both = isinstance(first, Tensor) and isinstance(second, Tensor) and first.requires_grad and second.requires_grad
        if both and first.shape != () and second.shape != ():
            return _Sum.apply(first, second, self.rules, self._note("add"))
        given, other = (first, second) if isinstance(first, Tensor) and first.requires_grad else (second, first)
        return _Unchanged.apply(given, lambda x: x + other, self._note("add of a constant"))

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
        return out

    def _note(self, op: str) -> Callable[[Tensor, tuple[Tensor, ...]], None]:
        path = self.path[-1] if self.path else ""

        def note(given: Tensor, passed: tuple[Tensor, ...]) -> None:
            parts = torch.cat([part.flatten() for part in passed])
            total = parts.abs().sum()
            negative = float(parts.clamp_max(0).abs().sum() / total) if total > 0 else 0.0
            handed = torch.stack([_totals(part, len(given)) for part in passed]).sum(0)
            peak = float(parts.abs().max()) if parts.numel() else 0.0
            self.records.append(Record(path, op, _totals(given, len(given)), handed, peak, negative))

        return note


@contextlib.contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Within: ``model`` in eval mode, gradients recorded in full precision, also those of every parameter, so that the
    relevance of position embeddings and class tokens is followed whatever was frozen. Afterwards all is as before.

    Raises BadInput for half precision.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise BadInput(f"relevance underflows in half precision ({name} is {kind}); use model.float().")
    flags = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    modes = [(m, m.training) for m in model.modules()]
    kind = flags[0][0].device.type if flags else "cpu"
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        with torch.enable_grad(), torch.autocast(kind, enabled=False):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def prepared(model: nn.Module, mode: Propagation) -> Iterator[Propagation]:
    """Within: ``model`` is :func:`settled`, ``mode`` is on and is told which module runs."""
    handles = []

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: mode.path.append(path)

    def leave(*_: Any) -> None:
        mode.path.pop()

    with settled(model):
        try:
            for path, part in model.named_modules():
                handles.append(part.register_forward_pre_hook(enter(path or type(model).__name__)))
                handles.append(part.register_forward_hook(leave, always_call=True))
            with mode:
                yield mode
        finally:
            for handle in handles:
                handle.remove()


# -- the rules ---------------------------------------------------------------------------------------------------------


class _Unchanged(torch.autograd.Function):
    """Relevance goes through as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: Callable, note: Callable) -> Tensor:
        ctx.note, ctx.kind, ctx.shape = note, x.dtype, x.shape
        out = op(x.detach())
        return out.clone() if out is x or out.data_ptr() == x.data_ptr() else out

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        back = _reduced(r.to(ctx.kind), ctx.shape)
        ctx.note(r, (back,))
        return back, None, None


class _Weighted(torch.autograd.Function):
    """alpha-beta: what contributes positively takes ``alpha`` of the relevance, in proportion, what contributes
    negatively 1 - ``alpha``. The bias takes part in nothing. Epsilon: all in proportion to signed contributions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, op: Callable, back: Callable, rules: Rules, note):
        ctx.save_for_backward(x, w)
        ctx.op, ctx.back, ctx.rules, ctx.note, ctx.b = op, back, rules, note, b
        return op(x, w, b)

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, w), rules, op, back = ctx.saved_tensors, ctx.rules, ctx.op, ctx.back
        if rules.linear == "epsilon":
            share = x * back(_divided(r, op(x, w, ctx.b), rules.eps), w)
        else:
            share = rules.alpha * _share(x, r, w.clamp_min(0), w.clamp_max(0), op, back, rules.eps)
            if rules.alpha != 1:
                against = _share(x, r, w.clamp_max(0), w.clamp_min(0), op, back, rules.eps)
                share = share - (rules.alpha - 1) * against
        ctx.note(r, (share,))
        return share, None, None, None, None, None, None


def _share(x: Tensor, r: Tensor, first: Tensor, second: Tensor, op: Callable, back: Callable, eps: float) -> Tensor:
    """``r`` handed to x in proportion to the terms x+ first and x- second."""
    up, down = x.clamp_min(0), x.clamp_max(0)
    s = _divided(r, op(up, first) + op(down, second), eps)
    return up * back(s, first) + down * back(s, second)


class _Bounded(torch.autograd.Function):
    """z-beta (deep Taylor for inputs between bounds): contributions are counted from the bounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, op: Callable, back: Callable, rules: Rules, note):
        ctx.save_for_backward(x, w)
        ctx.op, ctx.back, ctx.rules, ctx.note = op, back, rules, note
        return op(x, w, b)

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, w), rules = ctx.saved_tensors, ctx.rules
        if rules.bounds == "data":
            low, high = (bound.expand_as(x) for bound in (x.amin((1, 2, 3), True), x.amax((1, 2, 3), True)))
        else:
            low, high = (torch.full_like(x, float(bound)) for bound in rules.bounds)
        parts = ((x, w), (-low, w.clamp_min(0)), (-high, w.clamp_max(0)))
        s = _divided(r, sum(ctx.op(value, weight) for value, weight in parts), rules.eps)
        share = sum(value * ctx.back(s, weight) for value, weight in parts)
        ctx.note(r, (share,))
        return share, None, None, None, None, None, None


class _Product(torch.autograd.Function):
    """Each factor in proportion; each would get everything, so each gets half."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, op: Callable, note: Callable) -> Tensor:
        ctx.save_for_backward(u, v)
        ctx.op, ctx.note = op, note
        return op(u.detach(), v.detach())

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.enable_grad():
            u, v = (each.detach().requires_grad_(True) for each in ctx.saved_tensors)
            z = ctx.op(u, v)
            pulled = torch.autograd.grad(z, (u, v), _divided(r, z.detach()))
        shares = tuple(each.detach() * pull / 2 for each, pull in zip((u, v), pulled, strict=True))
        ctx.note(r, shares)
        return (*shares, None, None)


class _Sum(torch.autograd.Function):
    """In proportion; normalised, each summand keeps its sign pattern and gets of the total what its own total is of
    both (their absolute values), so that terms that cancel do not blow relevance up."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, rules: Rules, note: Callable) -> Tensor:
        ctx.save_for_backward(u, v)
        ctx.rules, ctx.note = rules, note
        return u + v

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        u, v = ctx.saved_tensors
        s = _divided(r, u + v, ctx.rules.eps)
        shares = [u * s, v * s]
        if ctx.rules.normalise:
            axes = tuple(range(1, r.ndim))
            first, second = (share.sum(axes, keepdim=True) for share in shares)
            total = r.sum(axes, keepdim=True)
            both = first.abs() + second.abs()
            shares = [
                share * _divided(_divided(own.abs(), both) * total, own)
                for share, own in zip(shares, (first, second), strict=True)
            ]
        ctx.note(r, tuple(shares))
        return _reduced(shares[0], u.shape), _reduced(shares[1], v.shape), None, None


class _Shares(torch.autograd.Function):
    """A function of one tensor that only picks or averages: in proportion."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: Callable, note: Callable) -> Tensor:
        ctx.save_for_backward(x)
        ctx.op, ctx.note = op, note
        return op(x.detach())

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_(True)
            z = ctx.op(x)
            [pulled] = torch.autograd.grad(z, x, _divided(r, z.detach()))
        share = x.detach() * pulled
        ctx.note(r, (share,))
        return share, None, None


def _divided(a: Tensor, b: Tensor, eps: float = 1e-9) -> Tensor:
    """a / b with b moved ``eps`` away from zero; 0 where b is 0."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b < 0, b - eps, b + eps))


def _totals(tensor: Tensor, n: int) -> Tensor:
    """Sum over everything but samples; a tensor that all samples share counts for the first of them."""
    totals = tensor.detach().double().reshape(len(tensor), -1).sum(1)
    return totals if len(totals) == n else F.pad(totals.sum()[None], (0, n - 1))


def _reduced(share: Tensor, shape: torch.Size) -> Tensor:
    """Undoes broadcasting: relevance of a value that was used many times adds up."""
    return share.sum_to_size(shape) if share.shape != shape else share


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
