"""A concept from two drawings (section 3.4): each is shown in the colours of many pictures, which makes pairs.

The same drawing in two colourings agrees in what was drawn; two drawings in one colouring agree in all but that.
The paper transfers styles by a network; here the inside of the drawing's outline takes the colours of a picture's
middle and the outside its surroundings, which needs none.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sfumato.arrays import to_tensor
from sfumato.errors import BadInput
from sfumato.explain.iin.factors import ConceptPairs

__all__ = ["drawn_in", "inside_of", "sketch_pairs"]


def inside_of(sketch: Tensor) -> Tensor:
    """The inside (h w) bool of a drawing (3 h w) in [-1, 1]: its dark lines and what they enclose.

    Raises BadInput where nothing is enclosed.
    """
    from scipy import ndimage

    light = sketch.mean(0).numpy()
    paper = float(np.median(light))
    ink = np.abs(light - paper) > 0.35
    filled = ndimage.binary_fill_holes(ndimage.binary_closing(ink, iterations=1))
    if filled is None or filled.mean() < 0.01 or filled.mean() > 0.95:
        raise BadInput("the drawing encloses nothing; draw a closed dark outline on light paper.")
    return to_tensor(np.asarray(filled))


def drawn_in(sketch: Tensor, pictures: Tensor) -> Tensor:
    """A drawing (3 h w) in the colours of pictures (b 3 h w), all in [-1, 1]: (b 3 h w).

    Outside, every row runs from the picture's colours at its left to those at its right; inside, the mean colour of the
    picture's middle is shaded from top left to bottom right.
    """
    h, w = pictures.shape[-2:]
    if sketch.shape != (3, h, w):
        raise BadInput(f"the drawing is {tuple(sketch.shape)}, but the pictures are (b, 3, {h}, {w}); resize it.")
    inside = inside_of(sketch)
    edge = max(1, w // 10)
    left, right = pictures[..., :edge].mean(-1, keepdim=True), pictures[..., -edge:].mean(-1, keepdim=True)
    ground = torch.lerp(left, right, torch.linspace(0, 1, w))
    third = slice(round(0.4 * h), round(0.6 * h)), slice(round(0.4 * w), round(0.6 * w))
    centre = pictures[..., third[0], third[1]].mean((2, 3), keepdim=True)
    down, across = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    thing = centre + 0.25 * (-down - across) / 2
    return torch.where(inside, thing, ground).clamp(-1, 1)


def sketch_pairs(colourings: int, per_kind: int, seed: int = 0) -> ConceptPairs:
    """Pairs over the rows [first drawing in every colouring, second drawing in every colouring], two concepts: what was
    drawn, and all else (in the place of the residual)."""
    rng = torch.Generator().manual_seed(seed)
    c = colourings
    one = torch.randint(0, c, (per_kind,), generator=rng)
    other = (one + 1 + torch.randint(0, c - 1, (per_kind,), generator=rng)) % c
    which = torch.randint(0, 2, (per_kind,), generator=rng)
    same = torch.stack([which * c + one, which * c + other], 1)
    apart = torch.stack([which * c + one, (1 - which) * c + one], 1)
    shared = torch.tensor([[True, False], [False, True]]).repeat_interleave(per_kind, 0)
    return ConceptPairs(torch.cat([same, apart]), shared)
