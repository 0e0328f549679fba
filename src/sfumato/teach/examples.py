"""A few pictures with masks and labels to teach a classifier with, from a folder or from the toybox."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato import files
from sfumato.errors import BadInput
from sfumato.rng import sequence
from sfumato.sampling.request import as_pixels
from sfumato.toybox import SHAPES, BiasedDataset

__all__ = ["Examples", "read_examples", "toybox_examples"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Pictures (n, 3, h, w) in [-1, 1], masks (n, h, w) float of 0 and 1, and the label of each."""

    pictures: Tensor
    masks: Tensor
    labels: tuple[str, ...]


def read_examples(folder: Path | str, size: tuple[int, int]) -> Examples:
    """The pictures of an imagefolder whose ``metadata.jsonl`` has ``file_name``, ``mask`` (a picture, black off the
    thing) and ``label`` in each line, all brought to ``size`` (height, width).

    Raises BadInput: no such file, a line that is not JSON or lacks one of them, a file that is no picture.
    """
    table = Path(folder) / "metadata.jsonl"
    if not table.is_file():
        raise BadInput(f"{folder} has no metadata.jsonl with a file_name, a mask and a label in each line.")
    pictures, masks, labels = [], [], []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, mask, label = (str(row[key]) for key in ("file_name", "mask", "label"))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BadInput(f"line {number} of {table} needs file_name, mask and label as JSON: {error}.") from None
        pictures.append(as_pixels(files.read_picture(Path(folder) / name), size[::-1])[0])
        drawn = files.read_picture(Path(folder) / mask).convert("L").resize(size[::-1], Image.Resampling.NEAREST)
        masks.append(torch.from_numpy(np.asarray(drawn) > 0).float())
        labels.append(label)
    if not labels:
        raise BadInput(f"{table} names no picture.")
    return Examples(torch.stack(pictures), torch.stack(masks), tuple(labels))


def toybox_examples(
    per_class: int = 3, seed: int = 0, split: str = "train", n: int = 240, cache: Path | None = None
) -> Examples:
    """``per_class`` toybox pictures of every shape out of ``n``, each on the shape's own backdrop. ``cache``: as for
    :class:`~sfumato.toybox.BiasedDataset`. Raises BadInput beyond 20 of a class."""
    if not 1 <= per_class <= 20:
        raise BadInput(f"per_class must be from 1 to 20, got {per_class}.")
    source = BiasedDataset(split, n, seed=1, cache=cache)
    own = np.flatnonzero((source.labels == source.shortcut) & ((source.masks >= 0).sum((1, 2)) >= 64))
    draw = sequence("teach.examples", seed)
    chosen = np.concatenate([draw.permutation(own[source.labels[own] == c])[:per_class] for c in range(len(SHAPES))])
    pictures = torch.from_numpy(source.images[chosen]).permute(0, 3, 1, 2).float() / 127.5 - 1
    masks = torch.from_numpy(source.masks[chosen] >= 0).float()
    return Examples(pictures, masks, tuple(SHAPES[i] for i in source.labels[chosen]))
