"""The closed form against its definition: constraints hold, nothing feasible is better."""

from __future__ import annotations

import pytest
import torch

from sfumato.adapters.closed_form import Solver, independent, low_rank
from sfumato.errors import BadInput


def problem(n=30, s=4, d=12, o=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    regular, wanted = torch.randn(n, d, generator=g).double(), torch.randn(s, d, generator=g).double()
    return regular, wanted, torch.randn(o, d, generator=g).double(), torch.randn(s, o, generator=g).double()


@pytest.mark.parametrize("n", [30, 5])  # captions that span the space, and that do not
def test_constraints_hold_and_no_feasible_change_is_better(n):
    regular, wanted, weight, values = problem(n)
    solver = Solver(regular, wanted, ridge=1e-6)
    found = solver(weight, values)
    assert found.residual < 1e-8
    torch.testing.assert_close(found.weight @ wanted.T, values.T, rtol=1e-8, atol=1e-8)
    ridge = 1e-6 * (regular.T @ regular).trace() / regular.shape[1]

    def objective(w):
        return ((w - weight) @ regular.T).square().sum() + ridge * (w - weight).square().sum()

    # the directions that keep the constraints: orthogonal to the rows of C
    free = torch.eye(12, dtype=torch.double) - wanted.T @ torch.linalg.solve(wanted @ wanted.T, wanted)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1, 10.0):
        for _ in range(35):
            moved = found.weight + size * torch.randn(7, 12, generator=generator).double() @ free
            assert objective(moved) >= objective(found.weight) * (1 - 1e-9)


def test_it_is_the_formula_of_the_paper():
    regular, wanted, weight, values = problem()
    inverse = torch.linalg.inv(regular.T @ regular)
    d = wanted @ inverse
    plain = weight + (values.T - weight @ wanted.T) @ torch.linalg.inv(d @ wanted.T) @ d
    torch.testing.assert_close(Solver(regular, wanted, 1e-13)(weight, values).weight, plain, rtol=1e-7, atol=1e-8)


def test_dependent_rows_are_left_out():
    regular, wanted, weight, values = problem()
    twice = torch.cat([wanted, wanted[:1], 2 * wanted[1:2]])
    assert len(independent(twice)) == 4
    solver = Solver(regular, twice)
    found = solver(weight, torch.cat([values, values[:1], 2 * values[1:2]]))
    torch.testing.assert_close(found.weight @ wanted.T, values.T, rtol=1e-7, atol=1e-7)
    unchanged = solver(weight, twice @ weight.T)
    assert unchanged.change < 1e-10 and unchanged.drift < 1e-10


def test_compression_keeps_the_largest_directions():
    g = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(6, 4, generator=g))[0], torch.linalg.qr(torch.randn(5, 4, generator=g))[0]
    change = u @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])) @ v.T  # shares 0.4, 0.7, 0.9, 1
    for share, rank in ((0.6, 1), (0.7, 2), (0.95, 3), (1.0, 4), (0.1, 1)):
        small = low_rank(change, share)
        assert small.down.shape == (rank, 5), share
    torch.testing.assert_close(low_rank(change, 1.0).up @ low_rank(change, 1.0).down, change, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput):
        low_rank(change, 0.0)
    with pytest.raises(BadInput, match="must be"):
        Solver(torch.zeros(3, 4), torch.zeros(2, 5))
