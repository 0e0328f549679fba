"""Pullback: editing directions that a diffusion model has by itself, found without labels.

At one noise level, the latents are moved along a direction v that changes the model's inner features most: a right
singular vector of the derivative of its bottleneck (Park, Kwon, Choi, Jo, Uh 2023; the basis is
:func:`sfumato.hspace.local_basis`). Early directions change what is coarse, late ones what is fine. The move itself is
the published *x-space guidance*, x <- x + gamma (eps(x + delta v) - eps(x)), repeated; or *geodesic shooting* (Park,
Kwon, Jo, Uh 2023, arXiv 2302.12469), x <- x + gamma delta v with v kept in the local basis of every new x.

    >>> generate(model, "a red cube", seed=3, interventions=Pullback(direction=1))
    >>> generate(model, "a red cube", seed=4, interventions=Pullback(direction=1, from_seed=3))  # carried over
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sfumato import cards
from sfumato.cards import Card, Field, FilePath, register
from sfumato.errors import BadInput
from sfumato.hspace.basis import Basis, Directions, Encoder, local_basis
from sfumato.hspace.tap import layer_of
from sfumato.models import Condition
from sfumato.sampling import Intervention, Run, Step
from sfumato.sampling.auxiliary import draw_auxiliary
from sfumato.sampling.intervention import Coverage

__all__ = ["Pullback"]


@register
class Pullback(Intervention):
    """Moves the latents along a local direction. ``bases``: the local basis of every sample, where it was moved."""

    CARD = Card(
        key="pullback",
        title="Understanding the Latent Space of Diffusion Models through the Lens of Riemannian Geometry",
        authors="Park, Kwon, Choi, Jo, Uh",
        year=2023,
        arxiv="2307.12868",
        verb="edit",
        needs=("pictures", "noise_path", "differentiable_state"),
        defaults_from="the authors' code for Stable Diffusion (at 0.7 T, delta 1, gamma 1, 16 repeats); rank 10 for 50",
        cost="per sample 5 times (rank + 4) per iteration, of the share of the denoiser up to the layer; 2 per repeat",
        not_reproduced="fresh noise in the last fifth of the steps. Transformers have no bottleneck: their "
        "features are those of the picture after the middle block, which is our extension",
        summary="editing directions found without labels, in the local geometry of the latents",
        example="pullback:rank=2,iterations=1,repeats=2",
    )

    class Params(cards.Params):
        direction: int = Field(default=1, ge=1, description="which direction, 1 changes the features most")
        reverse: bool = Field(default=False, description="move the other way")
        at: float = Field(
            default=0.3,
            ge=0,
            lt=1,
            description="when to move: early for what is coarse, late for what is fine",
            json_schema_extra={"unit": "progress"},
        )
        strength: float = Field(default=1.0, ge=0, description="size of each move, gamma; 0 changes nothing")
        repeats: int = Field(default=16, ge=1, le=1000, description="how many moves")
        delta: float = Field(
            default=1.0,
            gt=0,
            description="length of the probe along the direction",
            json_schema_extra={"unit": "latent"},
        )
        move: Literal["guidance", "geodesic"] = Field(
            default="guidance",
            description="by the change of the predicted noise, direction fixed; or along the direction itself, kept in "
            "the local basis",
        )
        prompt: str | None = Field(
            default=None, description="text under which the direction is found and followed; none: the run's own"
        )
        from_seed: int | None = Field(
            default=None, ge=0, description="take the direction from the sample of this seed and carry it over"
        )
        from_prompt: str | None = Field(default=None, description="the prompt of that sample; none: the run's own")
        directions: FilePath | None = Field(
            default=None, description="file of directions for many samples, as latent_geometry writes them"
        )
        transport: Literal["published", "exact"] = Field(
            default="published", description="carry a direction over by V U^T u, or by V S^-1 U^T u"
        )
        layer: str | None = Field(
            default=None, description="block whose features count, such as up.0 or joint.3; none: the bottleneck"
        )
        rank: int = Field(default=10, ge=1, le=1000, description="how many directions span the local basis")
        iterations: int = Field(default=20, ge=1, le=10000, description="most iterations of the power method")
        tolerance: float = Field(
            default=1e-2, gt=0, description="angle at which they stop", json_schema_extra={"unit": "radian"}
        )

    role = "steerer"

    def __init__(self, **given: Any):
        self.params = p = self.Params(**given)
        if p.from_seed is not None and p.directions is not None:
            raise BadInput("from_seed and directions of pullback both say which direction; give one of them.")
        if p.from_prompt is not None and p.from_seed is None:
            raise BadInput("from_prompt of pullback says what from_seed shows; give from_seed too.")
        self._shared = None if p.directions is None else Directions.load(p.directions)
        if self._shared is not None and p.direction > len(self._shared.u):
            raise BadInput(f"direction is {p.direction}, but {p.directions} holds {len(self._shared.u)}.")
        self.bases: list[Basis] = []
        self.activity = Coverage()

    def start(self, run: Run) -> None:
        """Raises UnknownName for a layer that is not there."""
        p = self.params
        named = p.layer if p.layer is not None or self._shared is None else self._shared.layer
        self._layer = layer_of(run.model, named)
        self._step = min(round(p.at * run.total), run.total - 1)
        if self._step < run.begin:
            raise BadInput(f"at of pullback is {p.at:g}, but this run begins at {run.begin / run.total:g}.")
        if run.samples.start == 0:
            self.bases = []

    def before_predict(self, step: Step) -> None:
        """The whole edit, at one step."""
        if self.strength == 0 or step.i != self._step:
            return
        condition = self._condition(step)
        scale = step.path.scale(step.t)
        x = (step.x / scale).detach()
        found = [self._basis(step, row, condition, each) for row, each in enumerate(x.split(1))]
        carried = self._carried(step)
        k = self.params.direction - 1
        chosen = [basis.v[k] if carried is None else self._carry(basis, carried) for basis in found]
        v = torch.stack(chosen).to(x) * (-1 if self.params.reverse else 1)
        self.bases += found
        if self.params.move == "guidance":
            x = self._guided(step, x, v, condition, scale)
        else:
            x = self._shot(step, x, v, condition, found)
        step.x = (scale * x).to(step.x.dtype)
        self.mark(step, sites=[self._layer.path])

    # -- directions ----------------------------------------------------------------------------------------------------

    def _condition(self, step: Step) -> Condition:
        """What the direction depends on: the run's texts, or the given one."""
        run = step.run
        if self.params.prompt is None:
            return step.condition
        condition = run.model.encode_text([self.params.prompt], None, False, step.condition.guidance)
        return condition.rows([0] * len(run))

    def _basis(self, step: Step, row: int, condition: Condition, x: Tensor, begin: Basis | None = None) -> Basis:
        p = self.params
        encoder = Encoder(step.run.model, self._layer, step.t, condition.rows([row]))
        n = max(p.rank, p.direction)
        basis = local_basis(encoder, x, n, iterations=p.iterations, tolerance=p.tolerance, begin=begin)
        step.run.add_cost(encoder.cost / len(step.run), step)
        return basis

    def _carried(self, step: Step) -> Tensor | None:
        """The direction (d) among the features that is to be carried over, if one is."""
        p = self.params
        if self._shared is not None:
            return self._shared.u[p.direction - 1]
        if p.from_seed is None:
            return None
        run = step.run
        prompt = run.prompts[0] if p.from_prompt is None else p.from_prompt
        there = draw_auxiliary(run, prompt, seed=p.from_seed, until=self._step)
        self.activity.cost += there.cost
        x = (there.x / step.path.scale(step.t)).detach()
        condition = self._condition(step) if p.prompt is not None else there.condition
        return self._basis(step, 0, condition, x).u[p.direction - 1]

    def _carry(self, basis: Basis, u: Tensor) -> Tensor:
        if u.shape != basis.u.shape[1:]:
            raise BadInput(
                f"the directions have {len(u)} features, but {self._layer.name} has {basis.u.shape[1]} here; use "
                f"directions of the same model, layer and picture size."
            )
        return basis.carried(u.to(basis.u.device), self.params.transport == "exact")

    # -- moves ---------------------------------------------------------------------------------------------------------

    def _guided(self, step: Step, x: Tensor, v: Tensor, condition: Condition, scale: Any) -> Tensor:
        """x-space guidance; the noise is predicted without classifier-free guidance."""
        p = self.params
        for _ in range(p.repeats):
            plain, probed = (
                step.predict((scale * each).to(step.x.dtype), condition=condition).eps().to(x)
                for each in (x, x + p.delta * v)
            )
            x = x + p.strength * (probed - plain)
        return x

    def _shot(self, step: Step, x: Tensor, v: Tensor, condition: Condition, bases: list[Basis]) -> Tensor:
        """Geodesic shooting: the direction is projected onto the basis of each new place."""
        p = self.params
        for i in range(p.repeats):
            x = x + p.strength * p.delta * v
            if i < p.repeats - 1:
                rows = enumerate(zip(x.split(1), bases, strict=True))
                bases = [self._basis(step, row, condition, each, begin=basis) for row, (each, basis) in rows]
                v = torch.stack([basis.projected(each) for basis, each in zip(bases, v, strict=True)]).to(x)
        return x
