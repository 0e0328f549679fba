"""A pseudo-word: a weighted sum of word embeddings that stands for one word of a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput, Conflict, NoMatch
from sfumato.explain.conceptor.vocabulary import PIECE, usual_norms
from sfumato.models import Model
from sfumato.models.text_towers import pseudo_word, text_towers, token_of
from sfumato.sampling import Intervention, Run, generate
from sfumato.sampling.intervention import Coverage
from sfumato.text.words import Words


def read_mixture(given: Sequence[str]) -> dict[str, float]:
    """``["red=0.7", "ball=0.3"]`` as word -> weight. Raises BadInput."""
    out: dict[str, float] = {}
    for text in given:
        word, sign, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not sign or not word.strip() or not math.isfinite(weight):
            raise BadInput(f"mixture holds {text!r}; write word=weight, such as red=0.7.")
        if word.strip() in out:
            raise BadInput(f"mixture holds {word.strip()!r} twice.")
        out[word.strip()] = weight
    if not any(out.values()):
        raise BadInput("mixture is empty, or all its weights are 0; give at least one word, such as red=0.7.")
    return out


def mixture_vectors(model: Model, mixture: Mapping[str, float]) -> dict[str, Tensor]:
    """The pseudo-word (d) of a mixture, per text encoder. Raises BadInput for a word that is not one token there."""
    norms, out = usual_norms(model), {}
    for tower in text_towers(model):
        mixed = torch.zeros(tower.table.shape[1], device=tower.table.device)
        for word, weight in mixture.items():
            if word.endswith(PIECE):
                token = tower.tokenizer.convert_tokens_to_ids(word.removesuffix(PIECE))
                if token is None or token == tower.tokenizer.unk_token_id:
                    raise BadInput(f"mixture: {tower.name} has no token {word!r}.")
            else:
                token = token_of(tower, word)
            mixed = mixed + weight * tower.row(token).float()
        out[tower.name] = mixed * norms[tower.name] / mixed.norm().clamp_min(1e-12)
    return out


class PseudoWord(Intervention):
    """Draws with a pseudo-word in place of ``word``: ``vectors`` (d) per text encoder, or those of ``mixture``."""

    role = "conditioner"

    def __init__(
        self,
        word: str | None,
        vectors: Mapping[str, Tensor] | None = None,
        mixture: Mapping[str, float] | None = None,
    ):
        self.word, self.vectors, self.mixture = word, vectors, dict(mixture or {})
        self.activity = Coverage()

    def start(self, run: Run) -> None:
        """Puts the pseudo-word in place of the word. Raises NoMatch for a word that no prompt has, BadInput without
        word and mixture, Conflict where two stand for one word."""
        word = self.word
        if word is None or (not self.mixture and self.vectors is None):
            raise BadInput("conceptor draws with a mixture in place of a word: give word and mixture, as word=cube.")
        if any(isinstance(part, PseudoWord) and part is not self and part.word == word for part in run.parts):
            raise Conflict(f"two mixtures stand for {word!r}; give conceptor once for each word.")
        words = Words(run.model)
        for k, prompt in enumerate(run.prompts):
            try:
                words.find(prompt, word)
                break
            except NoMatch:
                if k == len(run.prompts) - 1:
                    raise
        if self.strength == 0:
            return
        vectors = dict(self.vectors or mixture_vectors(run.model, self.mixture))
        if self.strength < 1:
            for tower in text_towers(run.model):
                own = tower.row(token_of(tower, word)).float()
                vectors[tower.name] = torch.lerp(own, vectors[tower.name].to(own), self.strength)

        def used() -> None:
            if word not in self.activity.tokens:  # once, however many texts hold it
                self.mark(tokens=[word])

        run.enter(pseudo_word(run.model, word, vectors, used))


def draw(model: Model, template: str, system: PseudoWord, seeds: Sequence[int], **options: Any) -> Tensor:
    """Pictures (b 3 H W) of the template with the pseudo-word in it, one per seed; ``options`` of the loop."""
    assert system.word is not None
    prompts = [template.format(system.word)] * len(seeds)
    made = generate(model, prompts, seed=list(seeds), interventions=system, **options)
    assert made.pixels is not None
    return made.pixels.detach()
