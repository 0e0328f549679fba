"""Which module of a network runs, and what it returns: hooks that are gone afterwards, also after an exception."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Running", "running"]


@dataclass(eq=False)
class Running:
    """A module that runs now, and what it was called with."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextlib.contextmanager
def running(module: nn.Module, after: Callable[[Running, Any], None] | None = None) -> Iterator[list[Running]]:
    """Within: the list that is handed out holds the parts of ``module`` that run, outermost first.

    ``after`` is shown each part and its output when it is done (not where it failed).
    """
    stack: list[Running] = []
    handles = []

    def enter(path: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stack.append(Running(path, part, args, kwargs))

        return hook

    def leave(part: nn.Module, args: Any, output: Any) -> None:
        done = stack.pop()
        if after is not None and output is not None:
            after(done, output)

    try:
        for path, part in module.named_modules():
            handles.append(part.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(part.register_forward_hook(leave, always_call=True))
        yield stack
    finally:
        for handle in handles:
            handle.remove()
