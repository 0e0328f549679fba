"""Batches for recipes, from the toybox or from a folder in its place: pictures, weights from masks, captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import files
from sfumato.arrays import to_tensor
from sfumato.errors import BadInput, NotSupported
from sfumato.toybox import ToyboxDataset
from sfumato.training.draw import Draw
from sfumato.training.recipe import DataOptions
from sfumato.training.samples import open_samples


def dataset(split: str, options: DataOptions) -> Any:
    """The "train" or "val" scenes of a recipe, each rendered on first use and cached, or the pictures of its folder."""
    if options.folder:
        return FolderDataset(split, options)
    return ToyboxDataset(split, getattr(options, split), options.size, options.seed, lazy=True)


@dataclass(frozen=True)
class _Text:
    text: str


@dataclass(frozen=True, eq=False)
class _Rows:
    """An array whose rows are made when they are asked for."""

    row: Callable[[int], np.ndarray]

    def __getitem__(self, at: Any) -> np.ndarray:
        return self.row(int(at)) if np.ndim(at) == 0 else np.stack([self.row(int(i)) for i in at])


class FolderDataset:
    """A folder of pictures as a recipe sees a toybox set: ``images`` (n, size, size, 3) uint8 and ``masks``
    (n, size, size), 0 on what a mask names and -1 elsewhere, read when asked for; captions. It has no scenes.

    Held out ("val") are at most a tenth, drawn by the seed. Raises BadInput: see
    :func:`~sfumato.training.samples.open_samples`, or fewer than two pictures.
    """

    def __init__(self, split: str, options: DataOptions):
        self.size = options.size
        self.samples = open_samples(options.folder, (options.size, options.size))
        n = len(self.samples)
        if n < 2:
            raise BadInput(f"{options.folder} holds one picture; one to learn from and one to measure on are needed.")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(options.seed)).tolist()
        held_out = max(1, min(options.val, n // 10))
        self.rows = sorted(order[:held_out] if split == "val" else order[held_out:][: options.train])
        self.images, self.masks = _Rows(self._image), _Rows(self._mask)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def scenes(self) -> Any:
        raise NotSupported("this recipe learns from what the toybox knows of its scenes; a folder cannot tell it.")

    @property
    def folder(self) -> Path:
        """A name for what is cached of these pictures: another one whenever a file changes."""
        facts = []
        for i in self.rows:
            part = self.samples.entries[i].shown
            at = part.path.stat()
            facts.append((part.name, part.offset, at.st_size, at.st_mtime_ns))
        digest = hashlib.blake2b(repr((self.size, facts)).encode(), digest_size=8).hexdigest()
        return Path(f"folder-{digest}-{len(self)}-{self.size}")

    def caption(
        self, i: int, rng: np.random.Generator | None = None, style: str | None = None, colorless: float = 0.0
    ) -> _Text:
        """As it is written. Raises NotSupported for one that leaves colours out."""
        if colorless:
            raise NotSupported(
                "colorless leaves colours out of captions of the toybox, those of a folder are as they are."
            )
        return _Text(self.samples.caption(self.rows[i]))

    def _image(self, i: int) -> np.ndarray:
        picture = self.samples.entries[self.rows[i]].shown.picture()
        return np.array(files.fitted(picture, (self.size, self.size)))

    def _mask(self, i: int) -> np.ndarray:
        mask = self.samples.mask(self.rows[i])
        return np.full((self.size, self.size), -1, np.int8) if mask is None else mask.numpy().astype(np.int8) - 1


Dataset: TypeAlias = ToyboxDataset | FolderDataset


def pictures(data: Dataset, indices: Tensor) -> Tensor:
    """Pictures of the scenes at ``indices`` (b,): (b, 3, h, w) float32 in [-1, 1]."""
    return to_tensor(data.images[indices.numpy()]).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def toy_weights(data: Dataset, indices: Tensor, weight: float) -> Tensor:
    """Loss weights of the pixels (b, 1, h, w) of what is shown and to be shown again: ``weight`` on toys, 1 elsewhere,
    mean over all 1."""
    weights = 1 + (weight - 1) * _toys(data, indices)
    return weights / weights.mean()


def toy_cells(data: Dataset, indices: Tensor, cells: int) -> Tensor:
    """1 in the cells of a ``cells`` x ``cells`` grid in which a pixel of a toy lies, else 0: (b, 1, cells, cells)."""
    return F.adaptive_max_pool2d(_toys(data, indices), cells)


def _toys(data: Dataset, indices: Tensor) -> Tensor:
    return to_tensor(data.masks[indices.numpy()] >= 0).float()[:, None]


def captions(data: Dataset, indices: Tensor, draw: Draw, colorless: float = 0.0) -> list[str]:
    """One random caption per scene, a pure function of the draw; ``colorless``: the share of toys whose colour it does
    not tell. Raises NotSupported for that of a folder, whose captions are written."""
    dice = ((int(i), np.random.default_rng(draw.number("caption", int(i)))) for i in indices)
    return [data.caption(i, rng, colorless=colorless).text for i, rng in dice]
