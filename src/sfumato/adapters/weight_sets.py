"""Weight sets: other parameters in the place of a network's own, for a while.

Whole :class:`torch.nn.Parameter` objects are exchanged, never values in place: a graph recorded with one set keeps what
it was recorded with, and putting the own ones back restores every bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sfumato.errors import BadWeights, NotSupported
from sfumato.models.weights import find_weights, read_header

__all__ = [
    "Weights",
    "WeightSets",
    "at_hand",
    "checked_parameter",
    "parameter_like",
    "parameters_of",
    "read_weights",
    "refuse_codes",
    "swapped_weights",
]

Weights = Mapping[str, nn.Parameter]
"""Parameters of a network by their path; those that are missing stay the network's own."""


def parameters_of(network: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where the parameters of a network hang: path -> (module, name in it)."""
    return {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in network.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


class WeightSets:
    """Several sets of parameters for one network, of which at most one is in place.

    >>> sets = WeightSets(network, {"early": weights, "late": others})
    >>> sets.use("early"); sets.use(None)
    """

    def __init__(self, network: nn.Module, sets: Mapping[Hashable, Weights]):
        self.sets = sets
        self._slots = parameters_of(network)
        self._own = {path: module._parameters[name] for path, (module, name) in self._slots.items()}
        for path in {path for each in sets.values() for path in each}:
            at_hand(path, self._own.get(path))
        self.current: Hashable | None = None

    def use(self, key: Hashable | None) -> None:
        """Puts a set in place; None: the network's own."""
        if key == self.current:
            return
        weights = {} if key is None else self.sets[key]
        for path, (module, name) in self._slots.items():
            module._parameters[name] = weights.get(path, self._own[path])
        self.current = key


@contextmanager
def swapped_weights(networks: Mapping[str, nn.Module], weights: Mapping[str, Weights]) -> Iterator[None]:
    """While it lasts, the networks named have these parameters: component -> path -> parameter."""
    with ExitStack() as stack:
        for component, chosen in weights.items():
            sets = WeightSets(networks[component], {True: chosen})
            stack.callback(sets.use, None)
            sets.use(True)
        yield


def at_hand(path: str, own: Tensor | None) -> None:
    """Raises NotSupported for a parameter that rests elsewhere: nothing can be added to it or stand in its place."""
    if own is not None and own.is_meta:
        raise NotSupported(f"{path} is offloaded, so no other weights can take its place; do it without offloading.")


@torch.no_grad()
def parameter_like(own: Tensor, value: Tensor) -> nn.Parameter:
    """``value`` as a parameter laid out in memory as ``own``, for the same kernels, on its device, in its precision."""
    return nn.Parameter(torch.empty_like(own).copy_(value), requires_grad=False)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a component's folder. Raises BadWeights for pickles, damaged files, or none."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in find_weights(folder):
        read_header(file)
        state.update(load_file(file))
    return state


def refuse_codes(path: str, own: Tensor) -> None:
    """Raise NotSupported for a parameter in the codes of a quantizer (bitsandbytes, GGUF, torchao), to which nothing
    can be added and in whose place no whole weight can stand."""
    if is_traceable_wrapper_subclass(own) or not own.is_floating_point():
        raise NotSupported(
            f"{path} is quantized ({type(own).__name__}, {own.dtype}); its weights can be neither exchanged nor "
            f"merged: load the model in bf16, fp16 or fp32."
        )


def checked_parameter(name: str, path: str, other: Tensor | None, own: Any, of: str) -> Tensor:
    """``other``, if it can stand in the place of ``own``. Raises BadWeights, in which ``name`` is whose it is, and
    NotSupported for codes."""
    refuse_codes(path, own)
    if other is None or other.shape != own.shape:
        found = "lacks" if other is None else f"has {tuple(other.shape)} instead of {tuple(own.shape)} in"
        raise BadWeights(f"{name} {found} {path}: it is no child of {of}.")
    if not other.isfinite().all():
        raise BadWeights(f"{name} holds values in {path} that are no finite numbers; it is damaged.")
    return other.to(device=own.device, dtype=own.dtype)
