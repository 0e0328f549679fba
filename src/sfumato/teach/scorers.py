"""What a class token is learnt from: a loss of pictures and whether they show the class, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadInput, NotSupported
from sfumato.models.modes import evaluation, frozen_parameters
from sfumato.models.readers import load_clip, load_reader

__all__ = ["Scorer", "scorer_of"]


class Scorer:
    """Called with a picture (1 3 H W) in [-1, 1] and the number of its noise: (loss (), whether it is a hit)."""

    def __init__(self, name: str, module: nn.Module | None, score: Callable[[Tensor, int], tuple[Tensor, bool]]):
        self.name, self.module, self._score = name, module, score

    def __call__(self, pixels: Tensor, number: int) -> tuple[Tensor, bool]:
        """Raises BadInput for a score that is not finite or that nothing can be learnt from."""
        loss, hit = self._score(pixels, number)
        if not bool(loss.detach().isfinite()):
            raise BadInput(f"{self.name} gives the picture of noise {number} a score that is not finite.")
        if pixels.requires_grad and not loss.requires_grad:
            raise BadInput(f"{self.name} gives a score without a gradient to the picture; work with torch alone in it.")
        return loss, hit

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within: its weights get no gradients, and it is in evaluation mode."""
        with ExitStack() as stack:
            if self.module is not None:
                stack.enter_context(frozen_parameters([self.module]))
                stack.enter_context(evaluation(self.module))
            yield


def scorer_of(
    data: Any, target: str, shares: Sequence[str] = (), rivals: Sequence[str] = (), noun: str = "", noises: int = 20
) -> Scorer:
    """The scorer of a class.

    ``data``: a classifier (cross entropy of its class), a CLIP (cross entropy of the text ``target`` against
    ``rivals``, or ``noun`` if there are none), a detector (minus the logarithm of the class's highest probability), or
    a function whose value is to rise. ``shares``: of several classes, as cone=0.5: each of the ``noises`` belongs to
    one of them, in these parts. Raises UnknownName, BadInput, NotSupported for a model that scores no pictures.
    """
    if callable(data) and not isinstance(data, str | Path) and not hasattr(data, "kind"):
        if shares or rivals:
            raise BadInput(f"{'shares' if shares else 'rivals'} need a model that knows classes; data is a function.")
        return _function(data)
    reader = load_reader(data) if isinstance(data, str | Path) else data
    if reader.kind not in ("classifier", "matcher", "detector"):
        raise NotSupported(f"{reader.name} scores no pictures; a classifier, a CLIP or a detector does.")
    if reader.kind == "matcher":
        if shares:
            raise BadInput("shares need a classifier; a CLIP has a target and rivals.")
        return _clip(data, target, rivals or [noun or target])
    if rivals:
        raise BadInput(f"rivals are texts for a CLIP; {reader.name} is a {reader.kind} and has classes: leave it out.")
    wanted = _labels(reader, target, shares, noises)
    if reader.kind == "classifier":

        def classified(pixels: Tensor, number: int) -> tuple[Tensor, bool]:
            label = wanted[number % len(wanted)]
            logits = reader.module(pixel_values=reader.pixels(pixels)).logits.float()
            return F.cross_entropy(logits, torch.tensor([label], device=logits.device)), int(logits.argmax()) == label

        return Scorer(reader.name, reader.module, classified)

    def detected(pixels: Tensor, number: int) -> tuple[Tensor, bool]:
        label = wanted[number % len(wanted)]
        found = reader.module(pixel_values=reader.pixels(pixels)).logits.float().softmax(-1)[..., label].max()
        return -found.clamp_min(1e-12).log(), float(found.detach()) > 0.5

    return Scorer(reader.name, reader.module, detected)


def _function(score: Callable[[Tensor], Any]) -> Scorer:
    name = getattr(score, "__name__", "a function")

    def scored(pixels: Tensor, _: int) -> tuple[Tensor, bool]:
        found = score(pixels)
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape not in ((), pixels.shape[:1]):
            kind = type(found).__name__
            what = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else kind
            raise BadInput(f"{name} must give a tensor of floats with a score for each picture, and gave {what}.")
        return -found.mean(), False

    return Scorer(name, score if isinstance(score, nn.Module) else None, scored)


def _labels(reader: Any, target: str, shares: Sequence[str], noises: int) -> list[int]:
    """Labels of the noises: of ``shares``, whatever they add up to, as evenly spread as can be."""
    if not shares:
        return [reader.label(target)]
    parts: dict[int, float] = {}
    for text in shares:
        name, _, number = text.rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if not name or not 0 < share < math.inf:
            raise BadInput(f"shares holds {text!r}; write class=share, such as cone=0.5.")
        label = reader.label(name.strip())
        if label in parts:
            raise BadInput(f"shares names {name.strip()!r} twice.")
        parts[label] = share
    total, given, out = sum(parts.values()), dict.fromkeys(parts, 0), []
    for i in range(1, noises + 1):
        due = max(parts, key=lambda label: parts[label] / total * i - given[label])
        given[due] += 1
        out.append(due)
    if left := [reader.labels[label] for label, times in given.items() if not times]:
        raise BadInput(f"none of {noises} noises is for {left[0]!r} by its share: raise noises, or leave it out.")
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
