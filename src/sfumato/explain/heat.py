"""Pictures of heat maps: colours, overlays that stay legible on small pictures, and labelled sheets."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sfumato.errors import BadInput

__all__ = ["colour", "enlarged_size", "overlay", "sheet"]

#: Pictures are enlarged by whole factors until their longer side has about this many pixels.
LEGIBLE = 256
#: Perceptually uniform, from black over red to a light yellow.
COLOURS = "inferno"


def colour(heat: Tensor, colours: str = COLOURS) -> np.ndarray:
    """Heat (h w) in [0, 1] as RGB bytes (h w 3) by a matplotlib colour map. Raises BadInput for an unknown map."""
    from matplotlib import colormaps

    if colours not in colormaps:
        raise BadInput(f"colours={colours!r} is not a matplotlib colour map; try 'inferno', 'magma' or 'turbo'.")
    return colormaps[colours](heat.clamp(0, 1).cpu().numpy(), bytes=True)[..., :3]


def enlarged_size(size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) at which a picture of ``size`` (H, W) is shown: itself, or a whole multiple of it."""
    factor = max(1, round(LEGIBLE / max(size)))
    return size[0] * factor, size[1] * factor


def overlay(image: Image.Image, heat: Tensor, colours: str = COLOURS) -> Image.Image:
    """A picture with heat (H W) in [0, 1] over it, at the size of the heat.

    The picture is dimmed and loses half of its own colour, so that what glows is heat and not the thing's own paint;
    its shapes stay visible under the hottest spot.
    """
    h, w = heat.shape
    resized = image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
    picture = np.asarray(resized, dtype=np.float32)
    grey = np.asarray(resized.convert("L"), dtype=np.float32)[..., None]
    picture = grey + (picture - grey) * 0.5
    share = (0.35 + 0.5 * heat.clamp(0, 1)).cpu().numpy()[..., None]
    mixed = picture * (1 - share) + colour(heat, colours).astype(np.float32) * share
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def sheet(cells: Sequence[tuple[str, Image.Image]], title: str = "", columns: int | None = None) -> Image.Image:
    """Labelled pictures of one size in rows, with a title that is wrapped to the width."""
    if not cells:
        raise BadInput("a sheet needs at least one picture.")
    w, h = cells[0][1].size
    columns = columns or min(len(cells), max(3, math.ceil(math.sqrt(len(cells)))))
    rows = math.ceil(len(cells) / columns)
    gap, font = 8, lettering(max(13, h // 16))
    line = sum(font.getmetrics()) + 4
    width = columns * (w + gap) + gap
    told = _wrapped(title, font, width - 2 * gap)
    top = gap + len(told) * line + (gap if told else 0)
    canvas = Image.new("RGB", (width, top + rows * (h + line + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(told):
        draw.text((gap, gap + i * line), text, fill="black", font=font)
    for i, (label, picture) in enumerate(cells):
        x, y = gap + (i % columns) * (w + gap), top + (i // columns) * (h + line + gap)
        canvas.paste(picture.convert("RGB").resize((w, h), Image.Resampling.BICUBIC), (x, y + line))
        draw.text((x + w / 2, y + line / 2), _shortened(label, font, w), fill="black", font=font, anchor="mm")
    return canvas


def unit(heat: Tensor, how: str = "minmax") -> Tensor:
    """Heat (... h w) brought to [0, 1], each map by itself: "minmax", or "max" which only divides by the maximum.
    A constant map becomes 0 ("minmax")."""
    low = heat.amin((-2, -1), keepdim=True) if how == "minmax" else torch.zeros_like(heat[..., :1, :1])
    span = heat.amax((-2, -1), keepdim=True) - low
    return torch.where(span > 0, (heat - low) / span.clamp_min(torch.finfo(heat.dtype).tiny), torch.zeros_like(heat))


@functools.cache
def lettering(size: int) -> Any:
    """DejaVu Sans, which comes with matplotlib and knows most alphabets."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        elif len(lines) == 4:
            lines[-1] = _shortened(lines[-1] + " ...", font, width)
            break
        else:
            lines.append(_shortened(word, font, width))
    return lines


def _shortened(text: str, font: Any, width: int) -> str:
    text = " ".join(text.split())
    while len(text) > 4 and font.getlength(text) > width:
        text = text[: max(1, min(len(text) - 4, int(len(text) * width / font.getlength(text)) - 3))] + "..."
    return text
