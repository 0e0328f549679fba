"""From a name to masks: each stage against a slow reference, the whole way on a tiny model, files, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.edit import text_to_segmentation as t2s
from sfumato.edit.inpaint import Inpaint
from sfumato.edit.text_to_segmentation import segmenter
from sfumato.edit.text_to_segmentation.stages import grown
from sfumato.errors import BadInput, NoMatch
from sfumato.explain.daam import explain_image
from sfumato.sampling import generate
from tests.tiny import tiny_model


def pictures(n=3, side=32):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def discs(n, side=32, seed=0):
    """Pictures of a bright disc on noise, and the discs."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    images, truths = [], []
    for _ in range(n):
        y, x, r = rng.uniform(10, side - 10), rng.uniform(10, side - 10), rng.uniform(5, 8)
        mask = (rows - y) ** 2 + (columns - x) ** 2 < r * r
        image = rng.uniform(-1, 0, (3, side, side)) + mask * np.array([1.0, 0.3, 0.0])[:, None, None]
        images.append(torch.from_numpy(image).float())
        truths.append(torch.from_numpy(mask))
    return torch.stack(images), torch.stack(truths)


def iou(a, b):
    return float((a & b).sum() / (a | b).sum())


def test_weak_maps_are_those_of_daam_in_the_window():
    model, shown = tiny_model("sd"), pictures(2)
    maps = t2s.weak_maps(model, shown, "a cube", "cube", levels=5, window=(0.4, 1.0), seed=3)
    assert maps.shape == (2, 32, 32)
    for i in range(2):
        alone = explain_image(model, shown[i : i + 1], "a cube", ["cube"], steps=5, window=(0.4, 1.0), seed=3 + i)
        torch.testing.assert_close(maps[i], alone.map("cube"), rtol=1e-3, atol=1e-6)
        assert alone.layers[0].calls[0] == 3  # three of five levels
    with pytest.raises(NoMatch, match="ball"):
        t2s.weak_maps(model, shown, "a cube", "ball", levels=2)


def test_rough_masks_part_two_heaps_and_follow_the_majority():
    generator = torch.Generator().manual_seed(0)
    maps = 0.2 + 0.02 * torch.randn(2, 16, 16, generator=generator)
    maps[0, 4:12, 4:12] += 0.5
    maps[0, 1, 14] += 0.5  # a lone speck
    maps[1] = 0.3  # flat
    found = t2s.rough_masks(maps)
    truth = torch.zeros(16, 16, dtype=torch.bool)
    truth[4:12, 4:12] = True
    above = maps[0] > 0.45
    slow = torch.zeros(16, 16, dtype=torch.bool)
    for y in range(16):
        for x in range(16):
            near = above[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            slow[y, x] = near.float().mean() >= 0.5
    assert torch.equal(found[0], slow) and not found[0, 1, 14]
    assert (found[0] ^ truth).sum() <= 4  # the corners
    assert not found[1].any()


def test_removal_is_inpainting_of_the_background():
    model, shown = tiny_model("inpaint"), pictures()
    holes = torch.zeros(3, 32, 32, dtype=torch.bool)
    holes[0, 4:20, 4:20] = holes[2, 10:30, 2:16] = True
    out = t2s.remove(model, shown, holes, ["", "the grass", "the sand"], "a cube", steps=2, guidance=3.0, seed=7)
    assert torch.equal(out[1], shown[1])  # nothing to remove
    assert torch.equal(out[:, :, ~holes.any(0)], shown[:, :, ~holes.any(0)])
    for i, text in ((0, ""), (2, "the sand")):
        alone = generate(
            model, text, negative="a cube", image=shown[i : i + 1], strength=1.0, steps=2, guidance=3.0, seed=7 + i,
            interventions=Inpaint(mask=holes[i].float()),
        )  # fmt: skip
        torch.testing.assert_close(out[i], alone.pixels[0].clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_without_an_inpainting_model_the_hole_is_blended():
    model, shown = tiny_model("sd"), pictures(2)
    holes = torch.zeros(2, 32, 32, dtype=torch.bool)
    holes[0, 4:20, 4:20] = holes[1, 8:24, 8:30] = True
    out = t2s.remove(model, shown, holes, [""], steps=2, guidance=1.0)
    outside = ~holes[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(out[outside], shown[outside]) and (out[~outside] != shown[~outside]).any()


def test_refined_masks_are_what_changed_within_the_hole():
    shown, truth = discs(3)
    empty = shown.clone()
    empty[truth[:, None].expand(-1, 3, -1, -1)] -= 0.9
    empty += 0.02 * torch.randn(empty.shape, generator=torch.Generator().manual_seed(0))
    holes = grown(truth, 3)
    holes[2] = False
    found = t2s.refined_masks(shown, empty, holes)
    assert iou(found[:2], truth[:2]) > 0.9 and not found[2].any() and not (found & ~holes).any()
    same = t2s.refined_masks(shown, shown, holes)
    assert not same.any()


def test_a_repainted_ground_within_the_hole_is_not_the_object():
    shown, truth = discs(2)
    holes = grown(truth, 5)
    empty = torch.where(holes[:, None], shown + 0.15, shown)  # the ground is redrawn a little lighter
    empty[truth[:, None].expand(-1, 3, -1, -1)] -= 0.9
    empty[holes[:, None].expand(-1, 3, -1, -1)] += 0.05 * torch.randn(
        int(holes.sum()) * 3, generator=torch.Generator().manual_seed(0)
    )
    found = t2s.refined_masks(shown, empty, holes)  # with the zeros outside, the threshold would lie below the ground's
    assert iou(found, truth) > 0.9


def test_rough_masks_above_half_their_range_keep_to_the_peak():
    place = torch.linspace(-1, 1, 32)
    hill = (-4 * (place[:, None] ** 2 + place**2)).exp()
    maps = torch.stack([3 + 2 * hill, torch.full((32, 32), 0.7)])
    found = t2s.rough_masks(maps, "half")
    assert iou(found[:1], (hill > 0.5)[None]) > 0.95 and not found[1].any()


def test_a_segmenter_learns_a_disc_among_others():
    both, truth, without = [], [], []
    for one, mask, other, off in zip(*discs(32), *discs(32, seed=5), strict=True):
        other = other.flip(0)  # the same disc in another colour is not the object
        both.append(torch.where(off, other, one))
        without.append(other)
        truth.append(mask & ~off)
    both, truth, without = (torch.stack(each) for each in (both, truth, without))
    net = t2s.train_segmenter(both, truth, width=6, iterations=100, batch=12)
    test, mask = discs(8, seed=9)
    assert iou(net.masks(test), mask) > 0.6
    once, again = (t2s.train_segmenter(both, truth, *more, width=6, iterations=3) for more in ((), (without,)))
    assert torch.equal(once(test), again(test))  # deterministic, and no negatives unless asked for


def test_negatives_are_pictures_without_the_object_and_an_empty_mask(monkeypatch):
    shown, truth = discs(5)
    without, seen = shown.flip(1), []
    monkeypatch.setattr(segmenter, "cropped", lambda x, y, *_: seen.append((x, y)) or (x, y))
    t2s.train_segmenter(shown, truth, without, width=2, iterations=4, negatives=0.5)
    negative = 0
    for x, y in zip(*(torch.cat(each) for each in zip(*seen, strict=True)), strict=True):
        if y.any():
            assert any(torch.equal(x, a) and torch.equal(y.bool(), b) for a, b in zip(shown, truth, strict=True))
        else:
            negative += 1
            assert any(torch.equal(x, each) for each in without)
    assert 40 <= negative <= 88  # of 128


def test_pictures_without_a_mask_teach_nothing():
    shown, truth = discs(6)
    spoilt, masks = torch.cat([shown, pictures(4)]), torch.cat([truth, torch.zeros(4, 32, 32, dtype=torch.bool)])
    # the draw of pictures counts usable ones only, so that the others cannot even shift it
    kept, all_ = (t2s.train_segmenter(*each, width=2, iterations=3) for each in ((shown, truth), (spoilt, masks)))
    assert torch.equal(kept(shown), all_(shown))
    with pytest.raises(NoMatch, match="no picture gave a mask"):
        t2s.train_segmenter(shown, torch.zeros_like(truth))


@pytest.mark.parametrize("shape", [(32, 32), (37, 21), (8, 9)])
def test_the_network_takes_any_size(shape):
    net = t2s.Segmenter(t2s.SegmenterConfig(width=2)).eval()
    assert net(torch.zeros(2, 3, *shape)).shape == (2, *shape)


def test_the_whole_way_and_its_files(tmp_path):
    system = t2s.TextToSegmentation(levels=3, steps=2, iterations=2, width=2, guidance=2.0)
    told = []
    found = system.run(tiny_model("sd"), tiny_model("inpaint"), "cube", pictures(3), lambda *each: told.append(each))
    assert {stage for stage, _, _ in told} == {"maps", "removals", "training steps"}
    assert all(done <= total for _, done, total in told) and ("maps", 3, 3) in told
    written = found.save(tmp_path, ["one", "two", "three"])
    assert [path.name for path in written] == ["one.png", "two.png", "three.png", "segmenter.safetensors"]
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all((tmp_path / row["file_name"]).is_file() for row in rows)
    again = t2s.Segmenter.load(tmp_path / "segmenter.safetensors")
    assert torch.equal(again.masks(found.pictures), found.final())
    mask = np.asarray(Image.open(tmp_path / "masks" / "two.png"))
    assert np.array_equal(mask > 0, found.final()[1].numpy()) and set(np.unique(mask)) <= {0, 255}
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / "segmenter.safetensors").read_bytes()[:-9])
    for path in (damaged, tmp_path / "metadata.jsonl"):
        with pytest.raises(BadInput, match="segmenter"):
            t2s.Segmenter.load(path)


def test_the_background_is_the_parameter_or_the_cards_or_a_photo(monkeypatch):
    asked = []
    monkeypatch.setattr(t2s, "remove", lambda *args: asked.append((args[3], args[4])))
    model, plain = tiny_model("inpaint", fresh=True), tiny_model("sd")
    model.card = {**model.card, "background": ["the grass"]}
    for system, remover in (
        (t2s.TextToSegmentation(background="the sand"), model),
        (t2s.TextToSegmentation(opposite=True), model),
        (t2s.TextToSegmentation(), plain),
    ):
        system.removed(remover, pictures(), torch.ones(3, 32, 32), "egg")
    assert asked == [(["the sand"], None), (["the grass"], "an egg"), (["a photo of a background"], None)]


def test_pictures_are_made_where_none_are_given():
    system = t2s.TextToSegmentation(n=3, levels=2, steps=2, iterations=1, width=2, prompt="a red {}")
    model = tiny_model("sd")
    found = system.run(model, model, "cube")
    expected = generate(model, "a red cube", n=3, seed=0, steps=2).pixels.clamp(-1, 1)
    assert torch.equal(found.pictures, expected)
    assert t2s.TextToSegmentation().named("apple") == "an apple" and system.named("cone") == "a red cone"


def test_refusals():
    with pytest.raises(BadInput, match="must hold {}"):
        t2s.TextToSegmentation(prompt="a photo")
    model = tiny_model("sd")
    with pytest.raises(BadInput, match="concept is empty"):
        t2s.TextToSegmentation().run(model, model, "  ", pictures())
    with pytest.raises(BadInput, match="two or more"):
        t2s.TextToSegmentation().run(model, model, "cube", pictures(1))
