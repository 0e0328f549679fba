"""Programs that stop as Ctrl-C stops them, whoever asks for it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

__all__ = ["interruptions_raised", "raise_if_asked", "stopped_by_signals"]

_RAISED: ContextVar[bool] = ContextVar("interruptions raised", default=False)


@contextlib.contextmanager
def interruptions_raised() -> Iterator[None]:
    """Within: a fit that Ctrl-C or a signal ends early raises KeyboardInterrupt, unless its checkpoints are kept. For
    programs: what they go on to say must not come from half of a fit."""
    token = _RAISED.set(True)
    try:
        yield
    finally:
        _RAISED.reset(token)


def raise_if_asked() -> None:
    """Raises KeyboardInterrupt within :func:`interruptions_raised`; to be called by who was interrupted."""
    if _RAISED.get():
        raise KeyboardInterrupt


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within: SIGTERM and, unless ignored as under nohup, SIGHUP interrupt as Ctrl-C does. For programs, in their main
    thread; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    which = [each for name in names if signal.getsignal(each := getattr(signal, name)) is not signal.SIG_IGN]
    old = {each: signal.signal(each, stop) for each in which}
    try:
        yield
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)
