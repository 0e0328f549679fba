"""A picture of weighted words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def word_cloud(shares: Sequence[tuple[str, float]], size: tuple[int, int] = (640, 360)) -> Image.Image:
    """Words as large as their shares, the largest in the middle, the others around it without overlap."""
    width, height = size
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    taken: list[tuple[float, float, float, float]] = []
    top = max((share for _, share in shares), default=1.0)
    for k, (word, share) in enumerate(shares):
        font = ImageFont.load_default(size=max(11, round(64 * math.sqrt(share / top))))
        left, up, right, down = draw.textbbox((0, 0), word, font=font)
        w, h = right - left, down - up
        for turn in range(1500):  # along a spiral
            angle, reach = 0.31 * turn, 0.7 * 0.31 * turn
            x, y = width / 2 + 1.6 * reach * math.cos(angle) - w / 2, height / 2 + reach * math.sin(angle) - h / 2
            box = (x - 3, y - 3, x + w + 3, y + h + 3)
            inside = x >= 0 and y >= 0 and x + w <= width and y + h <= height
            if inside and all(box[0] >= b[2] or box[2] <= b[0] or box[1] >= b[3] or box[3] <= b[1] for b in taken):
                shade = round(30 + 130 * min(1.0, k / 30))
                draw.text((x - left, y - up), word, font=font, fill=(shade // 3, shade // 2, shade))
                taken.append(box)
                break
    return canvas
