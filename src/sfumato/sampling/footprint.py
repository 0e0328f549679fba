"""How much memory a system adds, before any weight is loaded: the loop is walked on networks without weights.

Tensors of such networks have shapes and no numbers. While :class:`Footprint` lasts, whatever meets one of them gives
another one, what is asked of its numbers is answered by a small one, and the bytes of all tensors that are alive are
counted, the weights of the model aside. Two of them are equal if the same operations made them of the same tensors, as
the keys of a cross-attention in every step. Fused attention keeps what its kernels keep: queries, keys, values, output
and one number per query.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sfumato import cards
from sfumato.models import Model, quiet
from sfumato.once import shown_as
from sfumato.sampling.intervention import Intervention
from sfumato.sampling.loop import generate
from sfumato.sampling.recording import RecordingTooLarge

__all__ = ["Footprint", "Use", "adds", "drawn"]

STEPS = 5  # after which no scheduler keeps more with every step
PROMPT = "a red cube and a blue ball"  # with which the examples of all systems work
_aten = torch.ops.aten
_TO_COPY = getattr(_aten, "_to_copy").default  # noqa: B009


class Footprint(TorchDispatchMode):
    """Counts the bytes of tensors made within: ``live`` now, ``peak`` the most at any time. ``known``: tensors whose
    memory does not count, such as weights."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}
        self._counts: dict[int, int] = {}
        self._made: dict[int, Any] = {}  # of each storage what made it, as a hash
        self._copied: dict[int, tuple[Any, ...]] = {}  # of each storage that is a copy the content of the original
        self._fresh = itertools.count()
        # of storages of small tensors of integers that follow from none without numbers: place in it -> numbers
        self._numbers: dict[int, dict[Any, Tensor]] = {}
        self._outputs: dict[Any, Any] = {}  # of operations without numbers: shape, strides and dtype of what they give
        for x in known:
            self._note(x.untyped_storage(), 0)

    def _note(self, storage: Any, count: int) -> None:
        key = storage._cdata

        def gone(_: Any) -> None:
            self.live -= self._counts.pop(key)
            del self._seen[key]
            self._made.pop(key, None)
            self._copied.pop(key, None)
            self._numbers.pop(key, None)

        self._seen[key], self._counts[key] = weakref.ref(storage, gone), count
        self.live += count
        self.peak = max(self.peak, self.live)

    def _moved(self, storage: Any, count: int) -> None:
        """What goes to the device of the network would be there from the start, were there one device for all."""
        count = min(count, self._counts.get(storage._cdata, 0))
        if count:
            self._counts[storage._cdata] -= count
            self.live -= count

    def _content(self, x: Tensor) -> tuple[Any, ...]:
        """Equal for tensors that hold the same numbers, as far as that follows from how they were made."""
        key = x.untyped_storage()._cdata
        if key in self._copied and x.is_contiguous() and x.numel() == math.prod(self._copied[key][2]):
            return self._copied[key]
        if key not in self._made:
            self._made[key] = next(self._fresh)
        return self._made[key], x.storage_offset(), x.shape, x.stride()

    def numbers(self, x: Tensor) -> Tensor:
        """Those of ``x`` where they are known, as of masks and lengths of texts; else some: True, 1, or what no
        threshold asks to go on from."""
        known = self._known(x)
        return torch.full(x.shape, 0.01 if x.is_floating_point() else 1, dtype=x.dtype) if known is None else known

    def _remember(self, out: Any, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> None:
        """Works ``out`` out on the CPU as well if it is small and of integers, and all that it was made of is known."""
        made = _tensors((out,))
        if not made or not all(x.is_meta and not x.is_floating_point() and x.numel() <= 2**16 for x in made):
            return
        if _kind(func).chance or any(self._known(x) is None for x in given):
            for x in made:
                self._numbers.pop(x.untyped_storage()._cdata, None)  # written over in place
            return
        args, kwargs = tree_map_only(Tensor, self.numbers, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        for x, known in zip(made, _tensors((func(*args, **kwargs),)), strict=True):
            held = self._numbers.setdefault(x.untyped_storage()._cdata, {})
            held[x.storage_offset(), x.shape, x.stride()] = known

    def _places(self, indices: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
        """Indices with the places where masks are true instead of the masks."""
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                yield from self.numbers(index).nonzero().unbind(1)
            else:
                yield index

    def _known(self, x: Tensor) -> Tensor | None:
        if not x.is_meta:
            return x
        return self._numbers.get(x.untyped_storage()._cdata, {}).get((x.storage_offset(), x.shape, x.stride()))

    def _shaped(self, func: Any, args: Any, kwargs: Any, told: Any, given: list[Tensor]) -> Any:
        """What an operation gives without numbers. Working out its shape is slow, and blocks are alike."""
        key = func, told, *[(x.shape, x.stride(), x.dtype) for x in given]
        known = self._outputs.get(key)
        if known is None:
            out = func(*args, **kwargs)
            if out is given[0] and (out.shape, out.stride(), out.dtype) == key[2]:
                self._outputs[key] = Tensor, None
                return out
            found = _tensors((out,))
            new = all(x.untyped_storage()._cdata not in self._seen for x in found)  # _unsafe_view says so, and is not
            if new and len(found) == (len(out) if isinstance(out, tuple) else 1):
                self._outputs[key] = type(out), [(x.shape, x.stride(), x.dtype) for x in found]
            return out
        kind, shapes = known
        if shapes is None:
            return given[0]  # written to in place
        made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in shapes]
        return tuple(made) if kind is tuple else made[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, made, kind = kwargs or {}, None, _kind(func)
        if kind.view and args[0].is_meta and args[0].is_floating_point():
            return func(*args, **kwargs)  # the same memory and the same content, seen otherwise
        asked = args, kwargs
        given: list[Tensor] = []
        told = _told(args, given), _told(list(kwargs.items()), given) if kwargs else ()
        if any([x.is_meta for x in given]):
            if func is _aten._local_scalar_dense.default:
                return self.numbers(given[0]).item()
            if func is _aten.equal.default:
                return self._content(args[0]) == self._content(args[1])
            if func is _aten.nonzero.default:
                return self.numbers(given[0]).nonzero().to("meta")
            if func is _aten.bincount.default:  # how many tokens each expert gets: all go to one
                return self.numbers(given[0]).bincount()
            if func is _aten.index.Tensor:
                args = args[0], list(self._places(args[1]))
                given = _tensors((args,))
            asked = args, kwargs
            chance = next(self._fresh) if kind.chance else None
            made = hash((func, chance, told, *map(self._content, given)))
            if torch.device(kwargs.get("device") or "meta").type != "meta":
                kwargs = {**kwargs, "device": torch.device("meta")}
            if not all(x.is_meta for x in given):
                if kind.writes and not args[0].is_meta:
                    return args[0]  # numbers that nobody will read
                args, kwargs = tree_map_only(Tensor, lambda x: x if x.is_meta else x.to("meta"), (args, kwargs))
        known = made is not None and (kind.new or kind.writes)
        out = self._shaped(func, args, kwargs, told, given) if known else func(*args, **kwargs)
        self._remember(out, func, given, *asked)
        for i, x in enumerate((out,) if isinstance(out, Tensor) else _tensors((out,))):
            storage = x.untyped_storage()
            new = storage._cdata not in self._seen
            if new:
                if func is _TO_COPY and x.is_meta and not args[0].is_meta:
                    self._moved(args[0].untyped_storage(), storage.nbytes())
                self._note(storage, storage.nbytes())
            if made is not None and (new or kind.writes):
                self._made[storage._cdata] = hash((made, i))
                self._copied.pop(storage._cdata, None)
                if func is _aten.clone.default and x.is_contiguous():
                    self._copied[storage._cdata] = self._content(given[0])
        return out


class _Kind(NamedTuple):
    view: bool  # gives its first argument's memory, seen otherwise
    new: bool  # gives tensors of their own
    writes: bool
    chance: bool


@functools.cache
def _kind(func: Any) -> _Kind:
    schema = func._schema
    shared = [each.alias_info is not None for each in schema.returns]
    on_tensor = bool(schema.arguments) and str(schema.arguments[0].type) == "Tensor"
    view = on_tensor and bool(shared) and all(shared) and not schema.is_mutable
    chance = torch.Tag.nondeterministic_seeded in func.tags
    return _Kind(view, not schema.is_mutable and not any(shared), schema.is_mutable, chance)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    _told(values, found)
    return found


def _told(values: Iterable[Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    """The values that are no tensors, to be hashed; the tensors are put into the list."""
    told: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            told.append(None)
        elif isinstance(value, list | tuple):
            told.append(_told(value, tensors))
        else:
            told.append((type(value), value))
    return tuple(told)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        for x in (k, v):
            out += x.as_strided((), ())  # it follows from them
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


#: what is asked of tensors, or made, in another way while networks have no numbers
_ANSWERED = {F.scaled_dot_product_attention, torch.tensor, Tensor.__getitem__, Tensor.tolist, Tensor.numpy}


class _FusedAttention(TorchFunctionMode):
    def __init__(self, footprint: Footprint):
        super().__init__()
        self.footprint = footprint

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _ANSWERED:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            q, k, v = named["query"], named["key"], named["value"]
            if any(x.is_meta for x in (q, k, v)):
                return _Fused.apply(q, k, v)
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs = {**kwargs, "device": "cpu"}  # numbers that are said, such as sizes, stay known
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            args = args[0], torch.tensor(args[1])
        if func in (Tensor.tolist, Tensor.numpy) and args[0].is_meta:
            return func(self.footprint.numbers(args[0]))
        return func(*args, **kwargs)


@dataclass
class Use:
    """Bytes that a run took beyond the weights: at most, once texts are read, and at the end of each step."""

    peak: int
    begun: int
    kept: list[int]


class _Begun(Intervention):
    """Looks once what is alive when systems have started, networks of their own among it, and nothing is drawn yet."""

    live = 0

    def __init__(self, counted: Footprint):
        self.counted = counted

    def on_text(self, run: Any, condition: Any) -> Any:
        self.live = self.counted.live
        self.mark()
        return condition


def drawn(model: Model, systems: Any = (), steps: int = 1, **options: Any) -> Use:
    """What drawing one picture or clip in so many steps takes; with a model of :func:`.outline`, nothing is computed.
    Raises what drawing raises."""
    weights = [x for part in model.modules.values() for x in (*part.parameters(), *part.buffers())]
    kept: list[int] = []
    nets = (
        shown_as(_weightless) if weights[0].is_meta else contextlib.nullcontext()
    )  # those of systems are as the model
    with quiet(), nets, Footprint(weights) as counted, _FusedAttention(counted):
        begun = _Begun(counted)
        given = {"steps": steps, "seed": 0, "decode": False, "interventions": [systems, begun], **options}
        generate(model, PROMPT, on_step=lambda step: kept.append(counted.live), **given)
    return Use(counted.peak, begun.live, kept)


def _weightless(net: Any) -> Any:
    """A copy of a network, or of what holds one as its attribute, without numbers."""
    if isinstance(net, nn.Module):
        own = itertools.chain(net.parameters(), net.buffers())
        return copy.deepcopy(
            net, {id(x): torch.empty_like(x, device="meta").requires_grad_(x.requires_grad) for x in own}
        )
    held = {name: _weightless(each) for name, each in vars(net).items() if isinstance(each, nn.Module)}
    found = copy.copy(net)
    vars(found).update(held)
    return found


def adds(
    model: Model, keys: Iterable[str] | None = None, on_progress: Callable[[int, int, str], None] | None = None
) -> dict[str, int | str | None]:
    """How many bytes each system that takes part in drawing, or each of these ``keys``, adds to it, for one picture or
    clip of the model's own size, steps and dtype; "refused" where a recording would grow too large; None where that
    depends on numbers. ``model``: of :func:`.outline`; it is changed. What a file holds is taken to be of usual size
    (:meth:`.Intervention.usual_bytes`). Systems that keep more with every step are walked for five and ten steps,
    others for one or two. ``on_progress`` is told before each of them: how many were walked, of how many, and which
    comes.
    """
    _compute_elsewhere(model)
    height, width = model.default_size
    noise = torch.empty(1, *model.latent_shape(height, width, model.frames()), device="meta", dtype=model.state_dtype)
    plain = functools.cache(lambda steps: drawn(model, steps=steps, latents=noise))
    total = int(model.defaults["steps"])

    def more(make: Callable[[], Any]) -> int:
        def walked(steps: int) -> tuple[int, int]:
            use, without = drawn(model, make(), steps, latents=noise), plain(min(steps, STEPS))
            return use.peak - without.peak, use.kept[-1] - use.begun - (without.kept[-1] - without.begun)

        added, kept = walked(1)
        if total == 1 or kept <= plain(1).peak // 50 or walked(2)[1] <= kept + kept // 20:
            return max(0, added)
        added, later = walked(min(STEPS, total))
        if total <= STEPS:
            return max(0, added)
        added, last = walked(min(2 * STEPS, total))  # what is kept in a share of the steps grows by that share
        return max(0, added + (last - later) * max(0, total - 2 * STEPS) // STEPS)

    wanted = {
        key: card
        for key, card in cards.methods().items()
        if (keys is None or key in keys)
        and all(map(model.family.has, card.needs))
        and issubclass(cards.method(key), Intervention)
    }
    found: dict[str, int | str | None] = {}
    for key, card in wanted.items():
        if on_progress is not None:
            on_progress(len(found), len(wanted), key)
        found[key] = None
        with contextlib.suppress(Exception):  # code stumbles over numbers that are not there in whatever way
            usual = cards.method(key).usual_bytes(model)
            try:
                found[key] = more(functools.partial(cards.build, card.example or key)) if usual is None else usual
            except RecordingTooLarge:
                found[key] = "refused"
    return found


def _compute_elsewhere(model: Model) -> None:
    """Schedules and token ids are real, on the CPU, while weights have no numbers."""
    own = type(model.family)
    where = property(lambda self: torch.device("cpu"))
    model.family.__class__ = type(own.__name__, (own,), {"device": where, "__module__": own.__module__})
