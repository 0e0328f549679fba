"""What a set adds, drops or skews: style apart from content, pair by pair of sets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato import files, sheets, writing
from sfumato.judge.data_biases.projection import Projection
from sfumato.markup import described
from sfumato.translation.examples import LabelledVectors
from sfumato.translation.reading import CodeReader

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BiasReport", "PairBias", "pair_bias"]

SHARE = 0.25  # of the pictures of a value without counterpart, from which on it is named


def histogram(values: Tensor, k: int) -> Tensor:
    return torch.bincount(values, minlength=k).float() / max(1, len(values))


@dataclass(eq=False)
class PairBias:
    """Pictures of ``source`` as ``target`` has them.

    Attributes:
        style: mean absolute change in [0, 1] of pictures whose every concept stays: what the set does to any picture.
        change: the same of all pictures.
        changed: by concept, how many pictures change their value: content that the set distributes anew.
        before, after, own: frequencies of every concept's values in the source, in its projection, in the target.
        distance: by concept, total variation of ``after`` from ``own``.
        skews: largest changes of one concept given another: (given, value, concept, value, before, after).
        missing: by concept, share of pictures of each value for which the target has no counterpart.
    """

    source: str
    target: str
    style: float
    change: float
    changed: dict[str, float]
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    own: dict[str, dict[str, float]]
    distance: dict[str, float]
    skews: list[tuple[str, str, str, str, float, float]]
    missing: dict[str, dict[str, float]]
    unusual: float

    def lines(self) -> list[str]:
        """In words: style first, then content, then what has no counterpart."""
        out = [
            f"{self.source} -> {self.target}: style changes a picture by {self.style:.3f} of [0, 1] where all it shows"
            f" stays (all pictures: {self.change:.3f}); {100 * self.unusual:.0f} % have no counterpart"
        ]
        if self.changed:
            parts = [f"{concept} in {100 * value:.0f} %" for concept, value in self.changed.items()]
            out.append(f"{self.source} -> {self.target}: content changes: {', '.join(parts)}")
        for given, value, concept, to, before, after in self.skews[:4]:
            out.append(
                f"{self.source} -> {self.target}: {given} {value}: {concept} {to} {100 * before:.0f} % ->"
                f" {100 * after:.0f} %"
            )
        for concept, each in self.missing.items():
            lost = [f"{value} ({100 * share:.0f} %)" for value, share in each.items() if share >= SHARE]
            if lost:
                out.append(f"{self.source} -> {self.target}: {concept} without counterpart: {', '.join(lost)}")
        return out


def pair_bias(
    projection: Projection,
    z: Mapping[str, Tensor],
    source: str,
    target: str,
    reader: CodeReader | None,
    names: Any,
    unseen: Tensor | None = None,
) -> PairBias:
    """The report of one direction, from codes (m n) of every set; ``names`` are the words of every concept. ``unseen``:
    rows of the source that the flow was not fitted to, which are asked for their counterparts; None: all."""
    here, there = z[source], projection.codes(z[source], source, target)
    pictures = [projection.network.pictures(each) for each in (here, there)]
    change = ((pictures[1] - pictures[0]).abs().mean((1, 2, 3)) / 2).cpu()
    rows_asked = torch.arange(len(here)) if unseen is None or not len(unseen) else unseen
    odd = projection.without_counterpart(here[rows_asked], source, target)
    if reader is None:
        whole = float(change.mean())
        return PairBias(source, target, whole, whole, {}, {}, {}, {}, {}, [], {}, float(odd.float().mean()))
    old, new, own = reader.read(here), reader.read(there), reader.read(z[target])
    stays = torch.stack([old[c] == new[c] for c in old]).all(0)
    tables: list[dict[str, dict[str, float]]] = [{}, {}, {}]
    distance, missing = {}, {}
    for concept, words in names.items():
        rows = [histogram(each[concept], len(words)) for each in (old, new, own)]
        for table, row in zip(tables, rows, strict=True):
            table[concept] = dict(zip(words, row.tolist(), strict=True))
        distance[concept] = float(0.5 * (rows[1] - rows[2]).abs().sum())
        lost = {word: odd[old[concept][rows_asked] == i] for i, word in enumerate(words)}
        missing[concept] = {word: float(each.float().mean()) for word, each in lost.items() if len(each) >= 5}
    skews = []
    for given, concept in itertools.permutations(names, 2):
        for i, word in enumerate(names[given]):
            mine = old[given] == i
            if int(mine.sum()) < 20:
                continue
            before, after = (histogram(each[concept][mine], len(names[concept])) for each in (old, new))
            skews += [
                (given, word, concept, to, float(before[k]), float(after[k])) for k, to in enumerate(names[concept])
            ]
    skews.sort(key=lambda row: -abs(row[5] - row[4]))
    return PairBias(
        source, target, float(change[stays].mean()) if stays.any() else float("nan"), float(change.mean()),
        {c: float((old[c] != new[c]).float().mean()) for c in names}, tables[0], tables[1], tables[2], distance,
        skews[:20], missing, float(odd.float().mean()),
    )  # fmt: skip


@dataclass(eq=False)
class BiasReport:
    """Every pair of sets; ``examples`` and ``codes`` by set, ``reader`` where there are labels."""

    projection: Projection
    pairs: list[PairBias]
    examples: dict[str, LabelledVectors]
    codes: dict[str, Tensor]
    reader: CodeReader | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    __repr__ = described

    def lines(self) -> list[str]:
        """What :class:`PairBias` says of each pair, then how far to trust it."""
        out = [line for pair in self.pairs for line in pair.lines()]
        if self.reader is not None:
            accuracies = ", ".join(f"{c} {100 * v:.0f} %" for c, v in self.reader.accuracy.items())
            out.append(f"concepts are read off codes, held out right in: {accuracies}")
        if self.projection.record is not None:
            out.append(self.projection.record.line())
        return out

    def to_json(self) -> dict[str, Any]:
        record = self.projection.record
        return {
            "sets": self.projection.sets, "pairs": [vars(pair) for pair in self.pairs],
            "reader": self.reader.accuracy if self.reader else {}, "fit": record.facts if record else {}, **self.facts,
        }  # fmt: skip

    def picture(self, n: int = 6) -> Image:
        """Pictures of the first set as every set would have them."""
        first = self.projection.sets[0]
        z, pixels = self.codes[first][:n], self.examples[first].pixels[:n]
        rows = [("picture", list(pixels))]
        for name in self.projection.sets:
            label = f"as {name}" if name != first else "rebuilt"
            moved = z if name == first else self.projection.codes(z, first, name)
            rows.append((label, list(self.projection.network.pictures(moved))))
        title = f"Pictures of {first} as each data set would have them"
        cells = [cell for _, row in rows for cell in row]
        scale = max(1, 96 // pixels.shape[-1])
        return sheets.sheet(cells, len(pixels), rows=[label for label, _ in rows], title=title, scale=scale)

    def save(self, folder: Path) -> list[Path]:
        """Writes ``data_biases.json``, ``data_biases.png`` and the flow in the folder ``flow``."""
        folder.mkdir(parents=True, exist_ok=True)
        writing.write_text(folder / "data_biases.json", json.dumps(self.to_json(), indent=1) + "\n")
        about = {"sets": self.projection.sets}
        picture = files.save_png(folder / "data_biases.png", self.picture(), about)
        return [folder / "data_biases.json", picture, self.projection.save(folder / "flow")]
