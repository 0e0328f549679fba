"""Every registered system keeps the contract, on every family that its card names. Nothing here names a system."""

from __future__ import annotations

import pytest

from sfumato import cards
from sfumato.cards import build, method, methods
from sfumato.models.families import FAMILIES
from sfumato.sampling import Intervention
from tests.contract import checks
from tests.tiny import tiny_model

KINDS = {
    "sd": "sd",
    "inpaint": "sd_inpaint",
    "sd2": "sd",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "sd35": "sd3",
    "flux": "flux",
    "pixart": "pixart",
}
"""Tiny model -> the family it belongs to."""
BY_NAME = {family.name: family for family in FAMILIES}

SYSTEMS = {key: card for key, card in methods().items() if issubclass(method(key), Intervention)}
PAIRS = [
    (key, kind)
    for key, card in SYSTEMS.items()
    for kind, family in KINDS.items()
    if BY_NAME[family].serves(card.families)
]
# properties that do not depend on the family are checked on one U-Net and one joint-attention model per system
SOME = [
    (key, kind) for key, kind in PAIRS if kind in ("sd", "sd3", "flux") or method(key).CARD.families == (KINDS[kind],)
]
ELSEWHERE = [
    (key, kind)
    for key, card in SYSTEMS.items()
    for kind, family in KINDS.items()
    if not BY_NAME[family].serves(card.families)
]


def maker(key: str):
    return lambda: build(SYSTEMS[key].example)


def weakener(key: str):
    """The system at strength 0, if it has a strength."""
    if "strength" not in method(key).Params.model_fields:
        return None
    name, given = cards.parse_with(SYSTEMS[key].example)
    return lambda: method(name)(**{**given, "strength": 0})


@pytest.mark.parametrize(("key", "kind"), PAIRS)
def test_acts(key, kind):
    checks.check_acts(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), PAIRS)
def test_identity(key, kind):
    checks.check_identity(maker(key), tiny_model(kind), weakener(key))


@pytest.mark.parametrize(("key", "kind"), PAIRS)
def test_detaches(key, kind):
    checks.check_detaches(maker(key), tiny_model(kind, fresh=True))


@pytest.mark.parametrize(("key", "kind"), SOME)
def test_detaches_when_the_denoiser_fails(key, kind):
    checks.check_detaches_when_the_denoiser_fails(maker(key), tiny_model(kind, fresh=True))


@pytest.mark.parametrize(("key", "kind"), [(key, kind) for key, kind in PAIRS if kind in ("sd", "sd3")])
def test_frees(key, kind):
    checks.check_frees(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), SOME)
def test_deterministic(key, kind):
    checks.check_deterministic(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), PAIRS)
def test_batch_independent(key, kind):
    checks.check_batch_independent(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), PAIRS)
def test_wide_pictures(key, kind):
    checks.check_wide_pictures(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), SOME)
def test_half_precision(key, kind):
    import torch

    checks.check_half_precision(maker(key), tiny_model(kind, fresh=True).to(dtype=torch.bfloat16))


@pytest.mark.parametrize(("key", "kind"), SOME)
def test_without_guidance(key, kind):
    checks.check_without_guidance(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), SOME)
def test_recipe(key, kind):
    checks.check_recipe(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), SOME)
def test_saves(key, kind, tmp_path):
    checks.check_saves(maker(key), tiny_model(kind), tmp_path)


@pytest.mark.parametrize(("key", "kind"), [(k, kind) for k, kind in PAIRS if "words" in method(k).Params.model_fields])
def test_unknown_words(key, kind):
    checks.check_unknown_words(lambda words: method(key)(words=words), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), ELSEWHERE)
def test_other_families_are_refused(key, kind):
    checks.check_refuses(maker(key), tiny_model(kind))


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

    refused = checks.check_composes(maker(one), maker(other), tiny_model(kind, fresh=True))
    told = matrix.cell(one, other)
    assert told == (matrix.REFUSED if refused else matrix.TOGETHER) or (
        told == matrix.UNETS and bool(refused) == (kind == "sd3")
    ), f"docs/composition.md says {told!r} of {one} and {other} on {kind}: {refused or 'they compose'}"
    assert not refused or refused in matrix.page(), "docs/composition.md does not tell this reason"


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [(a, b, kind) for one, other, kind in TOGETHER for a, b in ((one, other), (other, one)) if weakener(b)],
)
def test_neutral_at_strength_0(one, other, kind):
    checks.check_neutral(maker(one), weakener(other), tiny_model(kind))


@pytest.mark.parametrize("variant", checks.GUIDANCE)
@pytest.mark.parametrize(("key", "kind"), [(key, kind) for key, kind in PAIRS if kind in ("sd", "sd3")])
def test_composes_with_guidance(key, kind, variant):
    from tests.contract import matrix

    refused = checks.check_guidance(maker(key), variant, tiny_model(kind, fresh=True))
    assert matrix.cell(key, variant) == (matrix.REFUSED if refused else matrix.TOGETHER), refused


def test_the_matrix_of_the_docs_names_every_system():
    from tests.contract import matrix

    assert matrix.names() == [*SYSTEMS]


def test_every_family_is_covered():
    families = {family for card in SYSTEMS.values() for family in card.families}
    assert families <= set(KINDS.values()), f"no tiny model stands for {families - set(KINDS.values())}"
