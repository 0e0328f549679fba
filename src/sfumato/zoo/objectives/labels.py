"""What the toybox knows and a picture or a caption only shows: which attributes a word stands for, which lie where.

Small auxiliary losses read them off hidden features. They shorten a training (features that already tell toys apart are
quickly put to use, the observation behind REPA, Yu et al. 2024) and leave the trained model's architecture untouched:
the read-outs are thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.arrays import to_tensor
from sfumato.toybox import COLORS, PATTERNS, SHAPES, SIZES, Scene, ToyboxDataset
from sfumato.toybox.captions import Caption

WORDS = {"shape": SHAPES, "color": COLORS, "pattern": PATTERNS, "size": SIZES}
PLACES = {"shape": SHAPES, "color": COLORS, "pattern": PATTERNS}
WORD_CLASSES = sum(map(len, WORDS.values()))
PLACE_CLASSES = sum(len(words) + 1 for words in PLACES.values())  # each attribute may also be "no toy"
UNSAID = -100  # the target that a cross-entropy leaves out


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


def word_targets(captions: Sequence[Caption], scenes: Sequence[Scene], offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Where the toys' nouns are and what they stand for.

    Args:
        captions: b captions with their parse.
        scenes: the b scenes they describe.
        offsets: (b, t, 2) character spans of the tokens.

    Returns:
        places (n, 2), row and token of each toy's noun; targets (n, 4), the class of each attribute of ``WORDS``, or
        ``UNSAID`` where the caption leaves it out. A noun beyond the tokens is left out.
    """
    places, targets = [], []
    for row, (caption, scene) in enumerate(zip(captions, scenes, strict=True)):
        ends = {end: t for t, (start, end) in enumerate(offsets[row].tolist()) if end > start}
        for phrase in caption.phrases:
            if phrase.object is None or phrase.head.end not in ends:
                continue
            toy = scene.toys[phrase.object]
            words = {phrase.head.text, *(word.text for word in phrase.modifiers)}
            values = [getattr(toy, name) for name in WORDS]
            places.append((row, ends[phrase.head.end]))
            targets.append([w.index(v) if v in words else UNSAID for w, v in zip(WORDS.values(), values, strict=True)])
    return torch.tensor(places).reshape(-1, 2), torch.tensor(targets).reshape(-1, len(WORDS))


def fixed_readout(width: int) -> Tensor:
    """Orthonormal directions (WORD_CLASSES, width), always the same.

    A read-out that cannot grow: features must themselves spend energy on what is read off them.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(width, WORD_CLASSES, generator=generator)).Q.T.contiguous()


def word_loss(hidden: Tensor, readout: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the attributes that ``readout`` finds in ``hidden`` (b, t, width) at ``places``."""
    features = hidden[places[:, 0], places[:, 1]].float()
    logits = F.layer_norm(features, features.shape[-1:]) @ readout.T
    total, start = logits.new_zeros(()), 0
    for column, words in enumerate(WORDS.values()):
        own = targets[:, column]
        if (own != UNSAID).any():
            total = total + F.cross_entropy(logits[:, start : start + len(words)], own, ignore_index=UNSAID)
        start += len(words)
    return total
