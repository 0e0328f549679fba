"""Vectors of new words while they are learnt: where they begin, how long they may become, what is near them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadInput, UnknownName
from sfumato.models import Model
from sfumato.models.text_towers import TextTower, text_towers
from sfumato.text.placeholders import refuse_unwritable

__all__ = ["WordVectors", "bare", "refuse_word", "towers_of"]


def towers_of(model: Model, encoders: Sequence[str] = ()) -> list[TextTower]:
    """The text encoders that learn: those named, or all. Raises UnknownName, NotSupported for none."""
    towers = text_towers(model)
    for name in encoders:
        if name not in {tower.name for tower in towers}:
            raise UnknownName("text encoder", name, [tower.name for tower in towers])
    return [tower for tower in towers if not encoders or tower.name in encoders]


class TableFigures:
    """What words are measured by, of a text encoder's table of embeddings, which is frozen while they are learnt:
    the ``longest`` and the ``median`` of its rows' lengths () and the ``deviation`` () of its numbers."""

    def __init__(self, tower: TextTower):
        self._tower = tower
        lengths = tower.table.detach().float().norm(dim=1)
        self.longest, self.median = lengths.max(), lengths.median()

    @cached_property
    def deviation(self) -> Tensor:
        return self._tower.table.detach().float().std()


class WordVectors:
    """k vectors of a word in each text encoder, in full precision, each beginning as the embedding of ``begin``: a
    word (of several tokens, their mean), or "" for random vectors of the table's mean length.

    ``parameters``: text encoder -> (k d), the leaves that learn.
    """

    def __init__(self, towers: Sequence[TextTower], word: str, begin: str, vectors: int = 1, seed: int = 0):
        self.towers, self.word = list(towers), word
        self.start: dict[str, Tensor] = {}
        for tower in towers:
            self.start[tower.name] = (row_of(tower, begin) if begin else random_row(tower, seed)).repeat(vectors, 1)
        self.parameters = {name: nn.Parameter(rows.clone()) for name, rows in self.start.items()}
        self.tables = {tower.name: TableFigures(tower) for tower in towers}

    def shown(self, vectors: int | None = None) -> dict[str, Tensor]:
        """Text encoder -> the first ``vectors`` (k d), all if None is said, with gradients."""
        return {name: rows if vectors is None else rows[:vectors] for name, rows in self.parameters.items()}

    def taken(self) -> dict[str, Tensor]:
        """Copies of them as they are now, without gradients."""
        return {name: rows.detach().clone() for name, rows in self.parameters.items()}

    def distance_from_start(self) -> Tensor:
        """Mean squared distance () from where they began, the regulariser of the original code."""
        parts = [(rows - self.start[name]).square().sum(1).mean() for name, rows in self.parameters.items()]
        return torch.stack(parts).mean()

    @torch.no_grad()
    def constrain(self, how: str) -> None:
        """After an optimizer's step. "clamp": no vector is longer than the longest of the table; "pull": the deviation
        of its numbers is drawn towards the table's by the power 0.1 of their ratio."""
        for tower in self.towers:
            rows = self.parameters[tower.name]
            if how == "clamp":
                most = self.tables[tower.name].longest
                rows.mul_((most / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1.0))
            elif how == "pull" and rows.shape[1] > 1:
                deviation = rows.std(dim=1, keepdim=True).clamp_min(1e-12)
                rows.mul_((self.tables[tower.name].deviation / deviation) ** 0.1)

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """``length``: their mean length over the median of the table's; ``cosine``: to where they began."""
        ratios, cosines = [], []
        for name, rows in self.parameters.items():
            ratios.append(rows.norm(dim=1).mean() / self.tables[name].median.to(rows).clamp_min(1e-12))
            cosines.append(F.cosine_similarity(rows, self.start[name], dim=1).mean())
        return {"length": float(torch.stack(ratios).mean()), "cosine": float(torch.stack(cosines).mean())}

    @torch.no_grad()
    def nearest(self, n: int = 5) -> dict[str, list[str]]:
        """Text encoder -> words of its vocabulary with the highest cosine to the vectors' mean."""
        out = {}
        for tower in self.towers:
            table = F.normalize(tower.table.float(), dim=1)
            mean = F.normalize(self.parameters[tower.name].mean(0), dim=0)
            special = set(tower.tokenizer.all_special_ids)
            order = [i for i in (table @ mean).argsort(descending=True).tolist() if i not in special]
            out[tower.name] = [_written(tower.tokenizer, i) for i in order[:n]]
        return out


def row_of(tower: TextTower, word: str) -> Tensor:
    """The embedding (1 d) of a word, the mean over its tokens. Raises BadInput for one that the encoder cannot read."""
    ids = tower.tokenizer(word, add_special_tokens=False).input_ids
    if not ids or tower.tokenizer.unk_token_id in ids and tower.tokenizer.unk_token_id != tower.tokenizer.eos_token_id:
        raise BadInput(f"{tower.name} cannot read {word!r}; name another word to begin with, such as toy.")
    return tower.table[ids].detach().float().mean(0, keepdim=True)


def random_row(tower: TextTower, seed: int) -> Tensor:
    """A random vector (1 d) with the deviation of the table's numbers."""
    from sfumato.rng import stream

    table = tower.table.detach().float()
    drawn = torch.randn((1, table.shape[1]), generator=stream(f"teach.row.{tower.name}", seed))
    return drawn.to(table) * table.std()


def refuse_word(towers: Sequence[TextTower], name: str) -> None:
    """Raises BadInput where a new word cannot be written in a prompt, or is a token of an encoder already, in any case:
    it is read in any case too."""
    refuse_unwritable(name)
    for tower in towers:
        if name.lower() in {bare(token).lower() for token in tower.tokenizer.get_vocab()}:
            raise BadInput(f"name {name!r} is a word of {tower.name} already; take one that is none, such as <{name}>.")


def bare(token: str) -> str:
    """A token without the marks of where a word begins or ends."""
    return token.removesuffix("</w>").removeprefix("▁").removeprefix("Ġ")


def _written(tokenizer: Any, token: int) -> str:
    return bare(str(tokenizer.convert_ids_to_tokens(token)))
