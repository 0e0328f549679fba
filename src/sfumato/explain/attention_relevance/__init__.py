"""The system ``sfumato explain PICTURE --by attention_relevance``: what led a model to an answer, class, box or word.

Chefer, Gur, Wolf 2021 (arXiv 2103.15679); the method itself is :func:`sfumato.relevance.attention.attention_relevance`.
:mod:`~sfumato.explain.attention_relevance.questions` asks models that read, and
:mod:`~sfumato.explain.attention_relevance.words` looks at models that draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sfumato import cards
from sfumato.cards import Card, Field, ModelPath, register
from sfumato.errors import BadInput
from sfumato.explain.attention_relevance.questions import ask
from sfumato.explain.attention_relevance.words import NOISE_LEVELS, word_maps
from sfumato.explain.relevance_maps import RelevanceMaps
from sfumato.models import Model
from sfumato.relevance.attention import Method
from sfumato.sampling.pixels import as_pixels
from sfumato.sampling.request import checked_size

__all__ = ["AttentionRelevance", "explain_image", "explain_images"]


@register
class AttentionRelevance:
    """The system as ``sfumato explain PICTURE --by attention_relevance`` runs it: its card, its parameters."""

    CARD = Card(
        key="attention_relevance",
        title="Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers",
        authors="Chefer, Gur, Wolf",
        year=2021,
        arxiv="2103.15679",
        verb="explain",
        needs=(),
        defaults_from="section 3 of the paper; for CLIP the authors' code (last layer of each tower only)",
        cost="one forward and one backward pass per thing asked; diffusion models: that per noise level",
        not_reproduced="windowed attention (Swin); the paper's networks and data sets, for which the toybox stands",
        summary="which patches, regions and words led a transformer to an answer, class, box or match",
    )

    class Params(cards.Params):
        method: Method = Field(default="relevance", description="relevance as in the paper, or a baseline")
        start_layer: int | None = Field(
            default=None,
            description="layers before this one are skipped, -1: all but the last; none: as usual",
        )
        normalise: bool = Field(default=True, description="normalise self matrices before cross-attention (eqs. 8, 9)")
        mix: bool = Field(default=True, description="use the self matrices in cross-attention (rule 10)")
        add: bool = Field(default=True, description="add up over layers rather than keep the last")
        words: list[str] = Field(default=[], description="models that draw: words to map; none: every word")
        least: float = Field(default=0.5, ge=0, le=1, description="detectors: explain finds of this certainty")
        detector: ModelPath = Field(
            default="toy-detr", description="question answerers: the model that finds the regions"
        )

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def explain_image(self, model: Any, image: Any, prompt: str, **options: Any) -> Any:
        """:func:`explain_image` with these parameters, by a model that draws."""
        return explain_image(model, image, prompt, **{**self.params.model_dump(), **options})

    def explain_reading(self, reader: Any, image: Any, prompt: str | None = None, **options: Any) -> Any:
        """:func:`explain_image` with these parameters, by a model that reads."""
        return explain_image(reader, image, prompt, **{**self.params.model_dump(), **options})


def explain_image(
    model: Any,
    image: Any,
    prompt: str | None = None,
    *,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    seed: int = 0,
    scheduler: Any = None,
    **params: Any,
) -> Any:
    """Relevance maps of one picture (a PIL picture or (1 3 h w) in [-1, 1]); see :func:`explain_images`."""
    options = {"size": size, "steps": steps, "seed": seed, "scheduler": scheduler}
    return explain_images(model, [image], [prompt], AttentionRelevance(**params).params, **options)[0]


def explain_images(
    model: Any,
    images: Sequence[Any],
    prompts: Sequence[str | None],
    params: Any,
    *,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    seed: int = 0,
    scheduler: Any = None,
) -> list[RelevanceMaps]:
    """Relevance of each picture to its prompt: a :class:`~sfumato.models.readers.Reader` is asked, a
    :class:`~sfumato.models.Model` that draws is shown the picture under noise."""
    rules = {name: getattr(params, name) for name in ("method", "normalise", "mix", "add")}
    rules["start_layer"] = params.start_layer
    if isinstance(model, Model):
        if any(prompt is None for prompt in prompts):
            raise BadInput(f"{model.name} draws from texts, so say what the picture shows: prompt=, or --prompt.")
        pixels = torch.cat([as_pixels(image, None if size is None else checked_size(model, size)) for image in images])
        return word_maps(
            model, pixels, [str(p) for p in prompts], params.words, steps=steps or NOISE_LEVELS, seed=seed,
            scheduler=scheduler, **rules,
        )  # fmt: skip
    if params.words:
        raise BadInput(f"words are for models that draw; {model.name} is asked about a text as a whole.")
    for name, value in (("steps", steps), ("scheduler", scheduler)):
        if value is not None:
            raise BadInput(f"{name} is for models that draw; {model.name} reads.")
    pixels = None if model.kind == "texts" else torch.cat([as_pixels(image, None) for image in images])
    return ask(model, pixels, prompts, least=params.least, detector=params.detector, **rules)
