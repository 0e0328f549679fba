"""Custom Diffusion's augmentation: the subject shown small or near, the sentence saying so, the rest not counting."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.teach.subject import Subject

__all__ = ["resized"]

FAR, NEAR = ("a far away ", "very small "), ("zoomed in ", "close up ")


def resized(subject: Subject, i: int, mirrored: bool, generator: torch.Generator) -> tuple[Tensor, str, Tensor | None]:
    """Latents (c h w) of picture ``i`` at a random scale, words to put before its sentence, and a mask (h w).

    Kumari et al. 2023, section 3.3, with the numbers of their code: with probability 2/3 the scale is uniform in 1/3 to
    1, else in 1.2 to 1.4. Below 0.6 the picture is pasted at a random place on black and only that place counts, less
    one cell at each side; above 1 it is a random crop of the enlarged picture; between, the picture as it is.
    """
    u, v, w, x, y = torch.rand(5, generator=generator).tolist()
    scale = 1 / 3 + (2 / 3) * v if u < 2 / 3 else 1.2 + 0.2 * v
    if 0.6 <= scale <= 1:
        return subject.latents(i, mirrored), "", None
    pixels = subject.pixels(i)
    pixels = pixels.flip(-1) if mirrored else pixels
    height, width = pixels.shape[-2:]
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    if scale > 1:
        top, left = int(x * (size[0] - height + 1)), int(y * (size[1] - width + 1))
        crop = small[:, top : top + height, left : left + width]
        return subject.encoded(crop), NEAR[int(w * 2)], None
    top, left = int(x * (height - size[0] + 1)), int(y * (width - size[1] + 1))
    canvas = torch.full_like(pixels, -1.0)
    canvas[:, top : top + size[0], left : left + size[1]] = small
    latents = subject.encoded(canvas)
    return latents, FAR[int(w * 2)], _cells(latents, (height, width), (top, left, *size))


def _cells(latents: Any, whole: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """Cells (h w) of the latents that lie inside a box of pixels, without the outermost; the middle one at least."""
    h, w = latents.shape[-2:]
    top, left, height, width = box
    rows, columns = h / whole[0], w / whole[1]
    mask = torch.zeros(h, w)
    first, last = round(top * rows) + 1, round((top + height) * rows) - 1
    begin, end = round(left * columns) + 1, round((left + width) * columns) - 1
    row, column = min(h - 1, int((top + height / 2) * rows)), min(w - 1, int((left + width / 2) * columns))
    mask[first:last, begin:end] = 1
    mask[row, column] = 1
    return mask
