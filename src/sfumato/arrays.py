"""From numpy to torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


def to_tensor(array: np.ndarray) -> Tensor:
    """A copy of an array, in its order of axes, in memory of torch's own, which begins at a multiple of 64 bytes.

    ``torch.from_numpy`` shares numpy's memory, which begins wherever the heap had room: kernels that treat the edges of
    a block by its address then give other last bits in one run out of many.
    """
    import torch

    return torch.from_numpy(array).clone()


def nothing_hidden(array: np.ndarray, name: str) -> None:
    """Raises BadInput for a masked array that was given as ``name``: what shall stand for its hidden values, nobody
    knows."""
    import numpy as np

    if isinstance(array, np.ma.MaskedArray):
        what = f"{name} is an array {array.dtype} {array.shape}"
        raise BadInput(f"{what}, of which some values are hidden; give array.filled(value).")


def to_pixels(pictures: Sequence[Image]) -> Tensor:
    """RGB pictures of one size as a tensor (b 3 H W) in [-1, 1], with diffusers' rounding."""
    import numpy as np

    array = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32) / 255.0
    return to_tensor(array.transpose(0, 3, 1, 2)) * 2.0 - 1.0
