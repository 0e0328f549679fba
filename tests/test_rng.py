"""Named streams: pure functions of (name, seed, numbers), apart from one another, and as they were before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato import rng


def test_a_stream_is_a_pure_function_of_its_name_and_numbers():
    first, again = (torch.randn(8, generator=rng.stream("a", 3, 1)) for _ in range(2))
    assert torch.equal(first, again)
    for other in (rng.stream("b", 3, 1), rng.stream("a", 4, 1), rng.stream("a", 3, 2), rng.stream("a", 31)):
        assert not torch.equal(first, torch.randn(8, generator=other))


def test_a_samples_stream_does_not_depend_on_its_neighbours():
    [alone] = rng.generators("blend.surroundings", [8])
    beside = rng.generators("blend.surroundings", [7, 8, 9])[1]
    assert torch.equal(torch.randn(4, generator=alone), torch.randn(4, generator=beside))


@pytest.mark.parametrize(
    "name, given, seed",
    [
        ("sample", (5,), 5),
        ("blend.surroundings", (2,), 2 * 0x9E3779B1 + 0x5F0A),
        ("shape_guided.fresh", (2**62,), (2**62 * 0x9E3779B1 + 0x5A9E) % 2**63),
        ("no_token_left_behind.views", (3, 4), 3031),
    ],
)
def test_seeds_are_those_of_before(name, given, seed):
    assert rng.stream_seed(name, *given) == seed


def test_numpy_streams_are_those_of_before():
    for name, given, numbers in [
        ("toybox.scene", (1, 0, 2), (1, 0, 2)),
        ("toybox.caption", (1, 0, 2), (1, 0, 2, 1)),
        ("toybox.biased", (1, 2, 3), (1, 1002, 3)),
        ("teach.examples", (4,), (17, 4)),
    ]:
        assert rng.sequence(name, *given).random() == np.random.default_rng(numbers).random()
    assert rng.sequence("new", 1).random() != rng.sequence("other", 1).random()
