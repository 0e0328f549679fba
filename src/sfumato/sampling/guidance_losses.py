"""What can be asked of a picture in CLIP's space: distances to targets, directions, random crops, smoothness.

All take and return tensors and carry gradients; vectors of CLIP are unit vectors (d).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadInput


def log_probability(vectors: Tensor, own: Tensor, rivals: Tensor, scale: float) -> Tensor:
    """log p(own | vectors) (b) of a zero-shot classifier whose classes are ``own`` (b d) and the ``rivals`` (m d)."""
    logits = scale * torch.cat([(vectors * own).sum(-1, keepdim=True), vectors @ rivals.T], 1)
    return logits.log_softmax(1)[:, 0]


def total_variation(pixels: Tensor) -> Tensor:
    """Mean squared difference of neighbours (b) in pictures (b 3 H W), both directions added."""
    right, down = pixels.diff(dim=-1).square(), pixels.diff(dim=-2).square()
    return right.mean((1, 2, 3)) + down.mean((1, 2, 3))


def out_of_range(pixels: Tensor) -> Tensor:
    """Mean square (b) of what exceeds [-1, 1] in pictures (b 3 H W)."""
    return (pixels - pixels.clamp(-1, 1)).square().mean((1, 2, 3))


# --- targets ---------------------------------------------------------------------------------------------------------


def weighted(text: str, what: str = "text") -> tuple[str, float]:
    """``"a red ball:0.5"`` as ("a red ball", 0.5); weight 1 where none is given. Colons elsewhere are no matter."""
    head, colon, tail = text.rpartition(":")
    weight = None
    if colon and head.strip():
        try:
            weight = float(tail)
        except ValueError:
            pass
    if weight is None:
        head, weight = text, 1.0
    if not math.isfinite(weight):
        raise BadInput(f"{what} {text[:60]!r} has the weight {weight}; it must be a finite number.")
    if not head.strip():
        raise BadInput(f"{what} is empty; it must say something.")
    return head.strip(), weight


def shares(weights: Sequence[float], what: str) -> list[float]:
    """Weights divided by the size of their sum, as MGAD does; negative ones push away. Raises BadInput at sum zero."""
    total = abs(sum(weights))
    if total < 1e-3:
        listed = ", ".join(f"{weight:g}" for weight in weights)
        raise BadInput(f"the weights of {what} ({listed}) add up to zero; change one of them.")
    return [weight / total for weight in weights]


# --- cutouts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cutouts:
    """Random square crops, as augmentation: a picture must look right as a whole and in parts.

    ``n`` squares with sides ``u^power (largest - smallest) + smallest``, u uniform, ``largest`` the shorter side of the
    picture and ``smallest`` a share of it (MGAD's code: power 0.5, which favours large ones).
    """

    n: int
    power: float = 0.5
    smallest: float = 0.5

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> list[tuple[int, int, int]]:
        """(top, left, side) of the squares in a picture of ``size`` (height, width)."""
        height, width = size
        most = min(size)
        least = max(1, round(self.smallest * most))
        boxes = []
        for a, b, c in torch.rand(self.n, 3, generator=generator, dtype=torch.float64).tolist():
            side = int(a**self.power * (most - least) + least)
            boxes.append((int(b * (height - side + 1)), int(c * (width - side + 1)), side))
        return boxes

    def cut(self, pixels: Tensor, boxes: Sequence[tuple[int, int, int]], side: int) -> Tensor:
        """The squares of one picture (3 H W), each at ``side`` x ``side``: (n 3 side side)."""
        crops = []
        for top, left, length in boxes:
            crop = pixels[None, :, top : top + length, left : left + length]
            if length != side:
                crop = F.interpolate(crop, (side, side), mode="bicubic", antialias=True)
            crops.append(crop)
        return torch.cat(crops)
