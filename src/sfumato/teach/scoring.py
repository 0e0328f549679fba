"""Scores of a subject while it is taught, and their plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from sfumato.bench.subject import Score, identity, pareto, scored
from sfumato.models import Model
from sfumato.models.readers import load_clip
from sfumato.sampling import generate
from sfumato.sampling.pixels import as_pictures
from sfumato.teach.concepts import Concept
from sfumato.text.placeholders import placeholders

__all__ = ["SubjectScorer", "plotted"]

OTHERS = ("a house by a river", "a red car on a street", "a bowl of fruit", "a dog in the grass")
"""Prompts that have nothing to do with any subject, to see whether the rest of the model has changed."""


class SubjectScorer:
    """Scores the model as it is when called: what it draws of the subject, of its class alone and of other prompts,
    from the same seeds as before the teaching. Returns the :class:`~sfumato.bench.subject.Score` of a step as plain
    values, and as "probe" its figure, lower is better.

    Args:
        net: a CLIP by name; it has no part in the teaching.
        n: pictures of each kind.
        words: gives the new words as they are now.
    """

    def __init__(
        self, model: Model, concept: Concept, net: str, n: int, seed: int, prompt: str, steps: int,
        words: Callable[[], dict[str, Any]],
    ):  # fmt: skip
        self.model, self.clip, self.n, self.words = model, load_clip(net), n, words
        self.seeds = [seed * 1_000_003 + 55_000_000 + i for i in range(n)]
        self.options: dict[str, Any] = {"steps": steps} if steps else {}
        self.phrase, self.plain = prompt.format(concept.phrase), prompt.format(concept.class_noun)
        pixels = [concept.subject.pixels(i) for i in range(min(len(concept.subject), 16))]
        self.real = np.concatenate([self.clip.features(as_pictures(each[None])) for each in pixels])
        self.plain_before, self.others_before = self._drawn(self.plain), self._drawn(*OTHERS)
        self.text = self.clip.text_features([self.plain])

    def _drawn(self, *prompts: str) -> np.ndarray:
        texts = [prompts[i % len(prompts)] for i in range(self.n)]
        with torch.no_grad(), placeholders(self.model, self.words()):
            pixels = generate(self.model, texts, seed=self.seeds, **self.options).pixels
        assert pixels is not None
        return self.clip.features(as_pictures(pixels.clamp(-1, 1)))

    def __call__(self, step: int) -> dict[str, float]:
        subject = self._drawn(self.phrase)
        score = scored(
            step, self.real, subject, self._drawn(self.plain), self.plain_before, self._drawn(*OTHERS),
            self.others_before, identity(subject, self.text),
        )  # fmt: skip
        return {**score.to_json(), "probe": score.figure()}


def plotted(scores: Sequence[Score]) -> Image.Image:
    """Identity against leak and drift, each checkpoint with its step; those on the front are filled."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    front, chosen = pareto(scores), min(scores, key=Score.figure)
    axes.plot([s.leak + s.drift for s in scores], [s.identity for s in scores], color="0.8", zorder=1)
    for score in scores:
        x, y = score.leak + score.drift, score.identity
        color = "tab:red" if score is chosen else "tab:blue"
        axes.scatter(x, y, s=42, facecolor=color if score in front else "white", edgecolor=color, zorder=2)
        axes.annotate(str(score.step), (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set_xlabel("leak + drift (less is better)")
    axes.set_ylabel("identity (more is better)")
    axes.set_title("checkpoints by step; filled: on the front, red: taken", fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return Image.open(io.BytesIO(stream.getvalue())).convert("RGB")
