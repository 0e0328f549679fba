"""Latent geometry: how the space of latents bends under a diffusion model, over time, between samples and prompts.

While pictures are made, the local basis of every sample (:func:`sfumato.hspace.local_basis`) is found at a few noise
levels. From these come the analyses of Park, Kwon, Choi, Jo, Uh 2023 (section 4): at which frequencies the strongest
directions lie, how far the tangent spaces of one sample at two times, of two samples, or of two prompts at the same
latents are from each other; and directions that serve many samples, for :class:`sfumato.edit.pullback.Pullback`.

    >>> look = LatentGeometry(prompts=["a blue ball", "a red cone"])
    >>> generate(model, "a red cube", interventions=look)
    >>> look.maps[0].between_prompts(0)

Changes nothing in the pictures.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from pydantic import field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfumato import cards, files
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput
from sfumato.hspace.basis import FORMAT, Basis, Directions, Encoder, local_basis
from sfumato.hspace.tap import layer_of
from sfumato.metrics.geometry import curvedness, geodesic_distance, mean_directions, slerp, spectrum
from sfumato.models import Condition, Model
from sfumato.sampling import Intervention, Run, Step, generate, invert
from sfumato.sampling.intervention import Coverage
from sfumato.sampling.loop import opened, walk
from sfumato.sampling.request import Source, as_pixels, checked_size

__all__ = ["Geometry", "LatentGeometry", "explain_image"]


@dataclass(frozen=True, eq=False)
class Geometry:
    """What was found at p noise levels for b samples, n directions each.

    ``points``: the levels as fractions of progress. ``u`` (p b n d) tangent spaces, ``s`` (p b n) singular values,
    ``power`` (p b n r) of the directions by radial frequency. ``told`` (p q n d): tangent spaces of the first sample's
    latents under other prompts, of which the first is its own; ``alike`` (q q) says how similar their texts are.
    ``curved``: of the path between the first two samples' latents, by kind of path. ``directions``: for all samples.
    """

    points: tuple[float, ...]
    u: Tensor
    s: Tensor
    power: Tensor
    told: Tensor
    alike: Tensor
    prompts: tuple[str, ...]
    curved: dict[str, float]
    directions: Directions

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
        return [(float(self.alike[a, b]), geodesic_distance(self.told[i, a], self.told[i, b])) for a, b in pairs]

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
            axes[0].semilogy(self.power[i].mean((0, 1)).clamp_min(1e-6), color=shades[i], label=f"{at:g}")
        axes[0].set(title="directions by frequency", xlabel="cycles across the latents", ylabel="share of power")
        axes[0].legend(title="progress", fontsize=7)
        shown = axes[1].imshow(self.between_times(), cmap="magma")
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
        tensors = {"s": self.s, "power": self.power, "told": self.told, "alike": self.alike}
        tensors |= {"spaces": self.u, "u": self.directions.u}
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
                told = json.loads((file.metadata() or {})["geometry"])
                tensors = {name: file.get_tensor(name) for name in ("s", "power", "told", "alike", "spaces")}
        except (SafetensorError, KeyError, ValueError):
            raise BadInput(f"{path} holds directions only, not the geometry they come from.") from None
        u = tensors.pop("spaces")
        curved = {str(name): float(value) for name, value in told["curved"].items()}
        return cls(
            tuple(told["points"]), u, prompts=tuple(told["prompts"]), curved=curved, directions=directions, **tensors
        )


@register
class LatentGeometry(Intervention):
    """Finds local bases while pictures are made. Afterwards ``maps`` holds the :class:`Geometry`, for each sample the
    same one."""

    CARD = Card(
        key="latent_geometry",
        title="Understanding the Latent Space of Diffusion Models through the Lens of Riemannian Geometry (analyses)",
        authors="Park, Kwon, Choi, Jo, Uh",
        year=2023,
        arxiv="2307.12868",
        verb="explain",
        needs=("pictures", "noise_path", "differentiable_state"),
        defaults_from="the paper, section 4; rank 10 for 50",
        cost="per sample and level 5 times (rank + 4) per iteration, of the share of the denoiser up to the layer",
        not_reproduced="the comparison of data sets takes one run per model. Transformers have no bottleneck: their "
        "features are those of the picture after the middle block, which is our extension",
        summary="how the latent space bends over time, between samples and between prompts",
        example="latent_geometry:at=[0.5],rank=1,iterations=1,samples=1",
    )

    class Params(cards.Params):
        at: list[float] = Field(
            default=[0.1, 0.3, 0.5, 0.7, 0.9],
            min_length=1,
            description="noise levels to look at",
            json_schema_extra={"unit": "progress"},
        )
        rank: int = Field(default=10, ge=1, description="how many directions span a tangent space")
        samples: int = Field(
            default=4, ge=1, description="how many samples to compare; those beyond the run's are drawn beside it"
        )
        prompts: list[str] = Field(
            default=[], description="other texts under which the first sample's latents are looked at as well"
        )
        curve: int = Field(
            default=0,
            ge=0,
            le=100,
            description="how many places to look at between the first two samples, for how curved that path is",
        )
        mean: Literal["frechet", "hungarian"] = Field(
            default="frechet", description="how the directions of all samples are averaged into common ones"
        )
        mean_at: float = Field(
            default=0.3,
            ge=0,
            lt=1,
            description="at the level nearest to which they are averaged",
            json_schema_extra={"unit": "progress"},
        )
        layer: str | None = Field(
            default=None, description="block whose features count, such as up.0 or joint.3; none: the bottleneck"
        )
        iterations: int = Field(default=20, ge=1, description="most iterations of the power method")
        tolerance: float = Field(
            default=1e-2, gt=0, description="angle at which they stop", json_schema_extra={"unit": "radian"}
        )

        @field_validator("at")
        @classmethod
        def _fractions(cls, given: list[float]) -> list[float]:
            if not all(0 <= each < 1 for each in given):
                raise ValueError("each level is a fraction of progress from 0 to below 1")
            return sorted(set(given))

    role = "observer"
    couples_samples = True  # samples are compared

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        self.maps: list[Geometry] = []
        self.activity = Coverage()
        self._beside = False  # only to remember places, for another one

    def start(self, run: Run) -> None:
        """Raises UnknownName for a layer that is not there, BadInput for a curve without two samples."""
        p = self.params
        if p.curve and max(len(run), p.samples) < 2:
            raise BadInput("curve of latent_geometry lies between two samples; make at least two (n=2 or samples=2).")
        self._layer = layer_of(run.model, p.layer)
        self._steps = {min(round(at * run.total), run.total - 1): at for at in reversed(p.at)}
        self._places: dict[int, _Places] = {}

    def before_predict(self, step: Step) -> None:
        """Remembers where the samples are; everything else waits until they are finished."""
        if step.i in self._steps:
            x = (step.x / step.path.scale(step.t)).detach()
            self._places[step.i] = _Places(step.t, list(x.split(1)), [step.condition.rows([i]) for i in range(len(x))])
            self.mark(step, sites=[self._layer.path])

    def finish(self, run: Run) -> None:
        self.maps = []
        steps = sorted(self._places)
        if not steps or self._beside:
            return
        before, p = run.cost, self.params
        for k in range(p.samples - len(run)):
            self._draw_beside(run, max(run.seeds) + 1 + k)
        bases = [self._bases(run, self._places[i]) for i in steps]
        texts = list(dict.fromkeys([run.prompts[0], *p.prompts]))
        told = [
            [row[0].u, *self._told(run, self._places[i], texts[1:], row[0])]
            for i, row in zip(steps, bases, strict=True)
        ]
        nearest = min(range(len(steps)), key=lambda i: abs(steps[i] / run.total - p.mean_at))
        common = mean_directions([basis.u for basis in bases[nearest]], p.mean)
        facts = {"model": run.model.name, "at": steps[nearest] / run.total, "mean": p.mean, "samples": len(bases[0])}
        geometry = Geometry(
            points=tuple(self._steps[i] for i in steps),
            u=_stacked([[basis.u for basis in row] for row in bases]),
            s=_stacked([[basis.s for basis in row] for row in bases]),
            power=_stacked([[spectrum(basis.v) for basis in row] for row in bases]),
            told=_stacked(told),
            alike=_similarity(run.model, texts),
            prompts=tuple(texts),
            curved={kind: self._curve(run, self._places[steps[0]], kind) for kind in ("line", "sphere") if p.curve},
            directions=Directions(common.cpu(), self._layer.name, facts),
        )
        self.maps = [geometry] * len(run)
        self.activity.cost += run.cost - before
        del self._places

    def explain_image(self, model: Model, image: Any, prompt: str, **options: Any) -> Any:
        """:func:`explain_image` with these parameters."""
        return explain_image(model, image, prompt, **{**self.params.model_dump(), **options})

    def pictures(self, result: Any, index: int) -> dict[str, Image.Image]:
        """The plots, beside the first picture."""
        return {"geometry": self.maps[0].plots()} if self.maps and index == 0 else {}

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _draw_beside(self, run: Run, seed: int) -> None:
        """One more sample, of the first one's prompt, as the run would draw it; its places join the others."""
        assert run.request is not None
        negatives = run.request.negatives and run.request.negatives[:1]
        request = replace(
            run.request, prompts=run.request.prompts[:1], negatives=negatives, seeds=[seed], source=Source()
        )
        look = LatentGeometry(**self.params.model_dump() | {"samples": 1, "curve": 0})
        look._beside = True
        with opened(run.model, request, range(1), (look,)) as other:
            shape, like = (1, *run.model.latent_shape(run.size[1], run.size[0])), run.model
            noise = randn_tensor(shape, generator=other.generators, device=like.device, dtype=like.dtype)
            walk(other, run.model.prepare(noise, other.scheduler))
        run.spend(other.cost / len(run), None)
        for i, places in self._places.items():
            places.x += look._places[i].x
            places.conditions += look._places[i].conditions

    def _bases(self, run: Run, places: _Places) -> list[Basis]:
        rows = zip(places.x, places.conditions, strict=True)
        return [self._basis(run, places.t, x, condition) for x, condition in rows]

    def _told(self, run: Run, places: _Places, texts: Sequence[str], own: Basis) -> list[Tensor]:
        """Tangent spaces (n d) at the first sample's latents under other prompts."""
        guidance = places.conditions[0].guidance
        others = [run.model.encode_text([text], None, False, guidance) for text in texts]
        return [self._basis(run, places.t, places.x[0], other, own).u for other in others]

    def _basis(self, run: Run, t: Tensor, x: Tensor, condition: Condition, begin: Basis | None = None) -> Basis:
        p = self.params
        encoder = Encoder(run.model, self._layer, t, condition)
        found = local_basis(encoder, x, p.rank, iterations=p.iterations, tolerance=p.tolerance, begin=begin)
        run.spend(encoder.cost / len(run), None)
        return found

    def _curve(self, run: Run, places: _Places, kind: str) -> float:
        """How curved the path from the first sample's latents to the second's is, under the first one's prompt."""
        spaces: list[Tensor] = []
        begin, (a, b) = None, places.x[:2]
        for share in torch.linspace(0, 1, self.params.curve + 2).tolist():
            place = torch.lerp(a, b, share) if kind == "line" else slerp(a, b, share)
            begin = self._basis(run, places.t, place, places.conditions[0], begin)
            spaces.append(begin.u)
        return curvedness(spaces)


@dataclass
class _Places:
    """Where samples are at timestep ``t``: latents (1 c h w) in unit scaling and conditions, one each."""

    t: Tensor
    x: list[Tensor]
    conditions: list[Condition]


def explain_image(
    model: Model,
    image: Any,
    prompt: str,
    *,
    steps: int = 20,
    size: tuple[int, int] | None = None,
    **params: Any,
) -> Geometry:
    """The geometry along the way from noise to a picture that exists: it is inverted, then followed forward without
    guidance; samples beside it are drawn from noise. ``params`` are those of :class:`LatentGeometry`. Raises BadInput,
    UnknownName."""
    look = LatentGeometry(**params)
    pixels = as_pixels(image, None if size is None else checked_size(model, size))
    trajectory = invert(model, pixels, prompt, steps=steps, size=(pixels.shape[-1], pixels.shape[-2]))
    settings = trajectory.settings | ({} if model.embeds_guidance else {"guidance": 1.0})
    settings["size"] = (pixels.shape[-1], pixels.shape[-2])
    generate(model, prompt, **settings, interventions=look, decode=False)
    return look.maps[0]


def _stacked(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack([each.cpu() for each in row]) for row in rows])


def _similarity(model: Model, texts: Sequence[str]) -> Tensor:
    """Cosines (q q) between texts as the model's own encoder reads them, mean over tokens and less the mean text."""
    with torch.no_grad():
        read = model.encode_text(list(texts), None, False).cond["embeds"].float().mean(1).cpu()
    if len(texts) > 2:  # two would always be opposites
        read = read - read.mean(0)
    read = read / read.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return read @ read.T
