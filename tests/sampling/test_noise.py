"""The noise path against formulas written out in float64 and against what diffusers' schedulers themselves do."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch

from sfumato.errors import BadInput, NotSupported
from sfumato.models import quiet
from sfumato.sampling import Path

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ["epsilon", "v_prediction", "sample"]


def scheduler(name: str, steps: int = 6, **config: Any) -> Any:
    flow = name.startswith("FlowMatch")
    with quiet():
        made = getattr(diffusers, name)(**({} if flow else BETAS), **config)
        made.set_timesteps(steps)
    return made


def noisy_pair(path: Path, t: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x0, eps, x) in float64."""
    draw = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 4, 3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    return x0, eps, path.add_noise(x0, eps, t)


def true_output(kind: str, alpha: float, sigma: float, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """The definitions, from the papers."""
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0, "flow": eps - x0}[kind]


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("kind", KINDS)
def test_conversions_recover_picture_and_noise(name: str, kind: str):
    if name.startswith("DPM") and kind == "sample":
        kind = "epsilon"
    path = Path(scheduler(name, prediction_type=kind))
    t = 481
    alpha, sigma = path.alpha_sigma(t)
    assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-12)
    x0, eps, x = noisy_pair(path, t)
    out = true_output(kind, alpha, sigma, x0, eps)
    close = dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.to_x0(x, out, t), x0, **close)
    torch.testing.assert_close(path.to_eps(x, out, t), eps, **close)
    torch.testing.assert_close(path.from_x0(x, x0, t), out, **close)


def test_flow_conversions():
    path = Path(scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0))
    t = path_t = 640.0
    assert path.kind == "flow"
    assert path.alpha_sigma(path_t) == pytest.approx((0.36, 0.64))
    x0, eps, x = noisy_pair(path, t)
    torch.testing.assert_close(x, 0.36 * x0 + 0.64 * eps)
    for answer, truth in [
        (path.to_x0(x, eps - x0, t), x0),
        (path.to_eps(x, eps - x0, t), eps),
        (path.from_x0(x, x0, t), eps - x0),
    ]:
        torch.testing.assert_close(answer, truth, rtol=1e-9, atol=1e-9)


def test_levels_are_those_of_the_training_schedule():
    path = Path(scheduler("DDIMScheduler"))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    for t in (0, 1, 500, 998, 999):
        product = math.prod((1 - betas[: t + 1]).tolist())
        alpha, sigma = path.alpha_sigma(torch.tensor(t))
        assert alpha == pytest.approx(product**0.5, rel=1e-5)
        assert sigma == pytest.approx((1 - product) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_noised_as_the_scheduler_noises(name: str):
    """``add_noise`` in the scheduler's own scaling, at its own timesteps."""
    made = scheduler(name)
    path = Path(made)
    for t in made.timesteps[1:]:
        x0, eps, x = noisy_pair(path, t)
        theirs = made.add_noise(x0, eps, t.repeat(2))
        torch.testing.assert_close(x, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_karras_spacing_uses_the_levels_really_taken(name: str):
    made = scheduler(name, use_karras_sigmas=True)
    path = Path(made)
    sigmas = dict(zip(made.timesteps.tolist(), made.sigmas.tolist(), strict=False))
    for t, sigma in sigmas.items():
        alpha, noise = path.alpha_sigma(t)
        assert noise / alpha == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scale_is_what_the_scheduler_divides_by(name: str):
    """Also at the half steps of second-order schedulers, whose levels are hidden in private state."""
    made = scheduler(name)
    path = Path(made)
    one = torch.ones(1, 4, 2, 2)
    for t in made.timesteps:
        theirs = made.scale_model_input(one, t)[0, 0, 0, 0].item()
        assert 1 / path.scale(t) == pytest.approx(theirs, rel=1e-4)
        made.step(torch.zeros_like(one), t, one)


def test_one_timestep_per_sample():
    path = Path(scheduler("DDIMScheduler"))
    t = torch.tensor([10, 900])
    x0, eps, x = noisy_pair(path, t)
    for i in range(2):
        torch.testing.assert_close(x[i], path.add_noise(x0, eps, t[i])[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(path.to_x0(x, eps, t)[i], x0[i], rtol=1e-4, atol=1e-5)


def test_zero_terminal_signal():
    path = Path(scheduler("DDIMScheduler", rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    assert path.alpha_sigma(999) == (0.0, 1.0)
    assert 0 < path.alpha_sigma(998)[0] < 0.01
    x0, eps, x = noisy_pair(path, 999)
    torch.testing.assert_close(x, eps)
    torch.testing.assert_close(path.to_x0(x, -x0, 999), x0)


def test_the_schedulers_state_is_untouched():
    made = scheduler("EulerDiscreteScheduler")
    path = Path(made)
    path.alpha_sigma(made.timesteps[0])
    assert made.step_index is None
    assert made.is_scale_input_called is False


def test_what_has_no_place_on_a_path_is_refused():
    with pytest.raises(BadInput, match="0 to 999"):
        Path(scheduler("DDIMScheduler")).alpha_sigma(1000)
    with quiet():
        odd = scheduler("DPMSolverMultistepScheduler")
        odd.register_to_config(prediction_type="score")
    with pytest.raises(NotSupported, match="score"):
        Path(odd)
