"""What was found: tangent spaces of samples at several levels, the analyses of section 4, plots and files."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfumato import files, valid
from sfumato.errors import BadInput
from sfumato.hspace.basis import FORMAT, Directions
from sfumato.markup import described
from sfumato.metrics.geometry import geodesic_distance

#: names of the tensors in files, and the fields that they hold
STORED = {"spaces": "u", "s": "s", "power": "power", "told": "by_prompt", "alike": "similarity"}


@dataclass(frozen=True, eq=False)
class Geometry:
    """What was found at p noise levels for b samples, n directions each.

    ``points``: the levels as fractions of progress. ``u`` (p b n d) tangent spaces, ``s`` (p b n) singular values,
    ``power`` (p b n r) of the directions by radial frequency. ``by_prompt`` (p q n d): tangent spaces of the first
    sample's latents under other prompts, of which the first is its own; ``similarity`` (q q) of their
    texts.
    ``curved``: of the path between the first two samples' latents, by kind of path. ``directions``: for all samples.
    """

    points: tuple[float, ...]
    u: Tensor
    s: Tensor
    power: Tensor
    by_prompt: Tensor
    similarity: Tensor
    prompts: tuple[str, ...]
    curved: dict[str, float]
    directions: Directions

    __repr__ = described

    @property
    def centroids(self) -> Tensor:
        """The mean radial frequency (p b), in cycles along the shorter side, of each sample's directions."""
        rings = torch.arange(self.power.shape[-1], dtype=self.power.dtype)
        return (self.power * rings).sum(-1).mean(-1)

    def between_times(self) -> Tensor:
        """Distances (p p) between one sample's tangent spaces at two levels, mean over samples."""
        p, b = self.u.shape[:2]
        found = torch.zeros(p, p)
        for i, j in combinations(range(p), 2):
            far = [geodesic_distance(self.u[i, row], self.u[j, row]) for row in range(b)]
            found[i, j] = found[j, i] = sum(far) / b
        return found

    def between_samples(self, i: int) -> list[float]:
        """Distances between the tangent spaces of every two samples at level ``i``."""
        return [geodesic_distance(a, b) for a, b in combinations(self.u[i], 2)]

    def between_prompts(self, i: int) -> list[tuple[float, float]]:
        """(similarity of the texts, distance of the tangent spaces) of every two prompts at level ``i``, at the same
        latents."""
        pairs = combinations(range(len(self.prompts)), 2)
        return [
            (float(self.similarity[a, b]), geodesic_distance(self.by_prompt[i, a], self.by_prompt[i, b]))
            for a, b in pairs
        ]

    # -- pictures and files --------------------------------------------------------------------------------------------

    def plots(self) -> Image.Image:
        """The analyses side by side: spectra over time, distances over time, between samples and between prompts."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        panels = 2 + (self.u.shape[1] > 1) + (len(self.prompts) > 1)
        figure = Figure(figsize=(4 * panels, 3.4), dpi=100, layout="constrained")
        axes = list(figure.subplots(1, panels))
        shades = [str(0.75 * i / max(1, len(self.points) - 1)) for i in range(len(self.points))]
        for i, at in enumerate(self.points):
            axes[0].semilogy(self.power[i].mean((0, 1)).clamp_min(1e-6).numpy(), color=shades[i], label=f"{at:g}")
        axes[0].set(title="directions by frequency", xlabel="cycles across the latents", ylabel="share of power")
        axes[0].legend(title="progress", fontsize=7)
        shown = axes[1].imshow(self.between_times().numpy(), cmap="magma")
        names = [f"{at:g}" for at in self.points]
        axes[1].set(title="distance across time", xlabel="progress", ylabel="progress")
        axes[1].set_xticks(range(len(names)), names)
        axes[1].set_yticks(range(len(names)), names)
        figure.colorbar(shown, ax=axes[1])
        rest = axes[2:]
        if self.u.shape[1] > 1:
            axis = rest.pop(0)
            axis.boxplot([self.between_samples(i) for i in range(len(self.points))], tick_labels=names)
            axis.set(title="distance between samples", xlabel="progress", ylabel="radians")
        if len(self.prompts) > 1:
            axis = rest.pop(0)
            for i, at in enumerate(self.points):
                x, y = zip(*self.between_prompts(i), strict=True)
                axis.scatter(x, y, s=10, color=shades[i], label=f"{at:g}")
            axis.set(title="distance between prompts", xlabel="similarity of the texts", ylabel="radians")
            axis.legend(title="progress", fontsize=7)
        canvas = FigureCanvasAgg(figure)
        encoded = io.BytesIO()
        canvas.print_png(encoded)
        return Image.open(encoded).convert("RGB")

    def grid(self, image: Image.Image | None = None) -> Image.Image:
        """The plots; the picture they belong to says nothing in them."""
        return self.plots()

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, whole or not at all; ``pullback:directions=FILE`` reads it as well."""
        tensors = {name: getattr(self, field) for name, field in STORED.items()}
        tensors["u"] = self.directions.u
        metadata = {
            "format": FORMAT,
            "directions": json.dumps({"layer": self.directions.layer, "facts": self.directions.facts}),
            "geometry": json.dumps({"points": self.points, "prompts": self.prompts, "curved": self.curved}),
        }
        return files.save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path | str) -> Geometry:
        """What :meth:`save` wrote. Raises BadInput for any other file."""
        directions = Directions.load(path)
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = valid.loads((file.metadata() or {})["geometry"])
                tensors = {field: file.get_tensor(name) for name, field in STORED.items()}
        except (SafetensorError, KeyError, ValueError):
            raise BadInput(f"{path} holds directions only, not the geometry they come from.") from None
        curved = {str(name): float(value) for name, value in metadata["curved"].items()}
        return cls(
            points=tuple(metadata["points"]),
            prompts=tuple(metadata["prompts"]),
            curved=curved,
            directions=directions,
            **tensors,
        )
