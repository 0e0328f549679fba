"""Masks: where in a picture something shall happen, read from files, pictures, arrays, boxes and label maps.

A mask is a float tensor (H W) in [0, 1], 1 where the named region is. :func:`read_mask` takes files, PIL pictures,
arrays and tensors of any size and depth. A mask need not have the picture's size: it is stretched to the picture, and
to each grid inside the network, by exact averages over the area of every cell (:mod:`sfumato.mask_ops`)."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, ImageColor
from pydantic import BeforeValidator, Field
from torch import Tensor

from sfumato import files
from sfumato.arrays import nothing_hidden, to_tensor
from sfumato.cards.paths import EMBEDDED, FilePath
from sfumato.errors import BadInput, NoMatch
from sfumato.mask_ops import area

__all__ = [
    "Boxes",
    "MaskTexts",
    "MaskWarning",
    "as_text",
    "box_mask",
    "label_regions",
    "read_labels",
    "read_mask",
    "regions",
]

MOST_REGIONS = 64  # masks, or boxes, of one system
MOST_EMBEDDED = 2**24  # pixels of a picture that is a text: a few kilobytes of it may stand for many
SAME_COLOR = 8 / 255  # colours closer than this are one: what JPEG and antialiasing leave of a flat colour
TOLERANCE = 24  # of 255, in each channel, between a label map's pixel and the colour named


class MaskWarning(UserWarning):
    """A mask is allowed, but probably not what was meant: it is empty, or covers the whole picture."""


# --- reading ---------------------------------------------------------------------------------------------------------


def read_mask(given: Any, what: str = "mask") -> Tensor:
    """A mask (H W), float32 in [0, 1], grey levels kept.

    ``given``: a path, the text of :func:`as_text`, a PIL picture, an array or a tensor (H W), also with axes of
    length 1, or (H W 3) and (H W 4) in colour. Pictures are turned upright (EXIF). The level of a pixel is its
    brightest channel, so that red paint on black counts as paint; 16-bit pictures are read in full depth; integer
    pictures that hold only 0 and 1 mean just that; floats must lie in [0, 1]. Transparency is the mask where the
    visible colours are all the same.

    Raises:
        BadInput: no such file, no picture, damaged, too large, values out of range, or a picture with transparency that
            does not say which of the two is the mask.
    """
    if isinstance(given, str | Path):
        what = f"{what} {str(given)[:60]!r}"
    with _one_line(what):
        if isinstance(given, Image.Image):
            return _from_picture(_upright(given), what)
        if isinstance(given, str | Path):
            return _from_picture(_opened(given, what), what)
        if isinstance(given, Tensor):
            given = given.detach().cpu()
            given = (given.float() if given.is_floating_point() else given).numpy()
        if isinstance(given, np.ndarray):
            return _from_array(given, what)
    raise BadInput(f"{what} is {type(given).__name__}; it must be a file, a PIL picture, an array or a tensor.")


def read_labels(given: Any, what: str = "map") -> Tensor:
    """A painted label map (H W 3), uint8, from what :func:`read_mask` takes; transparent pixels become black."""
    if isinstance(given, str | Path):
        what = f"{what} {str(given)[:60]!r}"
    with _one_line(what):
        if isinstance(given, Tensor):
            given = given.detach().cpu().numpy()
        if isinstance(given, np.ndarray):
            nothing_hidden(given, what)
            if (
                given.dtype != np.uint8
                or given.ndim not in (2, 3)
                or (given.ndim == 3 and given.shape[2] not in (3, 4))
            ):
                raise BadInput(f"{what} is an array {given.dtype} {given.shape}; it must be uint8 (H, W) or (H, W, 3).")
            given = Image.fromarray(given)
        elif isinstance(given, str | Path):
            given = _opened(given, what)
        if isinstance(given, Image.Image):
            layered = _upright(given).convert("RGBA")
            flat = Image.alpha_composite(Image.new("RGBA", layered.size, (0, 0, 0, 255)), layered)
            return to_tensor(np.array(flat.convert("RGB")))
    raise BadInput(f"{what} is {type(given).__name__}; it must be a file, a PIL picture or an array.")


def as_text(given: Any, labels: bool = False) -> str:
    """A mask (or a label map) as one line of text, so that a recipe can hold it: a path stays a path, anything else
    becomes a PNG of 8 bits in base64. :func:`read_mask` and :func:`read_labels` read both."""
    if isinstance(given, str | Path):
        return str(given)
    if labels:
        image = Image.fromarray(read_labels(given).numpy())
    else:
        image = Image.fromarray((read_mask(given) * 255).round().to(torch.uint8).numpy())
    if image.width * image.height > MOST_EMBEDDED:
        raise BadInput(f"a mask of {image.width}x{image.height} pixels is too large for a recipe; give it as a file.")
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", optimize=True)
    return EMBEDDED + base64.b64encode(encoded.getvalue()).decode()


def _opened(given: str | Path, what: str) -> Image.Image:
    if isinstance(given, str) and given.startswith("data:"):
        if not given.startswith(EMBEDDED):
            raise BadInput(f"{what} is not understood; embedded pictures begin with {EMBEDDED!r}.")
        try:
            stream = io.BytesIO(base64.b64decode(given[len(EMBEDDED) :], validate=True))
        except binascii.Error:
            raise BadInput(f"{what} cannot be read as a picture: it is damaged.") from None
        stream.name = what
        with files.opened_picture(stream) as image:
            return _upright(image, MOST_EMBEDDED)
    if "\0" in str(given) or not Path(given).exists() or Path(given).is_dir():
        raise BadInput(f"{what} is no file; give the path of a picture.")
    return files.read_upright(given)


def _upright(image: Image.Image, most: int | None = None) -> Image.Image:
    most = files.MOST_PIXELS if most is None else most
    if image.width * image.height > most:
        raise BadInput(f"a mask of {image.width}x{image.height} pixels is too large; the most is {most} in all.")
    return files.upright(image)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Within: whatever Pillow finds wrong with a picture is raised as BadInput, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except BadInput:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        message = " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
        raise BadInput(f"{what} cannot be read as a picture: {message}.") from None


def _from_picture(image: Image.Image, what: str) -> Tensor:
    if image.mode == "F" or image.mode.startswith("I"):
        levels = np.array(image)
        if image.mode == "F":
            levels = levels / files.full_scale(image.mode, levels)
        return _from_array(levels, what, deep=image.mode != "I")
    if image.has_transparency_data:
        layers = np.array(image.convert("RGBA"))
        alpha, colors = layers[..., 3], layers[..., :3]
        if alpha.min() != alpha.max():
            visible = colors[alpha > 0].astype(np.float32) / 255
            if (np.ptp(visible, axis=0) <= SAME_COLOR).all():
                return to_tensor(alpha.astype(np.float32) / 255)
            raise BadInput(
                f"{what} has colours and transparency, and does not say which of them is the mask; save it in black "
                f"and white without transparency, or in a single colour on a transparent layer."
            )
        return _from_array(colors.max(-1), what)
    return _from_array(np.array(image.convert("L" if image.mode in ("1", "L") else "RGB")), what)


def _from_array(array: np.ndarray, what: str, deep: bool = False) -> Tensor:
    nothing_hidden(array, what)
    if array.dtype.kind not in "buif":
        raise BadInput(f"{what} is an array of {array.dtype}; it must hold finite numbers, or yes and no.")
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[-1] == 4 and array.dtype == np.uint8:
        return _from_picture(Image.fromarray(array), what)
    if array.ndim == 3 and array.shape[-1] in (3, 4):
        array = array[..., :3].max(-1)
    if array.ndim != 2 or 0 in array.shape:
        raise BadInput(f"{what} has shape {array.shape}; it must be (height, width), one mask at a time.")
    if array.dtype == bool:
        return to_tensor(array.astype(np.float32))
    if not np.isfinite(array).all():
        raise BadInput(f"{what} holds values that are not finite numbers.")
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.floating):
        top = 1.0
    elif high <= 1:
        top = 1.0
    else:
        top = 65535.0 if deep or array.dtype == np.uint16 or high > 255 else 255.0
    slack = files.ROUNDING if array.dtype.kind == "f" else 0
    if low < -slack or high > top + slack:
        allowed = "in [0, 1]" if top == 1 else f"whole numbers up to {top:.0f}"
        raise BadInput(f"{what} holds values from {low:g} to {high:g}; they must be {allowed}.")
    return to_tensor((array / top).clip(0, 1).astype(np.float32))


# --- parameters ------------------------------------------------------------------------------------------------------


def _as_texts(given: Any) -> Any:
    listed = given if isinstance(given, list | tuple) else [given]
    return [as_text(each) for each in listed]


def _as_boxes(given: Any) -> Any:
    if isinstance(given, list | tuple) and len(given) == 4 and not any(isinstance(n, list | tuple) for n in given):
        return [given]
    return given


MaskTexts = Annotated[list[FilePath], BeforeValidator(_as_texts), Field(max_length=MOST_REGIONS)]
"""A parameter that takes one mask or several, in any form of :func:`read_mask`; kept as text."""

Boxes = Annotated[list[tuple[float, float, float, float]], BeforeValidator(_as_boxes), Field(max_length=MOST_REGIONS)]
"""A parameter that takes one box ``x0|y0|x1|y1`` or a list of them; see :func:`box_mask`."""


# --- regions ---------------------------------------------------------------------------------------------------------


def box_mask(box: Sequence[float], size: tuple[int, int]) -> Tensor:
    """A box (x0, y0, x1, y1), ends exclusive, as a mask (H W) of a picture of ``size`` (width, height); pixels that it
    cuts count by their covered share.

    Numbers that are all at most 1 are fractions of the picture, others pixels. Raises BadInput for a box without
    area or beyond the picture.
    """
    x0, y0, x1, y1 = (float(n) for n in box)
    width, height = size
    if max(x0, y0, x1, y1) <= 1:
        x0, x1, y0, y1 = x0 * width, x1 * width, y0 * height, y1 * height
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise BadInput(
            f"box is {'|'.join(f'{n:g}' for n in box)}; it must be x0|y0|x1|y1 with x0 < x1 and y0 < y1, as fractions "
            f"of the picture (0 to 1) or in pixels of its {width}x{height}."
        )

    def covered(start: float, end: float, n: int) -> Tensor:
        cells = torch.arange(n, dtype=torch.float64)
        return ((cells + 1).clamp(max=end) - cells.clamp(min=start)).clamp(0, 1)

    return torch.outer(covered(y0, y1, height), covered(x0, x1, width)).float()


def regions(masks: Sequence[Tensor], boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """Masks (each H' W') and then boxes as layers (r H W) of a picture of ``size`` (width, height)."""
    layers = [area(mask, (size[1], size[0])) for mask in masks] + [box_mask(box, size) for box in boxes]
    return torch.stack(layers) if layers else torch.zeros(0, size[1], size[0])


def label_regions(labels: Tensor, colors: Sequence[str], tolerance: int = TOLERANCE) -> Tensor:
    """One mask per colour (r H W) of a painted label map (H W 3): the pixels within ``tolerance`` of it.

    Colours are names or hex codes ("red", "#ff8000"). Raises BadInput for a text that is no colour, NoMatch, listing
    the map's own colours, for one that the map has not.
    """
    flat = labels.to(torch.int16)
    layers = []
    for color in colors:
        try:
            rgb = ImageColor.getrgb(color if not color.isalnum() or color.isalpha() else f"#{color}")[:3]
        except ValueError:
            raise BadInput(
                f"color {color!r} is unknown; give a name such as red or a hex code such as #ff8000."
            ) from None
        layer = ((flat - torch.tensor(rgb, dtype=torch.int16)).abs().amax(-1) <= tolerance).float()
        if not layer.any():
            raise NoMatch(f"color {color!r} is nowhere in the map; it is painted in {_most_common(labels)}.")
        layers.append(layer)
    return torch.stack(layers)


def _most_common(labels: Tensor, n: int = 8) -> str:
    colors, counts = labels.reshape(-1, 3).unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True)[:n].tolist()
    listed = ", ".join("#{:02x}{:02x}{:02x}".format(*colors[i].tolist()) for i in order)
    return listed + (", ..." if len(counts) > n else "")


# --- grids -----------------------------------------------------------------------------------------------------------


# --- thresholds ------------------------------------------------------------------------------------------------------
