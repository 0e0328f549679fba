"""Fitting flows: known densities, conditions, dead dimensions, files, and what is refused."""

from __future__ import annotations

import math
import signal

import pytest
import torch

from sfumato.errors import BadInput, BadWeights
from sfumato.translation.translator import fit_translator, load_translator, standardising, widened

SMALL = {"blocks": 3, "hidden": 24, "depth": 1, "batch": 96, "lr": 1e-2}


@pytest.fixture(scope="module")
def conditional():
    """z = 2 c + noise of deviation 0.5 in two dimensions, and a constant third."""
    rng = torch.Generator().manual_seed(0)
    c = torch.randn(1200, 2, generator=rng)
    z = torch.cat([2 * c + 0.5 * torch.randn(1200, 2, generator=rng), torch.full((1200, 1), 7.0)], 1)
    return fit_translator(z, c, steps=120, embedding=4, **SMALL), z, c


def test_the_likelihood_of_a_normal_is_its_entropy():
    rng = torch.Generator().manual_seed(1)
    mix = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-1.0, 0.3, 1.5]])
    found = fit_translator(torch.randn(3000, 3, generator=rng) @ mix.T + 4, steps=80, **SMALL)
    fresh = torch.randn(3000, 3, generator=rng) @ mix.T + 4
    nats = float(found.translator.nll(fresh).mean() + found.translator.std.log().sum())
    entropy = 1.5 * (1 + math.log(2 * math.pi)) + float(torch.linalg.slogdet(mix)[1])
    assert nats == pytest.approx(entropy, abs=0.06)


def test_two_moons_lose_most_of_what_a_normal_costs_them():
    rng = torch.Generator().manual_seed(2)
    angle = math.pi * torch.rand(2000, generator=rng)
    side = (torch.rand(2000, generator=rng) < 0.5).float()
    x = torch.stack([(1 - 2 * side) * angle.cos() + side, (1 - 2 * side) * angle.sin() + 0.5 * side], 1)
    z = x + 0.05 * torch.randn(x.shape, generator=rng)
    found = fit_translator(z, steps=150, **SMALL)
    normal = 1 + math.log(2 * math.pi) + 0.5 * torch.linalg.slogdet(torch.corrcoef(z.T))[1]
    assert found.facts["nll"] < float(normal) - 0.4  # of 1.3, in few steps


def test_a_condition_is_used_and_leaves_the_residual(conditional):
    record, z, c = conditional
    translator = record.translator
    right, wrong = translator.nll(z, c).mean(), translator.nll(z, c.flip(0)).mean()
    assert wrong - right > 2
    drawn = translator.sample(c[:50], n=20, seed=3)
    assert drawn.shape == (50, 20, 3)
    assert (drawn[..., :2].mean(1) - 2 * c[:50]).abs().mean() < 0.25
    assert float(drawn[..., :2].std(1).mean()) == pytest.approx(0.5, abs=0.12)
    moved = translator.vectors(translator.residual(z[:50], c[:50]), c[50:100])
    assert (moved[:, :2] - (z[:50, :2] + 2 * (c[50:100] - c[:50]))).abs().mean() < 0.3
    assert (translator.residual(z, c).T @ ((c - c.mean(0)) / c.std(0)) / len(c)).abs().max() < 0.12


def test_dead_dimensions_are_left_out_and_come_back(conditional):
    record, z, c = conditional
    translator = record.translator
    assert record.facts["dead"] == 1 and translator.free == 2 and "1 dead dimensions" in record.line()
    back = translator.vectors(translator.residual(z, c), c)
    assert (back - z).abs().max() < 1e-4 and record.facts["inverse_error"] < 1e-4


def test_files_hold_everything(conditional, tmp_path):
    record, z, c = conditional
    folder = record.translator.save(tmp_path / "flow")
    again = load_translator(folder)
    assert torch.equal(again.residual(z, c), record.translator.residual(z, c))
    assert again.training is False and bool(again.flow.stages[0].ready)
    with pytest.raises(BadInput, match="not empty"):
        record.translator.save(folder)
    with pytest.raises(BadInput, match="no fitted flow"):
        load_translator(tmp_path)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadWeights):
        load_translator(folder)


def test_the_same_seed_gives_the_same_flow_and_global_randomness_is_left_alone():
    z = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    one, two = (fit_translator(z, steps=3, seed=5, **SMALL).translator.residual(z) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("z", "told"),
    [
        (torch.randn(10, 4), "too few"),
        (torch.full((64, 4), float("nan")), "not finite"),
        (torch.ones(64, 4), "hardly vary"),
    ],
)
def test_vectors_that_cannot_be_fitted_are_refused(z, told):
    with pytest.raises(BadInput, match=told):
        standardising(z, "vectors")


def test_vectors_and_conditions_that_do_not_fit_are_refused(conditional):
    translator = conditional[0].translator
    for call, told in (
        (lambda: translator.residual(torch.randn(2, 4), torch.randn(2, 2)), "vectors must be"),
        (lambda: translator.residual(torch.full((2, 3), math.inf), torch.randn(2, 2)), "not finite"),
        (lambda: translator.residual(torch.randn(2, 3), torch.full((2, 2), math.nan)), "not finite"),
        (lambda: translator.residual(torch.randn(2, 3), torch.randn(2, 5)), "conditions must be"),
        (lambda: translator.noise(2, temperature=-1), "temperature"),
    ):
        with pytest.raises(BadInput, match=told):
            call()


def test_conditions_that_never_vary_are_refused_and_dead_ones_stay_in_their_unit():
    z, c = torch.randn(64, 3), torch.randn(64, 2)
    with pytest.raises(BadInput, match="all 64 conditions are the same"):
        fit_translator(z, torch.ones(64, 2), steps=1, **SMALL)
    with pytest.raises(BadInput, match="64 vectors but 63 conditions"):
        fit_translator(z, c[:-1], steps=1, **SMALL)
    c[:, 1] = 0.3
    translator = fit_translator(z, c, steps=1, **SMALL).translator
    assert translator.condition_std[1] == 1
    c[:, 1] = 0.301  # hardly anything: nothing explodes
    assert translator.residual(z, c).abs().max() < 50


def test_one_vector_alone_is_read_as_in_a_batch(conditional):
    translator = conditional[0].translator
    z, c = torch.randn(5, 3), torch.randn(5, 2)
    alone = torch.cat([translator.residual(z[i : i + 1], c[i : i + 1]) for i in range(5)])
    assert torch.allclose(alone, translator.residual(z, c), atol=1e-5)
    assert translator.sample(c[:1], 1).shape == (1, 1, 3)
    with pytest.raises(BadInput, match="batch"):
        fit_translator(z, batch=1)


def few() -> torch.Tensor:
    return torch.randn(150, 6, generator=torch.Generator().manual_seed(4)).exp()


def by_heart(noise: float) -> dict[str, float]:
    """Fitted to the end: a loss of its own is not ended by held-out rows."""
    z = few()

    def likelihood(translator, draw):
        rows = z[draw.indices(135, 96)]
        rows = rows + noise * z.std(0) * torch.randn(rows.shape, generator=draw.generator("noise"))
        return translator.flow.nll(translator.scaled(rows)).mean(), {}

    return fit_translator(z, steps=250, loss=likelihood, noise=0.0, **SMALL).facts


def test_noise_keeps_few_vectors_from_being_learnt_by_heart():
    plain, noisy = by_heart(0.0), by_heart(0.4)
    assert plain["kept"] == plain["steps"] == 250 and plain["nll_fitted"] < plain["nll"] - 1.0
    assert noisy["nll"] - noisy["nll_fitted"] < 0.5 * (plain["nll"] - plain["nll_fitted"])
    assert noisy["nll"] < plain["nll"] - 0.5


def test_the_weights_with_the_best_held_out_likelihood_are_kept():
    found = fit_translator(few(), steps=250, noise=0.0, **SMALL)
    assert found.facts["steps"] == 250 and 0 < found.facts["kept"] < 200
    assert found.held_out.tolist() == list(range(135, 150))
    assert found.facts["nll"] < by_heart(0.0)["nll"] - 0.5
    shorter = fit_translator(few(), steps=250, noise=0.0, **SMALL)
    assert shorter.facts == found.facts  # of the same weights
    assert float(found.translator.nll(few()[found.held_out]).mean()) == pytest.approx(found.facts["nll"], abs=1e-5)


def test_an_interrupted_fit_keeps_the_best_until_then():
    seen: list[int] = []

    def stop_soon(progress):
        seen.append(progress.step)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)

    found = fit_translator(few(), steps=400, noise=0.0, on_progress=stop_soon, **SMALL)
    assert found.facts["interrupted"] and 0 < found.facts["kept"] <= found.facts["steps"] < 400
    assert float(found.translator.nll(few()[found.held_out]).mean()) == pytest.approx(found.facts["nll"], abs=1e-5)


def test_noise_is_in_units_of_each_dimension_and_adds_to_the_spread():
    z = torch.randn(400, 3, generator=torch.Generator().manual_seed(5)) * torch.tensor([1.0, 10.0, 0.1])
    spread = torch.full_like(z, 0.3)
    assert widened(z, spread, 0.0) is spread and widened(z, None, 0.0) is None
    assert torch.allclose(widened(z, None, 0.5), 0.5 * z.std(0).expand_as(z))
    assert torch.allclose(widened(z, spread, 0.5).square(), 0.09 + (0.5 * z.std(0)).square().expand_as(z))
