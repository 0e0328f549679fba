"""What systems need besides a model, for the tiny ones: a cache that holds experts and adapters of each."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from sfumato.hspace import basis
from tests.examples import write_examples


@functools.cache
def _filled(cache: Path) -> Path:
    return write_examples(cache)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Experts and adapters in a cache of the tests' own; bases of features as rough as their examples ask for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(basis, "OVERSAMPLING", 1)
        patch.setenv("SFUMATO_CACHE", str(_filled(tmp_path_factory.getbasetemp() / "cache")))
        yield
