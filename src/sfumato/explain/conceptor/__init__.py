"""Conceptor: what a model's idea of something is made of, as a short weighted list of words.

Chefer, Lang, Geva, Polosukhin, Shocher, Irani, Mosseri and Wolf 2023 (arXiv 2306.00966). A pseudo-word
w* = sum_i alpha_i w_i over the embeddings of the vocabulary is put where the concept's name would stand, and the
coefficients are learnt through the frozen denoiser's own training loss on pictures of the concept, so that w* draws the
concept. A small network gives alpha_i = |f(w_i)|, so that words with close embeddings have close coefficients; a second
loss wants the N largest of them to make the same direction as all (section 3).

    >>> found = decompose(model, "cone")  # or pictures of anything
    >>> found.shares(3)
    [('ring', 0.31), ('small', 0.22), ('cylinder', 0.17)]
    >>> generate(model, "a cube on the grass", interventions=Conceptor(word="cube", mixture=found.mixture(10)))

:func:`explain_seed` reduces a decomposition to what one picture needs (section 4.2), :meth:`Decomposition.changed`
turns an ingredient up or down, :func:`balance` looks for the factor at which a measured share is what it should be
(section 5). Beyond the original: any number of text encoders (a dictionary of the words that all of them have as one
token, one coefficient each), flow models, and sets of given pictures.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import field_validator
from torch import Tensor

from sfumato import cards, files
from sfumato.cards import Card, Field, ModelPath, Template, register
from sfumato.errors import BadInput
from sfumato.explain.conceptor.bias import Balance, balance
from sfumato.explain.conceptor.decomposition import Decomposition
from sfumato.explain.conceptor.learning import decompose
from sfumato.explain.conceptor.pseudo_word import PseudoWord, read_mixture
from sfumato.explain.conceptor.single_image import explain_seed
from sfumato.explain.conceptor.vocabulary import Dictionary, dictionary
from sfumato.models import Model
from sfumato.models.readers import PLAIN

__all__ = ["Balance", "Conceptor", "Decomposition", "Dictionary", "balance", "decompose", "dictionary", "explain_seed"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@register
class Conceptor(PseudoWord):
    """In a generation: a mixture of words stands for one word of the prompt. As ``sfumato explain``: finds the mixture
    that stands for a concept (:meth:`explain_concept`)."""

    CARD = Card(
        key="conceptor",
        title="The Hidden Language of Diffusion Models",
        authors="Chefer, Lang, Geva, Polosukhin, Shocher, Irani, Mosseri, Wolf",
        year=2023,
        arxiv="2306.00966",
        verb="explain",
        needs=("pictures", "noise_path", "differentiable_state"),
        defaults_from="section 3 and the authors' code; the template is shorter, theirs is 'a photo of a {}'",
        cost="to find: the pictures, then batch x 2 forward-equivalents per step and the checks; to use: nothing",
        not_reproduced="the human study; 27 photo templates for choosing words by CLIP (one here)",
        summary="finds the weighted words a concept is made of, and draws with them changed",
        example="conceptor:word=cube,mixture=[red=0.7|ball=0.3]",
    )

    class Params(cards.Params):
        RENAMED = {"rate": "learning_rate"}
        MOST = 100_000  # words of a dictionary

        word: str | None = Field(default=None, description="make: the word of the prompt that the mixture stands for")
        mixture: list[str] = Field(default=[], description="make: words with weights, as red=0.7")
        strength: float = Field(
            default=1.0, ge=0, le=1, description="make: from the word's own embedding (0) to the mixture (1)"
        )
        template: Template = Field(default="a {}", description="explain: sentence in which the concept is learnt")
        dictionary: list[str] = Field(default=[], description="explain: words that may be used; none: all that are")
        exclude: list[str] = Field(
            default=[], description="explain: words that may not be used, besides those of the concept"
        )
        pieces: bool = Field(
            default=False, description="explain: also tokens that only begin words (the paper has all)"
        )
        candidates: int = Field(
            default=5000,
            ge=2,
            le=100000,
            description="explain: so many words are kept, the nearest to the pictures for CLIP",
        )
        similar: float = Field(
            default=1.0, gt=0, le=1, description="explain: leave out words this similar to the concept for CLIP; 0.9 in"
            " the paper"
        )  # fmt: skip
        keep: int = Field(default=50, ge=1, description="explain: N, how many words the decomposition may rest on")
        sparsity: float = Field(default=0.001, ge=0, description="explain: weight of the sparsity loss")
        levels_count: Literal["paper", "alike"] = Field(
            default="paper",
            description="explain: how much each noise level counts: by its error, or alike (the mean of the errors' "
            "logarithms), which needs fewer steps where pictures are few",
        )
        coefficients: Literal["network", "free", "softmax"] = Field(
            default="network", description="explain: a network of the embeddings (the paper), or one number per word"
        )
        images: int = Field(default=100, ge=1, le=10_000, description="explain: how many pictures of it to make")
        checked: int = Field(default=20, ge=0, le=1000, description="explain: how many more to check with, 0 none")
        every: int = Field(default=50, ge=1, description="explain: steps between two checks")
        iterations: int = Field(default=500, ge=1, le=100_000, description="explain: how many steps of learning")
        learning_rate: float = Field(default=1e-3, gt=0, le=10, description="explain: learning rate of AdamW")
        batch: int = Field(default=6, ge=1, le=1000, description="explain: pictures per step")
        flip: bool = Field(default=True, description="explain: mirror pictures at random")
        clip: ModelPath = Field(default=PLAIN, description="explain: the CLIP that checks; built in, or a folder")

        @field_validator("mixture", mode="before")
        @classmethod
        def _pairs(cls, given: Any) -> Any:
            return [f"{word}={weight:g}" for word, weight in given.items()] if isinstance(given, dict) else given

    def __init__(self, vectors: Mapping[str, Tensor] | None = None, **given: Any):
        self.params = self.Params(**given)
        mixture = read_mixture(self.params.mixture) if self.params.mixture else {}
        super().__init__(self.params.word, vectors, mixture)

    def explain_concept(
        self, model: Model, what: Any, prompt: str | None = None, on_step: Any = None, **options: Any
    ) -> Decomposition:
        """:func:`decompose` with this system's parameters. ``what``: a text, a picture, or a folder of pictures."""
        if self.params.word is not None or self.params.mixture:
            raise BadInput("word and mixture of conceptor are for make; explain finds the mixture.")
        p = self.params.model_dump(exclude={"word", "mixture", "strength"})
        folder = Path(what) if isinstance(what, str | Path) else None
        if folder is not None and os.path.isdir(folder):
            given = [files.read_picture(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES]
            if not given:
                raise BadInput(f"{folder} holds no picture.")
        elif folder is not None and (isinstance(what, Path) or folder.suffix.lower() in PICTURES):
            given = [files.read_picture(folder)]
        elif isinstance(what, Image.Image):
            given = [what]
        else:
            return decompose(model, str(what), on_step=on_step, **p, **options)
        return decompose(model, prompt or "", pictures=given, on_step=on_step, **p, **options)
