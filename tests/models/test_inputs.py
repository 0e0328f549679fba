"""The denoiser is fed exactly what the diffusers pipeline feeds it: recorded in the pipeline's own run, bit for bit."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from sfumato.models import Model, quiet
from tests.tiny import KINDS, TOKENS, tiny_model, tiny_pipeline

SIZE = (32, 48)  # height, width
PROMPTS = ["a red cube", "a photo of the small green ball on the left"]
NEGATIVES = ["blue", "an ugly dog"]


class Recorder:
    """Inputs of every forward pass of a module, by parameter name."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.calls, self.outputs = module, [], []
        self.signature = inspect.signature(module.forward)

    def __enter__(self) -> Recorder:
        self.handles = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, _: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self.calls.append(dict(bound.arguments))

    def _after(self, _: Any, __: Any, output: Any) -> None:
        self.outputs.append(output[0])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    return a == b or (a is None and b == {})  # Flux's pipeline passes an empty dictionary for "no keyword arguments"


def pipeline_call(kind: str, guided: bool, steps: int) -> dict[str, Any]:
    """Arguments for the tiny pipeline's own ``__call__``."""
    call: dict[str, Any] = dict(
        prompt=PROMPTS,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=steps,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        guidance_scale=5.0 if guided else 1.0,
    )
    if guided:
        call["negative_prompt"] = NEGATIVES
    if kind in ("flux", "schnell"):
        call["guidance_scale"] = 3.0
        call["true_cfg_scale"] = 2.0 if guided else 1.0
    if kind in TOKENS:
        call["max_sequence_length"] = TOKENS[kind]
    if kind.startswith("pixart"):
        call["use_resolution_binning"] = False
    if kind == "inpaint":  # everything is drawn anew; the pipeline would draw the masked latents from their posterior
        vae, grey = tiny_pipeline(kind).vae, torch.zeros(1, 3, *SIZE)
        with torch.no_grad():
            known = vae.encode(grey).latent_dist.mode() * vae.config.scaling_factor
        call |= {"image": grey, "mask_image": torch.ones(1, 1, *SIZE), "masked_image_latents": known, "strength": 1.0}
    return call


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_denoiser_inputs(kind: str, guided: bool) -> None:
    check_inputs(tiny_model(kind), kind, guided, embedded=3.0 if kind in ("flux", "schnell") else None)


def test_guidance_distilled_unet() -> None:
    """A latent-consistency U-Net takes the guidance scale as an input, through an embedding."""
    pipe = tiny_pipeline("sd", fresh=True)
    with torch.random.fork_rng(devices=[]):
        pipe.unet = type(pipe.unet).from_config(pipe.unet.config, time_cond_proj_dim=8).eval()
    model = Model(pipe)
    assert model.embeds_guidance
    check_inputs(model, "sd", guided=False, embedded=1.0)


def check_inputs(model: Model, kind: str, guided: bool, embedded: float | None) -> None:
    with Recorder(model.denoiser) as theirs, quiet():
        model.pipe(**pipeline_call(kind, guided, steps=2))
    expected_timesteps = model.pipe.scheduler.timesteps

    condition = model.encode_text(PROMPTS, NEGATIVES if guided else None, guided, embedded)
    scheduler = model.make_scheduler()
    timesteps = model.timesteps(scheduler, 2, *SIZE)
    noise = torch.randn(2, *model.latent_shape(*SIZE), generator=torch.Generator().manual_seed(0))
    x = model.prepare(noise, scheduler)
    if hasattr(scheduler, "scale_model_input"):
        x = scheduler.scale_model_input(x, timesteps[0])
    calls = model.calls(condition.branches)
    with Recorder(model.denoiser) as ours:
        outputs = [model.predict(x, timesteps[0], condition, branches) for branches in calls]

    assert torch.equal(timesteps, expected_timesteps)
    assert len(ours.calls) == len(calls) == (2 if guided and not model.family.joint_branches else 1)
    for mine, reference in zip(ours.calls, theirs.calls, strict=False):
        assert [name for name in reference if not same(mine[name], reference[name])] == []
    for output, branches in zip(outputs, calls, strict=True):
        assert output.shape == (2 * len(branches), *model.latent_shape(*SIZE))
