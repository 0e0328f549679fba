"""Inversion: exact where the truth is known in closed form, to a stated tolerance on random networks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import BadInput, NoMatch
from sfumato.sampling import Intervention, Step, generate, invert
from tests.helpers import fingerprint
from tests.tiny import tiny_model


def clean(model: Any, b: int = 1) -> Tensor:
    """Latents with the spread of real ones."""
    return torch.randn(b, *model.latent_shape(*model.default_size), generator=torch.Generator().manual_seed(0))


class Known(Intervention):
    """Replaces the network by a known one: ``out = slope * x + offset``."""

    role = "guider"

    def __init__(self, slope: float, offset: float):
        self.slope, self.offset = slope, offset

    def after_predict(self, step: Step) -> None:
        self.mark(step)
        step.output = self.slope * step.x + self.offset


@pytest.mark.parametrize("kind", ["sd", "sd2", "sd3", "flux"])
def test_constant_network_is_inverted_exactly(kind: str):
    """Epsilon, v and flow: with an output that does not depend on x, one pass is the exact inverse."""
    model = tiny_model(kind)
    x0 = clean(model)
    trajectory = invert(model, x0, "", steps=7, interventions=Known(0.0, 0.3))
    again = generate(model, "", guidance=1.0, decode=False, interventions=Known(0.0, 0.3), **trajectory.settings)
    torch.testing.assert_close(again.latents, x0, rtol=1e-4, atol=2e-5)
    assert (trajectory.noise - x0).abs().max() > 0.1


def test_noise_in_closed_form():
    """A constant epsilon c: every x_t on the path is alpha_t x0 + sigma_t c."""
    model = tiny_model("sd")
    x0 = clean(model)
    trajectory = invert(model, x0, "", steps=5, interventions=Known(0.0, 0.3))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    product = np.cumprod(1 - betas)
    assert trajectory.latents.shape == (6, *x0.shape)
    for x, t in zip(trajectory.latents[:-1], trajectory.timesteps.tolist(), strict=True):
        expected = product[t] ** 0.5 * x0 + (1 - product[t]) ** 0.5 * 0.3
        torch.testing.assert_close(x, expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(trajectory.latents[-1], x0)


def test_flow_noise_in_closed_form():
    """A constant velocity v: x = x0 + sigma v all along, and at sigma = 1 the noise is x0 + v."""
    model = tiny_model("sd3")
    x0 = clean(model)
    trajectory = invert(model, x0, "", steps=4, interventions=Known(0.0, -0.7))
    torch.testing.assert_close(trajectory.noise, x0 - 0.7, rtol=1e-5, atol=1e-5)


def test_linear_network_needs_refinement():
    """With out = 0.5 x the classical inverse is off by a known amount; fixed-point iterations remove it."""
    model = tiny_model("sd3")
    x0 = clean(model)

    class Linear(Intervention):
        role = "adapter"

        def start(self, run: Any) -> None:
            plain = run.model.family.predict
            run.model.family.predict = lambda x, t, rows, guidance, extra: 0.5 * x
            run.defer(run.model.family.__dict__.pop, "predict")
            assert plain is not None
            self.mark()

    def distance(refine: int) -> float:
        trajectory = invert(model, x0, "", steps=4, refine=refine, interventions=Linear())
        again = generate(model, "", guidance=1.0, decode=False, interventions=Linear(), **trajectory.settings)
        return (again.latents - x0).abs().max().item()

    sigmas = [0.0] + model.timesteps(model.make_scheduler(None), 4).flip(0).div(1000).tolist()
    factor = np.prod([(1 + 0.5 * (high - low)) * (1 - 0.5 * (high - low)) for low, high in pairwise(sigmas)])
    assert distance(0) == pytest.approx(abs(1 - factor) * x0.abs().max().item(), rel=1e-3)
    assert distance(12) < 1e-5
    assert "predict" not in model.family.__dict__


@pytest.mark.parametrize(
    ("kind", "guidance", "steps"),
    [("sd2", 3.0, 3), ("sd3", 1.0, 3), ("flux", 2.0, 3), ("pixart", 1.0, 5)],
)
def test_there_and_back_on_random_networks(kind: str, guidance: float, steps: int):
    """Tolerance: 1e-3 of the latents' spread after 8 iterations; on these rough networks the classical single pass
    leaves 4 % to 200 %."""
    model = tiny_model(kind)
    x0, prompts = clean(model, 2), ["a red cube", "a blue dog"]
    back = {"guidance": guidance} if not model.embeds_guidance else {"true_guidance": guidance}
    errors = []
    for refine in (0, 8):
        trajectory = invert(model, x0, prompts, steps=steps, guidance=guidance, refine=refine)
        again = generate(model, prompts, decode=False, **back, **trajectory.settings)
        errors.append(((again.latents - x0).std() / x0.std()).item())
    assert errors[1] < 1e-3
    assert errors[0] > 10 * errors[1]
    rows = 2 if guidance > 1 else 1
    assert trajectory.cost == steps * rows * 9


def test_pictures_are_inverted_through_the_codec():
    model = tiny_model("sd")
    pixels = torch.randint(0, 256, (32, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    trajectory = invert(model, picture, "a dog", steps=3)
    tensor = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = model.encode_image(tensor)
    torch.testing.assert_close(trajectory.latents[-1], expected, rtol=1e-5, atol=1e-5)
    assert trajectory.noise.shape[-2:] == (16, 24)
    resized = invert(model, picture, "a dog", steps=1, size=(32, 32))
    assert resized.noise.shape[-2:] == (16, 16)


class Watch(Intervention):
    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def after_step(self, step: Step) -> None:
        self.mark(step)
        self.seen.append((step.i, step.progress))


def test_interventions_take_part_and_leave_no_trace():
    model = tiny_model("sd")
    before, watch = fingerprint(model), Watch()
    trajectory = invert(model, clean(model), "a dog", steps=3, interventions=watch)
    assert watch.seen == [(2, 2 / 3), (1, 1 / 3), (0, 0)]
    assert trajectory.coverage["Watch"]["calls"] == 3
    assert fingerprint(model) == before

    class Idle(Intervention):
        pass

    with pytest.raises(NoMatch, match="Idle"):
        invert(model, clean(model), "a dog", steps=1, interventions=Idle())


def test_bad_input():
    model = tiny_model("sd")
    with pytest.raises(BadInput, match="refine"):
        invert(model, clean(model), "", steps=2, refine=-1)
    with pytest.raises(BadInput, match="latents has 3 rows for 2 samples"):
        invert(model, clean(model, 3), ["a", "b"], steps=2)
    with pytest.raises(BadInput, match="image"):
        invert(model, torch.zeros(1, 5, 8, 8), "", steps=2)
