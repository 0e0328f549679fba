"""What systems need besides a model, for the tiny ones: a cache that holds experts and adapters of each."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.examples import write_examples


@functools.cache
def _filled(cache: Path) -> Path:
    return write_examples(cache)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Experts and adapters in a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(_filled(tmp_path_factory.getbasetemp() / "cache")))
        yield
