"""Make, look inside, steer, teach, animate and judge generative image and video models.

    >>> import sfumato
    >>> result = sfumato.make("a red cube and a blue ball", with_=["daam"])
    >>> result.images[0].save("toys.png")

Everything here is loaded on first use; importing the package imports neither torch nor anything else that is heavy, and
changes nothing global. A room that carries the name of a verb is that verb as well: ``sfumato.explain(...)`` calls,
``sfumato.explain.daam`` is the room's file.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from sfumato.version import __version__

if TYPE_CHECKING:
    import inspect

    from sfumato.app.attaching import attached
    from sfumato.app.editing import edit
    from sfumato.app.explaining import explain
    from sfumato.app.jobs import load, make, models
    from sfumato.app.judging import compare, judge
    from sfumato.app.segmenting import segment
    from sfumato.app.teaching import teach, train
    from sfumato.cards import build, method, methods

__all__ = [
    "attached",
    "load",
    "make",
    "explain",
    "edit",
    "segment",
    "teach",
    "judge",
    "compare",
    "models",
    "methods",
    "method",
    "build",
    "train",
    "__version__",
]

_HOME = {
    "attached": "app",
    "load": "app",
    "make": "app",
    "explain": "app",
    "edit": "app",
    "segment": "app",
    "teach": "app",
    "judge": "app",
    "compare": "app",
    "models": "app",
    "train": "app",
    "methods": "cards",
    "method": "cards",
    "build": "cards",
}


class _Verb(types.ModuleType):
    """A room that can be called: the call goes to the function of the same name in the public face, which also says
    what it takes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _public(self.__name__.rpartition(".")[2])(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        import inspect

        return inspect.signature(_public(self.__name__.rpartition(".")[2]))


class _Face(types.ModuleType):
    """This package; the import system sets each room as its attribute, and verbs among them become callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and type(value) is types.ModuleType:
            value.__class__ = _Verb
        super().__setattr__(name, value)


def _public(name: str) -> Any:
    return getattr(importlib.import_module(f"sfumato.{_HOME[name]}"), name)


def __getattr__(name: str) -> Any:
    if name == "judge":  # ``from sfumato import judge`` means the room, which is the verb as well
        return importlib.import_module("sfumato.judge")
    if name in _HOME:
        return _public(name)
    raise AttributeError(f"module 'sfumato' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Face
