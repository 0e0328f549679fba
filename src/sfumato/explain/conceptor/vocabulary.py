"""The words that a pseudo-word is made of: a model's vocabulary, with the embeddings of every text encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sfumato.errors import NotSupported, UnknownName
from sfumato.markup import described
from sfumato.models import Model
from sfumato.models.text_towers import TextTower, text_towers

PIECE = "+"  # marks a token that is only the beginning of words: "cu+"


@dataclass(frozen=True, eq=False)
class Dictionary:
    """``names`` (m) and, per text encoder, their token ids (m) and embeddings (m d)."""

    names: tuple[str, ...]
    ids: dict[str, Tensor]
    tables: dict[str, Tensor]

    __repr__ = described

    def only(self, rows: Sequence[int]) -> Dictionary:
        """Some of the words."""
        rows = list(rows)
        return Dictionary(
            tuple(self.names[i] for i in rows),
            {name: ids[rows] for name, ids in self.ids.items()},
            {name: table[rows] for name, table in self.tables.items()},
        )

    def subset(self, words: Sequence[str]) -> Dictionary:
        """Those ``words``, each once. Raises UnknownName."""
        for word in words:
            if word not in self.names:
                raise UnknownName("word of the dictionary", word, self.names)
        return self.only([self.names.index(word) for word in dict.fromkeys(words)])

    def vectors(self, weights: Tensor, norms: Mapping[str, float]) -> dict[str, Tensor]:
        """Per encoder sum_i weights_i w_i, at the length ``norms`` (d); gradients flow to the weights (m)."""
        out = {}
        for name, table in self.tables.items():
            mixed = weights.to(table) @ table
            out[name] = mixed * norms[name] / mixed.norm().clamp_min(1e-12)
        return out


def dictionary(model: Model, pieces: bool = False) -> Dictionary:
    """The words that every text encoder of a model has as one token; ``pieces``: also tokens that only begin words, as
    in the paper, whose dictionary is the whole vocabulary. Raises NotSupported without a text encoder."""
    towers, known = text_towers(model), _known.setdefault(model, {})
    if pieces not in known:
        tokens = [_names(tower, pieces) for tower in towers]
        shared = [name for name in tokens[0] if all(name in other for other in tokens[1:])]
        each = zip(towers, tokens, strict=True)
        known[pieces] = (
            tuple(shared),
            {t.name: torch.tensor([named[n] for n in shared], dtype=torch.long) for t, named in each},
        )
    names, ids = known[pieces]
    return Dictionary(names, ids, {tower.name: tower.table.detach()[ids[tower.name]].float() for tower in towers})


# names and ids by model, for asking a tokenizer of 50,000 tokens takes a second
_known: WeakKeyDictionary[Model, dict[bool, tuple[tuple[str, ...], dict[str, Tensor]]]] = WeakKeyDictionary()


def _names(tower: TextTower, pieces: bool) -> dict[str, int]:
    """Name -> token id of one encoder."""
    special = set(tower.tokenizer.all_special_ids)
    ids = [i for i in range(min(len(tower.tokenizer), len(tower.table))) if i not in special]
    texts = [tower.tokenizer.decode([i]).strip().removesuffix("</w>") for i in ids]
    alone, before, inside = (
        tower.tokenizer(given, add_special_tokens=False, verbose=False).input_ids
        for given in (texts, ["a"], [f"a {text}" for text in texts])
    )
    names: dict[str, int] = {}
    for i, text, single, within in zip(ids, texts, alone, inside, strict=True):
        back = within[len(before[0]) :]
        back = back if len(back) == 1 else single  # as words stand in texts, else as they begin them
        if not text or not text.isprintable() or any(char.isspace() or char in "=+,|[]\"'\ufffd" for char in text):
            continue
        if back == [i]:
            if pieces or (text.isalpha() and len(text) > 1):
                names.setdefault(text.lower(), i)
        elif pieces:
            names.setdefault(text + PIECE, i)
    return names


def usual_norms(model: Model) -> dict[str, float]:
    """The mean length of the words' embeddings, per text encoder. (The paper averages over all tokens, pieces of words
    included; where most of these were never trained they are short, and so would be the pseudo-word.)"""
    return {name: float(table.norm(dim=1).mean()) for name, table in dictionary(model).tables.items()}


def placeholder(model: Model, template: str) -> str:
    """A word of one token in every encoder that the template does not hold, to stand where the pseudo-word goes."""
    used = set(re.findall(r"\w+", template.lower()))
    for name in dictionary(model).names:
        if name not in used and name.isascii() and len(name) > 2:
            return name
    raise NotSupported(f"{model.name} has no word of one token that could serve as a placeholder.")
