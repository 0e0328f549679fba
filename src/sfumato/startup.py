"""What makes a short program start and end sooner."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def lazy(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names are imported on first use; ``home``: from which of its
    modules."""

    def get(name: str) -> Any:
        if name in home:
            return getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted(home)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection for the length of a block: importing torch and diffusers makes a million objects that stay,
    and looking through them again and again takes a fifteenth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def skip_final_collection() -> None:
    """To be called last of all: what is left is not looked through for garbage any more when the interpreter ends."""
    gc.freeze()


class _Postponed(types.ModuleType):
    """A module whose code runs when something in it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        with _running:
            if type(self) is _Postponed:
                self.__class__ = types.ModuleType  # type: ignore[assignment]
                self.__loader__.exec_module(self)  # type: ignore[union-attr]
        return getattr(self, name)


_running = threading.RLock()


class _Postponing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname in self.names else None
        if spec is None or spec.loader is None:
            return None
        self.real = {**getattr(self, "real", {}), fullname: spec.loader}
        spec.loader = self
        return spec

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.real[module.__name__]  # type: ignore[union-attr]
        module.__class__ = _Postponed


def import_on_use(*names: str) -> None:
    """From now on modules of these names run when they are first used, not when they are imported: what libraries
    import for a case that seldom comes. For programs, not for libraries."""
    sys.meta_path.insert(0, _Postponing(names))
