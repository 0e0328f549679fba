"""A pretended accelerator: tensors that say they live on the device ``sim``, and refuse what a real one would refuse.

Each holds a CPU tensor that does the work, so values, gradients and control flow are real; torch itself sees a backend
of its own (``PrivateUse1``), with its autograd, its views and its messages. What is refused, as on a GPU: operations on
tensors of both devices (numbers of no dimensions aside, where an operation works element by element), results written
into a tensor elsewhere, a generator of the CPU for noise of the device, and numpy without ``.cpu()``. What is allowed
there is allowed here: copies between devices, indices and masks on the CPU.

    model.to(DEVICE)
    with pretending() as device: ...
    device.doubles              # where float64, which some accelerators have not, came to be on it

Attention takes the plain formula on it: compare with the CPU under ``sdpa_kernel(SDPBackend.MATH)``.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing

__all__ = ["NAME", "Device", "DeviceGenerator", "OnDevice", "WrongDevice", "pretending"]

NAME = "sim"
aten = torch.ops.aten


class WrongDevice(RuntimeError):
    """What a real accelerator would have refused."""


@dataclass
class Device:
    """What happened on the device: operations, and the lines of code under ``watched`` that made float64 on it."""

    watched: str = ""
    operations: int = 0
    doubles: set[str] = field(default_factory=set)


_now = Device()  # the one that is looked at


class OnDevice(Tensor):
    """A tensor on the device; ``held`` is its memory."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> Any:
        if held.device.type != "cpu":  # somebody makes a parameter of the type of the one before
            return nn.Parameter(held, requires_grad)
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=f"{NAME}:0",
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.held!r} on {NAME}"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, OnDevice):
            raise WrongDevice("the data of a tensor of the device replaced by some of the CPU")
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held


class DeviceGenerator(torch.Generator):
    """A generator of the device (it draws what one of the CPU draws), to be made while it is pretended."""

    device: Any = None  # once torch knows the device

    def __init__(self) -> None:
        _introduced.append(self)  # torch hands operations another object for it, always the same: let it be seen once
        torch.empty(0, device=NAME).normal_(generator=self)


#: generators of the device: as they were made, and as operations are given them
_introduced: list[Any] = []
_known: list[Any] = []


#: a transfer is what these are for
_TRANSFERS = {aten._to_copy.default, aten.copy_.default}
#: their indices may lie on the CPU, and a value that is one number
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
#: so may the one number that these are given
_ONE_NUMBER = {"masked_fill", "masked_fill_", "fill", "fill_", "where"}


@dataclass(frozen=True)
class _Facts:
    """What the schema of an operation says: which of its arguments it writes into, whether its results are views."""

    name: str
    written: tuple[tuple[int, str | None], ...]
    aliases: bool
    numbers: bool  # tensors of no dimensions may lie anywhere

    @classmethod
    @functools.cache
    def of(cls, op: Any) -> _Facts:
        name, schema = op.overloadpacket.__name__, op._schema
        written = tuple(
            (i, argument.name if argument.kwarg_only else None)
            for i, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        aliases = any(each.alias_info is not None for each in (*schema.arguments, *schema.returns))
        numbers = name in _ONE_NUMBER or name in _INDEXING or torch.Tag.pointwise in op.tags
        return cls(name, written, aliases, numbers)

    def targets(self, args: Any, kwargs: dict[str, Any]) -> list[Any]:
        given = [args[i] if i < len(args) else None for i, key in self.written if key is None]
        given += [kwargs.get(key) for _, key in self.written if key is not None]
        return [x for each in given for x in (each if isinstance(each, list | tuple) else [each])]


def _refuse(op: Any, facts: _Facts, args: Any, kwargs: dict[str, Any], flat: list[Tensor]) -> None:
    if op not in _TRANSFERS and any(type(x) is OnDevice for x in flat):
        looked = flat
        if facts.name in _INDEXING:
            looked = _tensors([args[0], *args[2:3]])
        wrong = [x for x in looked if type(x) is not OnDevice and (x.dim() or not facts.numbers)]
        wrong += [x for x in facts.targets(args, kwargs) if isinstance(x, Tensor) and type(x) is not OnDevice]
        if wrong:
            raise WrongDevice(
                f"Expected all tensors to be on the same device: {facts.name} mixes {NAME} with the CPU, there: "
                + ", ".join(str(tuple(x.shape)) for x in wrong)
            )
    generator = kwargs.get("generator")
    if generator is not None and _introduced:
        _introduced.clear()
        _known.append(generator)
    elif generator is not None and not any(each is generator for each in _known):
        raise WrongDevice(f"Expected a '{NAME}' device type for generator but found 'cpu' ({facts.name}).")


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on the device, by the memory of its tensors."""
    facts = _Facts.of(op)
    asked = kwargs.get("device")
    to_cpu = asked is not None and torch.device(asked).type == "cpu"
    if not to_cpu:
        _refuse(op, facts, args, kwargs, _tensors([*args, *kwargs.values()]))
    if op is aten._fused_sdp_choice.default:
        return 0  # the plain formula
    _now.operations += 1
    out = op(*map(_held, args), **{name: _held(value) for name, value in kwargs.items()})
    written = facts.targets(args, kwargs)
    for x in written:
        if type(x) is OnDevice and (x.shape != x.held.shape or x.stride() != x.held.stride()):
            _reshape(x)
    if len(written) == 1 and type(written[0]) is OnDevice and isinstance(out, Tensor):
        return written[0]
    if to_cpu:
        return out
    made = _on_device(out)
    if _now.watched and any(x.dtype == torch.float64 for x in _tensors([made])):
        _now.doubles.update(_line())
    return return_and_correct_aliasing(op, args, kwargs, made) if facts.aliases else made


def _held(x: Any) -> Any:
    if isinstance(x, OnDevice):
        return x.held
    if isinstance(x, list | tuple):
        return [_held(each) for each in x]
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _on_device(x: Any) -> Any:
    if isinstance(x, Tensor):
        return OnDevice(x)
    return type(x)(map(_on_device, x)) if isinstance(x, list | tuple) else x


def _tensors(given: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for x in given:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += _tensors(x)
    return found


def _reshape(x: OnDevice) -> None:
    """Its own shape is that of its memory, after an operation that changed it in place."""
    meta = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
    aten.as_strided_.default.redispatch(meta, x, x.held.size(), x.held.stride(), x.held.storage_offset())


def _line() -> list[str]:
    """The line that asks for an operation, if it is of the code that is watched."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and file != __file__:
            return [f"{file.split(_now.watched)[-1]}:{frame.f_lineno}"] if _now.watched in file else []
        frame = frame.f_back
    return []


@functools.cache
def _register() -> list[Any]:
    """Torch knows the device from now on, and nobody takes it unasked: it says that it is not available."""
    from torch._C import _acc  # type: ignore[attr-defined]
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    class Hooks(_acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return False

        def has_primary_context(self, index: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    class Module:
        def __getattr__(self, name: str) -> Any:
            if name in ("is_available", "is_initialized", "_is_in_bad_fork"):
                return lambda: False
            if name in ("device_count", "current_device"):
                return lambda: 0
            if name == "manual_seed_all":
                return lambda seed: None
            raise AttributeError(name)

    _setup_privateuseone_for_python_backend(NAME, Module(), Hooks(), None)
    DeviceGenerator.device = torch.device(NAME, 0)
    factories, copies = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    factories.fallback(_run, "PrivateUse1")
    # what torch makes of lists of numbers, such as an index, is copied past the class of the tensor
    copies.impl("copy_", lambda to, of, wait=False: _run(aten.copy_.default, to, of, wait), "PrivateUse1")
    # these would let torch fill an empty tensor, and give it its shape then
    for name in (
        "arange",
        "arange.start",
        "arange.start_step",
        "linspace",
        "randperm",
        "randperm.generator",
        "eye",
        "eye.m",
    ):
        op = getattr(getattr(aten, name.split(".")[0]), name.partition(".")[2] or "default")
        copies.impl(name, functools.partial(_run, op), "PrivateUse1")
    return [factories, copies]


@contextlib.contextmanager
def pretending(watched: str = "") -> Iterator[Device]:
    """The device exists; what is handed out says what happened on it. ``watched``: a folder whose lines are named when
    they make float64 there."""
    global _now
    _register()
    before, _now = _now, Device(watched)
    try:
        with mock.patch.object(nn.Module, "_apply", _tied(nn.Module._apply)):
            yield _now
    finally:
        _now = before


def _tied(real: Any) -> Any:
    """A module whose parameters get other ones when it is moved, and not other data, forgets which were the same."""

    def apply(self: nn.Module, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
        places: dict[int, tuple[Any, list[tuple[Any, str]]]] = {}
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), (parameter, []))[1].append((module._parameters, name))
        moved = real(self, fn, *args, **kwargs)
        for _, ((held, name), *others) in places.values():
            for other, at in others:
                other[at] = held[name]
        return moved

    return apply
