"""Guidance by a gradient: against diffusers' schedulers and loops written out by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from sfumato.errors import BadInput, NotFinite
from sfumato.sampling import Path, generate
from sfumato.sampling.gradient import GradientGuidance, GradientParams, step_variance
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"


class Pull(GradientGuidance):
    """Towards a fixed pattern: the gradient of -|x - pattern|^2 / 2, x as ``alpha x0 + sigma eps``."""

    Params = GradientParams

    def gradient(self, step):
        return self.pattern(step.x) - step.x / step.path.scale(step.t)

    @staticmethod
    def pattern(x):
        return torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).expand_as(x)


def made(model, system=(), **options):
    given = {"steps": 3, "guidance": 3.0, "seed": 4, "decode": False, "scheduler": "ddim", **options}
    return generate(model, PROMPT, interventions=system, **given).latents


def test_step_variance_is_that_of_ddpm():
    scheduler = DDPMScheduler(variance_type="fixed_small")
    scheduler.set_timesteps(20)
    path = Path(scheduler)
    for t, following in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
        ours = step_variance(path, t, following)
        assert ours == pytest.approx(float(scheduler._get_variance(int(t))), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("kind", ["sd", "sd2", "sd3"])
def test_less_noise_is_less_noise_by_that_much(kind):
    model = tiny_model(kind)
    scheduler = model.make_scheduler(None)
    timesteps = model.timesteps(scheduler, 10)
    path = Path(scheduler)
    x, out, less = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in timesteps[1:]:
        changed = path.with_less_noise(out, less, t)
        torch.testing.assert_close(path.to_eps(x, changed, t), path.to_eps(x, out, t) - less, rtol=1e-4, atol=1e-5)


def test_on_the_score_of_ddim_by_hand():
    model = tiny_model("sd")
    scheduler = model.make_scheduler("ddim")
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    condition = model.encode_text([PROMPT])
    with torch.no_grad():
        for t in model.timesteps(scheduler, 3):
            uncond, cond = model.predict(x, t, condition).chunk(2)
            eps = uncond + 3 * (cond - uncond)
            eps = eps - (1 - scheduler.alphas_cumprod[t]).sqrt() * 0.7 * (Pull.pattern(x) - x)
            x = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(made(model, Pull(strength=0.7)), x, rtol=1e-4, atol=1e-5)


def test_on_the_score_of_a_flow_by_hand():
    model = tiny_model("sd3")
    scheduler = model.make_scheduler(None)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    condition = model.encode_text([PROMPT])
    timesteps = model.timesteps(scheduler, 3)
    sigmas = scheduler.sigmas.tolist()
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            uncond, cond = model.predict(x, t, condition).chunk(2)
            velocity = uncond + 3 * (cond - uncond)
            # score = -(x + (1 - sigma) v) / sigma, so v changes by -sigma / (1 - sigma) times the score's change
            if i:
                velocity = velocity - sigmas[i] / (1 - sigmas[i]) * 0.2 * (Pull.pattern(x) - x)
            x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    ours = made(model, Pull(strength=0.2, window=(0.1, 1.0)), scheduler=None)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def test_on_the_mean_by_hand():
    model = tiny_model("sd")
    scheduler = model.make_scheduler("ddim")
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    condition = model.encode_text([PROMPT])
    timesteps = model.timesteps(scheduler, 3)
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            uncond, cond = model.predict(x, t, condition).chunk(2)
            pull = 0.7 * (Pull.pattern(x) - x)
            x = scheduler.step(uncond + 3 * (cond - uncond), t, x).prev_sample
            if i + 1 < len(timesteps):
                now, following = (scheduler.alphas_cumprod[one] for one in (t, timesteps[i + 1]))
                x = x + (1 - following) / (1 - now) * (1 - now / following) * pull
    ours = made(model, Pull(strength=0.7, on="mean"))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def test_karras_scaling_makes_no_difference():
    """Euler carries x / alpha; the same noise, the same gradient, the same change."""
    model = tiny_model("sd")
    seen = {}

    class Watch(Pull):
        def after_predict(self, step):
            before = step.eps
            super().after_predict(step)
            alpha, sigma = step.path.alpha_sigma(step.t)
            wanted = sigma * 0.7 * (self.pattern(step.x) - step.x / step.path.scale(step.t))
            torch.testing.assert_close(before - step.eps, wanted, rtol=1e-3, atol=1e-4)
            seen[step.path.scaled] = seen.get(step.path.scaled, 0) + 1

    for scheduler in ("ddim", "euler"):
        made(model, Watch(strength=0.7), scheduler=scheduler)
    assert seen == {False: 3, True: 3}


def test_a_relative_step_is_a_share_of_the_noise():
    model = tiny_model("sd")

    class Watch(Pull):
        def after_predict(self, step):
            before = step.eps
            super().after_predict(step)
            share = (step.eps - before).square().mean().sqrt() / before.square().mean().sqrt()
            assert share.item() == pytest.approx(0.3 * (1.0, 0.75, 0.5)[step.i], rel=1e-3)

    made(model, Watch(strength=0.3, step="relative", scale_range=(1.0, 0.5)))


def test_not_a_number_stops_at_that_step_and_keeps_what_was_made():
    class Breaks(Pull):
        def gradient(self, step):
            gradient = super().gradient(step)
            return gradient / 0 if step.run.seeds == [5] and step.i == 1 else gradient

    model = tiny_model("sd")
    with pytest.raises(NotFinite, match="step 2 of 3") as caught:
        made(model, Breaks(strength=0.1), n=3, batch_size=1)
    assert "first 1 of 3" in str(caught.value) and "\n" not in str(caught.value)
    kept = caught.value.result
    assert len(kept) == 1 and torch.equal(kept.latents, made(model, Pull(strength=0.1)))
    with pytest.raises(NotFinite) as caught:  # latents that overflow are found by the loop
        made(model, Pull(strength=1e38), guidance=1.0)
    assert "step" in str(caught.value) and caught.value.result is None


@pytest.mark.parametrize(
    "given", [{"window": (0.5, 0.5)}, {"window": (-0.1, 1)}, {"scale_range": (-1, 1)}, {"strength": float("nan")}]
)
def test_bad_parameters_are_refused(given):
    with pytest.raises(BadInput):
        Pull(**given)
