"""What systems need besides a model, for the tiny ones: a cache that holds experts of each."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.contract.systems import KINDS
from tests.experts import write_expert


@functools.cache
def _filled(cache: Path) -> Path:
    for kind in KINDS:
        for i, ends in enumerate(((0, 500), (500, 1000))):
            write_expert(cache, kind, f"tiny-{kind}-expert-1-{i}", ends, i)
    return cache


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Experts in a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(_filled(tmp_path_factory.getbasetemp() / "cache")))
        yield
