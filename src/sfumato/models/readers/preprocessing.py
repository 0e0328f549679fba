"""What is done to a picture before a net sees it: size, resampling, mean and standard deviation, in one place.

Two ways lead to a net's input. :meth:`Preprocessing.tensor` works on tensors, differentiably and without cutting
anything off, for nets that guide or are explained; :meth:`Preprocessing.pictures` works on PIL pictures, exactly as
transformers' processors resample, for nets that measure (Parmar et al. 2022, https://arxiv.org/abs/2104.11222, on why
the filter matters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato.arrays import to_tensor
from sfumato.models.quiet import quiet
from sfumato.models.weights import read_json

__all__ = ["Preprocessing", "as_tensor", "square"]

#: PIL's numbers of filters that torch has, antialiased, under these names
FILTERS = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """``size`` (h, w) in pixels, None for any; ``mean`` and ``std`` of pixels in [0, 1]; ``resample``: the filter."""

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: str = "bicubic"

    @classmethod
    def of(cls, folder: Path | None, config: Any = None) -> Preprocessing:
        """That of a transformers folder and its model's ``config``; what neither says is as above."""
        size = side_of(getattr(getattr(config, "vision_config", config), "image_size", None))
        given = {} if folder is None else _processor(folder)
        size = size or side_of(given.get("crop_size") or given.get("size"))
        mean, std = (tuple(given.get(key) or (0.5,) * 3) for key in ("image_mean", "image_std"))
        if given.get("do_normalize") is False:
            mean, std = (0.0,) * len(mean), (1.0,) * len(std)
        scale = 255 * float(given.get("rescale_factor") or 1 / 255)
        if abs(scale - 1) > 1e-6:
            mean, std = tuple(m / scale for m in mean), tuple(s / scale for s in std)
        return cls(size, mean, std, FILTERS.get(int(given.get("resample") or 3), "bicubic"))

    def normalised(self, images: Tensor) -> Tensor:
        """Pictures (b c h w) in [-1, 1] with the net's mean and deviation, in their own size."""
        mean, std = (images.new_tensor(part)[:, None, None] for part in (self.mean, self.std))
        return (images / 2 + 0.5 - mean) / std

    def tensor(self, images: Tensor, clamp: bool = False) -> Tensor:
        """Pictures (b c h w) in [-1, 1] as the net's input, stretched to its size where they have another.

        ``clamp``: what the filter overshoots is cut off, as in 8-bit pictures; gradients do not pass there.
        """
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode=self.resample, antialias=True, align_corners=False)
            images = images.clamp(-1, 1) if clamp else images
        return self.normalised(images)

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The centre squares of PIL pictures, resampled by Pillow, as the net's input (b 3 h w)."""
        assert self.size is not None
        return self.normalised(as_tensor([square(picture, self.size[0]) for picture in pictures]))


def square(picture: Image.Image, side: int) -> Image.Image:
    """The centre square of a picture in RGB at ``side`` x ``side`` pixels; unchanged when it is that already."""
    picture = picture.convert("RGB")
    if picture.size == (side, side):
        return picture
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    # cropped first: with resize(box=...) the filter would see beyond the square
    return picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as floats (b, 3, h, w) in [-1, 1]."""
    array = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return to_tensor(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def side_of(size: Any) -> tuple[int, int] | None:
    """(h, w) of a size as configs write it: a number, a pair, {"height": ..., "width": ...}, {"shortest_edge": ...}."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if size else None


def _processor(folder: Path) -> dict[str, Any]:
    """The settings of a folder's image processor; where its file leaves means out, its class's own."""
    given: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        given = read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():
        given = read_json(folder / "processor_config.json").get("image_processor") or {}
    if given and not given.get("image_mean") and given.get("do_normalize") is not False:
        from transformers import AutoImageProcessor

        try:
            with quiet():
                processor = AutoImageProcessor.from_pretrained(folder)
        except Exception:  # one that needs a package that is not here, or is none of transformers'
            return given
        names = ("image_mean", "image_std", "size", "crop_size", "resample", "rescale_factor")
        return {name: getattr(processor, name, None) for name in names} | given
    return given
