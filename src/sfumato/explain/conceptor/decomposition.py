"""A decomposition: what a concept is made of, as words with coefficients, and what can be done with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sfumato import valid, writing
from sfumato.adapters.word import save_word
from sfumato.bench.report import Figure, Report, Table
from sfumato.errors import BadInput, UnknownName
from sfumato.explain.conceptor.pseudo_word import PseudoWord, draw, read_mixture
from sfumato.explain.conceptor.vocabulary import placeholder
from sfumato.explain.conceptor.word_cloud import word_cloud
from sfumato.markup import described
from sfumato.models import Model

FORMAT = "sfumato-decomposition-1"


@dataclass(frozen=True, eq=False)
class Decomposition:
    """What a concept is made of.

    ``names`` (m) and ``alphas`` (m), at least 0, in no particular scale; ``keep`` is N. ``history``: (iteration, loss,
    sparsity loss, effective number of words); ``checks``: (iteration, CLIP similarity of checked pictures).
    ``pictures`` of the concept and ``drawn`` by the N words from the same seeds, a few.
    """

    concept: str
    template: str
    model: str
    names: tuple[str, ...]
    alphas: Tensor
    keep: int
    history: tuple[tuple[int, float, float, float], ...] = ()
    checks: tuple[tuple[int, float], ...] = ()
    pictures: list[Image.Image] = field(default_factory=list)
    drawn: list[Image.Image] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)

    __repr__ = described

    def shares(self, n: int | None = None) -> list[tuple[str, float]]:
        """The ``n`` (N) largest coefficients as shares of what these n have, largest first; zeros are left out."""
        top = self.alphas.argsort(descending=True, stable=True)[: self.keep if n is None else n]
        total = self.alphas[top].sum().clamp_min(1e-12)
        return [(self.names[i], float(self.alphas[i] / total)) for i in top.tolist() if self.alphas[i] > 0]

    def mixture(self, n: int | None = None) -> list[str]:
        """:meth:`shares` as ``["red=0.7", ...]``, for :class:`Conceptor` and the command line."""
        return [f"{name}={share:.4g}" for name, share in self.shares(n)]

    def rank(self, name: str) -> int:
        """The place of a word, from 1. Raises UnknownName for one that was not in the dictionary."""
        if name not in self.names:
            raise UnknownName("word", name, self.names)
        return int((self.alphas > self.alphas[self.names.index(name)]).sum()) + 1

    @property
    def effective(self) -> float:
        """exp(entropy): how many words the coefficients are spread over."""
        return effective_number(self.alphas)

    def changed(self, **factors: float) -> Decomposition:
        """The same with the coefficients of some words multiplied (0: without them). Raises UnknownName."""
        alphas = self.alphas.clone()
        for name, factor in factors.items():
            if name not in self.names:
                raise UnknownName("word", name, [each for each, _ in self.shares()])
            alphas[self.names.index(name)] *= factor
        return replace(self, alphas=alphas, drawn=[], vectors={})

    def draw(
        self, model: Model, seeds: Sequence[int], *, keep: int | None = None, word: str = "", **options: Any
    ) -> Tensor:
        """Pictures (b 3 H W) by the ``keep`` (N) words in the template, one per seed; ``options`` of the loop."""
        word = word or placeholder(model, self.template)
        return draw(model, self.template, PseudoWord(word, mixture=read_mixture(self.mixture(keep))), seeds, **options)

    # -- on disk -------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything but pictures and vectors, as plain values."""
        chosen = [(name, round(share, 6)) for name, share in self.shares()]
        return {
            "format": FORMAT, "concept": self.concept, "template": self.template, "model": self.model,
            "keep": self.keep, "effective": round(self.effective, 3), "words": chosen,
            "all": dict(zip(self.names, [round(a, 6) for a in self.alphas.tolist()], strict=True)),
            "dictionary": hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:16],
            "history": [list(row) for row in self.history], "checks": [list(row) for row in self.checks], **self.facts,
        }  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> Decomposition:
        """From the JSON that :meth:`save` wrote; without pictures. Raises BadInput for anything else."""
        try:
            data = valid.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError
            alphas = torch.tensor([float(a) for a in data["all"].values()])
            rows = tuple(tuple(row) for row in data["history"]), tuple(tuple(row) for row in data["checks"])
            names = tuple(map(str, data["all"]))
            return cls(data["concept"], data["template"], data["model"], names, alphas, int(data["keep"]), *rows)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{path} holds no decomposition of this version ({FORMAT}), or it is damaged.") from None

    def report(self) -> Report:
        """A page: the words as a cloud and a table, pictures of the concept above what the words draw."""
        figures = [Figure("effective words", self.effective, "exp(entropy) of the coefficients")]
        if self.checks:
            best = max(similarity for _, similarity in self.checks)
            figures.append(Figure("similarity", best, "CLIP, mean over pairs of pictures, best check"))
        tables = [Table("words", ("word", "share"), [(name, f"{share:.3f}") for name, share in self.shares(20)])]
        gallery = [(f"pictures of {self.concept or 'the concept'}", [("", image) for image in self.pictures])]
        gallery.append((f"drawn by the {min(self.keep, len(self.names))} words", [("", image) for image in self.drawn]))
        notes = [f'to draw with it: --with "conceptor:word=WORD,mixture=[{"|".join(self.mixture(10))}]"']
        return Report(
            title=f"What {self.model} makes {self.concept or 'these pictures'} of",
            figures=figures,
            notes=notes,
            tables=tables,
            plots={"words": self.picture()},
            gallery=[(head, shown) for head, shown in gallery if shown],
            data={"decomposition": self.to_json()},
        )

    def picture(self) -> Image.Image:
        """The words as a cloud, larger ones weigh more."""
        return word_cloud(self.shares(40))

    def save(self, folder: str | Path, name: str = "") -> list[Path]:
        """Writes the report (HTML and JSON), the decomposition (``NAME.json``) and the pseudo-word as a textual
        inversion (``NAME.safetensors``, for the adapter ``word`` and for diffusers). Returns the files."""
        folder, name = Path(folder), name or f"conceptor-{writing.slug(self.concept or 'pictures')}"
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        writing.write_text(folder / f"{name}.json", json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
        written.append(folder / f"{name}.json")
        writing.write_text(folder / f"{name}.html", self.report().html())
        written.append(folder / f"{name}.html")
        if self.vectors:
            word = f"<{writing.slug(self.concept or 'concept')}>"
            written.append(save_word(folder / f"{name}.safetensors", word, self.vectors))
        return written


def effective_number(alphas: Tensor) -> float:
    """exp(entropy) of coefficients (m) as shares."""
    share = alphas.double() / alphas.double().sum().clamp_min(1e-30)
    return float((-(share * share.clamp_min(1e-30).log()).sum()).exp())
