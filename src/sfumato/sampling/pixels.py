"""From pictures of any kind to tensors in [-1, 1], and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato import files
from sfumato.arrays import nothing_hidden, to_pixels
from sfumato.errors import BadInput
from sfumato.valid import brief

OVERSHOOT = 8.0  # how far beyond [-1, 1] an autoencoder's pixels may lie, which nobody has clamped; bytes lie further


def as_pixels_of(model: Any, image: Any, size: tuple[int, int] | None) -> Tensor:
    """What a model begins with or looks at: pictures (b 3 H W) as :func:`as_pixels` reads them or, of a model of clips,
    clips (b 3 f H W): frames as bytes (f h w 3) or as a list of pictures, several of the former, or such a tensor."""
    if not model.clips:
        return as_pixels(image, size)
    if isinstance(image, Tensor):
        if image.dim() != 5 or image.shape[1] != 3:
            raise BadInput(f"the clip has shape {tuple(image.shape)}; a tensor must be (b, 3, f, H, W) in [-1, 1].")
        frames = as_pixels(image.transpose(1, 2).flatten(0, 1), size)
        return frames.unflatten(0, (len(image), -1)).transpose(1, 2)
    if not isinstance(image, list | tuple) and getattr(image, "ndim", 0) != 4:
        raise BadInput(f"image is no clip, but {model.name} draws clips: give frames (f h w 3) or a list of pictures.")
    given = list(image) if isinstance(image, list | tuple) else [image]
    clips = given if all(getattr(each, "ndim", 0) == 4 for each in given) else [given]
    read = [as_pixels(list(clip), size).transpose(0, 1) for clip in clips]
    if len({each.shape for each in read}) > 1:
        raise BadInput("the clips have different numbers of frames or sizes; give clips that are alike.")
    return torch.stack(read)


def as_pixels(image: Any, size: tuple[int, int] | None) -> Tensor:
    """Pictures as a tensor (b 3 H W) in [-1, 1], resized to ``size`` = (width, height) when given.

    ``image``: a PIL picture, an array (H W), (H W 3) or (H W 4) of bytes, 16-bit numbers or floats in [0, 1], a list of
    these, or such a tensor already. Pictures and arrays are read as a file of the same content is: upright, transparent
    parts on white, deep greys in full range.
    """
    if isinstance(image, Tensor):
        if image.dim() != 4 or image.shape[1] != 3:
            raise BadInput(f"image has shape {tuple(image.shape)}; a tensor must be (b, 3, height, width) in [-1, 1].")
        if size is not None and tuple(image.shape[-2:]) != (size[1], size[0]):
            raise BadInput(
                f"image is {image.shape[-1]}x{image.shape[-2]} but size is {size[0]}x{size[1]}; resize it first."
            )
        if not image.is_floating_point():
            raise BadInput(f"image is a tensor of {image.dtype}; it must hold floats in [-1, 1]: image / 127.5 - 1.")
        if not torch.isfinite(image).all():
            raise BadInput("image holds values that are not finite.")
        if image.numel() and float(image.detach().abs().max()) > OVERSHOOT:
            low, high = (float(each) for each in image.detach().aminmax())
            raise BadInput(f"image holds values from {low:g} to {high:g}; a tensor must lie in [-1, 1].")
        return image
    pictures = [upright_picture(each) for each in (image if isinstance(image, list | tuple) else [image])]
    if not pictures:
        raise BadInput("image is an empty list; give a picture or several.")
    size = size or pictures[0].size
    resized = [p if p.size == size else p.resize(size, Image.Resampling.LANCZOS) for p in pictures]
    return to_pixels(resized)


def upright_picture(given: Any, name: str = "image") -> Image.Image:
    """A picture or an array as an upright RGB picture; ``name``: of the argument."""
    if isinstance(given, np.ndarray):
        given = _from_array(given, name)
    if not isinstance(given, Image.Image):
        raise BadInput(
            f"{name} is {brief(given)}; it must be a PIL picture, an array, a list of these, or a tensor (b, 3, H, W)."
        )
    if given.width * given.height > files.MOST_PIXELS:
        raise BadInput(f"{name} is {given.width}x{given.height}; the most is {files.MOST_PIXELS} pixels.")
    return files.as_rgb(given)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    what = f"{name} is an array {array.dtype} {array.shape}"
    nothing_hidden(array, name)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and 1 in array.shape[::2] and not (len(array) == 1 and array.shape[2] in (3, 4)):
        array = array[..., 0] if array.shape[2] == 1 else array[0]
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise BadInput(f"{what}; it must be (height, width), with 3 channels for colour and a fourth for transparency.")
    if array.shape[0] * array.shape[1] > files.MOST_PIXELS:
        raise BadInput(f"{what}; the most is {files.MOST_PIXELS} pixels.")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < -files.ROUNDING or array.max() > 1 + files.ROUNDING:
            raise BadInput(f"{what} from {array.min():g} to {array.max():g}; floats must lie in [0, 1].")
        array = array.clip(0, 1) * 255
    elif array.dtype == bool:
        array = array * 255
    elif not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 65535:
        raise BadInput(f"{what}; it must hold bytes, 16-bit numbers or floats in [0, 1].")
    elif array.dtype == np.uint16 or array.max() > 255:
        array = array / 257
    return Image.fromarray(array.round().astype(np.uint8))


def as_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels (b 3 H W) in [-1, 1] as PIL pictures, rounded as diffusers rounds them."""
    return [Image.fromarray(picture) for picture in _bytes(pixels)]


def as_clips(pixels: Tensor) -> list[np.ndarray]:
    """Pixels (b 3 f H W) in [-1, 1] as clips of bytes (f H W 3), rounded likewise."""
    return [_bytes(clip) for clip in pixels.transpose(1, 2)]


def _bytes(pixels: Tensor) -> np.ndarray:
    """(b 3 H W) in [-1, 1] as bytes (b H W 3)."""
    array = (pixels.detach() / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
    return (array * 255).round().astype("uint8")
