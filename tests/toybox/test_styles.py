"""Styles are pure functions that look alike at every size; sets follow the laws they state."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadInput, UnknownName
from sfumato.toybox import SETS, STYLES, cue_scenes, joint_distribution, render, set_scenes, styled


@pytest.fixture(scope="module")
def pictures():
    return render(cue_scenes(2)[0], 64).image


@pytest.mark.parametrize("style", STYLES)
def test_styles_keep_the_picture_and_their_promises(style, pictures):
    out = styled(pictures, style)
    assert out.shape == pictures.shape and out.abs().max() <= 1
    assert torch.equal(out, styled(pictures, style)) and torch.equal(out[1:], styled(pictures[1:], style))
    assert styled(pictures.half(), style).dtype == torch.float16
    small, large = F.avg_pool2d(out, 8), F.avg_pool2d(styled(render(cue_scenes(2)[0], 128).image, style), 16)
    assert (small - large).abs().mean() < 0.12  # alike at every size
    if style != "plain":
        assert (out - pictures).abs().mean() > 0.02


def test_styles_do_what_they_say(pictures):
    grey = styled(pictures, "sketch")
    assert (grey[:, 0] - grey[:, 1]).abs().max() < 0.1  # the paper's tint alone
    blocks = styled(pictures, "pixel")
    assert torch.equal(blocks, F.interpolate(blocks[..., ::4, ::4], (64, 64), mode="nearest"))
    assert set(((blocks.unique() + 1) * 2.5).round().tolist()) <= set(range(6))
    sharp = (pictures.diff(dim=-1)).abs().mean()
    assert styled(pictures, "degraded").diff(dim=-1).abs().mean() < 0.8 * sharp
    assert styled(pictures, "watercolour").mean() > pictures.mean()
    assert not torch.equal(styled(pictures, "mosaic", 0), styled(pictures, "mosaic", 1))


def test_what_has_no_style_is_refused(pictures):
    with pytest.raises(UnknownName, match="watercolour"):
        styled(pictures, "watercolor")
    with pytest.raises(BadInput, match="16 pixels"):
        styled(pictures[..., :8, :8], "pixel")
    with pytest.raises(BadInput):
        styled(pictures[..., :32], "pixel")


@pytest.mark.parametrize("name", ["neutral", "biased"])
def test_sets_follow_their_law(name):
    n = 1200
    seen = Counter((scene.toys[0].shape, scene.toys[0].color) for scene in set_scenes(name, n, seed=3))
    wanted = joint_distribution(name)
    assert sum(wanted.values()) == pytest.approx(1) and set(seen) <= set(wanted)
    assert sum(abs(seen[key] / n - share) for key, share in wanted.items()) / 2 < 0.08
    nights = sum(scene.sky == "night" for scene in set_scenes(name, n, seed=3)) / n
    assert nights == pytest.approx(0.2 if name == "neutral" else 0.04, abs=0.04)


def test_sets_grow_without_changing_and_styles_share_their_scenes():
    assert set_scenes("biased", 5, 1) == set_scenes("biased", 9, 1)[:5]
    assert set_scenes("watercolour", 5, 1) == set_scenes("neutral", 5, 1) != set_scenes("neutral", 5, 1, "test")
    assert {"neutral", "biased", "degraded", "watercolour", "sketch", "pixel", "mosaic"} == set(SETS)
    with pytest.raises(UnknownName):
        set_scenes("baised", 5)
    with pytest.raises(BadInput):
        set_scenes("biased", 0)
