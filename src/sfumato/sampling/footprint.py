"""How much memory a system adds, before any weight is loaded: the loop is walked on networks without weights.

Tensors of such networks have shapes and no numbers. While :class:`Footprint` lasts, whatever meets one of them gives
another one, what is asked of its numbers is answered by a small one, and the bytes of all tensors that are alive are
counted, the weights aside. Fused attention keeps what its kernels keep: queries, keys, values, output and one number
per query.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sfumato import cards
from sfumato.models import Model, quiet
from sfumato.sampling.intervention import Intervention
from sfumato.sampling.loop import generate

__all__ = ["Footprint", "Use", "adds", "drawn"]

STEPS = 5
PROMPT = "a red cube and a blue ball"  # with which the examples of all systems work
_aten = torch.ops.aten


class Footprint(TorchDispatchMode):
    """Counts the bytes of tensors made within: ``live`` now, ``peak`` the most at any time. ``known``: tensors whose
    memory does not count, such as weights."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}
        for x in known:
            self._note(x.untyped_storage(), 0)

    def _note(self, storage: Any, count: int) -> None:
        key = storage._cdata

        def gone(_: Any) -> None:
            self.live -= count
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.live += count
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if any(x.is_meta for x in given):
            if func is _aten._local_scalar_dense.default:
                return _like(given[0]).item()
            if func is _aten.equal.default:
                return True
            if torch.device(kwargs.get("device") or "meta").type != "meta":
                kwargs = {**kwargs, "device": torch.device("meta")}
            if not all(x.is_meta for x in given):
                if func._schema.is_mutable and not args[0].is_meta:
                    return args[0]  # numbers that nobody will read
                args, kwargs = tree_map_only(Tensor, lambda x: x if x.is_meta else x.to("meta"), (args, kwargs))
        out = func(*args, **kwargs)
        for x in _tensors((out,)):
            storage = x.untyped_storage()
            if storage._cdata not in self._seen:
                self._note(storage, storage.nbytes())
        return out


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _like(x: Tensor) -> Tensor:
    """What is answered for the numbers of ``x``: True, 1, or what no threshold asks to go on from."""
    return torch.full(x.shape, 0.01 if x.is_floating_point() else 1, dtype=x.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            q, k, v = named["query"], named["key"], named["value"]
            if any(x.is_meta for x in (q, k, v)):
                return _Fused.apply(q, k, v)
        if func in (Tensor.tolist, Tensor.numpy) and args[0].is_meta:
            return func(_like(args[0]))
        return func(*args, **kwargs)


@dataclass
class Use:
    """Bytes that a run took beyond the weights: at most, and at the end of each step."""

    peak: int
    kept: list[int]


def drawn(model: Model, systems: Any = (), steps: int = 1, **options: Any) -> Use:
    """What drawing one picture or clip in so many steps takes; with a model of :func:`.outline`, nothing is computed.
    Raises what drawing raises."""
    weights = [x for part in model.modules.values() for x in (*part.parameters(), *part.buffers())]
    kept: list[int] = []
    with quiet(), Footprint(weights) as counted, _FusedAttention():
        given = {"steps": steps, "seed": 0, "decode": False, **options}
        generate(model, PROMPT, interventions=systems, on_step=lambda step: kept.append(counted.live), **given)
    return Use(counted.peak, kept)


def adds(model: Model, keys: Iterable[str] | None = None) -> dict[str, int | None]:
    """How many bytes each system that takes part in drawing, or each of these ``keys``, adds to it, for one picture or
    clip of the model's own size, steps and dtype; None where that depends on numbers, or on a file. ``model``: of
    :func:`.outline`; it is changed. Systems that keep more with every step are walked for five steps, others for one.
    """
    _compute_elsewhere(model)
    height, width = model.default_size
    noise = torch.empty(1, *model.latent_shape(height, width, model.frames()), device="meta", dtype=model.state_dtype)
    plain = functools.cache(lambda steps: drawn(model, steps=steps, latents=noise))
    found: dict[str, int | None] = {}

    def more(make: Callable[[], Any]) -> int:
        use = drawn(model, make(), latents=noise)
        added, kept = use.peak - plain(1).peak, use.kept[-1] - plain(1).kept[-1]
        if kept > plain(1).peak // 50:
            later = drawn(model, make(), STEPS, latents=noise).kept[-1] - plain(STEPS).kept[-1]
            if later > 1.5 * kept:
                added += later * int(model.defaults["steps"]) // STEPS - kept
        return max(0, added)

    for key, card in cards.methods().items():
        if keys is not None and key not in keys:
            continue
        if all(map(model.family.has, card.needs)) and issubclass(cards.method(key), Intervention):
            try:
                found[key] = more(functools.partial(cards.build, card.example or key))
            except Exception:  # code stumbles over numbers that are not there in whatever way
                found[key] = None
    return found


def _compute_elsewhere(model: Model) -> None:
    """Schedules and token ids are real, on the CPU, while weights have no numbers."""
    own = type(model.family)
    where = property(lambda self: torch.device("cpu"))
    model.family.__class__ = type(own.__name__, (own,), {"device": where, "__module__": own.__module__})
