"""What the toybox knows and a picture only shows: which attributes lie where.

A small auxiliary loss reads them off hidden features. It shortens a training (features that already tell toys apart are
quickly put to use, the observation behind REPA, Yu et al. 2024) and leaves the trained model's architecture untouched:
the read-out is thrown away.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.arrays import to_tensor
from sfumato.toybox import COLORS, PATTERNS, SHAPES, ToyboxDataset

PLACES = {"shape": SHAPES, "color": COLORS, "pattern": PATTERNS}
PLACE_CLASSES = sum(len(words) + 1 for words in PLACES.values())  # each attribute may also be "no toy"


def place_labels(data: ToyboxDataset, indices: Tensor, cells: int) -> Tensor:
    """Shares (b, PLACE_CLASSES, cells, cells) of each cell by shape, by colour and by pattern, "no toy" first.

    The shares of one attribute add to 1 in every cell.
    """
    masks = to_tensor(data.masks[indices.numpy()]).long() + 1
    most = max([len(data.scenes[i].toys) for i in indices.tolist()], default=0) + 1
    shares = F.adaptive_avg_pool2d(F.one_hot(masks, most).permute(0, 3, 1, 2).float(), cells)
    table = torch.zeros(len(indices), most, PLACE_CLASSES)
    start = 0
    for name, words in PLACES.items():
        table[:, 0, start] = 1
        for row, i in enumerate(indices.tolist()):
            for k, toy in enumerate(data.scenes[i].toys):
                table[row, k + 1, start + 1 + words.index(getattr(toy, name))] = 1
        start += len(words) + 1
    return torch.einsum("bkhw,bkc->bchw", shares, table)


def place_loss(logits: Tensor, labels: Tensor, weight: float = 3.0) -> Tensor:
    """Cross-entropies (b,) of ``logits`` against :func:`place_labels`, both (b, PLACE_CLASSES, h, w).

    Summed over the attributes; a cell full of toy counts ``weight`` times one without.
    """
    cells = 1 + (weight - 1) * (1 - labels[:, 0])
    total = torch.zeros_like(cells)
    start = 0
    for words in PLACES.values():
        part = slice(start, start + len(words) + 1)
        total = total - (labels[:, part] * logits[:, part].float().log_softmax(1)).sum(1)
        start = part.stop
    return (total * cells).sum((1, 2)) / cells.sum((1, 2))
