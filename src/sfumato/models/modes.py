"""Modes of networks that hold within a block only: evaluation, and gradients of every or of no parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["evaluation", "frozen", "frozen_parameters", "with_gradients"]


@contextlib.contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Within: evaluation mode (no dropout). Afterwards every part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def with_gradients(module: nn.Module) -> Iterator[None]:
    """Within: every floating-point parameter records gradients. Afterwards each does so or not as before."""
    frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def frozen(model: Any) -> contextlib.AbstractContextManager[None]:
    """While it lasts, no weight of the model receives gradients; vectors and latents may."""
    return frozen_parameters(model.modules.values())


@contextlib.contextmanager
def frozen_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, no weight of these modules receives gradients."""
    weights = [p for module in modules for p in module.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
