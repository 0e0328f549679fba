"""Guidance by a gradient: the base of whatever pulls a sample towards a higher score of another network.

Dhariwal & Nichol 2021 give two ways in. On the *score* (their algorithm 2; deterministic samplers): the noise predicted
becomes ``eps - sigma s g``, where g is the gradient with respect to ``x = alpha x0 + sigma eps``. On the *mean* (their
algorithm 1; DDPM): what the step gave is moved by ``s Sigma g``, Sigma the variance of the step. The score's gradient
is ``-eps / sigma`` on diffusion and flow paths alike, so both serve every family. Strengths do not carry over from one
to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sfumato import cards
from sfumato.cards import Field
from sfumato.errors import BadInput, NotFinite
from sfumato.sampling.intervention import Intervention
from sfumato.sampling.noise import Path
from sfumato.sampling.run import Step
from sfumato.sampling.state import sample_axes
from sfumato.windows import Window

__all__ = ["GradientGuidance", "GradientParams", "step_variance"]


class GradientParams(cards.Params):
    """The parameters that all gradient guidance shares; a system sets its own default of ``strength``."""

    strength: float = Field(default=1.0, ge=0, description="what the gradient is multiplied by; see step")
    scale_range: tuple[float, float] = Field(
        default=(1.0, 1.0), description="strength is multiplied by this, from the first to the last step"
    )
    window: Window = Field(
        default=(0.0, 1.0), description="share of the denoising that is guided", json_schema_extra={"unit": "progress"}
    )
    on: Literal["score", "mean"] = Field(
        default="score", description="change the noise predicted (any sampler) or the mean of the step (as DDPM)"
    )
    step: Literal["gradient", "relative"] = Field(
        default="gradient",
        description="relative: the change of the predicted noise is strength times as long as that noise, however "
        "long the gradient is; then strength is about 0.05 to 0.5",
    )


class GradientGuidance(Intervention):
    """Subclasses give :meth:`gradient`; this moves the prediction or the step along it."""

    role = "guider"
    params: Any
    CARD: ClassVar[Any]

    def __init__(self, **given: Any):
        self.params = self.Params(**given)  # type: ignore[attr-defined]
        self.window = self.params.window
        if min(self.params.scale_range) < 0:
            raise BadInput(f"scale_range of {self.name} is {self.params.scale_range}; both must be 0 or above.")
        self._pull: Tensor | None = None

    def gradient(self, step: Step) -> Tensor:
        """The gradient (b c h w) of what is to rise, with respect to ``alpha x0 + sigma eps``, whatever scaling the
        scheduler carries latents in."""
        raise NotImplementedError

    def after_predict(self, step: Step) -> None:
        p = self.params
        first, last = p.scale_range
        strength = p.strength * (first + (last - first) * step.i / max(step.total - 1, 1))
        if strength == 0:
            return
        gradient = self.gradient(step).float()
        if not torch.isfinite(gradient).all():
            raise NotFinite(
                f"the gradient of {self.name} stopped being finite at step {step.i + 1} of {step.total} "
                f"(t = {float(step.t):g}); lower its strength"
                + (" or use dtype float32." if step.run.model.dtype != torch.float32 else ".")
            )
        if not gradient.any():  # such as in pure noise, which tells nothing yet
            return
        sigma = step.path.alpha_sigma(step.t)[1]
        change = sigma * strength * gradient  # of the noise
        if p.step == "relative":
            change = change * (strength * _length(step.eps.float()) / _length(change).clamp_min(1e-30))
        if p.on == "score":
            step.output = step.path.with_less_noise(step.output, change.to(step.output.dtype), step.t)
            self.mark(step)
        else:
            self._pull = change / sigma

    def after_step(self, step: Step) -> None:
        if self._pull is None:
            return
        if step.t_next is not None:
            shift = step_variance(step.path, step.t, step.t_next) * self._pull
            step.x = step.x + (step.path.scale(step.t_next) * shift).to(step.x.dtype)
            self.mark(step)
        self._pull = None

    def of_prediction(self, step: Step, gain: Callable[[Tensor], Tensor], through_denoiser: bool) -> Tensor:
        """The gradient (b c h w) of ``gain`` (b) of the clean latents (b c h w) that the guided output predicts.

        Through the denoiser, exactly: then ``keeps_graph`` spares a forward pass. Or without it: its Jacobian is taken
        as ``alpha / (alpha^2 + sigma^2)``, what it is for independent data of unit variance.
        """
        if through_denoiser:
            gradient = step.grad(lambda prediction: gain(prediction.x0("guided")), branches=step.branches)
            return step.path.scale(step.t) * gradient
        step.run.freeze()
        alpha, sigma = step.path.alpha_sigma(step.t)
        with torch.enable_grad():
            x0 = step.x0.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(gain(x0).sum(), x0)
        return gradient * (alpha / (alpha**2 + sigma**2))

    @staticmethod
    def of_noised(step: Step, gain: Callable[[Tensor, float, float], Tensor]) -> Tensor:
        """The gradient (b c h w) of ``gain(x, alpha, sigma)`` (b) of the noised latents ``x = alpha x0 + sigma eps``; 0
        in pure noise, which tells nothing yet. The denoiser has no part in it."""
        alpha, sigma = step.path.alpha_sigma(step.t)
        if alpha == 0:
            return torch.zeros_like(step.x)
        with torch.enable_grad():
            x = (step.x.detach().float() / step.path.scale(step.t)).requires_grad_(True)
            return torch.autograd.grad(gain(x, alpha, sigma).sum(), x)[0]


def step_variance(path: Path, t: Any, t_next: Any) -> float:
    """Variance of the DDPM step from ``t`` to ``t_next``: of q(x_next | x_t, x0) (Ho et al. 2020, equation 7), on any
    path."""
    alpha, sigma = path.alpha_sigma(t)
    alpha_next, sigma_next = path.alpha_sigma(t_next)
    return sigma_next**2 * max(0.0, 1 - (alpha * sigma_next / (alpha_next * sigma)) ** 2)


def _length(x: Tensor) -> Tensor:
    """Root mean square of each sample (b 1 ...)."""
    return x.square().mean(sample_axes(x), keepdim=True).sqrt()
