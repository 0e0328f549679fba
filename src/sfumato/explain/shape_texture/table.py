"""The dimensions of all layers of a net, as text, picture and file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato import files, writing
from sfumato.explain.shape_texture.dimensions import RESIDUAL, Dimensions
from sfumato.markup import described

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class LayerTable:
    """Dimensions of every layer of one net, in order."""

    net: str
    layers: dict[str, Dimensions]

    __repr__ = described

    def lines(self) -> list[str]:
        """The table as text: percent of the units and raw score of every factor, layer by layer."""
        out = []
        for name, found in self.layers.items():
            parts = [f"{f} {found.percent(f):.1f} % (score {found.scores[f].text()})" for f in found.scores]
            out.append(f"{name}: {found.d} units: " + ", ".join(parts) + f", residual {found.percent(RESIDUAL):.1f} %")
        return out

    def to_json(self) -> dict[str, Any]:
        return {"net": self.net, "layers": {name: found.to_json() for name, found in self.layers.items()}}

    def picture(self) -> Image:
        """Raw scores by layer, one line per factor, with their intervals."""
        return plot({self.net: self})

    def save(self, folder: Path, stem: str, new: bool = False) -> list[Path]:
        """Writes ``<stem>.json`` and ``<stem>.png``; returns them. ``new``: FileExistsError if they are there."""
        writing.write_text(folder / f"{stem}.json", json.dumps(self.to_json(), indent=1) + "\n", new)
        return [folder / f"{stem}.json", files.save_png(folder / f"{stem}.png", self.picture(), {"net": self.net})]


def plot(tables: Mapping[str, LayerTable]) -> Image:
    """Raw scores of every factor by layer, a panel for each net."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image as PILImage

    figure = Figure(figsize=(4.2 * len(tables), 3.6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        names = [name.replace("encoder.", "").replace("resnet.", "") for name in table.layers]
        for factor in next(iter(table.layers.values())).scores:
            found = [each.scores[factor] for each in table.layers.values()]
            values = np.array([each.value for each in found])
            bars = np.abs(np.array([[each.low, each.high] for each in found]).T - values)
            axis.errorbar(range(len(names)), values, bars, marker="o", ms=4, capsize=2, label=factor)
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.axhline(0, color="0.8", lw=0.8, zorder=0)
    axes[0].set_ylabel("score (share of variance)")
    axes[-1].legend(fontsize=8, frameon=False)
    canvas.draw()
    return PILImage.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
