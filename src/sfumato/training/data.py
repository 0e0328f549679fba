"""Batches from the toybox: pictures, weights from masks, captions."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.toybox import ToyboxDataset
from sfumato.training.draw import Draw
from sfumato.training.recipe import DataOptions


def dataset(split: str, options: DataOptions) -> ToyboxDataset:
    """The "train" or "val" scenes a recipe asks for, rendered on first use and cached."""
    return ToyboxDataset(split, getattr(options, split), options.size, options.seed)


def pictures(data: ToyboxDataset, indices: Tensor) -> Tensor:
    """Pictures of the scenes at ``indices`` (b,): (b, 3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(data.images[indices.numpy()]).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def toy_weights(data: ToyboxDataset, indices: Tensor, weight: float, cells: int | None = None) -> Tensor:
    """Loss weights (b, 1, h, w), or on a ``cells`` x ``cells`` grid: ``weight`` on toys, 1 elsewhere, mean over all 1.

    Known masks say where the picture is hard. A weight per place does not move the optimum of a regression.
    """
    toys = torch.from_numpy(data.masks[indices.numpy()] >= 0).float()[:, None]
    if cells is not None:
        toys = F.adaptive_max_pool2d(toys, cells)
    weights = 1 + (weight - 1) * toys
    return weights / weights.mean()


def captions(data: ToyboxDataset, indices: Tensor, draw: Draw) -> list[str]:
    """One random caption per scene, a pure function of the draw."""
    return [data.caption(int(i), np.random.default_rng(draw.number("caption", int(i)))).text for i in indices]
