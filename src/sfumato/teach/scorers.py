"""What a class token is learnt from: a loss of pictures and whether they show the class, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadInput, NotSupported
from sfumato.models.modes import frozen_parameters
from sfumato.models.readers import load_clip, load_reader

__all__ = ["Scorer", "scorer_of"]


class Scorer:
    """Called with a picture (1 3 H W) in [-1, 1] and the number of its noise: (loss (), whether it is a hit)."""

    def __init__(self, name: str, module: nn.Module | None, score: Callable[[Tensor, int], tuple[Tensor, bool]]):
        self.name, self.module, self._score = name, module, score

    def __call__(self, pixels: Tensor, number: int) -> tuple[Tensor, bool]:
        return self._score(pixels, number)

    def frozen(self) -> AbstractContextManager[None]:
        """Within: its weights get no gradients."""
        return frozen_parameters([] if self.module is None else [self.module])


def scorer_of(data: Any, target: str, shares: Sequence[str], rivals: Sequence[str]) -> Scorer:
    """The scorer of a class.

    ``data``: a classifier (cross entropy of its class), a CLIP (cross entropy of the text ``target`` against
    ``rivals``), a detector (minus the logarithm of the class's highest probability), or a function whose value is to
    rise. ``shares``: of several classes, as cone=0.5: each noise belongs to one of them, in these shares. Raises
    UnknownName, BadInput, NotSupported for a model that scores no pictures.
    """
    if callable(data) and not isinstance(data, str | Path) and not hasattr(data, "kind"):
        return Scorer(getattr(data, "__name__", "a function"), None, lambda x, _: (-data(x).mean(), False))
    reader = load_reader(data) if isinstance(data, str | Path) else data
    if reader.kind == "matcher":
        if shares:
            raise BadInput("shares need a classifier; a CLIP has a target and rivals.")
        return _clip(data, target, rivals)
    wanted = _labels(reader, target, shares)
    if reader.kind == "classifier":

        def classified(pixels: Tensor, number: int) -> tuple[Tensor, bool]:
            label = wanted[number % len(wanted)]
            logits = reader.module(pixel_values=reader.pixels(pixels)).logits.float()
            return F.cross_entropy(logits, torch.tensor([label], device=logits.device)), int(logits.argmax()) == label

        return Scorer(reader.name, reader.module, classified)
    if reader.kind == "detector":

        def detected(pixels: Tensor, number: int) -> tuple[Tensor, bool]:
            label = wanted[number % len(wanted)]
            found = reader.module(pixel_values=reader.pixels(pixels)).logits.float().softmax(-1)[..., label].max()
            return -found.clamp_min(1e-12).log(), float(found.detach()) > 0.5

        return Scorer(reader.name, reader.module, detected)
    raise NotSupported(f"{reader.name} scores no pictures; a classifier, a CLIP or a detector does.")


def _labels(reader: Any, target: str, shares: Sequence[str], most: int = 20) -> list[int]:
    """Labels in the order of noises: of ``shares``, as evenly spread as can be."""
    if not shares:
        return [reader.label(target)]
    parts: dict[int, float] = {}
    for text in shares:
        label, sign, number = text.rpartition("=")
        try:
            parts[reader.label(label.strip())] = float(number)
        except ValueError:
            sign = ""
        if not sign or not parts[reader.label(label.strip())] > 0:
            raise BadInput(f"shares holds {text!r}; write class=share, such as cone=0.5.")
    total, given, out = sum(parts.values()), dict.fromkeys(parts, 0), []
    for i in range(1, most + 1):
        due = max(parts, key=lambda label: parts[label] / total * i - given[label])
        given[due] += 1
        out.append(due)
    return out


def _clip(data: Any, target: str, rivals: Sequence[str]) -> Scorer:
    clip = load_clip(data if isinstance(data, str | Path) else data.name)
    others = [text for text in rivals if text != target]
    with torch.no_grad():
        texts = clip.text([target, *others])

    def matched(pixels: Tensor, _: int) -> tuple[Tensor, bool]:
        cosines = clip.pictures(pixels) @ texts.T
        if not others:
            return 1 - cosines.mean(), False
        return -(clip.scale * cosines).log_softmax(-1)[:, 0].mean(), int(cosines.argmax()) == 0

    return Scorer(clip.name, clip.model, matched)
