"""Local bases against the singular value decomposition of the whole Jacobian."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import BadInput, SfumatoError
from sfumato.hspace import Basis, Directions, Encoder, Jacobian, layer_of, local_basis
from sfumato.metrics.geometry import principal_angles
from tests.tiny import tiny_model


def encoder_of(kind, layer=None, side=16):
    model = tiny_model(kind)
    told = model.encode_text(["a red cube"], guidance=False, embedded_guidance=3.0)
    x = torch.randn(1, *model.latent_shape(side, side), generator=torch.Generator().manual_seed(3))
    return Encoder(model, layer_of(model, layer), torch.tensor(500.0), told), x


def jacobian(encoder, x):
    """(d_h d_x), row by row, by ordinary backward passes through the fused kernels."""
    model, layer = encoder.model, encoder.layer
    seen = []
    handle = model.denoiser.get_submodule(layer.path).register_forward_hook(
        lambda m, a, out: seen.append(out if layer.entry is None else out[layer.entry])
    )
    x = x.clone().requires_grad_(True)
    with torch.enable_grad():
        model.predict(x, encoder.t, encoder.condition, "cond")
        handle.remove()
        h = seen[0].flatten()
        return torch.stack([torch.autograd.grad(each, x, retain_graph=True)[0].flatten() for each in h])


def orthonormal(n, d, seed):
    return torch.linalg.qr(torch.randn(d, n, generator=torch.Generator().manual_seed(seed)).double()).Q.T


@torch.no_grad()
def test_the_basis_is_that_of_the_full_jacobian():
    encoder, x = encoder_of("sd", side=8)
    n = 20
    u, s, vt = torch.linalg.svd(jacobian(encoder, x), full_matrices=False)
    basis = local_basis(encoder, x, n, iterations=60, tolerance=1e-3)
    assert len(basis) == n and basis.converged and basis.cost > 0
    assert torch.allclose(basis.s, s[:n], rtol=0.01)
    gap = max(k for k in range(1, n + 1) if s[k - 1] > 1.02 * s[k])  # spaces are told apart where values differ
    v = basis.v.flatten(1)
    assert principal_angles(v[:gap], vt[:gap]).max() < 0.05
    assert principal_angles(basis.u[:gap], u.T[:gap]).max() < 0.05
    eye = torch.eye(n)
    assert torch.allclose(v @ v.T, eye, atol=1e-4) and torch.allclose(basis.u @ basis.u.T, eye, atol=1e-4)
    assert torch.allclose(Jacobian(encoder, x, 7).jvp(v), basis.s[:, None] * basis.u, atol=1e-3 * float(s[0]))


@torch.no_grad()
def test_values_are_right_even_where_they_lie_too_close_for_the_directions_to_settle():
    encoder, x = encoder_of("sd3")  # an untrained transformer passes everything on: its values are all but equal
    s = torch.linalg.svdvals(jacobian(encoder, x))
    basis = local_basis(encoder, x, 3, iterations=5, tolerance=1e-4)
    assert not basis.converged and basis.iterations == 5 and s[2] > 0.95 * s[0]
    assert torch.allclose(basis.s, s[:3], rtol=0.05)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "pixart"])
@torch.no_grad()
def test_the_two_products_are_adjoint_and_those_of_differences(kind):
    encoder, x = encoder_of(kind)
    generator = torch.Generator().manual_seed(5)
    v = torch.linalg.qr(torch.randn(x.numel(), 3, generator=generator)).Q.T
    jacobian = Jacobian(encoder, x, 2)  # two products at a time
    u = torch.randn(3, jacobian.width, generator=generator)
    forward, backward = (jacobian.jvp(v) * u).sum(1), (jacobian.vjp(u) * v).sum(1)
    assert torch.allclose(forward, backward, rtol=1e-3, atol=1e-4 * float(forward.abs().max()))
    step = 0.05 * v.view(3, *x.shape[1:])
    difference = (encoder(x + step) - encoder(x - step)) / 0.1
    assert torch.allclose(jacobian.jvp(v), difference, atol=0.01 * float(difference.abs().max()))
    assert torch.allclose(jacobian.vjp(u) @ v.T, u @ difference.T, atol=0.01 * float((u @ difference.T).abs().max()))


@torch.no_grad()
def test_a_warm_start_finds_the_same_sooner_and_any_layer_serves():
    encoder, x = encoder_of("sd")
    cold = local_basis(encoder, x, 4, tolerance=1e-3)
    warm = local_basis(encoder, x, 4, tolerance=1e-3, begin=cold, seed=9)
    assert warm.iterations < cold.iterations and torch.allclose(warm.s, cold.s, rtol=1e-2)
    other, x = encoder_of("sd", "up.0")
    assert local_basis(other, x, 2, iterations=3).u.shape == (2, 32 * 8 * 8)
    for n in (0, 10_000):
        with pytest.raises(BadInput, match="it must be from 1 to"):
            local_basis(encoder, x, n)


def test_transport():
    u, v = orthonormal(3, 20, 1).float(), orthonormal(3, 12, 2).float()
    basis = Basis(v.view(3, 1, 3, 4), u, torch.tensor([3.0, 2.0, 1.0]), 1, True, 0.0)
    assert torch.allclose(basis.carried(u[1]), basis.v[1], atol=1e-5)  # its own direction comes back
    mixed = u[0] + 2 * u[2] + 10 * torch.linalg.svd(u).Vh[5]
    there = basis.carried(mixed, exact=True)
    jacobian = u.T @ torch.diag(basis.s) @ v
    image = jacobian @ there.flatten()
    assert torch.allclose(image / image.norm(), (u[0] + 2 * u[2]) / 5**0.5, atol=1e-5)
    assert torch.allclose(basis.projected(basis.v[0] + basis.v[1]), (basis.v[0] + basis.v[1]) / 2**0.5, atol=1e-5)
    with pytest.raises(SfumatoError, match="no part"):
        basis.carried(torch.zeros(20))


def test_directions_come_back_and_other_files_are_refused(tmp_path):
    given = Directions(orthonormal(2, 10, 1).float(), "mid", {"at": 0.3})
    again = Directions.load(given.save(tmp_path / "d.safetensors"))
    assert torch.equal(again.u, given.u) and (again.layer, again.facts) == ("mid", {"at": 0.3})
    (tmp_path / "d.safetensors").write_bytes((tmp_path / "d.safetensors").read_bytes()[:-8])
    for path in (tmp_path / "d.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(BadInput):
            Directions.load(path)
