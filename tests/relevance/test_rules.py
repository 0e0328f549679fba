"""The algebra against loops over single numbers, written from the paper's equations."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import BadInput, UnknownName
from sfumato.relevance.rules import Relevancy, fuse_heads, normalised, resampling, rollout

N, M, B = 3, 4, 2


def some(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def product(a, b):
    """Matrix product by hand."""
    return [[sum(a[i][k] * b[k][j] for k in range(len(b))) for j in range(len(b[0]))] for i in range(len(a))]


def plus(a, b):
    return [[x + y for x, y in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]


def eye(n):
    return [[float(i == j) for j in range(n)] for i in range(n)]


def by_eqs_8_and_9(r):
    out = []
    for i, row in enumerate(r):
        gained = [v - (i == j) for j, v in enumerate(row)]
        total = sum(gained)
        out.append([(v / total if total else 0.0) + (i == j) for j, v in enumerate(gained)])
    return out


def close(matrix, numbers):
    return torch.allclose(matrix, torch.tensor(numbers, dtype=torch.double), atol=1e-12)


def test_rule_5():
    probs, slopes = some(B, 2, N, N), some(B, 2, N, N, seed=1) - 0.5
    fused = fuse_heads(probs, slopes)
    for b in range(B):
        for i in range(N):
            for j in range(N):
                heads = [max(0.0, float(probs[b, h, i, j] * slopes[b, h, i, j])) for h in range(2)]
                assert float(fused[b, i, j]) == pytest.approx(sum(heads) / 2)


def test_one_self_attention_gives_identity_plus_map():
    a = some(B, N, N)
    state = Relevancy({"t": N}, a)
    state.attend_self("t", a)
    assert torch.equal(state["t", "t"], torch.eye(N, dtype=torch.double) + a)


def test_rules_6_7_10_and_11():
    self_t, self_i, there, back = some(B, N, N), some(B, M, M, seed=1), some(B, N, M, seed=2), some(B, M, N, seed=3)
    last = some(B, N, N, seed=4)
    state = Relevancy({"t": N, "i": M}, self_t)
    state.attend_self("t", self_t)
    state.attend_self("i", self_i)
    state.attend_both("t", "i", there, back)
    state.attend_both("t", "i", there, back)
    state.attend_self("t", last)
    for b in range(B):
        tt, ii = plus(eye(N), self_t[b].tolist()), plus(eye(M), self_i[b].tolist())
        ti, it = [[0.0] * M for _ in range(N)], [[0.0] * N for _ in range(M)]
        a, c = there[b].tolist(), back[b].tolist()
        for _ in range(2):
            nt, ni = by_eqs_8_and_9(tt), by_eqs_8_and_9(ii)
            flip = [list(col) for col in zip(*nt, strict=True)], [list(col) for col in zip(*ni, strict=True)]
            old_ti, old_it = ti, it
            ti = plus(ti, product(product(flip[0], a), ni))
            it = plus(it, product(product(flip[1], c), nt))
            tt, ii = plus(tt, product(a, old_it)), plus(ii, product(c, old_ti))
        ti, tt = plus(ti, product(last[b].tolist(), ti)), plus(tt, product(last[b].tolist(), tt))
        for pair, numbers in {("t", "t"): tt, ("i", "i"): ii, ("t", "i"): ti, ("i", "t"): it}.items():
            assert close(state[pair][b], numbers), pair


def test_a_decoder_feeds_nothing_back():
    state = Relevancy({"q": N, "i": M}, some(B, 1, 1))
    state.attend_self("i", some(B, M, M))
    state.attend_cross("q", "i", some(B, N, M, seed=1))
    assert not state["i", "q"].any()
    assert torch.equal(state["q", "q"], torch.eye(N, dtype=torch.double).expand(B, N, N))


def test_normalised_rows_sum_to_one_beside_the_identity():
    r = torch.eye(N, dtype=torch.double) + some(B, N, N)
    r[0, 1] = torch.eye(N, dtype=torch.double)[1]  # nothing gained: no nan
    out = normalised(r) - torch.eye(N, dtype=torch.double)
    sums = out.sum(-1)
    assert float(sums[0, 1]) == 0
    sums[0, 1] = 1
    assert torch.allclose(sums, torch.ones((), dtype=torch.double))


def test_permuted_tokens_give_permuted_relevance():
    order = torch.tensor([2, 0, 1])
    layers = [some(B, N, N, seed=k) for k in range(3)]
    results = []
    for p in (torch.arange(N), order):
        state = Relevancy({"t": N}, layers[0])
        for a in layers:
            state.attend_self("t", a[:, p][:, :, p])
        results.append(state["t", "t"])
    assert torch.allclose(results[0][:, order][:, :, order], results[1])


def test_ablations_do_what_they_say():
    a, c = some(B, N, N), some(B, N, M, seed=1)
    plain = Relevancy({"t": N, "i": M}, a, mix=False)
    plain.attend_self("t", a)
    plain.attend_cross("t", "i", c)
    assert torch.equal(plain["t", "i"], c)
    last = Relevancy({"t": N}, a, add=False)
    last.attend_self("t", a)
    last.attend_self("t", a)
    assert torch.allclose(last["t", "t"], a @ a)


def test_rollout():
    a, b = some(1, N, N), some(1, N, N, seed=1)
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    half = [(0.5 * (x[0] + torch.eye(N))).tolist() for x in (a, b)]
    assert close(rollout([a, b])[0], product(half[1], half[0]))
    with pytest.raises(BadInput):
        rollout([])


@pytest.mark.parametrize(("old", "new"), [((4, 4), (2, 2)), ((2, 2), (4, 4)), ((5, 3), (3, 2)), ((3, 2), (5, 3))])
def test_resampling_keeps_rows_as_means_and_columns_as_sums(old, new):
    rows, columns = resampling(old, new)
    assert rows.shape == (new[0] * new[1], old[0] * old[1]) and columns.shape == rows.shape[::-1]
    assert torch.allclose(rows.sum(1), torch.ones(())) and torch.allclose(columns.sum(1), torch.ones(()))
    state = Relevancy({"i": old[0] * old[1], "t": 2}, torch.rand(1, 1, 1))
    state.resample("i", old, new)
    assert torch.allclose(state["i", "i"][0], torch.eye(new[0] * new[1])) and state["i", "t"].shape[1] == len(rows)


def test_an_unknown_set_is_named():
    with pytest.raises(UnknownName, match="textt"):
        _ = Relevancy({"text": 2}, torch.zeros(1, 1, 1))["textt", "text"]
