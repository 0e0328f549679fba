"""Several processes of one run, as torchrun and accelerate launch them."""

from __future__ import annotations

import os

from sfumato.errors import BadInput

__all__ = ["processes"]


def processes() -> int:
    """How many processes this one was launched with, itself among them.

    Raises BadInput where ``accelerate launch --cpu`` was told to start several: it starts one, without a word.
    """
    here = os.environ
    if "WORLD_SIZE" not in here and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= here.keys():
        raise BadInput(
            "accelerate launch --cpu starts one process, whatever number it is given: use torchrun --nproc_per_node 2 "
            "-m sfumato and the same arguments."
        )
    return int(here.get("WORLD_SIZE", "1"))
