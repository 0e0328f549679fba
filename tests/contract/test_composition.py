"""Every pair of systems composes or is refused, as docs/composition.md says. Nothing here names a system."""

from __future__ import annotations

from itertools import combinations, combinations_with_replacement

import pytest

from tests.contract import checks, covering, matrix
from tests.contract.systems import PAIRS, SYSTEMS, maker, weakener
from tests.tiny import tiny_model

TRIED = ("sd3", "sd", "inpaint")
"""Pairs that run together everywhere are tried on joint attention or on a U-Net, in turn, so that every system meets
half of the others on each; those that do not on both; on the inpainting model those that run there only."""
RUNNING = {kind: [key for key in SYSTEMS if (key, kind) in PAIRS] for kind in TRIED}


def together(one: str, other: str, kind: str) -> bool:
    """Whether the page says that two systems run together on this kind of model."""
    cell = matrix.cell(one, other)
    return cell == matrix.TOGETHER or (cell == matrix.UNETS and kind == "sd")


def needed(one: str, other: str, kind: str) -> bool:
    """Whether a pair is tried on this kind."""
    kinds = matrix.kinds(one, other)
    if len(kinds) > 1 and matrix.cell(one, other) == matrix.TOGETHER:
        i, k = (list(SYSTEMS).index(key) for key in (one, other))
        kinds = [kinds[(i if one == other else i + k) % len(kinds)]]
    return kind in kinds


GROUPS = [
    (kind, tuple(group))
    for kind in TRIED
    for group in covering.groups(
        RUNNING[kind],
        lambda one, other, kind=kind: together(one, other, kind),
        needed=lambda one, other, kind=kind: needed(one, other, kind),
    )
]
REFUSED = [
    (one, other, kind)
    for kind in TRIED
    for one, other in combinations_with_replacement(RUNNING[kind], 2)
    if needed(one, other, kind) and not together(one, other, kind)
]


LEFT_OUT = covering.leaving_out([group for _, group in GROUPS])


@pytest.mark.parametrize(
    ("kind", "group", "left_out"),
    [(kind, group, out) for (kind, group), out in zip(GROUPS, LEFT_OUT, strict=True)],
    ids=[f"{kind}-{'+'.join(group)}" for kind, group in GROUPS],
)
def test_composes(kind, group, left_out):
    """... as docs/composition.md says; `python -m tests.contract.matrix` writes its table anew. Of every two systems
    each is left out beside the other, on one of the models."""
    try:
        checks.check_composes([maker(key) for key in group], tiny_model(kind), left_out)
    except Exception:
        for pair in combinations(group, 2):  # which two it is
            checks.check_composes([maker(key) for key in pair], tiny_model(kind))
        raise


@pytest.mark.parametrize(
    ("key", "kind"), [(k, kind) for kind in TRIED for k in RUNNING[kind] if needed(k, k, kind) and together(k, k, kind)]
)
def test_twice(key, kind):
    checks.check_composes([maker(key)] * 2, tiny_model(kind))


@pytest.mark.parametrize(("one", "other", "kind"), REFUSED)
def test_conflicts(one, other, kind):
    assert checks.check_conflicts(maker(one), maker(other), tiny_model(kind)) in matrix.page(), (
        "docs/composition.md does not tell this reason"
    )


def test_every_pair_is_covered():
    for kind in TRIED:
        tried = {pair for k, group in GROUPS if k == kind for pair in combinations(group, 2)}
        refused = {(one, other) for one, other, k in REFUSED if k == kind}
        wanted = {pair for pair in combinations(RUNNING[kind], 2) if needed(*pair, kind)}
        assert tried | refused >= wanted and not tried & refused


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (key, kinds[k % len(kinds)])
        for k, key in enumerate(SYSTEMS)
        if (kinds := [kind for kind in ("sd", "sd3") if key in RUNNING[kind]])
    ],
)
def test_neutral_beside_systems_of_strength_0(key, kind):
    """Beside every one that may be there, in as few runs as they fit in."""
    fitting = [other for other in RUNNING[kind] if weakener(other) and together(key, other, kind)]
    for group in covering.parties(fitting, lambda one, other: together(one, other, kind)):
        checks.check_neutral(maker(key), [weakener(other) for other in group], tiny_model(kind))


@pytest.mark.parametrize("variant", checks.GUIDANCE)
@pytest.mark.parametrize(
    ("key", "kind"),
    # with U-Nets and joint attention in turn, where a system runs on both
    [
        (key, kinds[k % len(kinds)])
        for k, key in enumerate(SYSTEMS)
        if (kinds := [kind for kind in TRIED if key in RUNNING[kind] and needed(key, key, kind)])
    ],
)
def test_composes_with_guidance(key, kind, variant):
    refused = checks.check_guidance(maker(key), variant, tiny_model(kind))
    assert matrix.cell(key, variant) == (matrix.REFUSED if refused else matrix.TOGETHER), refused


def test_the_matrix_of_the_docs_names_every_system():
    assert matrix.names() == [*SYSTEMS]
