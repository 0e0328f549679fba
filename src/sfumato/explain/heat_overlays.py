"""Pictures of heat maps: colours, and overlays that stay legible on small pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sfumato import sheets
from sfumato.errors import BadInput

__all__ = ["colour", "enlarged_size", "overlay", "overlays", "strips"]

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


def overlays(clip: Sequence[np.ndarray] | np.ndarray, heat: Tensor, colours: str = COLOURS) -> np.ndarray:
    """Frames (f h w 3) uint8 with heat (f H W) in [0, 1] over each, (f H W 3) uint8."""
    pairs = zip(clip, heat, strict=True)
    return np.stack([np.asarray(overlay(Image.fromarray(frame), one, colours)) for frame, one in pairs])


def strips(clip: np.ndarray, heats: Mapping[str, Tensor], title: str = "", colours: str = COLOURS) -> Image.Image:
    """A strip of the frames (f h w 3) uint8 of a clip, below it one of overlays for every heat (f H W) in [0, 1]."""
    chosen = sheets.strip(range(len(clip)))
    frames = [clip[i] for i in chosen]
    w, h = enlarged_size(clip.shape[1:3])[::-1]
    cells: list[Any] = [Image.fromarray(frame).resize((w, h), Image.Resampling.BICUBIC) for frame in frames]
    for heat in heats.values():
        cells += list(overlays(frames, heat[chosen], colours))
    heads = [f"frame {i + 1}" for i in chosen]
    return sheets.sheet(cells, len(chosen), title=title, rows=["", *heats], heads=heads)
