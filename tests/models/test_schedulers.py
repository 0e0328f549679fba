"""Samplers by name: fresh, fitting the model, and set up as the pipeline would."""

from __future__ import annotations

import importlib.util

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models import Model
from sfumato.models.families.base import accepted_by
from sfumato.sampling import generate
from tests.tiny import tiny_model, tiny_pipeline

DIFFUSION = tiny_model("sd").schedulers
FLOW = tiny_model("sd3").schedulers


@pytest.mark.parametrize(("kind", "name"), [("sd", name) for name in DIFFUSION] + [("sd2", "ddim"), ("sd2", "euler")])
def test_every_diffusion_sampler_denoises(kind: str, name: str) -> None:
    """A denoiser that knows the truth is led back to it: every sampler reads the model's prediction type and betas."""
    if name == "lms" and importlib.util.find_spec("scipy") is None:
        pytest.skip("scipy is not installed")
    model = tiny_model(kind)
    scheduler = model.make_scheduler(name)
    assert model.prediction(scheduler) == ("epsilon" if kind == "sd" else "v_prediction")
    assert scheduler.config.beta_schedule == "scaled_linear"
    timesteps = model.timesteps(scheduler, 10, 32, 32)
    truth = 2.5 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))  # beyond [-1, 1]: no clipping
    x = model.prepare(torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)), scheduler)
    abar = scheduler.alphas_cumprod
    extra = {"generator": torch.Generator().manual_seed(2)} if "generator" in accepted_by(scheduler.step) else {}
    for t in timesteps:
        scaled = scheduler.scale_model_input(x, t)
        alpha, sigma = (float(v) for v in at_timestep(abar, float(t)))
        eps = (scaled - alpha * truth) / sigma
        out = eps if kind == "sd" else alpha * eps - sigma * truth
        x = scheduler.step(out, t, x, **extra)[0]
    assert (x - truth).abs().mean() < 0.1


def at_timestep(abar: torch.Tensor, t: float) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) at a possibly fractional timestep, as the sigma-space samplers interpolate."""
    ratio = ((1 - abar) / abar).sqrt().numpy()
    level = np.exp(np.interp(t, np.arange(len(ratio)), np.log(ratio)))
    return 1 / np.sqrt(1 + level**2), level / np.sqrt(1 + level**2)


@pytest.mark.parametrize("name", FLOW)
def test_every_flow_sampler_arrives(name: str) -> None:
    model = tiny_model("sd3")
    scheduler = model.make_scheduler(name)
    assert model.prediction(scheduler) == "flow"
    truth = 2.5 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    for t in model.timesteps(scheduler, 8, 32, 32):
        sigma = float(t) / 1000
        x = scheduler.step((x - truth) / sigma, t, x)[0]
    assert (x - truth).abs().mean() < 0.1


def test_own_scheduler_is_copied_fresh() -> None:
    model = tiny_model("sd")
    one, two = model.make_scheduler(), model.make_scheduler()
    assert type(one) is type(model.pipe.scheduler)
    assert one is not two and one is not model.pipe.scheduler
    model.timesteps(one, 3)
    assert two.num_inference_steps is None
    given = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True)
    copy = model.make_scheduler(given)
    assert copy is not given and copy.config.use_karras_sigmas


def test_names_that_do_not_fit() -> None:
    with pytest.raises(NotSupported, match="'flow_euler' does not fit a diffusion model; use one of: ddim, ddpm"):
        tiny_model("sd").make_scheduler("flow_euler")
    with pytest.raises(NotSupported, match="'ddim' does not fit a flow model; use one of: flow_euler"):
        tiny_model("sd3").make_scheduler("ddim")
    with pytest.raises(NotSupported, match="DDIMScheduler"):
        tiny_model("flux").make_scheduler(DDIMScheduler())
    with pytest.raises(UnknownName, match="unknown scheduler 'dpm\\+'. Did you mean 'dpm\\+\\+'"):
        tiny_model("sd").make_scheduler("dpm+")


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "4"])
def test_steps_refused(steps: object) -> None:
    model = tiny_model("sd")
    with pytest.raises(BadInput, match="steps="):
        model.timesteps(model.make_scheduler(), steps)  # type: ignore[arg-type]


def test_shift_depends_on_the_picture_size() -> None:
    """Esser et al. 2024, section 5.3.2: sigma' = s sigma / (1 + (s - 1) sigma), with log s linear in image tokens."""
    model = tiny_model("flux")
    for size in ((32, 32), (64, 128)):
        scheduler = model.make_scheduler()
        timesteps = model.timesteps(scheduler, 4, *size)
        tokens = (size[0] // 4) * (size[1] // 4)
        shift = np.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))
        sigma = np.linspace(1, 1 / 4, 4)
        assert np.allclose(timesteps.numpy(), 1000 * shift * sigma / (1 + (shift - 1) * sigma), rtol=1e-5)


def test_sd3_with_dynamic_shifting() -> None:
    pipe = tiny_pipeline("sd3", fresh=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.16)
    model = Model(pipe)
    ours = model.timesteps(model.make_scheduler(), 3, 32, 48)
    pipe("x", height=32, width=48, num_inference_steps=3, output_type="latent")
    assert torch.equal(ours, pipe.scheduler.timesteps)
    with pytest.raises(NotSupported, match="cannot shift its timesteps with the picture size"):
        model.timesteps(model.make_scheduler("flow_heun"), 3)


def test_cogvideox_walks_its_own_noise_levels():
    model = tiny_model("cogvideox", fresh=True)
    given = {"steps": 2, "size": (80, 48), "decode": False}
    expected = generate(model, "a dog", **given).latents
    model.pipe.scheduler = diffusers.CogVideoXDPMScheduler.from_config(model.pipe.scheduler.config)
    with pytest.raises(NotSupported, match="step needs old_pred_original_sample, .*; give scheduler 'ddim'"):
        generate(model, "a dog", **given)
    assert torch.equal(generate(model, "a dog", scheduler="ddim", **given).latents, expected)
    with pytest.raises(NotSupported, match="'dpm[+][+]' does not know the shifted noise levels .* use 'ddim'"):
        generate(model, "a dog", scheduler="dpm++", **given)
