"""Contact sheets: pictures in rows and columns on white, with labels where there are any. Nothing else in the package
lays pictures out."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sfumato.errors import BadInput

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["as_picture", "lettering", "sheet", "strip"]


def sheet(
    cells: Sequence[Any],
    columns: int | None = None,
    *,
    title: str = "",
    rows: Sequence[str] = (),
    heads: Sequence[str] = (),
    scale: int = 1,
    gap: int | None = None,
) -> Image.Image:
    """``cells`` in rows of ``columns`` (by default about as many as rows) as one RGB picture.

    Args:
        cells: pictures as :func:`as_picture` takes them, (label, picture) pairs, or None for an empty place.
        title: above everything, wrapped to the width.
        rows, heads: labels of rows (on the left) and of columns (on top).
        scale: whole factor of enlargement, without smoothing.
        gap: pixels between pictures; by default 4, or 8, also around them, where something is written.

    A row is as high and a column as wide as its largest picture. Raises BadInput where there is nothing to show.
    """
    from PIL import Image, ImageDraw

    pairs = [cell if isinstance(cell, tuple) else ("", cell) for cell in cells]
    pictures = [None if cell is None else _enlarged(as_picture(cell), scale) for _, cell in pairs]
    shown = [picture for picture in pictures if picture is not None]
    if not shown:
        raise BadInput("a sheet needs at least one picture.")
    columns = columns or min(len(cells), max(3, math.ceil(math.sqrt(len(cells)))))
    lines = math.ceil(len(cells) / columns)
    labelled = any(label for label, _ in pairs)
    written = bool(labelled or title or any(rows) or any(heads))
    gap = (8 if written else 4) if gap is None else gap
    margin = gap if written else 0
    widths = [max((p.width for p in pictures[c::columns] if p), default=0) for c in range(columns)]
    heights = [max((p.height for p in pictures[r * columns : (r + 1) * columns] if p), default=0) for r in range(lines)]
    font = lettering(max(13, shown[0].height // 16)) if written else None
    line = sum(font.getmetrics()) + 4 if font else 0
    above = line if labelled else 0
    rows = [_shortened(text, font, 30 * line) for text in rows] if font else []
    side = max((math.ceil(font.getlength(text)) for text in rows if font), default=0)
    left = margin + (side + gap if side else 0)
    width = left + sum(widths) + gap * (columns - 1) + margin
    headline = _wrapped(title, font, width - 2 * gap) if title else []
    top = margin + len(headline) * line + (gap if headline else 0) + (line if any(heads) else 0)
    canvas = Image.new("RGB", (width, top + sum(heights) + lines * (above + gap) - gap + margin), "white")
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(headline):
        draw.text((gap, gap + i * line), text, fill="black", font=font)
    y = top
    for r in range(lines):
        x = left
        if r < len(rows):
            spot: tuple[float, float] = (margin, y + above + heights[r] / 2)
            draw.text(spot, rows[r], fill="black", font=font, anchor="lm")
        for c in range(columns):
            if not r and c < len(heads):
                spot = (x + widths[c] / 2, y - line / 2)
                draw.text(spot, _shortened(heads[c], font, widths[c]), fill="black", font=font, anchor="mm")
            i = r * columns + c
            if i < len(cells) and (picture := pictures[i]) is not None:
                canvas.paste(picture, (x, y + above))
                if label := pairs[i][0]:
                    spot = (x + picture.width / 2, y + line / 2)
                    draw.text(spot, _shortened(label, font, picture.width), fill="black", font=font, anchor="mm")
            x += widths[c] + gap
        y += heights[r] + above + gap
    return canvas


def strip(frames: Sequence[Any], most: int = 8) -> list[Any]:
    """At most ``most`` of a clip's frames, evenly spread, the first and the last among them."""
    if len(frames) <= most:
        return list(frames)
    if most == 1:
        return [frames[0]]
    return [frames[round(i * (len(frames) - 1) / (most - 1))] for i in range(most)]


def as_picture(what: Any) -> Image.Image:
    """A PIL picture, uint8 array (h w 3) or tensor (3 h w) in [-1, 1] as an RGB PIL picture. Raises BadInput."""
    import numpy as np
    from PIL import Image

    if isinstance(what, Image.Image):
        return what.convert("RGB")
    if hasattr(what, "detach") and what.dim() == 3 and len(what) == 3:
        unit = (what.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
        return Image.fromarray(unit.round().byte().permute(1, 2, 0).numpy())
    if isinstance(what, np.ndarray) and what.dtype == np.uint8 and what.ndim == 3 and what.shape[2] == 3:
        return Image.fromarray(what)
    given = f"{type(what).__name__} {tuple(getattr(what, 'shape', ()))}"
    raise BadInput(f"{given} is no picture: give a PIL picture, bytes (h w 3) or a tensor (3 h w) in [-1, 1].")


@functools.cache
def lettering(size: int) -> Any:
    """DejaVu Sans, which comes with matplotlib and knows most alphabets."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _enlarged(picture: Image.Image, scale: int) -> Image.Image:
    return picture if scale == 1 else picture.resize((picture.width * scale, picture.height * scale), 0)  # nearest


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
