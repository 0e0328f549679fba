"""Pictures with what is known of them, concept by concept: toys of the toybox, or a folder with its metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput, UnknownName
from sfumato.markup import described
from sfumato.toybox import ToyboxDataset
from sfumato.toybox.cues import CONCEPTS, CueDataset, concept_of
from sfumato.training.data import pictures
from sfumato.training.samples import open_samples

__all__ = ["LabelledVectors", "agreeing", "folder_examples", "labelled", "of_toys", "open_examples", "toybox_examples"]

LEAST = 32


@dataclass(eq=False)
class LabelledVectors:
    """``pixels`` (m 3 h w) in [-1, 1]; ``labels`` of every concept (m) int64, into its ``names``; ``scenes`` and
    ``texts`` where there are any."""

    pixels: Tensor
    labels: dict[str, Tensor]
    names: dict[str, list[str]]
    scenes: list[Any] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    __repr__ = described

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, at: Tensor | Sequence[int]) -> LabelledVectors:
        """Some of them."""
        index = torch.as_tensor(at)
        labels = {name: each[index] for name, each in self.labels.items()}
        chosen = [[part[i] for i in index.tolist()] if part else [] for part in (self.scenes, self.texts)]
        return LabelledVectors(self.pixels[index], labels, self.names, *chosen)


def labelled(words: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Words as numbers into their sorted vocabulary."""
    names = sorted(set(words))
    return torch.tensor([names.index(word) for word in words]), names


def toybox_examples(
    n: int, side: int, concepts: Sequence[str] = CONCEPTS, seed: int = 0, split: str = "train"
) -> LabelledVectors:
    """``n`` toys seen from near (:func:`sfumato.toybox.cues.cue_scenes`), every concept drawn apart from the others;
    rendered once and cached. Raises UnknownName (concept)."""
    for name in concepts:
        if name not in CONCEPTS:
            raise UnknownName("concept of the toybox", name, CONCEPTS)
    data = CueDataset(split, n, side, seed, 1.0, 0.25)
    return of_toys(data, concepts, [data.caption(i).text for i in range(n)])


def of_toys(data: ToyboxDataset, concepts: Sequence[str], texts: Sequence[str] = ()) -> LabelledVectors:
    """All pictures of a set of the toybox with what its scenes say of ``concepts``, and ``texts`` if there are any."""
    found = {name: labelled([concept_of(scene, name) for scene in data.scenes]) for name in concepts}
    return LabelledVectors(
        pictures(data, torch.arange(len(data))), {k: v[0] for k, v in found.items()},
        {k: v[1] for k, v in found.items()}, data.scenes, list(texts),
    )  # fmt: skip


def folder_examples(folder: Path | str, side: int, concepts: Sequence[str] = (), most: int = 5000) -> LabelledVectors:
    """Pictures of a folder whose ``metadata.jsonl`` (or csv) has a column for each concept.

    Raises:
        BadInput: fewer than 32 pictures, a row without a concept. UnknownName: no such column.
    """
    samples = open_samples(folder, (side, side))
    n = min(len(samples), most)
    if n < LEAST:
        raise BadInput(f"{folder} holds {n} pictures; a flow needs {LEAST} or more, better 1000.")
    rows = [samples.entries[i].facts for i in range(n)]
    columns = sorted({key for row in rows for key in row} - {"file_name", "text", "mask", "target"})
    labels, names = {}, {}
    for concept in concepts:
        if concept not in columns:
            raise UnknownName(f"column of {folder}/metadata.jsonl", concept, columns)
        lacking = next((i for i, row in enumerate(rows) if row.get(concept) in (None, "")), None)
        if lacking is not None:
            raise BadInput(f"{samples.entries[lacking].shown.name} says nothing about {concept!r}.")
        labels[concept], names[concept] = labelled([str(row[concept]) for row in rows])
    pixels = torch.stack([samples.sample(i).pixels for i in range(n)])
    return LabelledVectors(pixels, labels, names, [], [samples.caption(i) for i in range(n)])


def open_examples(data: str | Path, n: int, side: int, concepts: Sequence[str], seed: int = 0) -> LabelledVectors:
    """``n`` toybox pictures for "toybox", else those of a folder (at most ``n``)."""
    if str(data) == "toybox":
        return toybox_examples(n, side, concepts, seed)
    return folder_examples(data, side, concepts, n)


def agreeing(labels: Tensor, n: int, seed: int, concept: str = "the concept") -> Tensor:
    """``n`` pairs of rows (n 2), different pictures of equal label and random in all else; values are as frequent as
    they are among the rows that have a partner.

    Raises BadInput: every picture has a value of its own (no two agree), or all have the same.
    """
    counts = torch.bincount(labels)
    if int((counts > 0).sum()) < 2:
        raise BadInput(f"all pictures agree in {concept!r}; a concept needs two values or more.")
    partnered = (counts[labels] > 1).nonzero().flatten()
    if not len(partnered):
        raise BadInput(f"no two pictures agree in {concept!r}; pairs that agree are what a concept is learnt from.")
    rng = torch.Generator().manual_seed(seed)
    first = partnered[torch.randint(0, len(partnered), (n,), generator=rng)]
    order = labels.argsort(stable=True)
    start = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    kind = labels[first]
    step = 1 + (torch.rand(n, generator=rng) * (counts[kind] - 1)).long().clamp_max(counts[kind] - 2)
    second = order[start[kind] + (place[first] - start[kind] + step) % counts[kind]]
    return torch.stack([first, second], 1)
