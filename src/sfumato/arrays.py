"""From numpy to torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def to_tensor(array: np.ndarray) -> Tensor:
    """A copy of an array, in its order of axes, in memory of torch's own, which begins at a multiple of 64 bytes.

    ``torch.from_numpy`` shares numpy's memory, which begins wherever the heap had room: kernels that treat the edges of
    a block by its address then give other last bits in one run out of many.
    """
    import torch

    return torch.from_numpy(array).clone()
