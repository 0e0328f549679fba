"""Taught words: vectors that a prompt reaches by a word of its own, such as ``<rex>``.

Textual inversion (Gal et al. 2022, arXiv 2208.01618) learns k vectors of a text encoder's input from a few pictures;
the word then works in any prompt, in negative prompts, edits and word maps. Read are the dialects of diffusers, kohya,
SDXL and ComfyUI pairs, pivotal tuning, and A1111's pictures; pickles (``.pt``, ``.bin``) never.

    >>> generate(model, "a <rex> on the snow", interventions=Word(file="rex.safetensors"))
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sfumato import files
from sfumato.adapters.base import Adapter, AdapterParams
from sfumato.adapters.weight_sets import Weights
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, BadWeights, Conflict, NoMatch, NotSupported
from sfumato.models import Model
from sfumato.models.text_towers import TextTower, text_towers
from sfumato.sampling import Run, Step
from sfumato.text.placeholders import placeholders

__all__ = ["Word", "save_word"]


@register
class Word(Adapter):
    """The words of a textual-inversion file, in every text encoder it has vectors for."""

    CARD = Card(
        key="word",
        title="An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
        authors="Gal, Alaluf, Atzmon, Patashnik, Bermano, Chechik, Cohen-Or",
        year=2022,
        arxiv="2208.01618",
        verb="adapters",
        needs=(),
        defaults_from="the file: the word and its number of vectors",
        cost="none",
        not_reproduced="files of A1111 and of the original code in .pt are pickles and are refused",
        summary="a taught word in any prompt, from a textual-inversion file of any dialect",
        example="word:file=example-word,name=blue",
    )

    class Params(AdapterParams):
        scale: float = Field(
            default=1.0, description="length of the vectors in shares of what was taught; 0: the word as it is written"
        )
        name: str = Field(default="", description="the word in prompts; none: as the file has it, or the file's name")
        encoder: str = Field(
            default="",
            description="the text encoder that reads it, such as text_encoder_2, where the file does not say; none: by "
            "the width of the vectors",
        )

    kind = "word"
    params: Params

    def __init__(self, **given: Any):
        super().__init__(**given)
        known = list(self.contents.words)
        if self.params.name and len(known) > 1:
            raise BadInput(
                f"name of word: {self.path} holds several words ({', '.join(known[:6])}), which keep theirs."
            )

    @property
    def words(self) -> list[str]:
        """The words that prompts may use."""
        return [self.params.name] if self.params.name else list(self.contents.words)

    def vectors(self, model: Model) -> dict[str, dict[str, Tensor]]:
        """Word -> text encoder -> (k d). Raises BadWeights for vectors that no encoder of the model reads, or that are
        not finite; BadInput for an encoder that the model lacks."""
        towers = text_towers(model)
        out: dict[str, dict[str, Tensor]] = {}
        for word, held in zip(self.words, self.contents.vectors().values(), strict=True):
            found: dict[str, Tensor] = {}
            for place, rows in held.items():
                tower = _tower(towers, self.params.encoder or place, rows.shape[1])
                if tower is not None:
                    found[tower.name] = rows
            if not found:
                widths = ", ".join(f"{tower.name} {tower.table.shape[1]}" for tower in towers)
                have = ", ".join(str(rows.shape[1]) for rows in held.values())
                raise BadWeights(
                    f"{self.path} does not fit {model.name}: {word} has vectors of width {have}; its encoders read "
                    f"{widths}."
                )
            out[word] = found
        return out

    @classmethod
    def usual_bytes(cls, model: Model) -> int:
        """One vector in every text encoder."""
        return sum(tower.table.shape[1] * tower.table.element_size() for tower in text_towers(model))

    def _attach(self, model: Model, scale: float, stack: ExitStack) -> None:
        vectors = self.vectors(model)
        if scale:
            scaled = {
                word: {name: rows if scale == 1 else rows * scale for name, rows in each.items()}
                for word, each in vectors.items()
            }
            stack.enter_context(placeholders(model, scaled, self.acted))

    def start(self, run: Run) -> None:
        mine = {(word, name) for word, each in self.vectors(run.model).items() for name in each}
        for other in run.parts:
            if isinstance(other, Word) and other is not self and self.scale and other.scale:
                if shared := mine & {(w, name) for w, each in other.vectors(run.model).items() for name in each}:
                    word, name = min(shared)
                    raise Conflict(f"{word} is taught twice for {name}; give one of the two another name.")
        super().start(run)

    def on_text(self, run: Run, condition: Any) -> Any:
        others = [part for part in run.parts if part.role not in ("adapter", "observer", "guider")]
        if self.scale and not self._acted and not others:  # nobody is left who could read it
            self._raise_unused(run)
        return super().on_text(run, condition)

    def finish(self, run: Run) -> None:
        if self.scale and not self.activity.calls:
            self._raise_unused(run)

    def _raise_unused(self, run: Run) -> None:
        close = [part.strip("<>") for part in self.words]
        near = next((w for w in re.findall(r"\w+", " ".join(run.prompts)) if w in close), None)
        hint = f" It has {near!r} without its brackets." if near else ""
        raise NoMatch(
            f"{' and '.join(self.words)} of {self.path} is in no text of this run, such as {run.prompts[0]!r}.{hint} "
            "Write it into the prompt, or give the word another name."
        )

    def after_predict(self, step: Step) -> None:
        self._tell(None)  # it acts where texts are encoded, which is no step, also when a system encodes during one

    def _covered(self, names: list[str]) -> dict[str, list[str]]:
        return {"tokens": names}

    def weights(self, model: Model, scale: float | None = None) -> dict[str, Weights]:
        raise NotSupported("a taught word changes no weights: it cannot be merged, and has no difference.")

    def save(self, path: str | Path, dialect: Dialect = "diffusers") -> Path:
        """Writes the only word of the file in another dialect; see :func:`save_word`."""
        if len(self.contents.words) > 1:
            raise BadInput(f"{self.path} holds several words; save them one by one.")
        (held,) = self.contents.vectors().values()
        vectors = {place or "text_encoder": rows for place, rows in held.items()}
        return save_word(path, self.words[0], vectors, dialect, metadata=self.contents.metadata)


def _tower(towers: list[TextTower], place: str, width: int) -> TextTower | None:
    """The encoder that a file means: the one it names, or the first of this width."""
    fitting = [tower for tower in towers if tower.table.shape[1] == width]
    if not place:
        return fitting[0] if fitting else None
    if place == "text_encoder_3":  # of files: their T5, which is the second of Flux and the only one of PixArt
        return next((tower for tower in fitting if getattr(tower.encoder.config, "model_type", "") == "t5"), None)
    return next((tower for tower in fitting if tower.name == place), None)


Dialect = Literal["diffusers", "kohya", "comfyui", "pivotal"]

_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}


def save_word(
    path: str | Path,
    word: str,
    vectors: Mapping[str, Tensor],
    dialect: Dialect = "diffusers",
    *,
    t5: Collection[str] = ("text_encoder_3",),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a word, vectors (k d) by text encoder, as a textual inversion.

    ``diffusers``: one key, the word, read by ``load_textual_inversion``; ``kohya``: ``emb_params``, the file's name
    being the word (A1111, ComfyUI); ``comfyui``: ``clip_l``, ``clip_g``, ``t5xxl`` (ComfyUI, kohya, A1111), which
    several encoders are always written as unless it is ``pivotal``: ``text_encoders_0`` ... ``t5``: the encoders that
    are T5s, of any place. The word is noted in the ``metadata`` too. Raises BadInput for no vectors, OSError.
    """
    if not vectors:
        raise BadInput(f"{word} has no vectors to write.")
    rows = {name: each.detach().cpu().reshape(-1, each.shape[-1]) for name, each in vectors.items()}
    if dialect == "pivotal":
        tensors = {f"text_encoders_{i}": rows[name] for i, name in enumerate(sorted(rows))}
    elif len(rows) > 1 or dialect == "comfyui":
        tensors = {_key(name, each, name in t5): each for name, each in rows.items()}
    else:
        tensors = {"emb_params" if dialect == "kohya" else word: next(iter(rows.values()))}
    return files.save_tensors(path, tensors, {**(metadata or {}), "sfumato.word": word})


def _key(name: str, rows: Tensor, t5: bool) -> str:
    """ComfyUI's name of a text encoder: SD 2's only one is its ``clip_h``."""
    if t5:
        return "t5xxl"
    return "clip_h" if name == "text_encoder" and rows.shape[1] == 1024 else _KEYS[name]
