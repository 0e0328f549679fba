"""Arcs between vectors, angles between subspaces and means of them, against constructions by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadInput
from sfumato.metrics.geometry import (
    curvedness,
    frechet_mean,
    geodesic_distance,
    hungarian_mean,
    principal_angles,
    slerp,
    spectrum,
    spherical_distance,
)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def orthonormal(n, d, seed):
    return torch.linalg.qr(torch.randn(d, n, generator=torch.Generator().manual_seed(seed)).double()).Q.T


def test_slerp_is_a_rotation_in_the_plane_of_both():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=24), 3 * rng.normal(size=24)
    angle = math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    one = a / np.linalg.norm(a)
    two = b - (b @ one) * one
    two /= np.linalg.norm(two)
    for share in (0.0, 0.25, 0.7, 1.0):
        truth = np.linalg.norm(a) * (math.cos(share * angle) * one + math.sin(share * angle) * two)
        got = slerp(torch.tensor(a)[None].view(1, 2, 3, 4), torch.tensor(b)[None].view(1, 2, 3, 4), share)
        assert got.dtype == torch.float64 and np.allclose(got.flatten().numpy(), truth, atol=1e-5)


def test_slerp_of_equal_opposite_and_zero_features_is_finite():
    a = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-6) and torch.allclose(slerp(a, 5 * a, 0.3), a, atol=1e-6)
    assert torch.isfinite(slerp(a, -a, 0.5)).all() and torch.isfinite(slerp(0 * a, a, 0.5)).all()
    assert torch.equal(slerp(a, a.flip(1), 0.0), a)
    together, alone = slerp(a, a.flip(1), 0.4), slerp(a[1:], a[1:].flip(1), 0.4)
    assert torch.equal(together[1:], alone)


def test_slerp_that_lets_the_norm_go_along():
    a, b = unit(3, 10), 4 * unit(3, 10, seed=1)
    angle = F.cosine_similarity(a, b).acos()[:, None]
    truth = ((0.7 * angle).sin() * a + (0.3 * angle).sin() * b) / angle.sin()
    torch.testing.assert_close(slerp(a, b, 0.3, keep_norm=False), truth, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(slerp(a, -a, 0.5, keep_norm=False)).all()


def test_spherical_distance_is_half_the_squared_angle():
    x, y = unit(20, 5), unit(20, 5, seed=1)
    angle = torch.tensor([math.acos(float(a @ b)) for a, b in zip(x, y, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(spherical_distance(x, y), angle.square() / 2)


@pytest.mark.parametrize("sign", [1, -1])
def test_spherical_distance_has_finite_gradients_at_both_poles(sign):
    y = unit(3, 5)
    x = (sign * y).clone().requires_grad_(True)
    spherical_distance(x, y).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_principal_angles_of_planes_turned_by_known_angles():
    truth = torch.tensor([1e-5, 0.01, 0.4, 1.5], dtype=torch.float64)
    turned = orthonormal(12, 12, 3)
    a = torch.eye(4, 12).double()
    b = truth.cos()[:, None] * a + truth.sin()[:, None] * torch.eye(4, 12).double().roll(4, 1)
    mixed = orthonormal(4, 4, 5) @ b  # another basis of the same space
    found = principal_angles(a @ turned, mixed @ turned)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-8)
    assert geodesic_distance(a @ turned, mixed @ turned) == pytest.approx(float(truth.square().sum().sqrt()))
    assert principal_angles(a[:2], b).tolist() == pytest.approx([1e-5, 0.01], rel=1e-3)
    assert geodesic_distance(a, a.flip(0)) < 1e-7
    with pytest.raises(BadInput, match="cannot be compared"):
        geodesic_distance(a, b[:2])


def test_means_over_samples():
    a, b = orthonormal(3, 40, 1), orthonormal(3, 40, 2)
    b = torch.linalg.qr((a + 0.5 * b).T).Q.T
    mean = frechet_mean([a, b])
    assert geodesic_distance(mean, a) == pytest.approx(geodesic_distance(a, b) / 2, rel=1e-4)
    assert geodesic_distance(mean, b) == pytest.approx(geodesic_distance(a, b) / 2, rel=1e-4)
    shuffled = torch.stack([-a[2], a[0], -a[1]])
    assert torch.allclose(hungarian_mean([a, shuffled, a]), a, atol=1e-6)
    assert torch.allclose(frechet_mean([a, a.clone()]), a, atol=1e-6)


def test_spectrum_and_curvedness():
    x = torch.arange(16.0)
    waves = torch.stack([torch.cos(2 * torch.pi * k * x / 16) for k in (0, 1, 5)])[:, None, None].expand(3, 2, 16, 16)
    power = spectrum(waves)
    assert power.shape == (3, 9) and torch.allclose(power[[0, 1, 2], [0, 1, 5]], torch.ones(3).double())
    turned = [torch.tensor([[np.cos(angle), np.sin(angle), 0.0]]) for angle in (0.0, 0.3, 0.7)]
    assert curvedness(turned) == pytest.approx(1)
    assert curvedness([turned[0], torch.tensor([[0.8, 0.0, 0.6]]).double(), turned[2]]) > 1.1
    with pytest.raises(BadInput, match="at least 3"):
        curvedness(turned[:2])
