"""The command line: one module a command, thin over :mod:`sfumato.app`, read when it is called."""

from __future__ import annotations

import os
import sys

from sfumato.app.cli.commands import app
from sfumato.startup import import_on_use, skip_final_collection

__all__ = ["app", "main"]


def main() -> None:
    """The entry point ``sfumato``."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever began this; the first file would take its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    # threads that wait for each other sleep instead of spinning: on a busy machine that is many times faster
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import_on_use("scipy.stats")  # diffusers' schedulers import it, for beta schedules alone: a twentieth of the time
    try:
        app()
    finally:
        skip_final_collection()
