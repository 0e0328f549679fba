"""The judge's grouping, reading, files and training targets, without trained weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName
from sfumato.toybox import render, sample_scene
from sfumato.toybox.oracle import accuracy
from sfumato.toybox.oracle.toy_judge import (
    LOOK,
    Dense,
    JudgeConfig,
    JudgeNet,
    ObjectReading,
    SceneReading,
    ToyJudge,
    _cut_out,
    _geometry,
    group,
    load_judge,
)
from sfumato.training.draw import Draw
from sfumato.training.recipe import Recipe
from sfumato.zoo.objectives.judge import JudgeLoss, JudgeObjective, augment, centre_loss, compress, labels, targets_of

SMALL = JudgeConfig(widths=(8, 8, 8, 8), blocks=(1, 1, 1), embedding=8, close=(16, 16))


@pytest.fixture(scope="module")
def frames():
    return render([sample_scene(np.random.default_rng(seed), toys) for seed, toys in enumerate((1, 2, 3, 2))], 64)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return JudgeNet(SMALL)


def ideal(masks):
    """What a perfect network would say, as :class:`Dense`."""
    want = targets_of(masks.long(), 10)
    empty = torch.zeros(len(masks), 1)
    return Dense(want.toys.sum(1) * 20 - 10, want.offset, want.centre * 20 - 19.5, empty, empty, {}, empty)


def test_targets_against_loops(frames):
    masks = frames.mask.long()
    want = targets_of(masks, 10)
    for i, scene in enumerate(frames.scenes):
        for k in range(len(scene.toys)):
            ys, xs = (masks[i] == k).nonzero(as_tuple=True)
            assert torch.equal(want.toys[i, k].bool(), masks[i] == k)
            assert bool(want.valid[i, k]) == (len(ys) >= 10)
            if len(ys):
                y, x = int(ys[3]), int(xs[3])
                assert want.offset[i, 0, y, x] == pytest.approx(float(xs.float().mean()) - x, abs=1e-3)
                assert want.offset[i, 1, y, x] == pytest.approx(float(ys.float().mean()) - y, abs=1e-3)
        assert (want.centre[i] == 1).sum() == int(want.valid[i].sum())
        assert (want.offset[i][:, masks[i] < 0] == 0).all()


def test_ideal_output_is_grouped_into_the_true_masks(frames):
    masks, rows, sure = group(ideal(frames.mask), 0.3, 10)
    for i, scene in enumerate(frames.scenes):
        got = {mask.numpy().tobytes() for mask in masks[rows == i]}
        assert got == {(frames.mask[i] == k).numpy().tobytes() for k in range(len(scene.toys))}
    assert (sure > 0.5).all()


def test_the_close_look_is_cut_out_around_the_toy(frames):
    mask = (frames.mask[0] == 0).float()
    geometry = _geometry(mask[None])
    look = _cut_out(frames.image[:1], mask[None], geometry, None)[0]
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    side = 1.25 * max(int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1)
    assert (look[3] > 0).float().mean() == pytest.approx(float(mask.sum()) / side**2, rel=0.1)
    place = int(rows.float().mean().round()), int(columns.float().mean().round())
    centre = LOOK // 2
    assert torch.allclose(
        look[:3, centre - 2 : centre + 2, centre - 2 : centre + 2].mean((1, 2)),
        frames.image[0, :, place[0] - 1 : place[0] + 2, place[1] - 1 : place[1] + 2].mean((1, 2)),
        atol=0.15,
    )
    moved = _cut_out(frames.image[:1], mask[None], geometry, torch.tensor([[0.5, 0.0, 0.0]]))[0]
    assert (moved[3, :, :centre] > 0).sum() > (look[3, :, :centre] > 0).sum()


def test_nothing_is_found_in_nothing():
    masks, rows, _ = group(ideal(torch.full((2, 64, 64), -1)), 0.3, 10)
    assert masks.shape == (0, 64, 64) and len(rows) == 0


def test_centre_loss_is_least_for_the_truth(frames):
    target = targets_of(frames.mask.long(), 10).centre
    assert (
        centre_loss(torch.where(target == 1, 12.0, -12.0), target)
        < 1e-3
        < centre_loss(torch.zeros_like(target), target)
    )


def test_read_does_not_depend_on_the_batch(net, frames):
    judge = ToyJudge(net, threshold=0.01)
    together = judge.read(frames.image)
    for i, reading in enumerate(together):
        alone = judge.read(frames.image[i : i + 1])[0]
        assert len(alone.objects) == len(reading.objects) and (alone.ground, alone.sky) == (reading.ground, reading.sky)
        for a, b in zip(alone.objects, reading.objects, strict=True):
            assert torch.equal(a.mask, b.mask) and (a.shape, a.color, a.box) == (b.shape, b.color, b.box)


def test_other_sizes(net, frames):
    reading = ToyJudge(net, threshold=0.01).read(torch.nn.functional.interpolate(frames.image, size=128))[0]
    assert reading.objects and all(toy.mask.shape == (128, 128) for toy in reading.objects)
    with pytest.raises(NotSupported, match="square"):
        ToyJudge(net).read(torch.zeros(1, 3, 64, 32))


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 64, 64), torch.zeros(1, 3, 64, 64).long(), torch.full((1, 3, 64, 64), 255.0)]
)
def test_bad_pictures(net, images):
    with pytest.raises(BadInput, match="read"):
        ToyJudge(net).read(images)


def test_files(net, frames, tmp_path):
    net.save(tmp_path)
    again = JudgeNet.load(tmp_path)
    want, got = net.eval()(frames.image), again(frames.image)
    assert torch.equal(want.foreground, got.foreground) and torch.equal(want.scenery["sky"], got.scenery["sky"])
    assert again.words == net.words and not again.training
    net.save(tmp_path / "half", torch.float16)
    half = JudgeNet.load(tmp_path / "half")(frames.image)
    assert torch.allclose(half.foreground, want.foreground, atol=0.02)


def test_the_words_travel_with_the_weights(net, tmp_path):
    net.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vocabulary"]["shape"].reverse()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert JudgeNet.load(tmp_path).words["shape"] == net.words["shape"][::-1]


def test_damaged_files(net, tmp_path):
    with pytest.raises(BadWeights, match="missing"):
        JudgeNet.load(tmp_path)
    net.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BadWeights, match="cannot be read"):
        JudgeNet.load(tmp_path)
    with pytest.raises(UnknownName, match="judge"):
        load_judge("no-such-judge")


def reading_of(scene, mask, **changes):
    """The reading of a judge that makes no mistake but ``changes`` on the first toy."""
    toys = []
    for k, toy in enumerate(scene.toys):
        words = {"shape": toy.shape, "color": toy.color, "pattern": toy.pattern, "size": toy.size}
        toys.append(
            ObjectReading(**words | (changes if k == 0 else {}), mask=mask == k, box=(0, 0, 1, 1), confidence=1)
        )
    return SceneReading(tuple(toys), scene.ground, scene.sky)


def test_accuracy_counts_by_hand(frames):
    perfect = [reading_of(s, m) for s, m in zip(frames.scenes, frames.mask, strict=True)]
    got = accuracy.measure(perfect, frames.scenes, frames.mask, min_pixels=10)
    assert got.attributes.value == got.miou == got.found.value == got.counted.value == 1.0
    toys = got.toys
    assert got.attributes.n == 4 * toys + 2 * len(perfect)

    shape = "ball" if frames.scenes[0].toys[0].shape != "ball" else "cube"
    wrong = [reading_of(frames.scenes[0], frames.mask[0], shape=shape), *perfect[1:]]
    got = accuracy.measure(wrong, frames.scenes, frames.mask, min_pixels=10)
    assert got.single["shape"].value == pytest.approx(1 - 1 / toys)
    assert got.attributes.value == pytest.approx(1 - 1 / (4 * toys + 8))

    # a toy that was not found is wrong in everything
    blind = [SceneReading((), frames.scenes[0].ground, frames.scenes[0].sky), *perfect[1:]]
    got = accuracy.measure(blind, frames.scenes, frames.mask, min_pixels=10)
    assert got.found.value == pytest.approx(1 - 1 / toys) and got.attributes.value == pytest.approx(
        1 - 4 / (4 * toys + 8)
    )
    assert got.counted.value == 0.75

    small = accuracy.measure(perfect, frames.scenes, frames.mask, min_pixels=200)
    assert small.toys + small.left_out == toys


def test_compression_keeps_and_coarsens(frames):
    assert torch.allclose(compress(frames.image, torch.zeros(4)), frames.image, atol=1e-5)
    rough = compress(frames.image, torch.full((4,), 0.3))
    flat = compress(torch.full((1, 3, 64, 64), 0.5), torch.full((1,), 0.3))
    assert 20 < -10 * torch.log10(((rough - frames.image) / 2).square().mean()) < 45
    assert flat.std() < 1e-5


def test_augmentation_is_seeded_and_mild(frames):
    first = augment(frames.image, JudgeLoss(), torch.Generator().manual_seed(3))
    again = augment(frames.image, JudgeLoss(), torch.Generator().manual_seed(3))
    assert torch.equal(first, again) and first.abs().max() <= 1
    assert (first - frames.image).abs().mean() < 0.2
    none = JudgeLoss(blur=0, noise=0, gain=0, shift=0, quantise=0)
    assert torch.allclose(augment(frames.image, none, torch.Generator().manual_seed(3)), frames.image, atol=1e-5)


def test_labels(net, frames):
    out = labels(net, frames.scenes)
    toy = frames.scenes[1].toys[1]
    assert net.words["ground"][out[1, 0]] == frames.scenes[1].ground
    assert [net.words[n][out[1, 6 + i]] for i, n in enumerate(("shape", "color", "pattern", "size"))] == [
        toy.shape, toy.color, toy.pattern, toy.size
    ]  # fmt: skip


def test_objective_learns_and_is_a_function_of_the_draw(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    recipe = Recipe(
        name="tiny-judge",
        objective="judge",
        data={"train": 12, "val": 4},
        model={"widths": (8, 8, 8, 8), "blocks": (1, 1, 1), "embedding": 8, "close": (16, 16)},
        loss={"heldout": 4},
        train={"steps": 10, "batch": 8},
    )
    objective = JudgeObjective(recipe)
    objective.setup(torch.device("cpu"))
    one, two = objective.batch(Draw(0, 5)), objective.batch(Draw(0, 5))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["images"], objective.batch(Draw(0, 6))["images"])

    optimizer = torch.optim.Adam(objective.net.parameters(), 5e-3)
    losses = []
    for step in range(12):
        loss, parts = objective.loss(one, Draw(0, step))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert set(parts) == {"foreground", "offset", "centre", "attribute", "scenery"}
    assert isinstance(objective.grid(), Image.Image)
    assert objective.export(tmp_path / "out") == {}
    objective.load(tmp_path / "out")
    figures = objective.evaluate()
    assert {"val_attributes", "heldout_shape", "val_miou"} <= set(figures) and all(
        0 <= v <= 1 for v in figures.values()
    )
