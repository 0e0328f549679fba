"""Inversion: from a picture back to the noise that makes it, along the deterministic first-order path of the family.

For diffusion models this is DDIM inversion (Song et al. 2021, section 4.3; Dhariwal & Nichol 2021, appendix F), for
flow models the Euler path run backwards. One sampling step is ``x' = A x + B out(x, t)``; its inverse needs ``out``
at the unknown ``x`` and, in the classical form, takes it at ``x'`` instead. With ``refine`` > 0 the equation is
solved by that many fixed-point iterations per step (Pan et al. 2023, section 3.2), which removes the error where they
converge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import NotSupported
from sfumato.markup import described
from sfumato.models import Model
from sfumato.sampling.guidance import Guidance
from sfumato.sampling.intervention import Coverage, Intervention, arrange, distinct_names, refuse_idle
from sfumato.sampling.loop import open_run, walk
from sfumato.sampling.pixels import as_pixels_of
from sfumato.sampling.process import process_of
from sfumato.sampling.request import checked_int, checked_request
from sfumato.sampling.run import Run, Step


@dataclass(eq=False)
class Trajectory:
    """The way back. ``latents`` (s+1 b c h w) in the order of sampling: ``latents[i]`` is what step i of sampling
    starts from, ``latents[-1]`` the clean latents. ``generate(model, prompt, **trajectory.settings)`` follows it
    forward again."""

    latents: Tensor
    timesteps: Tensor
    steps: int
    scheduler: str
    prompts: list[str]
    coverage: dict[str, dict[str, Any]] = field(default_factory=dict)
    cost: float = 0.0

    __repr__ = described

    @property
    def noise(self) -> Tensor:
        """The noise (b c h w) that makes the picture."""
        return self.latents[0]

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments for ``generate`` that walk the same schedule from this noise."""
        return {"latents": self.noise, "steps": self.steps, "scheduler": self.scheduler}


def invert(
    model: Model,
    source: Any,
    prompt: str | Sequence[str],
    *,
    steps: int | None = None,
    guidance: float | Guidance = 1.0,
    negative: str | Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    refine: int = 0,
    interventions: Intervention | Sequence[Any] = (),
    on_step: Callable[[Step], None] | None = None,
) -> Trajectory:
    """The trajectory that ends in ``source``: clean latents (b c h w), pictures, or a tensor (b 3 H W) in [-1, 1];
    of models of clips likewise with frames.

    Pictures are encoded by the posterior's mean. ``prompt``: a text, or one per picture. ``guidance`` 1 (none) is
    what DDIM inversion is accurate for. ``refine``: fixed-point iterations per step, each one more denoiser call.
    With as many ``steps``, the same prompt and guidance, sampling from the result returns to ``source``: exactly in
    the limit of many steps or, where they converge, of many iterations.

    Raises BadInput, NotSupported (EDM's scaling), and what :func:`generate` raises for prompts, sizes and
    interventions.
    """
    process_of(model).require_path(model, "invert")
    if model.deterministic_scheduler == "edm_euler":
        raise NotSupported(f"invert needs latents that carry no scale of the noise; {model.name} draws in EDM's.")
    parts = arrange(interventions)
    refine = checked_int(refine, "refine", 0)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    latents = source
    if not (
        isinstance(source, Tensor)
        and source.dim() == model.family.state_dims
        and source.shape[1] == model.latent_shape(*model.default_size)[0]
    ):
        with torch.no_grad():
            latents = model.encode_image(as_pixels_of(model, source, size))
    distilled = {"true_guidance": guidance, "guidance": None} if model.embeds_guidance else {"guidance": guidance}
    name = model.deterministic_scheduler
    request = checked_request(
        model,
        list(prompts) * len(latents) if len(prompts) == 1 else prompts,
        negative=negative, steps=steps, latents=latents, scheduler=name, size=size, **distilled,
    )  # fmt: skip
    for part in parts:
        part.activity = Coverage()
    with open_run(model, request, range(len(request)), parts, backward=True) as run:
        states = [latents.to(run.model.device, run.model.state_dtype)]

        def back(step: Step) -> Tensor:
            states.append(_one_back(run, step, refine))
            return states[-1]

        run.stepper = back
        walk(run, states[0], on_step)
    refuse_idle(parts, run.sites if parts else ())
    coverage = dict(zip(distinct_names(parts), [part.coverage() for part in parts], strict=True))
    return Trajectory(
        torch.stack(states[::-1]), run.timesteps, request.steps, name, request.prompts, coverage, run.cost
    )


def _one_back(run: Run, step: Step, refine: int) -> Tensor:
    """The latents (b c h w) from which the scheduler's step ``step.i`` leads to ``step.x``."""
    a, b = step_coefficients(run, step)
    x = (step.x - b * step.output) / a
    for _ in range(refine):
        x = (step.x - b * step.predict(x, branches=step.branches).output("guided")) / a
    return x


def step_coefficients(run: Run, step: Step) -> tuple[float, float]:
    """(A, B) of the scheduler's own step ``x' = A x + B out``, measured on unit inputs: whatever its spacing of
    timesteps, its final level or its rounding, the inverse is that of the step which sampling will take."""
    units = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=step.x.device)
    x, out = (unit.view(2, 1, 1, 1) for unit in units)
    a, b = run.process.scheduler_at(step.i).step(out, step.t, x, return_dict=False)[0].flatten().tolist()
    return a, b
