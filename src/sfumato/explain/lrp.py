"""LRP for transformers: a class-specific map of what a classifier's decision rests on, through the whole computation.

Chefer, Gur, Wolf 2021 (arXiv 2012.09838); the method itself is :func:`sfumato.relevance.lrp.lrp`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato import cards
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, NotSupported
from sfumato.explain.relevance_maps import Answer, RelevanceMaps
from sfumato.relevance.lrp import Method, lrp, on_grid
from sfumato.relevance.propagation import eval_with_gradients
from sfumato.relevance.propagation_rules import Rules
from sfumato.sampling.pixels import as_pixels

__all__ = ["LRP", "explain_image"]


@register
class LRP:
    """The system as ``sfumato explain PICTURE --by lrp`` runs it: its card, its parameters."""

    CARD = Card(
        key="lrp",
        title="Transformer Interpretability Beyond Attention Visualization",
        authors="Chefer, Gur, Wolf",
        year=2021,
        arxiv="2012.09838",
        verb="explain",
        needs=(),
        defaults_from="section 3 of the paper and the authors' code for ViT (alpha 1, no row sums)",
        cost="two forward and two backward passes per label; one each for LRP",
        not_reproduced="the ImageNet and ERASER data sets, for which the toybox stands; RMS norms, windows",
        summary="which patches or words a classifier's label rests on, through values, MLPs and skip connections too",
    )

    class Params(cards.Params):
        method: Method = Field(
            default="transformer_attribution",
            description="transformer_attribution, or what it improves on: partial_lrp, lrp",
        )
        labels: list[str] = Field(default=[], description="labels to explain; none: the predicted one")
        start_layer: int = Field(default=0, ge=0, description="attribution begins at this attention layer")
        alpha: float = Field(default=1.0, ge=1, description="weight of what speaks for the label; 1: only that counts")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def explain_reading(self, reader: Any, image: Any, prompt: str | None = None, **options: Any) -> RelevanceMaps:
        """:func:`explain_image` with these parameters."""
        return explain_image(reader, image, prompt, **{**self.params.model_dump(), **options})


def explain_image(model: Any, image: Any, prompt: str | None = None, **params: Any) -> RelevanceMaps:
    """What labels of a :class:`~sfumato.models.readers.Reader` rest on in one picture, or in the text ``prompt``.

    For a picture, ``prompt`` is one label more to explain. Raises NotSupported for readers that give no labels.
    """
    p = LRP(**params).params
    kind = getattr(model, "kind", "")
    if kind not in ("classifier", "texts"):
        raise NotSupported(f"lrp explains classifiers; {model.name} is none. Try attention_relevance.")
    module = model.module
    rules = Rules(alpha=p.alpha, normalise=p.method != "partial_lrp")
    if kind == "texts":
        if not (prompt or "").strip():
            raise BadInput(f"{model.name} needs a text: give prompt=, or --prompt.")
        inputs: Any = dict(model.tokens([str(prompt)]))
        size, labels = (64, 64), list(p.labels) or [None]
    else:
        pixels = as_pixels(image, None)
        inputs, size = model.pixels(pixels), (pixels.shape[-2], pixels.shape[-1])
        labels = [*([prompt] if prompt else []), *p.labels] or [None]
    answers = []
    for label in labels:
        row = lrp(module, inputs, label, p.method, rules=rules, start_layer=p.start_layer)
        with torch.no_grad(), eval_with_gradients(module):
            scores = (module(inputs) if isinstance(inputs, Tensor) else module(**inputs)).logits[0].detach().float()
        name = model.labels[int(scores.argmax())] if label is None else label
        score = float(scores[model.labels.index(name)])
        if kind == "texts":
            words = tuple(model.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist()))
            answers.append(Answer(name, score, None, words, tuple(row[0].tolist())))
        else:
            answers.append(Answer(name, score, on_grid(row)[0].cpu()))
    facts = {"model": model.name, "query": ", ".join(answer.label for answer in answers), "alpha": p.alpha}
    return RelevanceMaps(tuple(answers), size, p.method, facts)
