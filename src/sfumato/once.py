"""Networks that several systems ask for are loaded once in a process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar, cast

Given = ParamSpec("Given")
Loaded = TypeVar("Loaded")

_shown: ContextVar[Callable[[Any], Any]] = ContextVar("shown", default=lambda loaded: loaded)


def once(most: int) -> Callable[[Callable[Given, Loaded]], Callable[Given, Loaded]]:
    """A decorator for functions that load a network: the last ``most`` that were loaded stay, by their arguments.

    They are loaded in a thread of their own, where none of torch's modes holds. Who asks first may do so with inference
    mode on, without gradients, with another default device, or while networks have no numbers; who asks next gets the
    same network.
    """

    def decorate(load: Callable[Given, Loaded]) -> Callable[Given, Loaded]:
        def apart(*args: Any, **kwargs: Any) -> Loaded:
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(load, *args, **kwargs).result()

        kept: Callable[..., Loaded] = functools.lru_cache(most)(apart)

        @functools.wraps(load)
        def handed_out(*args: Given.args, **kwargs: Given.kwargs) -> Loaded:
            return cast(Loaded, _shown.get()(kept(*args, **kwargs)))

        return handed_out

    return decorate


@contextlib.contextmanager
def shown_as(change: Callable[[Any], Any]) -> Iterator[None]:
    """Within, ``change`` of what was loaded is handed out; what stays is as it was."""
    token = _shown.set(change)
    try:
        yield
    finally:
        _shown.reset(token)
