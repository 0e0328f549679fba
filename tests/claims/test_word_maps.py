"""The contestants of the benchmark of word maps, on tiny models."""

from __future__ import annotations

import pytest

from benchmarks.word_maps import figures
from tests.tiny import tiny_model


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_both_loops_are_measured(kind: str):
    found = figures(kind, tiny_model(kind), side=16, rounds=1)
    assert [figure.name.split(",")[1].split(":")[0].strip() for figure in found] == [
        "our loop",
        "the pipeline's own loop",
    ]
    for figure in found:
        seconds = figure.data["seconds"]
        assert set(seconds) == {"loop", "loop with maps", "pipeline", "pipeline with maps"}
        assert all(len(times) == 1 and times[0] > 0 for times in seconds.values())
