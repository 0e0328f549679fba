from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import BadInput, UnknownName
from sfumato.toybox import Scene, ToyboxDataset, export_imagefolder, render, to_uint8


def test_cache_holds_what_rendering_gives_and_sets_grow_without_changing(tmp_path):
    small = ToyboxDataset("val", 3, size=32, seed=5, cache=tmp_path)
    large = ToyboxDataset("val", 5, size=32, seed=5, cache=tmp_path)
    assert small.scenes == large.scenes[:3]
    assert small.images.shape == (3, 32, 32, 3) and small.images.dtype == np.uint8
    assert abs(small.images[:].astype(int) - large.images[:3].astype(int)).max() <= 1
    fresh = render(small.scenes, 32)
    assert np.array_equal(small.images, to_uint8(fresh.image).permute(0, 2, 3, 1).numpy())
    assert np.array_equal(small.masks, fresh.mask.numpy())
    before = (small.folder / "images.npy").stat().st_mtime_ns
    again = ToyboxDataset("val", 3, size=32, seed=5, cache=tmp_path)
    assert np.array_equal(again.images, small.images)
    assert (small.folder / "images.npy").stat().st_mtime_ns == before
    told = {small.caption(0, np.random.default_rng(i)).text for i in range(8)}
    assert len(told) > 3 and small.caption(0).text == large.caption(0).text


def test_splits_differ_and_bad_arguments_are_refused(tmp_path):
    train, val = (ToyboxDataset(s, 2, size=16, cache=tmp_path) for s in ("train", "val"))
    assert train.scenes != val.scenes
    with pytest.raises(UnknownName, match="'train'"):
        ToyboxDataset("trian", 2, cache=tmp_path)
    with pytest.raises(BadInput, match="n must"):
        ToyboxDataset("train", 0, cache=tmp_path)


def test_an_interrupted_render_goes_on_and_a_lazy_one_is_the_same(tmp_path):
    steps = []

    def stop(done, total):
        steps.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ToyboxDataset("train", 70, size=16, cache=tmp_path / "a", on_progress=stop)
    assert steps == [(64, 70)]
    whole = ToyboxDataset("train", 70, size=16, cache=tmp_path / "a", on_progress=lambda *at: steps.append(at))
    assert steps[1:] == [(70, 70)] and isinstance(whole.images, np.memmap)
    lazy = ToyboxDataset("train", 70, size=16, cache=tmp_path / "b", lazy=True)
    chosen = np.array([40, 3])
    assert (lazy.masks[chosen] == whole.masks[chosen]).all() and not (tmp_path / "b" / whole.folder.name).exists()
    assert (np.asarray(lazy.images) == whole.images).all() and lazy.images.dtype == np.uint8
    assert sorted(path.name for path in lazy.folder.iterdir()) == ["images.npy", "masks.npy"]


def test_imagefolder_holds_pictures_masks_scenes_and_metadata(tmp_path):
    out = export_imagefolder(tmp_path / "toys", n=5, size=48, seed=2)
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [r["file_name"] for r in rows] == [f"{i:06d}.png" for i in range(5)]
    for row in rows:
        image, mask = Image.open(out / row["file_name"]), np.array(Image.open(out / row["mask"]))
        scene = Scene.from_json((out / row["scene"]).read_text())
        assert image.size == (48, 48) and image.mode == "RGB"
        frames = render(scene, 48)
        assert np.array_equal(mask.astype(int) - 1, frames.mask[0].numpy())
        assert all(row["text"][p["start"] : p["end"]] == p["text"] for p in row["phrases"])
        assert len(row["boxes"]) == len(scene.toys)


def test_imagefolder_refuses_a_full_folder_and_cleans_up(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("x")
    with pytest.raises(BadInput, match="not empty"):
        export_imagefolder(tmp_path / "full")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_imagefolder(tmp_path / "new", n=2, size=16, on_progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
