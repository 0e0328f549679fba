"""Every pair of systems composes or is refused, as docs/composition.md says. Nothing here names a system."""

from __future__ import annotations

import pytest

from tests.contract import checks
from tests.contract.systems import PAIRS, SYSTEMS, maker, weakener
from tests.tiny import tiny_model

TOGETHER = [
    (one, other, kind)
    for i, one in enumerate(SYSTEMS)
    for other in list(SYSTEMS)[i:]
    for kind in ("sd", "sd3")
    if (one, kind) in PAIRS and (other, kind) in PAIRS
]


@pytest.mark.parametrize(("one", "other", "kind"), TOGETHER)
def test_composes(one, other, kind):
    """... and docs/composition.md says so; `python -m tests.contract.matrix` writes its table anew."""
    from tests.contract import matrix

    both = (one, "sd3") in PAIRS and (other, "sd3") in PAIRS
    swap = kind == "sd3" or not both  # what order they are given in is a question of systems, not of networks
    refused = checks.check_composes(maker(one), maker(other), tiny_model(kind), swap)
    told = matrix.cell(one, other)
    assert told == (matrix.REFUSED if refused else matrix.TOGETHER) or (
        told == matrix.UNETS and bool(refused) == (kind == "sd3")
    ), f"docs/composition.md says {told!r} of {one} and {other} on {kind}: {refused or 'they compose'}"
    assert not refused or refused in matrix.page(), "docs/composition.md does not tell this reason"


@pytest.mark.parametrize(("key", "kind"), [(key, kind) for key, kind in PAIRS if kind in ("sd", "sd3")])
def test_neutral_beside_systems_of_strength_0(key, kind):
    weak = [weakener(other) for other in SYSTEMS if (other, kind) in PAIRS]
    checks.check_neutral(maker(key), [each for each in weak if each], tiny_model(kind))


@pytest.mark.parametrize("variant", checks.GUIDANCE)
@pytest.mark.parametrize(("key", "kind"), [(key, kind) for key, kind in PAIRS if kind in ("sd", "sd3")])
def test_composes_with_guidance(key, kind, variant):
    from tests.contract import matrix

    refused = checks.check_guidance(maker(key), variant, tiny_model(kind))
    assert matrix.cell(key, variant) == (matrix.REFUSED if refused else matrix.TOGETHER), refused


def test_the_matrix_of_the_docs_names_every_system():
    from tests.contract import matrix

    assert matrix.names() == [*SYSTEMS]
