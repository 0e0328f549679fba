"""The pictures that something is taught from: read, checked, and encoded once."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.files import fitted
from sfumato.models import Model
from sfumato.training.samples import Samples, open_samples, picture_tensor

__all__ = ["Latents", "Subject"]

BUDGET = 512 << 20  # bytes of latents that are kept in memory


class Subject:
    """Pictures of one subject, and their latents, each encoded when it is first asked for and then kept.

    Args:
        where: a folder or shards (:func:`~sfumato.training.samples.open_samples`): pictures are upright as EXIF says,
            transparency white, greys RGB.
        size: (width, height) that every picture is brought to; None: the model's own.
        keep_aspect: a picture keeps its aspect and has about the area of ``size``, instead of being cut to it.

    Raises BadInput: no picture, or files among them that are damaged or no pictures; all are looked at before anything
    is learnt, and opened as far as that needs.
    """

    def __init__(self, model: Model, where: str | Path, size: tuple[int, int] | None = None, keep_aspect: bool = False):
        self.model, self.keep_aspect = model, keep_aspect
        self.size = size or model.default_size[::-1]
        model.latent_shape(self.size[1], self.size[0])  # refuses a size that the model cannot make
        self.samples: Samples = open_samples(where, self.size)
        self._refuse_damaged()
        self._cache: OrderedDict[Any, Tensor] = OrderedDict()
        self._bytes = 0
        self.captions = [self.samples.caption(i) for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.samples)

    def _refuse_damaged(self) -> None:
        bad = [error for entry in self.samples.entries if (error := entry.shown.damage())]
        if bad:
            more = f" So are {len(bad) - 1} others." if len(bad) > 1 else ""
            raise BadInput(f"{bad[0]}{more}")

    @property
    def hash(self) -> str:
        """Of names, sizes and times of the files, in order: another one whenever a file changes."""
        facts = []
        for entry in self.samples.entries:
            at = entry.shown.path.stat()
            facts.append((entry.shown.name, entry.shown.offset, at.st_size, at.st_mtime_ns))
        return hashlib.sha256(repr((facts, self.captions)).encode()).hexdigest()

    def pixels(self, i: int) -> Tensor:
        """Picture ``i`` (3 h w) in [-1, 1], at its size. Raises BadInput with the file's name."""
        picture = self.samples.entries[i].shown.picture()
        size = bucket(picture.size, self.size, self.model.size_multiple) if self.keep_aspect else self.size
        return picture_tensor(fitted(picture, size))

    def latents(self, i: int, mirrored: bool = False) -> Tensor:
        """Latents (c h w) of picture ``i``: the mean of the codec's posterior, in float32. Pictures are encoded one by
        one, so that a picture's bits depend on no other."""
        key = (i, mirrored)
        if key not in self._cache:
            pixels = self.pixels(i)
            self._keep(key, self.encoded(pixels.flip(-1) if mirrored else pixels))
        return self._cache[key]

    @torch.no_grad()
    def encoded(self, pixels: Tensor) -> Tensor:
        """Latents (c h w) of a picture (3 h w)."""
        at = pixels[None].to(self.model.device, self.model.dtype)
        return self.model.encode_image(at)[0].float()

    def _keep(self, key: Any, latents: Tensor) -> None:
        self._cache[key] = latents
        self._bytes += latents.nbytes
        while self._bytes > BUDGET and len(self._cache) > 1:
            self._bytes -= self._cache.popitem(last=False)[1].nbytes


class Latents(Sequence[Tensor]):
    """The latents of a subject's pictures as a sequence; no more of them are kept than the subject keeps."""

    def __init__(self, subject: Subject):
        self._subject = subject

    def __len__(self) -> int:
        return len(self._subject)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._subject.latents(j) for j in range(*i.indices(len(self)))]
        return self._subject.latents(i)


def bucket(own: tuple[int, int], size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(width, height) in multiples of the model's for a picture of ``own`` size: about the area of ``size`` and its own
    aspect, at most 1 : 2."""
    aspect = min(2.0, max(0.5, own[0] / own[1]))
    height = math.sqrt(size[0] * size[1] / aspect)
    sides = (max(1, round(aspect * height / multiple)), max(1, round(height / multiple)))
    return sides[0] * multiple, sides[1] * multiple


def by_shape(latents: Sequence[Tensor]) -> dict[tuple[int, ...], list[int]]:
    """Rows of latents that can be stacked, by their shape."""
    out: dict[tuple[int, ...], list[int]] = {}
    for row, each in enumerate(latents):
        out.setdefault(tuple(each.shape), []).append(row)
    return out
