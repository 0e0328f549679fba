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

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import field_validator
from torch import Tensor

from sfumato import cards
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput
from sfumato.explain.latent_geometry.geometry import Geometry
from sfumato.explain.latent_geometry.sample_states import SampleStates, StateRecorder
from sfumato.hspace.basis import Basis, Directions, Encoder, local_basis
from sfumato.hspace.tap import layer_of
from sfumato.metrics.geometry import curvedness, mean_directions, slerp, spectrum
from sfumato.models import Condition, Model
from sfumato.sampling import Intervention, Run, Step, generate, invert
from sfumato.sampling.auxiliary import draw_auxiliary
from sfumato.sampling.intervention import Coverage
from sfumato.sampling.pixels import as_pixels
from sfumato.sampling.request import checked_size

__all__ = ["Geometry", "LatentGeometry", "explain_image"]


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
        rank: int = Field(default=10, ge=1, le=1000, description="how many directions span a tangent space")
        samples: int = Field(
            default=4,
            ge=1,
            le=1000,
            description="how many samples to compare; those beyond the run's are drawn beside it",
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
        iterations: int = Field(default=20, ge=1, le=10000, description="most iterations of the power method")
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
    needs_own_loop = "it follows the denoiser's derivatives at latents of its own"

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        self.maps: list[Geometry] = []
        self.activity = Coverage()

    def start(self, run: Run) -> None:
        """Raises UnknownName for a layer that is not there, BadInput for a curve without two samples."""
        p = self.params
        if p.curve and max(len(run), p.samples) < 2:
            raise BadInput("curve of latent_geometry lies between two samples; make at least two (n=2 or samples=2).")
        self._layer = layer_of(run.model, p.layer)
        self._levels = {min(round(at * run.total), run.total - 1): at for at in reversed(p.at)}
        self._record = StateRecorder(list(self._levels), self._layer)
        self._record.activity = self.activity

    def before_predict(self, step: Step) -> None:
        """Records where the samples are; everything else waits until they are finished."""
        self._record.before_predict(step)

    def finish(self, run: Run) -> None:
        self.maps = []
        places = [self._record.places[i] for i in sorted(self._record.places)]
        steps = sorted(self._record.places)
        if not steps:
            return
        before, p = run.cost, self.params
        for k in range(p.samples - len(run)):
            self._add_sample(run, max(run.seeds) + 1 + k)
        bases = [self._bases(run, each) for each in places]
        texts = list(dict.fromkeys([run.prompts[0], *p.prompts]))
        by_prompt = [
            [row[0].u, *self._under(run, each, texts[1:], row[0])] for each, row in zip(places, bases, strict=True)
        ]
        nearest = min(range(len(steps)), key=lambda i: abs(steps[i] / run.total - p.mean_at))
        common = mean_directions([basis.u for basis in bases[nearest]], p.mean)
        facts = {"model": run.model.name, "at": steps[nearest] / run.total, "mean": p.mean, "samples": len(bases[0])}
        geometry = Geometry(
            points=tuple(self._levels[i] for i in steps),
            u=_stacked([[basis.u for basis in row] for row in bases]),
            s=_stacked([[basis.s for basis in row] for row in bases]),
            power=_stacked([[spectrum(basis.v) for basis in row] for row in bases]),
            by_prompt=_stacked(by_prompt),
            similarity=_similarity(run.model, texts),
            prompts=tuple(texts),
            curved={kind: self._curve(run, places[0], kind) for kind in ("line", "sphere") if p.curve},
            directions=Directions(common.cpu(), self._layer.name, facts),
        )
        self.maps = [geometry] * len(run)
        self.activity.cost += run.cost - before
        del self._record

    def explain_image(self, model: Model, image: Any, prompt: str, **options: Any) -> Any:
        """:func:`explain_image` with these parameters."""
        return explain_image(model, image, prompt, **{**self.params.model_dump(), **options})

    def pictures(self, result: Any, index: int) -> dict[str, Image.Image]:
        """The plots, beside the first picture."""
        return {"geometry": self.maps[0].plots()} if self.maps and index == 0 else {}

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _add_sample(self, run: Run, seed: int) -> None:
        """One more sample, of the first one's prompt, as the run would draw it; its places join the others."""
        assert run.request is not None
        record = StateRecorder(list(self._levels), self._layer)
        draw_auxiliary(run, run.request.prompts[0], seed=seed, parts=[record])
        for i, places in self._record.places.items():
            places.x += record.places[i].x
            places.conditions += record.places[i].conditions

    def _bases(self, run: Run, places: SampleStates) -> list[Basis]:
        rows = zip(places.x, places.conditions, strict=True)
        return [self._basis(run, places.t, x, condition) for x, condition in rows]

    def _under(self, run: Run, places: SampleStates, texts: Sequence[str], own: Basis) -> list[Tensor]:
        """Tangent spaces (n d) at the first sample's latents under other prompts."""
        guidance = places.conditions[0].guidance
        others = [run.model.encode_text([text], None, False, guidance) for text in texts]
        return [self._basis(run, places.t, places.x[0], other, own).u for other in others]

    def _basis(self, run: Run, t: Tensor, x: Tensor, condition: Condition, begin: Basis | None = None) -> Basis:
        p = self.params
        encoder = Encoder(run.model, self._layer, t, condition)
        found = local_basis(encoder, x, p.rank, iterations=p.iterations, tolerance=p.tolerance, begin=begin)
        run.add_cost(encoder.cost / len(run), None)
        return found

    def _curve(self, run: Run, places: SampleStates, kind: str) -> float:
        """How curved the path from the first sample's latents to the second's is, under the first one's prompt."""
        spaces: list[Tensor] = []
        begin, (a, b) = None, places.x[:2]
        for share in torch.linspace(0, 1, self.params.curve + 2).tolist():
            place = torch.lerp(a, b, share) if kind == "line" else slerp(a, b, share)
            begin = self._basis(run, places.t, place, places.conditions[0], begin)
            spaces.append(begin.u)
        return curvedness(spaces)


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
