"""What an interpretation says of a net: dimensions by layer, what each block reads, and pictures of swaps and walks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato import files, sheets, writing
from sfumato.explain.iin.factors import Interpretation
from sfumato.explain.shape_texture.dimensions import Dimensions, dimensions_of
from sfumato.markup import described
from sfumato.translation.examples import LabelledVectors
from sfumato.translation.networks import Network

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BlockReading", "linear_accuracy", "readings"]


def linear_accuracy(x: Tensor, labels: Tensor, held: float = 0.25, ridge: float = 1e-2) -> float:
    """Accuracy on held-out rows of a linear reader of labels (m) from vectors x (m d): ridge regression on one-hot
    labels. Chance is the share of the commonest label."""
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-8)
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    known = labels.unique()
    target = (labels[:, None] == known).double()
    cut = round(len(x) * (1 - held))
    gram = x[:cut].T @ x[:cut] + ridge * cut * torch.eye(x.shape[1], dtype=torch.double)
    weights = torch.linalg.solve(gram, x[:cut].T @ target[:cut])
    return float((known[(x[cut:] @ weights).argmax(1)] == labels[cut:]).double().mean())


def readings(found: Interpretation, z: Tensor, examples: LabelledVectors) -> dict[str, dict[str, float]]:
    """How well each concept can be read from each block, as a share of what chance leaves: {block: {concept: r}}."""
    v = found.codes(z)
    out: dict[str, dict[str, float]] = {}
    for name in found.sizes:
        out[name] = {}
        for concept, labels in examples.labels.items():
            chance = float(torch.bincount(labels).max()) / len(labels)
            accuracy = linear_accuracy(v[:, found.block(name)], labels)
            out[name][concept] = (accuracy - chance) / max(1 - chance, 1e-9)
    return out


@dataclass(eq=False)
class BlockReading:
    """What :meth:`IIN.explain_net` found. ``interpretation`` is the fitted translator, ``tables`` the dimensions of
    every layer, ``read`` the :func:`readings`, ``vectors`` (m n) those of ``examples``."""

    network: Network
    interpretation: Interpretation
    tables: dict[str, Dimensions]
    examples: LabelledVectors
    vectors: Tensor
    read: dict[str, dict[str, float]] = field(default_factory=dict)

    __repr__ = described

    def lines(self) -> list[str]:
        """Layer by layer the dimensions beside their floor, then the blocks, then the fit."""
        out = []
        for layer, table in self.tables.items():
            floor = dimensions_of(table.d, {name: 0.0 for name in table.scores})
            parts = [f"{c} {table.dimensions[c]} (score {table.scores[c].text()})" for c in table.scores]
            least = min(floor[c] for c in table.scores)
            out.append(f"{layer}: {table.d} dimensions, {least} each where nothing is known: {', '.join(parts)}")
        for block, found in self.read.items():
            parts = [f"{concept} {100 * value:.0f} %" for concept, value in found.items()]
            out.append(f"block {block} ({self.interpretation.sizes[block]}) reads: {', '.join(parts)} above chance")
        if self.interpretation.record is not None:
            out.append(self.interpretation.record.line())
        return out

    def to_json(self) -> dict[str, Any]:
        record = self.interpretation.record
        return {
            "net": self.network.name, "layer": self.network.layer, "blocks": self.interpretation.sizes,
            "layers": {name: table.to_json() | {"units": None} for name, table in self.tables.items()},
            "readings": self.read, "fit": record.facts if record else {},
        }  # fmt: skip

    def swaps(self, n: int = 5) -> Image:
        """Hosts in the first column, donors on top of each row of swaps: one row for each concept."""
        hosts, donors = torch.arange(0, n), torch.arange(n, 2 * n)
        found, z = self.interpretation, self.vectors
        rows = [("host", z[hosts]), ("donor", z[donors])]
        rows += [(f"donor's {c}", found.swap(z[hosts], z[donors], c)) for c in found.concepts]
        cells = [cell for _, row in rows for cell in self.network.pictures(row)]
        scale = max(1, 96 // self.network.side)
        return sheets.sheet(
            cells, n, rows=[label for label, _ in rows], scale=scale,
            title=f"{self.network.name}: one concept of each host replaced by its donor's",
        )  # fmt: skip

    def samples(self, n: int = 16, seed: int = 0) -> Image:
        """Pictures decoded from draws of the prior."""
        title = f"{self.network.name}: drawn from the prior through the flow"
        pictures = self.network.pictures(self.interpretation.sample(n, seed))
        return sheets.sheet(list(pictures), 8, title=title, scale=max(1, 96 // self.network.side))

    def save(self, folder: Path, stem: str, new: bool = False) -> list[Path]:
        """Writes ``<stem>.json``, the flow in the folder ``<stem>``, and pictures where the net decodes."""
        writing.write_text(folder / f"{stem}.json", json.dumps(self.to_json(), indent=1) + "\n", new)
        written = [folder / f"{stem}.json", self.interpretation.save(folder / stem)]
        if self.network.decode is not None:
            about = {"net": self.network.name}
            if self.interpretation.concepts:
                written.append(files.save_png(folder / f"{stem}.swaps.png", self.swaps(), about))
            written.append(files.save_png(folder / f"{stem}.samples.png", self.samples(), about))
        return written
