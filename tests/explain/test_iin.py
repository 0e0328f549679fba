"""IIN: the loss against a slow reference, planted concepts found and exchanged, drawings, files, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName
from sfumato.explain.iin import (
    IIN,
    ConceptPairs,
    concept_pairs,
    dimensions,
    factor_loss,
    fit_factors,
    floor_of,
    load_interpretation,
)
from sfumato.explain.iin.factors import block_sizes
from sfumato.explain.iin.report import linear_accuracy, readings
from sfumato.explain.iin.sketches import drawn_in, inside_of, sketch_pairs
from sfumato.models.nets.vector_ae import VectorAutoencoder
from sfumato.translation.examples import LabelledVectors, agreeing
from sfumato.translation.translator import FlowParams

FLOW = FlowParams(blocks=3, hidden=32, depth=1, steps=250, batch=96, lr=1e-2)


def test_the_loss_is_the_likelihood_of_the_pair():
    torch.manual_seed(0)
    va, vb, rho = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0.9, 0.9, 0.0, 0.5]).expand(3, 4)
    la, lb = torch.randn(3), torch.randn(3)
    first = torch.distributions.Normal(0, 1).log_prob(va).sum(1)
    second = torch.distributions.Normal(rho * va, (1 - rho**2).sqrt()).log_prob(vb).sum(1)
    assert torch.allclose(factor_loss(va, vb, la, lb, rho), -(first + second + la + lb) - 4 * math.log(2 * math.pi))


def test_a_pair_that_shares_nothing_costs_as_two_singles():
    va, vb, zero = torch.randn(3, 4), torch.randn(3, 4), torch.zeros(3)
    singles = 0.5 * (va.square() + vb.square()).sum(1)
    assert torch.allclose(factor_loss(va, vb, zero, zero, torch.zeros(3, 4)), singles)


def planted(n: int = 1500, seed: int = 0):
    """Eight mixed dimensions: a concept of 3 values in two of them, one of 4 in two others, and noise in four."""
    rng = torch.Generator().manual_seed(seed)
    labels = {"hue": torch.randint(0, 3, (n,), generator=rng), "form": torch.randint(0, 4, (n,), generator=rng)}
    hue, form = 2 * torch.randn(3, 2, generator=rng), 2 * torch.randn(4, 2, generator=rng)
    own = torch.cat([hue[labels["hue"]], form[labels["form"]], torch.randn(n, 4, generator=rng)], 1)
    own[:, :4] += 0.2 * torch.randn(n, 4, generator=rng)
    mix = torch.linalg.qr(torch.randn(8, 8, generator=rng))[0]
    examples = LabelledVectors(torch.zeros(n, 3, 1, 1), labels, {"hue": list("abc"), "form": list("wxyz")})
    return own @ mix.T, own, mix, examples


@pytest.fixture(scope="module")
def found():
    z, own, mix, examples = planted()
    rows = {name: agreeing(labels, 1500, i, name) for i, (name, labels) in enumerate(examples.labels.items())}
    interpretation = fit_factors(z, concept_pairs(rows), {"hue": 2, "form": 2}, FLOW, rho=0.95)
    return interpretation, z, own, mix, examples, rows


def test_blocks_read_their_concept_and_no_other(found):
    interpretation, z, _, _, examples, _ = found
    read = readings(interpretation, z, examples)
    assert read["hue"]["hue"] > 0.7 and read["form"]["form"] > 0.6
    assert read["hue"]["form"] < 0.25 and read["form"]["hue"] < 0.25
    assert read["residual"]["hue"] < 0.25 and read["residual"]["form"] < 0.25


def test_swaps_exchange_one_concept_and_keep_the_rest(found):
    interpretation, z, own, mix, _, _ = found
    hosts, donors = slice(0, 300), slice(300, 600)
    swapped = interpretation.swap(z[hosts], z[donors], "hue") @ mix
    spread = own.std(0)
    followed = ((swapped[:, :2] - own[donors, :2]).abs() / spread[:2]).mean()
    kept = ((swapped[:, 2:] - own[hosts, 2:]).abs() / spread[2:]).mean()
    without = ((own[hosts, :2] - own[donors, :2]).abs() / spread[:2]).mean()
    assert followed < 0.4 * without and kept < 0.35


def test_nothing_is_lost(found):
    interpretation, z = found[:2]
    assert (interpretation.vectors(interpretation.codes(z)) - z).abs().max() < 1e-4
    assert torch.allclose(interpretation.swap(z, z, "hue"), z, atol=1e-4)


def test_walks_resamples_and_strengths_touch_one_block(found):
    interpretation, z, _, _, examples, _ = found
    at = interpretation.block("form")
    labels = examples.labels["form"]
    way = interpretation.direction(z, labels, "form", 0, 2)
    walked = interpretation.codes(interpretation.walk(z[:2], "form", way, steps=3, reach=1.0).flatten(0, 1))
    moved = walked.unflatten(0, (2, 3)) - interpretation.codes(z[:2])[:, None]
    assert torch.allclose(moved[:, 2, at], way.expand(2, -1), atol=1e-3) and moved[:, 1].abs().max() < 1e-3
    others = torch.ones(8, dtype=torch.bool)
    others[at] = False
    assert moved[..., others].abs().max() < 1e-3
    drawn = interpretation.codes(interpretation.resample(z[:4], "form", 50).flatten(0, 1)).unflatten(0, (4, 50))
    assert float(drawn[..., at].std(1).mean()) == pytest.approx(1, abs=0.15)
    assert drawn[..., others].std(1).max() < 1e-3
    assert interpretation.strength(z, "form").mean() == pytest.approx(1, abs=0.25)
    assert interpretation.strength(z + 20, "form").mean() > 3
    axis = interpretation.principal(z, "form")
    assert axis.shape == (2,) and 0.7 < float(axis.norm()) < 1.8


def test_a_decision_responds_to_the_concept_it_rests_on(found):
    interpretation, z, own, mix, examples, _ = found
    centres = torch.stack([own[examples.labels["hue"] == k, :2].mean(0) for k in range(3)])

    def tail(vectors):  # nearest centre of hue
        return -8 * torch.cdist((vectors @ mix)[:, :2], centres)

    hue, form = (interpretation.response(tail, z[:100], name).mean() for name in ("hue", "form"))
    assert hue > 0.35 and form < 0.12


def test_dimensions_follow_what_pairs_share_and_the_floor_is_that_of_no_correlation(found):
    _, z, _, _, _, rows = found
    table = dimensions(z, rows)
    assert table.dimensions["hue"] >= floor_of(8, 2) and sum(table.dimensions.values()) == 8
    assert floor_of(64, 2) == 13  # 64 / (2 + e)
    noise = torch.randn(len(z), 64, generator=torch.Generator().manual_seed(3))
    assert dimensions(noise, rows).dimensions["hue"] in (12, 13, 14)


def test_files_hold_blocks_and_flow(found, tmp_path):
    interpretation, z = found[:2]
    again = load_interpretation(interpretation.save(tmp_path / "iin"))
    assert again.sizes == interpretation.sizes and again.facts["rho"] == 0.95
    assert torch.equal(again.codes(z), interpretation.codes(z))
    interpretation.translator.register_to_config(about={})
    interpretation.translator.save(tmp_path / "plain")
    with pytest.raises(BadWeights, match="without blocks"):
        load_interpretation(tmp_path / "plain")


def test_pairs_and_blocks_that_teach_nothing_are_refused():
    rows = torch.zeros(4, 2, dtype=torch.long)
    with pytest.raises(BadInput, match="agree in nothing"):
        fit_factors(torch.randn(64, 4), ConceptPairs(rows, torch.zeros(4, 1, dtype=torch.bool)), {"a": 2}, FLOW)
    with pytest.raises(BadInput, match="of 3 concepts"):
        fit_factors(torch.randn(64, 4), ConceptPairs(rows, torch.ones(4, 3, dtype=torch.bool)), {"a": 2}, FLOW)
    with pytest.raises(BadInput, match="2 dimensions that vary hold 1 concepts at most .* 2 are asked for .a, b."):
        block_sizes(2, {"a": 0, "b": 0})


@pytest.mark.parametrize(
    ("free", "asked", "given"),
    [
        (8, {"a": 2, "b": 3}, {"a": 2, "b": 3, "residual": 3}),
        (4, {"a": 0, "b": 0, "c": 0}, {"a": 1, "b": 1, "c": 1, "residual": 1}),
        (8, {"a": 2, "b": 9, "residual": 40}, {"a": 2, "b": 5, "residual": 1}),
        (3, {"a": 0, "b": 2}, {"a": 1, "b": 1, "residual": 1}),
    ],
)
def test_every_block_has_a_dimension_where_there_are_enough(free, asked, given):
    assert block_sizes(free, asked) == given


class FourNumbers(torch.nn.Module):
    """A net with as many numbers as concepts and residual: estimates of some of them round down to none."""

    def __init__(self):
        super().__init__()
        self.last = torch.nn.Linear(3, 4)

    def forward(self, pixels):
        return self.last(pixels.mean((2, 3)))


def test_a_vector_of_few_numbers_gives_each_concept_one():
    given = FlowParams(blocks=2, hidden=8, depth=1, steps=5, batch=16).model_dump()
    found = IIN(**given, concepts=["shape", "color", "place"], pictures=48).explain_net(FourNumbers())
    assert found.tables["last"].dimensions["shape"] == 0  # as the paper estimates
    assert found.interpretation.sizes == {"shape": 1, "color": 1, "place": 1, "residual": 1}
    assert set(found.read["shape"]) >= {"shape", "color", "place"}
    with pytest.raises(BadInput, match="hold 3 concepts at most"):
        IIN(**given, concepts=["shape", "color", "place", "scenery"], pictures=48).explain_net(FourNumbers())


def ring(side: int = 32) -> torch.Tensor:
    """A dark square outline on light paper (3 h w)."""
    sketch = torch.ones(3, side, side)
    sketch[:, 8:24, 8:24] = -1
    sketch[:, 10:22, 10:22] = 1
    return sketch


def test_drawings_take_a_pictures_colours_inside_and_out():
    assert inside_of(ring()).sum() == 16 * 16
    pictures = torch.full((2, 3, 32, 32), -0.5)
    pictures[1] = 0.5
    pictures[:, 0, 12:20, 12:20] = 0.9
    shown = drawn_in(ring(), pictures)
    assert torch.allclose(shown[:, :, 2, 2], pictures[:, :, 2, 2])
    assert (shown[:, 0, 10:22, 10:22].mean((1, 2)) - 0.9).abs().max() < 0.1
    with pytest.raises(BadInput, match="encloses nothing"):
        inside_of(torch.ones(3, 32, 32))


def test_pairs_of_drawings_share_the_drawing_or_all_but_it():
    pairs = sketch_pairs(10, 200, seed=0)
    drawing, colouring = pairs.rows // 10, pairs.rows % 10
    same = pairs.shared[:, 0]
    assert (drawing[same, 0] == drawing[same, 1]).all() and (colouring[same, 0] != colouring[same, 1]).all()
    assert (drawing[~same, 0] != drawing[~same, 1]).all() and (colouring[~same, 0] == colouring[~same, 1]).all()


def test_a_net_is_explained_from_start_to_files(tmp_path):
    torch.manual_seed(0)
    system = IIN(pictures=48, concepts=["shape", "color"], blocks=1, hidden=8, depth=1, steps=3, batch=16)
    found = system.explain_net(VectorAutoencoder(16, (8, 8), 10).eval(), "tiny")
    assert any(line.startswith("code: 10 dimensions, 2 each") for line in found.lines())
    names = {path.name for path in found.save(tmp_path, "tiny.iin")}
    assert names == {"tiny.iin.json", "tiny.iin", "tiny.iin.swaps.png", "tiny.iin.samples.png"}
    assert list(load_interpretation(tmp_path / "tiny.iin").sizes) == ["shape", "color", "residual"]
    free = IIN(pictures=48, supervised=False, blocks=1, hidden=8, steps=3, batch=16)
    assert free.explain_net(VectorAutoencoder(16, (8, 8), 10).eval()).interpretation.concepts == []


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        ({"concepts": []}, BadInput, "needs a concept"),
        ({"concepts": ["shape", "shape"]}, BadInput, "different"),
        ({"sketches": ["a.png"]}, BadInput, "two drawings"),
        ({"rho": 1.0}, BadInput, "rho"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(given, kind, told):
    with pytest.raises(kind, match=told):
        IIN(**given)


def test_concepts_and_nets_that_are_not_there_are_refused():
    ae = VectorAutoencoder(16, (8, 8), 10).eval()
    with pytest.raises(UnknownName, match="colour"):
        IIN(concepts=["colour"]).explain_net(ae)
    with pytest.raises(NotSupported):
        IIN().explain_net(object())


def test_linear_readers_read_what_is_linear():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=rng)
    assert linear_accuracy(x, (x[:, 2] > 0).long()) > 0.9
    assert linear_accuracy(x, torch.randint(0, 2, (400,), generator=rng)) < 0.65
