"""Modes of networks that hold within a block only: evaluation, and gradients of every parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

__all__ = ["evaluation", "with_gradients"]


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
