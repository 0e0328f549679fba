"""What is known and lost layer by layer: variances of concepts, fidelity, and sheets of samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sfumato import files, sheets, writing
from sfumato.explain.cnn_invariances.explorer import InvarianceExplorer
from sfumato.explain.iin import Interpretation
from sfumato.markup import described
from sfumato.translation.translator import FitRecord

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["InvarianceTable", "LayerRow", "LayerSamples", "variance_ratios"]


def variance_ratios(reader: Interpretation, drawn: Tensor, data: Tensor) -> dict[str, float]:
    """For each concept the variance of its block over samples of one picture, averaged over pictures, as a share of its
    variance over the data: 0 where the layer holds all of it, 1 where it is invariant (section 3.3).

    Args:
        drawn: codes (b n d), n samples for each of b pictures. data: codes (m d).
    """
    own = reader.codes(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])
    all_ = reader.codes(data)
    return {
        concept: float((own[..., reader.block(concept)].var(1).mean(0) / all_[:, reader.block(concept)].var(0)).mean())
        for concept in reader.concepts
    }


@dataclass(eq=False)
class LayerRow:
    """One layer: its explorer, the :func:`variance_ratios`, its fidelity and the record of the fit."""

    layer: str
    explorer: InvarianceExplorer
    ratios: dict[str, float]
    fidelity: dict[str, float]
    record: FitRecord


@dataclass(eq=False)
class InvarianceTable:
    """All layers of a net, in order, and pictures to draw samples for."""

    net: str
    layers: list[LayerRow]
    pixels: Tensor
    temperature: float = 1.0
    seed: int = 0

    __repr__ = described

    def lines(self) -> list[str]:
        """For each layer first what can be trusted, then what it is invariant to."""
        out = []
        for row in self.layers:
            f = row.fidelity
            line = f"{row.layer}: samples look to it like their picture by {f['cosine']:.2f}"
            line += f" (reconstructions {f['cosine_reconstruction']:.2f}, other pictures {f['cosine_others']:.2f})"
            if "decision" in f:
                line += f", same decision {100 * f['decision']:.0f} %"
                line += f" (reconstructions {100 * f['decision_reconstruction']:.0f} %)"
            out.append(line)
            if row.ratios:
                parts = [f"{concept} {100 * value:.0f} %" for concept, value in row.ratios.items()]
                out.append(f"{row.layer}: invariant to {', '.join(parts)}")
        return out

    def to_json(self) -> dict[str, Any]:
        return {
            "net": self.net,
            "layers": {
                r.layer: {"ratios": r.ratios, "fidelity": r.fidelity, "fit": r.record.facts} for r in self.layers
            },
        }

    def picture(self, n: int = 4) -> Image:
        """Pictures in rows, one column for each layer: one sample each, for ``n`` pictures."""
        shown = self.pixels[:n]
        n = len(shown)
        columns = [list(shown)]
        columns.append(list(self.layers[0].explorer.autoencoder.pictures(_codes(self.layers[0], shown))))
        for row in self.layers:
            drawn = row.explorer.samples(shown, 1, self.seed, self.temperature)
            columns.append(list(row.explorer.pictures(drawn)[:, 0]))
        heads = ["picture", "autoencoder", *[row.layer.rpartition("stages.")[2] for row in self.layers]]
        cells = [column[i] for i in range(n) for column in columns]
        title = f"{self.net}: samples that each layer should not tell from the picture"
        return sheets.sheet(cells, len(columns), heads=heads, title=title, scale=max(1, 96 // shown.shape[-1]))

    def save(self, folder: Path, stem: str, new: bool = False) -> list[Path]:
        """Writes ``<stem>.json``, ``<stem>.png`` and the flow of every layer in the folder ``<stem>``."""
        writing.write_text(folder / f"{stem}.json", json.dumps(self.to_json(), indent=1) + "\n", new)
        written = [folder / f"{stem}.json", files.save_png(folder / f"{stem}.png", self.picture(), {"net": self.net})]
        for row in self.layers:
            written.append(row.record.translator.save(folder / stem / writing.slug(row.layer)))
        return written


def _codes(row: LayerRow, pixels: Tensor) -> Tensor:
    return row.explorer.autoencoder.vectors(pixels)[0]


@dataclass(eq=False)
class LayerSamples:
    """Samples for one picture: ``rows`` of (layer, pictures (n 3 h w))."""

    net: str
    pixels: Tensor
    rebuilt: Tensor
    rows: Sequence[tuple[str, Tensor]]
    attacked: bool = False

    __repr__ = described

    def grid(self, image: Any = None) -> Image:
        """A sheet: the picture, what the autoencoder keeps of it, then the samples; a row for each layer."""
        n = len(self.rows[0][1])
        cells = [cell for _, pictures in self.rows for cell in (self.pixels, self.rebuilt, *pictures)]
        heads = ["picture", "attacked, rebuilt" if self.attacked else "rebuilt", *["sample"] * n]
        title = f"{self.net}: pictures that a layer should not tell from the first"
        scale = max(1, 96 // self.pixels.shape[-1])
        return sheets.sheet(cells, n + 2, heads=heads, rows=[layer for layer, _ in self.rows], title=title, scale=scale)

    def save(self, path: Path) -> Path:
        """Writes the samples (n 3 h w) of every layer by name, as safetensors."""
        tensors = {layer: pictures for layer, pictures in self.rows}
        return files.save_tensors(path, {"picture": self.pixels, **tensors}, {"net": self.net})
