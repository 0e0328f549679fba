"""Cue conflicts and factor pairs: what is shared is shared, everything else is drawn apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.errors import BadInput, UnknownName
from sfumato.toybox import CUES, FACTORS, CueDataset, conflicts, cue_scenes, factor_pairs, render
from sfumato.toybox.cues import CUE_TEXTURES

FIELDS = {
    "shape": lambda s: s.toys[0].shape,
    "texture": lambda s: s.toys[0].pattern,
    "color": lambda s: s.toys[0].color,
    "pose": lambda s: (s.toys[0].x, s.toys[0].z, s.toys[0].yaw, s.camera),
    "scenery": lambda s: (s.ground, s.sky, s.light),
}


@pytest.mark.parametrize("factor", FACTORS)
def test_pairs_agree_in_one_factor_and_are_apart_in_the_others(factor):
    pairs = factor_pairs(factor, 600, seed=5)
    chance = {"shape": 1 / 4, "texture": 1 / 4, "color": 1 / 8, "pose": 0.0, "scenery": 0.0}
    for name, field in FIELDS.items():
        share = np.mean([field(a) == field(b) for a, b in pairs])
        if name == factor:
            assert share == 1
        else:  # four standard errors
            assert abs(share - chance[name]) <= 4 * (chance[name] * (1 - chance[name]) / 600) ** 0.5
    assert factor_pairs(factor, 10, seed=5) == pairs[:10] and factor_pairs(factor, 10, seed=6) != pairs[:10]


def test_conflicts_never_agree_and_name_both_cues():
    scenes, shapes, textures = conflicts(300, seed=2)
    assert (shapes != textures).all()
    for scene, shape, texture in zip(scenes, shapes, textures, strict=True):
        assert (scene.toys[0].shape, scene.toys[0].pattern) == (CUES[shape][0], CUES[texture][1])
    # every ordered pair of different labels, about equally often
    counts = np.bincount(4 * shapes + textures, minlength=16)[[i for i in range(16) if i // 4 != i % 4]]
    assert counts.min() > 8


@pytest.mark.parametrize(("shape", "texture"), [(1.0, 0.25), (0.6, 1.0), (0.25, 0.25)])
def test_cues_agree_with_the_label_as_often_as_asked(shape, texture):
    scenes, labels = cue_scenes(1500, 1, shape, texture)
    own = np.array(
        [[s.toys[0].shape == CUES[k][0], s.toys[0].pattern == CUES[k][1]] for s, k in zip(scenes, labels, strict=True)]
    )
    assert own.mean(0) == pytest.approx([shape, texture], abs=0.05)
    assert [s for s in cue_scenes(5, 1, shape, texture)[0]] == scenes[:5]
    assert cue_scenes(5, 1, shape, texture, "val")[0] != scenes[:5]


def test_textures_and_colours_change_no_outline():
    scene = cue_scenes(1, 3)[0][0]
    variants = [scene.replace(0, pattern=p, color=c) for p in CUE_TEXTURES for c in ("red", "blue")]
    frames = render(variants, 48)
    assert (frames.mask == frames.mask[:1]).all() and torch.equal(frames.depth[0], frames.depth[-1])
    assert all((frames.image[0] - other).abs().max() > 0.1 for other in frames.image[1:])


def test_the_toy_is_in_the_picture():
    frames = render(cue_scenes(40, 4)[0], 48)
    seen = (frames.mask == 0).flatten(1).float().mean(1)
    assert seen.min() > 0.04 and seen.max() < 0.8


def test_the_dataset_is_cached_and_labelled(tmp_path):
    first = CueDataset("val", 6, 16, cache=tmp_path, texture=1.0)
    again = CueDataset("val", 6, 16, cache=tmp_path, texture=1.0)
    assert first.images.shape == (6, 16, 16, 3) and (np.array(first.images) == np.array(again.images)).all()
    assert [CUE_TEXTURES.index(s.toys[0].pattern) for s in first.scenes] == first.labels.tolist()
    assert len(list(tmp_path.iterdir())) == 1


def test_bad_input_is_refused():
    with pytest.raises(UnknownName, match="'texture'"):
        factor_pairs("textures", 3)
    with pytest.raises(BadInput, match="at least 1"):
        factor_pairs("shape", 0)
    with pytest.raises(BadInput, match="probability"):
        cue_scenes(3, texture=1.5)
    with pytest.raises(UnknownName, match="split"):
        cue_scenes(3, split="testt")
