"""Guidance against its formulas, written out sample by sample in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.models.families import Family
from sfumato.sampling import Guidance, Options, generate
from sfumato.sampling.guidance import rescaled
from tests.tiny import tiny_model


def outputs(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 3, 5, generator=draw, dtype=torch.float64) for _ in range(count)]


def combine(uncond: Tensor, conds: list[Tensor], weights: list[float], rescale: float = 0.0) -> Tensor:
    guided = Family.combine(None, uncond, conds, weights)  # type: ignore[arg-type]
    return rescaled(guided, conds[0], rescale) if rescale else guided


def test_classifier_free_guidance():
    uncond, cond = outputs(2)
    torch.testing.assert_close(combine(uncond, [cond], [7.5]), -6.5 * uncond + 7.5 * cond)
    assert torch.equal(combine(uncond, [cond], [0.0]), uncond)


def test_composition_is_a_sum_of_directions():
    uncond, first, second, third = outputs(4)
    weights = [5.0, -2.0, 0.5]
    expected = uncond.clone()
    for i in range(uncond.numel()):
        u = uncond.view(-1)[i]
        expected.view(-1)[i] = u + sum(
            w * (c.reshape(-1)[i] - u) for w, c in zip(weights, (first, second, third), strict=True)
        )
    torch.testing.assert_close(combine(uncond, [first, second, third], weights), expected)


def test_rescale_moves_the_spread_to_the_conditional_one():
    uncond, cond = outputs(2)
    cond = cond * 3 + 1
    plain = combine(uncond, [cond], [9.0])
    full = combine(uncond, [cond], [9.0], rescale=1.0)
    half = combine(uncond, [cond], [9.0], rescale=0.5)
    for i in range(2):
        assert plain[i].std() > 2 * cond[i].std()
        torch.testing.assert_close(full[i].std(), cond[i].std())
        torch.testing.assert_close(half[i], (plain[i] + plain[i] * cond[i].std() / plain[i].std()) / 2)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, "7", None])
def test_bad_scales(scale: object):
    with pytest.raises(BadInput, match="guidance"):
        Guidance(scale)  # type: ignore[arg-type]


def test_bad_rescale_and_interval():
    with pytest.raises(BadInput, match="rescale"):
        Guidance(5.0, rescale=1.5)
    for interval in [(0.5, 0.5), (-0.1, 1.0), (0.2, 1.1), (0.1,)]:
        with pytest.raises(BadInput, match="interval"):
            Guidance(5.0, interval=interval)  # type: ignore[arg-type]
    for compose in [["a dog"], [("a dog", math.nan)], [(1, 2)], [("a", 1.0, 2.0)]]:
        with pytest.raises(BadInput, match="compose"):
            Options(prompt="a", compose=compose)


def test_interval_runs_the_unconditional_branch_only_inside():
    model = tiny_model("sd")
    seen = []
    result = generate(
        model,
        "a red cube",
        guidance=Guidance(5.0, interval=(0.25, 0.75)),
        steps=4,
        scheduler="ddim",
        decode=False,
        on_step=lambda step: seen.append(step.branches),
    )
    assert seen == [("cond",), ("uncond", "cond"), ("uncond", "cond"), ("cond",)]
    assert result.cost == 6


@pytest.mark.filterwarnings("ignore::sfumato.sampling.request.GuidanceCosts")
@pytest.mark.parametrize("kind", ["sd", "sd3", "schnell"])
def test_composed_prompts_in_the_loop(kind: str):
    """Against the same sum made by hand from separate denoiser calls at every step."""
    model = tiny_model(kind)
    texts, weights = ["a red cube", "a blue ball", "a dog"], [4.0, 2.5, -1.0]
    conditions = [model.encode_text(text, guidance=True) for text in texts]
    checked = []

    def compare(step):
        with torch.no_grad():
            x = step.run.scheduler.scale_model_input(before[-1], step.t) if kind == "sd" else before[-1]
            u = model.predict(x, step.t, conditions[0], "uncond")
            expected = u + sum(
                w * (model.predict(x, step.t, c, "cond") - u) for w, c in zip(weights, conditions, strict=True)
            )
        torch.testing.assert_close(step.output, expected, rtol=1e-4, atol=1e-5)
        checked.append(step.i)
        before.append(step.x)

    before = [generate_noise(model)]
    result = generate(
        model,
        texts[0],
        guidance=weights[0],
        compose=[(texts[1], weights[1]), (texts[2], weights[2])],
        steps=3,
        scheduler="ddim" if kind == "sd" else None,
        latents=before[0],
        decode=False,
        on_step=compare,
    )
    assert checked == [0, 1, 2]
    assert result.cost == 3 * 4


def generate_noise(model) -> Tensor:
    shape = model.latent_shape(*model.default_size)
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))


def test_composing_with_weight_zero_changes_nothing():
    model = tiny_model("sd")
    plain = generate(model, "a red cube", steps=2, seed=1, decode=False)
    composed = generate(model, "a red cube", steps=2, seed=1, decode=False, compose=[("a dog", 0.0)])
    torch.testing.assert_close(composed.latents, plain.latents, rtol=0, atol=0)
