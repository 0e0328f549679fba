"""The denoising loss, once for all that learn to denoise: what is noised, how much, what is predicted, what counts;
and the loss of the autoencoders that learn without an adversary.

>>> noise = Noise(DDPMScheduler(...))                    # or Flow(), or a sampling path
>>> t = (stratified(len(x0), draw.generator("time")) * 1000).long()
>>> found = denoising_loss(lambda x, t: unet(x, t, text).sample, noise, x0, eps, t, weight=min_snr(noise.snr(t)))
>>> found.loss.backward()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sfumato.errors import NotSupported, UnknownName
from sfumato.markup import described


class NoisePath(Protocol):
    """How clean latents are noised and what is then to be predicted: :class:`Noise`, :class:`Flow`, or
    :class:`sfumato.sampling.noise.Path`, the path of any scheduler that a model samples with."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (b ...)."""
        ...

    def target(self, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should say of ``x`` = x_t, (b ...)."""
        ...


class Noise:
    """A diffusion scheduler at its training timesteps 0, 1, ..., as diffusers' training scripts use it: predicts
    epsilon, v (Salimans & Ho 2022) or x0, whatever the scheduler's ``prediction_type``."""

    def __init__(self, scheduler: Any):
        self.scheduler, self.kind = scheduler, str(scheduler.config.get("prediction_type"))
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise NotSupported(f"scheduler {type(scheduler).__name__} predicts {self.kind!r}: use a flow's path.")

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.add_noise(x0, eps, t)

    def target(self, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        if self.kind == "epsilon":
            return eps
        return x0 if self.kind == "sample" else self.scheduler.get_velocity(x0, eps, t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 (b,) at timesteps ``t`` (b,) int64."""
        alpha = self.scheduler.alphas_cumprod.to(t.device)[t]
        return alpha / (1 - alpha)


class Flow:
    """Rectified flow (Lipman et al. 2023): x_t = (1 - t) x0 + t eps with ``t`` (b,) in 0 to 1; predicts eps - x0."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        s = t.view(-1, *[1] * (x0.ndim - 1))
        return (1 - s) * x0 + s * eps

    def target(self, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x0


@dataclass(frozen=True, eq=False)
class Denoised:
    """``loss``, a scalar; ``errors`` (b,), each sample's mean squared error, masked but not weighted."""

    loss: Tensor
    errors: Tensor

    __repr__ = described


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    path: NoisePath,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Denoised:
    """How far ``predict(x_t, t)`` is from what ``path`` wants (Ho et al. 2020, eq. 14, for any kind of prediction).

    Args:
        x0, eps: clean latents and noise (b c [f] h w).
        t: timesteps (b,), in the path's units.
        mask: weight of each element, anything that spreads to (b c [f] h w).
        weight: of each sample (b,), such as :func:`min_snr`.
    """
    x = path.add_noise(x0, eps, t)
    error = (predict(x, t).float() - path.target(x, x0, eps, t)).square()
    if mask is not None:
        error = mask * error
    errors = error.mean(tuple(range(1, error.ndim)))
    return Denoised((errors if weight is None else weight * errors).mean(), errors)


def min_snr(snr: Tensor, gamma: float = 5.0, kind: str = "epsilon") -> Tensor:
    """Weights (b,) of samples by their signal-to-noise ratio, capped at ``gamma`` (Hang et al. 2023, section 3.4)."""
    capped = snr.clamp(max=gamma)
    if kind == "epsilon":
        return capped / snr
    return capped if kind == "sample" else capped / (snr + 1)


# reconstruction -------------------------------------------------------------------------------------------------------


def reconstruction_loss(
    error: Tensor, weight: Tensor, posterior: Any, options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a variational autoencoder without an adversary, and its terms for the log.

    Args:
        error: what it makes of the pictures less the pictures (b 3 h w), which lie in [-1, 1].
        weight: of each pixel (b 1 h w).
        posterior: the Gaussian of the codes, as diffusers has it.
        options: the terms' weights ``l1``, ``l2``, ``edge`` (L1 of the differences between neighbouring pixels) and
            ``kl`` (to the unit normal); all terms are means over elements.
    """
    l1, l2 = (weight * error.abs()).mean(), (weight * error.square()).mean()
    edge = (weight[..., 1:] * error.diff(dim=-1).abs()).mean()
    edge = edge + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    psnr = -10 * torch.log10(error.detach().square().mean() / 4)
    logs = {"psnr": psnr, "l1": l1.detach(), "edge": edge.detach(), "kl": kl.detach()}
    return options.l1 * l1 + options.l2 * l2 + options.edge * edge + options.kl * kl, logs


# where on the path ----------------------------------------------------------------------------------------------------


def stratified(
    n: int,
    generator: torch.Generator,
    order: torch.Generator | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Places (n,) in ``interval``, one from each of n equal parts, so that a loss varies less than with independent
    draws; in random order if ``order`` is given."""
    low, high = interval
    u = torch.rand(n, generator=generator)
    part = torch.arange(n) if order is None else torch.randperm(n, generator=order)
    return low + (high - low) * ((part + u) / n)


def density(u: Tensor, kind: str = "uniform", mean: float = 0.0, std: float = 1.0, scale: float = 1.29) -> Tensor:
    """Shares of the path (n,) that uniform ``u`` (n,) become under a density of Esser et al. 2024, section 3.1:
    "uniform", "logit_normal" (``mean``, ``std``) or "mode" (``scale``); or "cubic", which favours high noise (Mou et
    al. 2023, arXiv 2302.08453, section 3.4).

    The first three are those of diffusers' ``compute_density_for_timestep_sampling``, from quantiles instead of draws,
    so that they can be stratified.
    """
    if kind == "uniform":
        return u
    if kind == "logit_normal":
        return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
    if kind == "mode":
        return 1 - u - scale * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
    if kind == "cubic":
        return 1 - u**3
    raise UnknownName("density of timesteps", kind, ("uniform", "logit_normal", "mode", "cubic"))
