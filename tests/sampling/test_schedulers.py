"""Every scheduler of diffusers, given by a user: samples depend on their own seed only, or the scheduler is refused."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import schedulers

from sfumato.errors import BadInput, NotSupported, SfumatoError
from sfumato.models import quiet
from sfumato.sampling import generate, recipe_args
from tests.tiny import tiny_model

NAMES = [name for name in dir(schedulers) if name.endswith("Scheduler") and isinstance(getattr(schedulers, name), type)]
PROMPTS = ["a dog", "a cat"]
#: what a diffusion model can be drawn with, those with random steps last
SERVES = (
    "CogVideoXDDIM DDIMInverse DDIMParallel DDIM DEISMultistep DPMSolverMultistepInverse DPMSolverMultistep "
    "DPMSolverSinglestep EulerDiscrete HeunDiscrete KDPM2Discrete LMSDiscrete PNDM UniPCMultistep TCD "
    "DDPMParallel DDPM EulerAncestralDiscrete KDPM2AncestralDiscrete LCM SASolver DPMSolverSDE"
).split()
FLOW = "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM".split()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def made(kind: str, name: str) -> Any:
    """The scheduler with the settings of the model's own; None where these do not suit it."""
    kind_of = getattr(diffusers, name, None) or getattr(schedulers, name)
    with quiet():
        try:
            own = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
            return kind_of.from_config(tiny_model(kind).pipe.scheduler.config, **own)
        except ImportError:
            pytest.skip("torchsde is not installed")
        except (TypeError, ValueError):
            return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_sample_depends_on_its_own_seed_only(kind: str, name: str):
    """Alone, in a batch, and after a foreign ``torch.rand``; everything that cannot promise that is refused."""
    model, scheduler = tiny_model(kind), made(kind, name)
    if scheduler is None:
        return
    given: dict[str, Any] = {"steps": 2, "guidance": 1.0, "scheduler": scheduler, "decode": False, "size": (16, 16)}
    serves = name.removesuffix("Scheduler") in (SERVES if kind == "sd" else FLOW)
    try:
        batch = generate(model, PROMPTS[1:] * 2, seed=[5, 6], **given)
    except SfumatoError as error:
        assert not serves and isinstance(error, BadInput | NotSupported) and len(str(error)) < 300
        return
    assert serves, f"{name} draws: say so above"
    torch.rand(5)
    alone = generate(model, PROMPTS[1], seed=6, **given)
    scale = float(batch.latents.abs().max())
    torch.testing.assert_close(batch.latents[1:2], alone.latents, rtol=0, atol=1e-4 * scale)
    torch.rand(5)
    again = generate(model, **recipe_args(alone.recipe), decode=False)
    assert torch.equal(again.latents, alone.latents)
    assert not torch.allclose(batch.latents[:1], alone.latents, atol=0.1)


def test_brownian_noise_is_that_of_the_pipeline():
    """DPM++ SDE with one tree per sample, as diffusers makes it when given the seeds."""
    if (scheduler := made("sd", "DPMSolverSDEScheduler")) is None:
        return
    model = tiny_model("sd")
    ours = generate(model, PROMPTS, steps=3, seed=[5, 6], scheduler=scheduler, decode=False)
    peer = type(scheduler).from_config(scheduler.config, noise_sampler_seed=[5, 6])
    with quiet():
        pipe = type(model.pipe)(**{**model.pipe.components, "scheduler": peer})
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(
            PROMPTS, num_inference_steps=3, width=32, height=32, output_type="latent",
            generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        ).images  # fmt: skip
    assert torch.equal(ours.latents, theirs)


class Global(diffusers.DDIMScheduler):
    """Adds noise of its own, from the global state."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        (x, *rest) = super().step(model_output, timestep, sample, return_dict=False)
        return (x + torch.randn(x.shape), *rest)


def test_noise_from_the_global_state_is_refused():
    model = tiny_model("sd")
    with quiet():
        scheduler = Global.from_config(model.pipe.scheduler.config)
    with pytest.raises(NotSupported, match="Global draws from torch's global random state"):
        generate(model, "a dog", steps=2, scheduler=scheduler)
