"""The denoising loss and its parts against diffusers and against slow formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from sfumato.errors import NotSupported, UnknownName
from sfumato.sampling.noise import Path
from sfumato.training.losses import Flow, Noise, denoising_loss, density, min_snr, stratified


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X0, EPS, OUT = randn(3, 4, 5, 6), randn(3, 4, 5, 6, seed=1), randn(3, 4, 5, 6, seed=2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_scheduler_noises_and_targets_as_diffusers_scripts_do(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    t = torch.tensor([3, 500, 998])
    alpha = scheduler.alphas_cumprod[t].sqrt().view(3, 1, 1, 1)
    sigma = (1 - scheduler.alphas_cumprod[t]).sqrt().view(3, 1, 1, 1)
    target = {"epsilon": EPS, "sample": X0, "v_prediction": alpha * EPS - sigma * X0}[kind]

    def predict(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(x, alpha * X0 + sigma * EPS)
        assert torch.equal(at, t)
        return OUT

    found = denoising_loss(predict, Noise(scheduler), X0, EPS, t)
    expected = torch.stack([((o - g) ** 2).mean() for o, g in zip(OUT, target, strict=True)])
    torch.testing.assert_close(found.errors, expected)
    torch.testing.assert_close(found.loss, expected.mean())


def test_flow_masks_weights_and_clips_of_any_shape() -> None:
    x0, eps, out = randn(2, 3, 2, 4, 4), randn(2, 3, 2, 4, 4, seed=1), randn(2, 3, 2, 4, 4, seed=2)  # (b c f h w)
    mask, weight, t = torch.rand(2, 1, 2, 4, 4), torch.tensor([0.5, 3.0]), torch.tensor([0.25, 0.75])
    seen = []
    found = denoising_loss(lambda x, _: seen.append(x) or out, Flow(), x0, eps, t, mask=mask, weight=weight)
    for i in range(2):
        torch.testing.assert_close(seen[0][i], (1 - t[i]) * x0[i] + t[i] * eps[i])
        error = (mask[i] * (out[i] - (eps[i] - x0[i])) ** 2).mean()
        torch.testing.assert_close(found.errors[i], error)
    torch.testing.assert_close(found.loss, (weight * found.errors).mean())


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_sampling_path_serves_too_and_the_right_answer_costs_nothing(scheduler: type) -> None:
    made = scheduler()
    made.set_timesteps(10)
    path, t = Path(made), torch.tensor([100.0, 500.0, 900.0])

    def answer(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        right = path.target(x, X0, EPS, at)
        torch.testing.assert_close(path.to_x0(x, right, at), X0, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(path.to_eps(x, right, at), EPS, atol=1e-4, rtol=1e-4)
        return right

    assert float(denoising_loss(answer, path, X0, EPS, t).loss) == 0
    assert float(denoising_loss(lambda *_: OUT, path, X0, EPS, t).loss) > 0.1


def test_min_snr_weights_are_the_papers() -> None:
    scheduler, t = DDPMScheduler(), torch.tensor([1, 200, 700])
    snr = Noise(scheduler).snr(t)
    torch.testing.assert_close(snr, compute_snr(scheduler, t), rtol=1e-4, atol=0)
    capped = snr.clamp(max=5)
    torch.testing.assert_close(min_snr(snr), capped / snr)
    torch.testing.assert_close(min_snr(snr, kind="v_prediction"), capped / (snr + 1))
    torch.testing.assert_close(min_snr(snr, kind="sample"), capped)
    assert float(min_snr(snr)[0]) < 0.1 and float(min_snr(snr)[2]) == 1


def test_densities_are_those_of_diffusers() -> None:
    n = 20_000
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", n, logit_mean=0.5, logit_std=0.7, generator=torch.Generator().manual_seed(0)
    )
    ours = density(stratified(n, torch.Generator().manual_seed(1)), "logit_normal", 0.5, 0.7)
    quantiles = torch.linspace(0.02, 0.98, 25)
    torch.testing.assert_close(ours.quantile(quantiles), theirs.quantile(quantiles), atol=0.01, rtol=0)
    u = torch.rand(100, generator=torch.Generator().manual_seed(2))
    theirs = compute_density_for_timestep_sampling(
        "mode", 100, mode_scale=0.8, generator=torch.Generator().manual_seed(2)
    )
    torch.testing.assert_close(density(u, "mode", scale=0.8), theirs)
    assert torch.equal(density(u), u)
    cubic = density(stratified(n, torch.Generator().manual_seed(1)), "cubic")
    assert 0 <= cubic.min() and cubic.max() <= 1
    assert abs(float((cubic > 0.8).float().mean()) - 0.2 ** (1 / 3)) < 0.01  # 1 - u^3 > 0.8
    with pytest.raises(UnknownName, match="logit_normal"):
        density(u, "logitnormal")


def test_stratified_places_are_one_of_each_part() -> None:
    places = stratified(50, torch.Generator().manual_seed(0), torch.Generator().manual_seed(1), (0.5, 1.0))
    assert sorted(((places - 0.5) * 100).long().tolist()) == list(range(50)) and places.min() >= 0.5
    assert places.tolist() != sorted(places.tolist())
    assert (stratified(50, torch.Generator().manual_seed(0)).diff() > 0).all()


def test_schedulers_without_a_noise_path_are_refused() -> None:
    with pytest.raises(NotSupported, match="FlowMatchEulerDiscreteScheduler predicts"):
        Noise(FlowMatchEulerDiscreteScheduler())
