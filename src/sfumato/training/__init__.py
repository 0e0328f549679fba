"""Training: one recipe-driven trainer and the objectives it knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.training.trainer import Progress, RunResult, run

__all__ = ["Progress", "RunResult", "run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from sfumato.training import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
