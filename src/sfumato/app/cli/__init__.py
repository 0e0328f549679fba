"""The command line: one module a command, thin over :mod:`sfumato.app`. Heavy imports happen inside the commands."""

from __future__ import annotations

import os

from sfumato.app.cli import claims, edit, explain, judge, lists, make, segment, toybox, train  # noqa: F401
from sfumato.app.cli.frame import app

__all__ = ["app", "main"]


def main() -> None:
    """The entry point ``sfumato``."""
    # threads that wait for each other sleep instead of spinning: on a busy machine that is many times faster
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
