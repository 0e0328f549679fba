"""What the words of a sample got of its attention, and a picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sfumato import sheets
from sfumato.attention.accumulate import upscale
from sfumato.markup import described


@dataclass(eq=False)
class WordAttention:
    """The words of one sample that shall appear, and the attention they got.

    ``words`` (s) by label; ``before`` and ``after`` (s [f] h w): the share of each place's attention to the text that
    went to each word, when first and when last looked at; ``losses``: by step, one entry per look.
    """

    words: tuple[str, ...]
    before: Tensor | None = None
    after: Tensor | None = None
    losses: dict[int, list[float]] = field(default_factory=dict)

    __repr__ = described


def sheet(frames: Sequence[Any], one: WordAttention) -> Image.Image:
    """A picture, or some frames of a clip, then per word two overlays on it: before and after, in brightness from none
    to all attention."""
    assert one.before is not None and one.after is not None
    chosen = sheets.strip(range(len(frames)))
    pictures = [sheets.as_picture(frames[i]) for i in chosen]
    factor = max(1, round(192 / max(pictures[0].size)))
    w, h = pictures[0].width * factor, pictures[0].height * factor
    pictures = [picture.resize((w, h), Image.Resampling.BICUBIC) for picture in pictures]
    rows: list[list[tuple[str, Image.Image]]] = [[("", picture)] for picture in pictures]
    for s, word in enumerate(one.words):
        for label, maps in (("first", one.before[s]), ("last", one.after[s])):
            by_frame = maps.reshape(-1, *maps.shape[-2:])  # a picture is one frame
            for row, picture, i in zip(rows, pictures, chosen, strict=True):
                lit = upscale(by_frame[i], (h, w)).clamp(0, 1).sqrt().numpy()[..., None]
                shown = np.asarray(picture, dtype=np.float32) * (0.15 + 0.85 * lit)
                title = f"{word}, {label}: {float(by_frame[i].max()):.2f}"
                row.append((title, Image.fromarray(shown.round().clip(0, 255).astype(np.uint8))))
    return sheets.sheet([cell for row in rows for cell in row], len(rows[0]))
