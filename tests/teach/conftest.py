"""Pictures to teach from, as phones and scanners leave them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Three pictures of different sizes: one turned by EXIF, one grey, one with transparency."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)

    def picture(height: int, width: int, mode: str) -> Image.Image:
        rough = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        return rough.resize((width, height), Image.Resampling.BICUBIC).convert(mode)

    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture(40, 60, "RGB").save(folder / "a.jpg", exif=exif)
    picture(32, 32, "L").save(folder / "b.png")
    clear = picture(48, 36, "RGBA")
    clear.putalpha(Image.new("L", clear.size, 128))
    clear.save(folder / "c.png")
    return folder
