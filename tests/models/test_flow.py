"""Flows: invertible, with the log-determinant that autograd finds, and FrEIA's coupling against one written here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.errors import BadInput
from sfumato.models.nets.flow import ActNorm, CouplingFlow


def started(
    condition: tuple[int, ...] = (), dim: int = 8, blocks: int = 3, by: float = 0.1
) -> tuple[CouplingFlow, torch.Tensor | None]:
    """A flow whose ActNorms have seen a batch and whose weights are not those of an identity."""
    torch.manual_seed(0)
    flow = CouplingFlow(dim, blocks, 16, 2, condition, 4).train()
    c = torch.randn(64, *condition) if condition else None
    flow(3 * torch.randn(64, dim) + 1, c)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return flow.eval(), c


@pytest.mark.parametrize("condition", [(), (5,), (3, 8, 8)])
def test_log_determinants_are_those_of_autograd_in_both_directions(condition):
    flow, c = started(condition)
    flow = flow.double()
    x, c = torch.randn(2, 8).double(), None if c is None else c[:2].double()
    one = None if c is None else c[:1]
    v, logdet = flow(x, c)
    slow = torch.autograd.functional.jacobian(lambda row: flow(row[None], one)[0][0], x[0])
    assert torch.allclose(torch.linalg.slogdet(slow)[1], logdet[0])
    back, inverse = flow.inverse(v, c)
    slow = torch.autograd.functional.jacobian(lambda row: flow.inverse(row[None], one)[0][0], v[0])
    assert torch.allclose(torch.linalg.slogdet(slow)[1], inverse[0])
    assert torch.allclose(back, x) and torch.allclose(logdet, -inverse)


@pytest.mark.parametrize("dim", [64, 7])
def test_24_blocks_invert_to_1e_4_in_single_precision(dim):
    flow, _ = started((), dim, 24, 0.03)
    x = 3 * torch.randn(256, dim) + 1
    with torch.no_grad():
        assert (flow.inverse(flow(x)[0])[0] - x).abs().max() < 1e-4


def coupled(block: nn.Module, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The papers' two-sided coupling, written out: each half is scaled and shifted by what the other half says."""
    a, b = x.chunk(2, 1)
    a = a * torch.tanh(block.subnet_s2(torch.cat([b, c], 1))).exp() + block.subnet_t2(torch.cat([b, c], 1))
    b = b * torch.tanh(block.subnet_s1(torch.cat([a, c], 1))).exp() + block.subnet_t1(torch.cat([a, c], 1))
    return torch.cat([a, b], 1)


def test_the_blocks_are_those_of_the_papers():
    flow, c = started((5,))
    x, c = torch.randn(4, 8), c[:4]
    y = x
    with torch.no_grad():
        seen = flow.embed(c)
        for norm, coupling, shuffle in zip(*[iter(flow.stages)] * 3, strict=True):
            y = coupled(coupling, y * norm.scale.exp() + norm.shift, seen)[:, shuffle.order]
        assert torch.allclose(flow(x, c)[0], y, atol=1e-6)


def test_actnorm_starts_once_from_a_batch_in_training_mode_and_is_saved_so():
    torch.manual_seed(0)
    norm, x = ActNorm([(3,)]), torch.randn(50, 3) * torch.tensor([1.0, 5.0, 0.1]) + 2
    with pytest.raises(BadInput, match="not been fitted"):
        norm.eval()((x,))
    with pytest.raises(BadInput, match="at least 2"):
        norm.train()((x[:1],))
    with pytest.raises(BadInput, match=r"dimensions \[1\] never vary"):
        norm((x * torch.tensor([1.0, 0.0, 1.0]),))
    (y,), _ = norm((x,))
    assert torch.allclose(y.mean(0), torch.zeros(3), atol=1e-5) and torch.allclose(y.std(0), torch.ones(3))
    before = norm.scale.clone()
    norm((x * 100,))
    other = ActNorm([(3,)])
    other.load_state_dict(norm.state_dict())
    other.train()((x * 100,))
    assert torch.equal(norm.scale, before) and torch.equal(other.scale, before)


def test_permutations_are_of_their_seed_and_leave_global_generators_alone():
    import numpy as np

    np.random.seed(3)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    orders = [[s.order.tolist() for s in CouplingFlow(16, 2, 4, seed=k).stages[2::3]] for k in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert (np.random.get_state()[1] == numpy_before).all()
    torch.set_rng_state(torch_before)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda flow: flow(torch.randn(2, 9)), r"\(b, 8\)"),
        (lambda flow: flow(torch.randn(2, 8)), "needs a condition"),
        (lambda flow: flow(torch.randn(2, 8), torch.randn(3, 5)), "conditions must be"),
    ],
)
def test_what_does_not_fit_is_refused(given, told):
    flow, _ = started((5,))
    with pytest.raises(BadInput, match=told):
        given(flow)
