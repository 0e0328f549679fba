"""The processes by which models draw, by the name that a family gives as its ``process``."""

from __future__ import annotations

from sfumato.errors import UnknownName
from sfumato.models import Model
from sfumato.sampling.process.autoregressive import Autoregressive
from sfumato.sampling.process.base import Process, Source
from sfumato.sampling.process.diffusion import Diffusion
from sfumato.sampling.process.masked import Masked
from sfumato.sampling.process.onepass import OnePass

PROCESSES: dict[str, type[Process]] = {each.name: each for each in (Diffusion, Masked, Autoregressive, OnePass)}


def process_of(model: Model) -> type[Process]:
    """How a model draws. Raises UnknownName for a family that names no process."""
    if model.family.process not in PROCESSES:
        raise UnknownName(f"process of family {model.family.name}", model.family.process, PROCESSES)
    return PROCESSES[model.family.process]


__all__ = ["PROCESSES", "Process", "Source", "process_of"]
