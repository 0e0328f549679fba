"""Laws of the loop that hold for every family and scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfumato.sampling import Intervention, Step, generate
from tests.helpers import fingerprint
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PROMPTS = ["a red cube", "a photo of a big blue dog", ""]
NOISY = ["ddpm", "euler_a", "dpm++_sde", "lcm"]
FAMILIES = ["sd", "sdxl", "sd3", "flux", "pixart"]


def make(kind: str, prompts: Any, seeds: Any, **given: Any) -> torch.Tensor:
    given = {"steps": 3, "decode": False, **given}
    return generate(tiny_model(kind), prompts, seed=seeds, **given).latents


# with every scheduler there is: tests/sampling/test_schedulers.py
@pytest.mark.parametrize(("kind", "scheduler"), [("sd", "euler_a")] + [(kind, None) for kind in FAMILIES])
def test_a_sample_does_not_depend_on_its_neighbours(kind: str, scheduler: str | None):
    together = make(kind, PROMPTS, [5, 6, 7], scheduler=scheduler)
    alone = make(kind, PROMPTS[1], 6, scheduler=scheduler)
    reordered = make(kind, [PROMPTS[1], PROMPTS[1], "a dog", PROMPTS[0]], [9, 6, 6, 5], scheduler=scheduler)
    for latents in (together[1:2], reordered[1:2]):
        torch.testing.assert_close(latents, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("scheduler", [*NOISY, "ddim"])
def test_noise_is_exactly_that_of_the_seed(scheduler: str):
    """Initial noise and the noise inside stochastic schedulers, to the bit, at any batch size: with the output replaced
    by zeros nothing else is left."""

    class Silence(Intervention):
        role = "guider"

        def after_predict(self, step: Step) -> None:
            self.mark(step)
            step.output = torch.zeros_like(step.x)

    def noise(seeds: list[int], **given: Any) -> torch.Tensor:
        return generate(
            tiny_model("sd"), ["a"] * len(seeds), seed=seeds, steps=3, scheduler=scheduler, decode=False,
            guidance=1.0, eta=0.7 if scheduler == "ddim" else 0.0, interventions=Silence(), **given,
        ).latents  # fmt: skip

    together = noise([3, 8, 5])
    assert torch.equal(together[1:2], noise([8]))
    assert torch.equal(together, noise([3, 8, 5], batch_size=2))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("kind", FAMILIES)
def test_same_seed_same_picture_and_nothing_else_matters(kind: str):
    first = make(kind, PROMPTS[0], 4)
    torch.rand(7)
    before = fingerprint(tiny_model(kind))
    assert torch.equal(make(kind, PROMPTS[0], 4), first)
    assert fingerprint(tiny_model(kind)) == before
    assert not torch.equal(make(kind, PROMPTS[0], 5), first)
    assert not torch.equal(make(kind, "a dog", 4), first)


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [("sd", "ddim"), ("sd", "euler"), ("sd", "heun"), ("sd2", "ddim"), ("sdxl", None), ("sd3", None), ("flux", None)],
)
def test_resuming_equals_the_uninterrupted_run(kind: str, scheduler: str | None):
    model = tiny_model(kind)
    given: dict[str, Any] = {"steps": 4, "scheduler": scheduler, "seed": 2, "decode": False, "size": (48, 32)}
    kept = {}
    whole = generate(model, "a dog", on_step=lambda step: kept.update({step.i + 1: step.x.clone()}), **given)
    for start in (1, 3):
        index = start * model.make_scheduler(scheduler).order
        resumed = generate(model, "a dog", latents=kept[index], start=start, **given)
        assert torch.equal(resumed.latents, whole.latents)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_guidance_of_one_is_the_conditional_model(kind: str):
    off = make(kind, PROMPTS[0], 1, guidance=1.0)
    zero = make(kind, PROMPTS[0], 1, guidance=0.0)
    assert torch.equal(off, zero)
    nearly = make(kind, PROMPTS[0], 1, guidance=1.0 + 1e-6)
    torch.testing.assert_close(nearly, off, rtol=1e-3, atol=1e-3)


def test_the_negative_prompt_is_what_an_empty_one_stands_for():
    assert torch.equal(make("sd", "a dog", 1, negative=""), make("sd", "a dog", 1))
    assert not torch.equal(make("sd", "a dog", 1, negative="a cat"), make("sd", "a dog", 1))


class Constant(Intervention):
    """Replaces the network's output by a constant."""

    role = "guider"

    def after_predict(self, step: Step) -> None:
        self.mark(step)
        step.output = torch.full_like(step.x, 0.3)


DETERMINISTIC = {
    "sd": ["ddim", "pndm", "lms", "euler", "heun", "dpm2", "dpm++", "dpm++_karras", "dpm++_single", "deis", "unipc"],
    "sd3": ["flow_euler", "flow_heun", "dpm++", "unipc"],
}


@pytest.mark.parametrize(
    ("kind", "scheduler"), [(kind, name) for kind in DETERMINISTIC for name in DETERMINISTIC[kind]]
)
def test_every_deterministic_scheduler_solves_what_can_be_solved_by_hand(kind: str, scheduler: str):
    """A network that always says the same: noise (or velocity) is constant, so every scheduler must end at the picture
    that the very first prediction implies. It ties the schedulers' scaling to the noise path."""
    seen: list[Step] = []
    given: dict[str, Any] = {"steps": 6, "scheduler": scheduler, "decode": False, "guidance": 1.0}
    result = generate(tiny_model(kind), "", interventions=Constant(), on_step=seen.append, **given)
    scale = float(seen[0].x0.abs().max())
    # two of them stop at the lowest noise level of training instead of at none
    tolerance = 1e-3 if scheduler in ("pndm", "deis") else 1e-6
    torch.testing.assert_close(result.latents, seen[0].x0, rtol=0, atol=tolerance * scale)
