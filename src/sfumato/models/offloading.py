"""Networks whose weights rest elsewhere while they do not run, brought and taken away by accelerate's hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sfumato.errors import BadWeights

__all__ = ["execution_device", "fetched"]


def execution_device(modules: Iterable[nn.Module]) -> torch.device | None:
    """Where the first of these modules that is offloaded computes; None where none is."""
    hooks = (getattr(module, "_hf_hook", None) for module in modules)
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((place for place in places if place is not None), None)
    return None if found is None else torch.device(found)


@contextmanager
def fetched(module: nn.Module, name: str) -> Iterator[Tensor]:
    """Within: the values of a parameter or buffer that rests elsewhere, in the memory of the CPU. Raises BadWeights
    where there are none."""
    from accelerate.utils import align_module_device

    owner, _, leaf = name.rpartition(".")
    part = module.get_submodule(owner)
    if execution_device([part]) is None:
        raise BadWeights(f"{name} of {type(module).__name__} has no values: it is on the meta device.")
    with align_module_device(part, "cpu"):
        yield getattr(part, leaf)
