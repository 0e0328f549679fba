"""A few pictures with masks and labels to teach a classifier with, from a folder or from the toybox."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.arrays import to_tensor
from sfumato.errors import BadInput
from sfumato.markup import described
from sfumato.rng import sequence
from sfumato.toybox import SHAPES, BiasedDataset
from sfumato.training.samples import open_samples

__all__ = ["Examples", "read_examples", "toybox_examples"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Pictures (n, 3, h, w) in [-1, 1], masks (n, h, w) float of 0 and 1, and the label of each."""

    pictures: Tensor
    masks: Tensor
    labels: tuple[str, ...]

    __repr__ = described


def read_examples(folder: Path | str, size: tuple[int, int]) -> Examples:
    """The pictures of an imagefolder whose ``metadata.jsonl`` has ``file_name``, ``mask`` (a picture, black off the
    thing) and ``label`` in each line, all brought to ``size`` (height, width).

    Pictures are scaled until they cover the size and cut at equal parts from both sides. Raises BadInput: no such file,
    a line that is not JSON or lacks one of them, a file that is no picture.
    """
    table = Path(folder) / "metadata.jsonl"
    if not table.is_file():
        raise BadInput(f"{folder} has no metadata.jsonl with a file_name, a mask and a label in each line.")
    data = open_samples(folder, size[::-1])
    found = [data.sample(i) for i in range(len(data))]
    for each in found:
        if each.mask is None or not each.facts.get("label"):
            raise BadInput(f"{each.name} has no mask or no label in {table}; each line needs both.")
    masks = [each.mask for each in found if each.mask is not None]
    labels = tuple(str(each.facts["label"]) for each in found)
    return Examples(torch.stack([each.pixels for each in found]), torch.stack(masks), labels)


LEAST = 64 / 64**2  # of the picture: toys that show less are left out


def toybox_examples(
    per_class: int = 3,
    seed: int = 0,
    split: str = "train",
    n: int = 240,
    cache: Path | None = None,
    size: int = 64,
) -> Examples:
    """``per_class`` toybox pictures of every shape out of ``n``, each on the shape's own backdrop, ``size`` pixels
    a side. ``cache``: as for
    :class:`~sfumato.toybox.BiasedDataset`. Raises BadInput beyond 20 of a class."""
    if not 1 <= per_class <= 20:
        raise BadInput(f"per_class must be from 1 to 20, got {per_class}.")
    source = BiasedDataset(split, n, size, seed=1, cache=cache)
    own = np.flatnonzero((source.labels == source.shortcut) & ((source.masks >= 0).mean((1, 2)) >= LEAST))
    draw = sequence("teach.examples", seed)
    chosen = np.concatenate([draw.permutation(own[source.labels[own] == c])[:per_class] for c in range(len(SHAPES))])
    pictures = to_tensor(source.images[chosen]).permute(0, 3, 1, 2).float() / 127.5 - 1
    masks = to_tensor(source.masks[chosen] >= 0).float()
    return Examples(pictures, masks, tuple(SHAPES[i] for i in source.labels[chosen]))
