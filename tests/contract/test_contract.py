"""Every registered system keeps the contract, on every family that its card names. Nothing here names a system."""

from __future__ import annotations

import functools

import pytest
import torch

from sfumato.cards import method
from sfumato.models.families import offering
from tests.contract import checks
from tests.contract.systems import (
    BY_NAME,
    COVERED,
    ELSEWHERE,
    FURTHER,
    KINDS,
    MET,
    ONCE,
    PAIRS,
    SYSTEMS,
    cover,
    further,
    maker,
    once,
    weakener,
)
from tests.tiny import tiny_model


@pytest.mark.parametrize(("key", "kind"), PAIRS)
def test_acts(key, kind):
    checks.check_acts(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), cover("identity"))
def test_identity(key, kind):
    checks.check_identity(maker(key), tiny_model(kind), weakener(key))


@pytest.mark.parametrize(("key", "kind"), cover("detaches"))
def test_detaches(key, kind):
    checks.check_detaches(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), once("detaches_when_the_denoiser_fails"))
def test_detaches_when_the_denoiser_fails(key, kind):
    checks.check_detaches_when_the_denoiser_fails(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), once("frees"))
def test_frees(key, kind):
    checks.check_frees(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), once("deterministic"))
def test_deterministic(key, kind):
    checks.check_deterministic(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), cover("batch_independent"))
def test_batch_independent(key, kind):
    checks.check_batch_independent(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), cover("wide_pictures"))
def test_wide_pictures(key, kind):
    checks.check_wide_pictures(maker(key), tiny_model(kind))


@functools.cache
def half(kind):
    return tiny_model(kind, fresh=True).to(dtype=torch.bfloat16)


@pytest.mark.parametrize(("key", "kind"), once("half_precision"))
def test_half_precision(key, kind):
    checks.check_half_precision(maker(key), half(kind), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), once("without_guidance"))
def test_without_guidance(key, kind):
    checks.check_without_guidance(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), once("recipe"))
def test_recipe(key, kind):
    checks.check_recipe(maker(key), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), once("saves"))
def test_saves(key, kind, tmp_path):
    checks.check_saves(maker(key), tiny_model(kind), tmp_path)


@pytest.mark.parametrize(("key", "kind"), [(k, kind) for k, kind in PAIRS if "words" in method(k).Params.model_fields])
def test_unknown_words(key, kind):
    checks.check_unknown_words(lambda words: method(key)(words=words), tiny_model(kind))


@pytest.mark.parametrize(("key", "kind"), ELSEWHERE)
def test_other_families_are_refused(key, kind):
    missing = next(need for need in SYSTEMS[key].needs if not tiny_model(kind).family.has(need))
    checks.check_refuses(maker(key), tiny_model(kind), missing)


@pytest.mark.parametrize("check", COVERED)
def test_checks_that_take_turns_meet_every_model_and_every_system(check):
    checked = cover(check)
    assert {kind for _, kind in checked} == {kind for _, kind in PAIRS} | {kind for _, kind in further(check)}
    assert {key for key, _ in checked} == set(SYSTEMS)


def test_checks_that_run_once_meet_every_system_and_both_kinds_of_attention():
    for check in ONCE:
        assert [key for key, _ in once(check)] == [*SYSTEMS]
        assert {"sd", "sd3", "flux"} <= {kind for _, kind in once(check)}


def test_further_models_meet_systems_in_every_check():
    assert {kind for _, kind in MET} == set(FURTHER) and len(MET) == len({key for key, _ in MET}) > 10
    assert sorted(pair for check in COVERED for pair in further(check)) == sorted(MET)


def test_every_family_is_covered():
    needed = {need for card in SYSTEMS.values() for need in card.needs}
    offered = {each for family in set(KINDS.values()) for each in BY_NAME[family].capabilities}
    assert needed <= offered, f"no tiny model offers {needed - offered}"
    for card in SYSTEMS.values():
        assert offering(card.needs), f"no family offers all that {card.key} needs: {card.needs}"
