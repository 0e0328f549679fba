"""Distances between sets of features against slow float64 references, closed forms, and torch-fidelity where it is."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import scipy.linalg

from sfumato.errors import BadInput
from sfumato.metrics import frechet, kernel
from sfumato.metrics.frechet import Moments
from sfumato.metrics.kernel import Kernel, kernel_distance
from sfumato.metrics.manifold import manifold, squared_distances

fidelity = pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not here")


def sample(n, d, seed=0, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(d, d)) / np.sqrt(d)
    return rng.normal(size=(n, d)) @ mix * scale + shift


def moments(x):
    return Moments(x.shape[1]).add(x)


# --- Frechet ---------------------------------------------------------------------------------------------------------


def slow_frechet(x, y):
    """The textbook formula through a general matrix square root."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)


def test_frechet_against_sqrtm():
    for seed, (n, m, d) in enumerate(((200, 300, 8), (500, 100, 20))):
        x, y = sample(n, d, seed), sample(m, d, seed + 10, 0.3, 1.2)
        assert frechet.frechet(moments(x), moments(y)) == pytest.approx(slow_frechet(x, y), rel=1e-9)


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    one, two = Moments(2), Moments(2)
    one.n, one.mean, one.scatter = 11, np.array([1.0, 0.0]), np.diag([4.0, 9.0]) * 10
    two.n, two.mean, two.scatter = 11, np.array([0.0, 2.0]), np.diag([1.0, 1.0]) * 10
    assert frechet.frechet(one, two) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2)


def test_frechet_survives_singular_covariances():
    x, y = sample(6, 40, 1), sample(6, 40, 2)
    assert frechet.frechet(moments(x), moments(x)) == pytest.approx(0, abs=1e-6)
    # sqrtm is not to be trusted on singular products; a floor of 1e-10 makes them regular
    a, b = (np.cov(z, rowvar=False) + 1e-10 * np.eye(40) for z in (x, y))
    values = scipy.linalg.eigvals(a @ b).real.clip(0)
    slow = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * np.sqrt(values).sum()
    assert frechet.frechet(moments(x), moments(y)) == pytest.approx(slow, rel=1e-3)


def test_moments_do_not_depend_on_how_they_were_gathered():
    x = sample(101, 7, 3) + 1000  # far from 0, where sums of squares would cancel
    parts = Moments(7)
    for rows in np.array_split(x, 9):
        parts.add(rows)
    halves = moments(x[:40]).merge(moments(x[40:])).merge(Moments(7))
    back = Moments.restore(halves.state())
    for got in (parts, halves, back):
        assert got.n == 101
        assert np.allclose(got.mean, x.mean(0), rtol=1e-12)
        assert np.allclose(got.covariance, np.cov(x, rowvar=False), rtol=1e-9)


def test_half_precision_is_counted_in_double():
    x = sample(300, 5, 4).astype(np.float16)
    assert moments(x).mean.dtype == np.float64
    assert np.allclose(moments(x).covariance, np.cov(x.astype(np.float64), rowvar=False))


def test_frechet_refuses():
    with pytest.raises(BadInput, match="at least 2 pictures"):
        frechet.frechet(moments(sample(1, 3)), moments(sample(5, 3)))
    with pytest.raises(BadInput, match="3 and 4 numbers"):
        frechet.frechet(moments(sample(5, 3)), moments(sample(5, 4)))
    with pytest.raises(BadInput, match="picture 2 are not finite"):
        moments(np.array([[0.0], [1.0], [np.nan]]))
    with pytest.raises(BadInput, match="3 numbers each"):
        moments(sample(5, 4)).add(sample(5, 3))
    with pytest.raises(BadInput, match="must be \\(pictures, numbers\\)"):
        Moments(3).add(np.zeros(3))


# --- kernel ----------------------------------------------------------------------------------------------------------


def slow_mmd2(x, y):
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


@pytest.mark.parametrize("block", [1024, 7])
def test_kernel_distance_against_loops(monkeypatch, block):
    monkeypatch.setattr(kernel, "BLOCK", block)
    x, y = sample(23, 5, 1), sample(31, 5, 2, 0.2)
    got = kernel_distance(x, y)
    assert got.value == pytest.approx(slow_mmd2(x, y), rel=1e-10) and got.low < got.value < got.high and got.n == 23


def test_kernel_distance_is_unbiased_and_its_interval_honest():
    near = [kernel_distance(sample(60, 4, s), sample(60, 4, 1000 + s)) for s in range(100)]
    values = np.array([each.value for each in near])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    # truth of the shifted pair from one large sample; the 95 % intervals must hold it about that often
    truth = kernel_distance(sample(1500, 4, 5), sample(1500, 4, 6, 0.5)).value
    far = [kernel_distance(sample(60, 4, s), sample(60, 4, 1000 + s, 0.5)) for s in range(100)]
    held = np.mean([each.low <= truth <= each.high for each in far])
    assert 0.85 <= held <= 1


def test_the_kernel_makes_a_difference():
    x, y = sample(40, 5, 1), sample(50, 5, 2, 0.2)
    assert kernel_distance(x, y, Kernel(degree=1)).value != pytest.approx(kernel_distance(x, y).value)


def test_kernel_distance_refuses():
    with pytest.raises(BadInput, match="at least 2 pictures"):
        kernel_distance(sample(1, 3), sample(5, 3))
    with pytest.raises(BadInput, match="3 and 4 numbers"):
        kernel_distance(sample(5, 3), sample(5, 4))


# --- manifolds -------------------------------------------------------------------------------------------------------


def slow_manifold(x, y, k, k_density):
    def radius(rows, i, neighbour):
        return sorted(np.linalg.norm(rows[i] - rows[j]) for j in range(len(rows)) if j != i)[neighbour - 1]

    d = [[np.linalg.norm(a - b) for b in y] for a in x]
    real, fake = [radius(x, i, k) for i in range(len(x))], [radius(y, j, k) for j in range(len(y))]
    wide = [radius(x, i, k_density) for i in range(len(x))]
    pairs = [(i, j) for i in range(len(x)) for j in range(len(y))]
    return (
        np.mean([any(d[i][j] <= real[i] for i in range(len(x))) for j in range(len(y))]),
        np.mean([any(d[i][j] <= fake[j] for j in range(len(y))) for i in range(len(x))]),
        sum(d[i][j] <= wide[i] for i, j in pairs) / (k_density * len(y)),
        np.mean([any(d[i][j] <= wide[i] for j in range(len(y))) for i in range(len(x))]),
    )


@pytest.mark.parametrize("block", [1024, 9])
def test_manifold_against_loops(monkeypatch, block):
    monkeypatch.setattr(kernel, "BLOCK", block)
    x, y = sample(40, 3, 1), sample(31, 3, 2, 0.4, 0.7)
    got = manifold(x, y, 3, 5)
    figures = (got.precision.value, got.recall.value, got.density.value, got.coverage.value)
    assert figures == pytest.approx(slow_manifold(x, y, 3, 5)) and 0 < got.recall.value < got.precision.value


def test_a_set_covers_itself_and_a_far_one_nothing():
    x = sample(30, 4, 1) + 1e4  # where the expansion of |x - y|^2 cancels
    same = manifold(x, x.copy())
    assert (same.precision.value, same.recall.value, same.coverage.value) == (1, 1, 1)
    far = manifold(x, x + 1e6)
    assert (far.precision.value, far.recall.value, far.density.value, far.coverage.value) == (0, 0, 0, 0)
    collapsed = manifold(x, np.repeat(x[:1], 30, 0))
    assert collapsed.precision.value == 1 and collapsed.recall.value < 0.1 and collapsed.coverage.value < 0.5
    assert np.array_equal(np.diag(squared_distances(x, x)), np.zeros(30))


def test_manifold_refuses():
    with pytest.raises(BadInput, match="at least 6 pictures"):
        manifold(sample(5, 3), sample(50, 3))
    with pytest.raises(BadInput, match="k=0"):
        manifold(sample(50, 3), sample(50, 3), k=0)


# --- peers -----------------------------------------------------------------------------------------------------------


@fidelity
def test_torch_fidelity_says_the_same():
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = torch.from_numpy(sample(200, 16, 1)), torch.from_numpy(sample(200, 16, 2, 0.2))
    ours = frechet.frechet(moments(x.numpy()), moments(y.numpy()))
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    # one subset that holds every picture: nothing is left to the draw
    got = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=200, rng_seed=3, verbose=False)
    theirs = got["kernel_inception_distance_mean"]
    assert kernel_distance(x.numpy(), y.numpy()).value == pytest.approx(theirs, rel=1e-6)
    prc = prc_features_to_metric(x, y, prc_neighborhood=3, verbose=False)
    assert manifold(x.numpy(), y.numpy()).precision.value == pytest.approx(prc["precision"])
