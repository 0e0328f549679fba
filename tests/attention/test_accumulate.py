"""Running sums of maps against keeping every map and averaging at the end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfumato.attention.accumulate import MapStore, upscale
from sfumato.errors import BadInput, NoMatch
from sfumato.models.site import Site

B, K, C = 2, 3, 4


def site(path, grid):
    return Site(path, "cross", grid, (0, C), (0, grid[0] * grid[1]), K, "up.0", 0)


def calls(seed=0):
    """(site, step, maps): three steps, the last one seen twice as second-order schedulers do."""
    torch.manual_seed(seed)
    for step in (0, 1, 2, 2):
        for where in (site("a", (3, 5)), site("b", (2, 2))):
            yield where, step, torch.rand(B, K, where.grid[0] * where.grid[1], C)


def by_hand(path, sample, steps=(0, 1, 2)):
    kept = [maps[sample].double() for where, step, maps in calls() if where.path == path and step in steps]
    h, w = site("a", (3, 5)).grid if path == "a" else (2, 2)
    return torch.stack(kept).mean(0).transpose(1, 2).reshape(K, C, h, w)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("steps", [False, True])
def test_sums_equal_the_mean_over_all_maps(heads, steps):
    store = MapStore(heads=heads, steps=steps)
    for where, step, maps in calls():
        store.add(where, maps, step)
    for sample in range(B):
        for layer in store.take(sample):
            expected = by_hand(layer.site.path, sample)
            assert layer.heads == K and layer.maps.shape[:2] == (3 if steps else 1, K if heads else 1)
            wanted = expected if heads else expected.mean(0, keepdim=True)
            torch.testing.assert_close(layer.mean().double(), wanted, rtol=1e-6, atol=1e-7)
            assert sum(layer.calls) == 4
            if steps:
                assert layer.calls == (1, 1, 2) and layer.steps == (0, 1, 2)
                some = by_hand(layer.site.path, sample, (0, 2))
                some = some if heads else some.mean(0, keepdim=True)
                torch.testing.assert_close(layer.mean(steps=[0, 2]).double(), some, rtol=1e-6, atol=1e-7)
            if heads:
                torch.testing.assert_close(layer.mean(heads=[2, 0]).double(), expected[[2, 0]], rtol=1e-6, atol=1e-7)


def test_what_was_averaged_cannot_be_asked_for():
    store = MapStore()
    for where, step, maps in calls():
        store.add(where, maps, step)
    layer = store.take(0)[0]
    with pytest.raises(NoMatch, match="head 1 of a was not kept; its heads were averaged"):
        layer.mean(heads=[1])
    with pytest.raises(NoMatch, match="step 1 of a was not kept; its steps were averaged"):
        layer.mean(steps=[1])
    kept = MapStore(heads=True, steps=True)
    kept.add(site("a", (3, 5)), torch.rand(B, K, 15, C), 4)
    with pytest.raises(NoMatch, match="step 1 of a was not kept; it has 4"):
        kept.take(0)[0].mean(steps=[1])
    with pytest.raises(NoMatch, match="head 3 of a was not kept; it has 0, 1, 2"):
        kept.take(0)[0].mean(heads=[3])


def test_the_maps_given_are_neither_kept_nor_changed():
    store, maps = MapStore(heads=True), torch.rand(B, K, 4, C)
    before = maps.clone()
    for _ in range(3):
        store.add(site("b", (2, 2)), maps)
    assert torch.equal(maps, before)
    torch.testing.assert_close(store.take(1)[0].mean(), before[1].transpose(1, 2).reshape(K, C, 2, 2))


def test_maps_of_another_size_are_refused():
    with pytest.raises(BadInput, match="maps of 6 queries do not fit the grid .2, 2."):
        MapStore().add(site("b", (2, 2)), torch.rand(B, K, 6, C))


def test_upscale_is_bicubic_and_never_negative():
    maps = torch.rand(2, 3, 4, 6) ** 4
    up = upscale(maps, (9, 11))
    expected = F.interpolate(maps, size=(9, 11), mode="bicubic")
    assert (expected < 0).any() and (up >= 0).all()
    assert torch.equal(up, expected.clamp(min=0)) and torch.equal(upscale(maps, (4, 6)), maps)
