"""What the claims of the invertible translators count, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from claims import cnn_invariances, data_biases, iin, net2net
from sfumato.toybox import COLORS
from sfumato.toybox.cues import CUE_SHAPES


def test_hosts_are_what_is_drawn():
    at = {"shape": torch.tensor([0, 2]), "color": torch.tensor([2])}
    found = iin.Swapped(
        at,
        {"shape": torch.tensor([1.0, 0.0]), "color": torch.tensor([1.0])},
        {"shape": torch.tensor([0.5, 1.0]), "color": torch.tensor([0.25])},
    )
    assert found.by_host(4, lambda a, _: a).tolist() == [1.0, 0.5]  # host 1 was never changed, host 2 twice
    assert found.by_host(4, torch.mul).tolist() == [0.5, 0.125]
    assert found.means() == ({"shape": 0.5, "color": 1.0}, {"shape": 0.75, "color": 0.25})


def test_variance_that_labels_explain_is_what_pairs_estimate():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (3000,), generator=rng)
    z = torch.randn(3000, 4, generator=rng)
    z[:, 0] += 3 * labels
    share = iin.explained(z, labels)
    rows = iin.agreeing(labels, 6000, 1, "label")
    assert iin.dimensions(z, {"label": rows}).scores["label"].value == pytest.approx(share, abs=0.02)
    assert iin.explained(torch.randn(3000, 4, generator=rng), labels) < 0.01


def test_ratios_are_one_for_chance_and_ranks_are_spearmans():
    said = torch.tensor([[0, 0, 0], [1, 1, 0]])
    assert cnn_invariances.agreement(said).tolist() == pytest.approx([1, 1 / 3])
    layers = [np.full((2, 5), v) for v in (0.1, 0.2, 0.4, 0.3)]
    assert cnn_invariances.ranks(*layers).tolist() == pytest.approx([0.8, 0.8])
    half = cnn_invariances.share_of(np.full(20, 0.4), np.full(20, 0.8))
    assert half.value == half.low == half.high == pytest.approx(0.5)


def test_laws_orders_and_colours_of_sets():
    names = {
        "shape": list(CUE_SHAPES), "color": list(COLORS), "ground": list("abcde"),
        "sky": ["clouds", "day", "fog", "night", "sunset"],
    }  # fmt: skip
    laws = data_biases.true_laws(names)
    assert all(float(each.sum()) == pytest.approx(1) for each in laws.values())
    assert float(laws["shape"][names["shape"].index("cone")]) == 0
    assert float(laws["color"][names["color"].index("red")]) == pytest.approx((0.9 + 2 / 8) / 3)
    assert data_biases.variation(torch.tensor([0, 0, 1, 1]), torch.tensor([0.5, 0.0, 0.5])) == pytest.approx(0.5)
    worth, odd = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, False, True, False])
    assert data_biases.auc(worth, odd) == 1 and data_biases.auc(-worth, odd) == 0
    x = torch.rand(6, 3, 8, 8) - 0.5
    tinted = (x * 0.5 + 0.2).clamp(-1, 1)
    assert torch.allclose(data_biases.colour_matched(x, x, tinted), tinted, atol=1e-4)


def test_captions_are_what_is_drawn():
    hits = torch.zeros(len(net2net.CAPTIONS), net2net.EACH, dtype=torch.bool)
    hits[0] = True
    found = net2net.Sampled({"shape": hits}, {"sky": 0.2, "ground": 0.4}, 3.0)
    none = net2net.Sampled({"shape": ~hits}, {}, 0.0)
    share = net2net.by_caption([found, none], "shape")
    assert share.shape == (32,) and set(share.tolist()) == {0.5}
    assert found.mean_law == pytest.approx(0.3) and found.to_json()["shape"] == pytest.approx(1 / 32)
