"""Where a text is in a picture, by attention while the picture is inverted; for pictures without a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato import mask_ops
from sfumato.attention.accumulate import MapStore, upscale
from sfumato.attention.call import Call
from sfumato.attention.tap import Tap
from sfumato.models import Model
from sfumato.sampling import Intervention, Run
from sfumato.sampling.inversion import invert
from sfumato.steer.shape_guided.attention import takes_part
from sfumato.text.words import Words, noun_phrases


def infer_region(model: Model, pixels: Tensor, source: str, steps: int = 10) -> tuple[Tensor, float]:
    """Where ``source`` is in a picture (1 3 H W): the mean attention map of its words while the picture is inverted
    without constraint, parted in two, closed and filled. Returns the region (h w) and the forwards spent."""
    looker = _WordMap(source)
    back = invert(model, pixels, source, steps=steps, interventions=[looker])
    found = mask_ops.close((looker.map > mask_ops.mixture_threshold(looker.map)).float())
    return mask_ops.fill_holes(found), back.cost


class _WordMap(Intervention):
    """The mean attention map of all words of a text over sites, heads and steps, at the finest site's grid."""

    def __init__(self, text: str):
        self.text = text

    def start(self, run: Run) -> None:
        # the noun stands for the object; articles and the rest of the phrase do not
        phrases, reading = noun_phrases(self.text), Words(run.model).read(self.text)
        spans = [reading.span(phrase.head.start, phrase.head.end) for phrase in phrases] or reading.all()
        self.positions = sorted({position for span in spans for position in span.positions})
        self.store = MapStore()

    def taps(self) -> Sequence[Tap]:
        chosen = lambda site: site.kind in ("cross", "joint") and takes_part(site)  # noqa: E731
        return [Tap(chosen, observe=self.look, name="word map")]

    def look(self, call: Call) -> None:
        if "cond" in call.rows:
            first = call.text.start
            self.store.add(call.site, call.branch("cond").word_probs([first + p for p in self.positions]))
            self.mark(call.step, sites=[call.site.path])

    def finish(self, run: Run) -> None:
        layers = [layer.mean()[0].mean(0) for layer in self.store.take(0)]
        finest = max((tuple(layer.shape) for layer in layers), key=math.prod)
        self.map = torch.stack([upscale(layer / layer.mean(), finest) for layer in layers]).mean(0)
