"""The noise path: how much picture and how much noise a latent holds, and what the network's output says about both.

Every family is spoken of in one way: ``x_t = alpha_t x0 + sigma_t eps``. Diffusion models keep
``alpha^2 + sigma^2 = 1``, rectified flows ``alpha + sigma = 1``. Some schedulers (Euler, Heun, LMS, ...) carry the
latents in the scaling of Karras et al. 2022, ``x = x0 + (sigma / alpha) eps``; a :class:`Path` knows that factor, so
callers hand it the scheduler's own ``x``.

Network outputs come in four kinds: ``epsilon`` (Ho et al. 2020), ``v_prediction`` = alpha eps - sigma x0 (Salimans & Ho
2022), ``sample`` = x0, and ``flow`` = eps - x0 (Lipman et al. 2023, Esser et al. 2024). A fifth, ``edm``, is the raw
network of Karras et al. 2022: x0 = c_skip x + c_out F in their scaling (section 5, table 1), with F's sign turned where
the scheduler says v-prediction.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput, NotSupported
from sfumato.models.schedulers import kind_of

LEAST_DATA = 0.03
KINDS = ("epsilon", "v_prediction", "sample", "flow", "edm")


class Path:
    """The noise path of a scheduler whose ``set_timesteps`` has been called.

    ``t`` is always a timestep as the network receives it: a number, a 0-dim tensor, or one per sample (b).
    """

    def __init__(self, scheduler: Any):
        kind = scheduler.config.get("prediction_type", "flow" if hasattr(scheduler, "scale_noise") else None)
        self.kind: str = {"flow_prediction": "flow"}.get(kind, kind)
        self._data = 0.0  # EDM: the standard deviation of the data
        if kind_of(scheduler) == "edm":
            self.kind, self._data = "edm", float(scheduler.config.sigma_data)
            self._sign = 1.0 if scheduler.config.prediction_type == "epsilon" else -1.0
            if abs(float(scheduler.precondition_noise(torch.tensor(math.e))) - 0.25) > 1e-6:
                raise NotSupported(f"scheduler {type(scheduler).__name__} names its noise levels in a way of its own.")
        if self.kind not in KINDS:
            raise NotSupported(
                f"scheduler {type(scheduler).__name__} predicts {kind!r}, which has no place on an (alpha, sigma) "
                f"path; supported kinds: {', '.join(KINDS)}."
            )
        if not scheduler.config.get("num_train_timesteps") or (
            self.kind not in ("flow", "edm") and getattr(scheduler, "alphas_cumprod", None) is None
        ):
            raise NotSupported(
                f"scheduler {type(scheduler).__name__} has no table of noise levels, as those for diffusion and flow "
                f"models have."
            )
        self._steps_of_training = int(scheduler.config.num_train_timesteps)
        self._log_ratios: Tensor | None = None
        if self.kind not in ("flow", "edm"):
            squares = scheduler.alphas_cumprod.double().cpu()
            self._log_ratios = ((1 - squares) / squares).sqrt().log()  # log(sigma / alpha) at each training timestep
        # Noise levels that the schedule states itself win over the table: Karras spacing rounds its timesteps.
        # Schedulers with interpolated half steps (KDPM2) keep their levels in private state, but name exact
        # timesteps.
        self._stated: dict[float, float] = {}
        if hasattr(scheduler, "sigmas") and not hasattr(scheduler, "sigmas_interpol"):
            for t, sigma in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False):
                self._stated.setdefault(t, sigma)
        self.scaled = self.kind != "flow" and _scales_input(scheduler)

    def alpha_sigma(self, t: Any, like: Tensor | None = None) -> tuple[Any, Any]:
        """(alpha, sigma) at ``t``: two floats, or two float32 tensors when ``t`` has one entry per sample, of the shape
        that multiplies ``like`` (b ...), (b 1 1 1) without it."""
        if isinstance(t, Tensor) and t.dim() > 0:
            pairs = torch.tensor([self.alpha_sigma(each) for each in t.tolist()], dtype=torch.float32, device=t.device)
            return tuple(pairs.T.reshape(2, -1, *[1] * (3 if like is None else like.dim() - 1)))  # type: ignore[return-value]
        t = float(t)
        level = self._stated.get(t)
        if self.kind == "flow":
            level = t / self._steps_of_training if level is None else level
            return 1.0 - level, level
        if level is None:
            level = math.exp(4 * t) if self.kind == "edm" else self._trained_ratio(t)
        if level == math.inf:  # zero terminal signal-to-noise ratio
            return 0.0, 1.0
        alpha = 1.0 / math.sqrt(1.0 + level * level)
        return alpha, level * alpha

    def scale(self, t: Any, like: Tensor | None = None) -> Any:
        """What the scheduler's ``x`` is multiplied by relative to ``alpha x0 + sigma eps``; 1 for most schedulers."""
        return 1.0 / self.alpha_sigma(t, like)[0] if self.scaled else 1.0

    def to_x0(self, x: Tensor, out: Tensor, t: Any) -> Tensor:
        """The clean latents x0 (b ...) that the network's output ``out`` implies at ``x``. Undefined (inf) where
        alpha = 0 and the kind is epsilon."""
        alpha, sigma = self.alpha_sigma(t, x)
        x = x / self.scale(t, x)
        if self.kind == "edm":
            skip, gain = self._precondition(alpha, sigma)
            return skip * x + gain * out
        if self.kind == "epsilon":
            return (x - sigma * out) / alpha
        if self.kind == "v_prediction":
            return alpha * x - sigma * out
        return out if self.kind == "sample" else x - sigma * out

    def to_eps(self, x: Tensor, out: Tensor, t: Any) -> Tensor:
        """The noise eps (b ...) that ``out`` implies at ``x``."""
        alpha, sigma = self.alpha_sigma(t, x)
        x = x / self.scale(t, x)
        if self.kind == "epsilon":
            return out
        if self.kind == "sample":
            return (x - alpha * out) / sigma
        if self.kind == "edm":
            skip, gain = self._precondition(alpha, sigma)
            return (x - alpha * (skip * x + gain * out)) / sigma
        return alpha * out + sigma * x if self.kind == "v_prediction" else x + alpha * out

    def from_x0(self, x: Tensor, x0: Tensor, t: Any) -> Tensor:
        """The network output that would imply ``x0``; inverse of :meth:`to_x0`."""
        alpha, sigma = self.alpha_sigma(t, x)
        x = x / self.scale(t, x)
        if self.kind == "edm":
            skip, gain = self._precondition(alpha, sigma)
            return (x0 - skip * x) / gain
        if self.kind == "epsilon":
            return (x - alpha * x0) / sigma
        if self.kind == "v_prediction":
            return (alpha * x - x0) / sigma
        return x0 if self.kind == "sample" else (x - x0) / sigma

    def target(self, x: Tensor, x0: Tensor, eps: Tensor, t: Any) -> Tensor:
        """What the network should say at ``x``, which is ``x0`` noised with ``eps``: for the denoising loss."""
        return self.from_x0(x, x0, t)

    def with_less_noise(self, out: Tensor, less: Tensor, t: Any) -> Tensor:
        """The network output that implies ``less`` (b ...) less noise than ``out`` at the same latents.

        Where there is no data (the first step of a flow, zero terminal signal-to-noise ratio), what a change of the
        noise means for the data has no bound; alpha is taken as ``LEAST_DATA`` at least.
        """
        alpha, sigma = self.alpha_sigma(t, out)
        gain = self._precondition(alpha, sigma)[1] if self.kind == "edm" else None
        alpha = alpha.clamp_min(LEAST_DATA) if isinstance(alpha, Tensor) else max(alpha, LEAST_DATA)
        if self.kind == "epsilon":
            return out - less
        if self.kind == "edm":
            return out + sigma / alpha * less / gain
        return out + sigma / alpha * less if self.kind == "sample" else out - less / alpha

    def add_noise(self, x0: Tensor, eps: Tensor, t: Any) -> Tensor:
        """Clean latents noised to level ``t``, in the scheduler's scaling (b ...)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return self.scale(t, x0) * (alpha * x0 + sigma * eps)

    def _precondition(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        """EDM's c_skip and c_out, for latents alpha x0 + sigma eps."""
        level, data = sigma / alpha, self._data
        spread = level**2 + data**2
        return data**2 / spread / alpha, self._sign * level * data / spread**0.5

    def _trained_ratio(self, t: float) -> float:
        """sigma / alpha of the training schedule, log-linear between its integer timesteps."""
        assert self._log_ratios is not None
        last = len(self._log_ratios) - 1
        if not 0 <= t <= last:
            raise BadInput(f"t={t:g} is outside the path: timesteps run from 0 to {last}.")
        below = min(int(t), last - 1)
        low, high = self._log_ratios[below].item(), self._log_ratios[below + 1].item()
        return math.exp(low + (t - below) * (high - low) if t > below else low)


def _scales_input(scheduler: Any) -> bool:
    """Whether latents are carried in Karras scaling: determined by what ``scale_model_input`` does, not from a class
    name."""
    if not hasattr(scheduler, "scale_model_input"):
        return False
    probe = copy.copy(scheduler)  # the call below sets step counters, on the copy
    one = torch.ones(1, 1, 1, 1, device=scheduler.timesteps.device)
    return probe.scale_model_input(one, probe.timesteps[0]).item() != 1.0
