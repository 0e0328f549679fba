"""The toy-vit objective: labels, cuts, batches, the start from a CLIP."""

from __future__ import annotations

import torch
from transformers import CLIPModel

from sfumato import registry
from sfumato.toybox import SHAPES
from sfumato.training.draw import Draw
from sfumato.training.objective import build_objective
from sfumato.training.recipe import Recipe
from sfumato.zoo.objectives.vit import cut


def objective(tmp_path, monkeypatch, scenery: float = 0.0, near: float = 0.5):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    recipe = Recipe(
        name="t",
        objective="vit",
        data={"train": 12, "val": 6, "size": 32},
        model={"width": 16, "layers": 1, "heads": 2},
        loss={"scenery": scenery, "near": near},
        train={"steps": 1, "batch": 8},
    )
    out = build_objective(recipe)
    out.setup(torch.device("cpu"))
    return out


def test_ordinary_scenes_have_several_labels(tmp_path, monkeypatch) -> None:
    o = objective(tmp_path, monkeypatch, near=0)
    for i, scene in enumerate(o.train_data.scenes):
        said = {o.labels[k] for k in o.wanted[i].nonzero().flatten()}
        assert said == {word for toy in scene.toys for word in (toy.shape, toy.color)}
    batch = o.batch(Draw(0, 0))
    assert batch["pixels"].shape == (8, 3, 32, 32) and batch["wanted"].shape == (8, 14)
    loss, logs = o.loss(batch, Draw(0, 0))
    assert loss > 0 and set(logs) == {"shapes_right", "colors_right"}
    assert o.vit.config.problem_type == "multi_label_classification" and o.vit.config.id2label[0] == "ball"
    assert set(o.evaluate()) >= {"val_shape_of_one", "val_shapes_of_several", "heldout_color_of_one"}


def test_cuts_show_what_their_labels_say(tmp_path, monkeypatch) -> None:
    o = objective(tmp_path, monkeypatch, near=1.0)
    indices = torch.arange(12)
    masks = torch.tensor(o.train_data.masks[:]).long()
    windows = o._windows(masks, torch.Generator().manual_seed(0))
    wanted, known = o._targets(indices, masks, windows)
    assert (wanted.sum(1) >= 2).all() and (known >= wanted).all()  # the toy it was cut around is always named
    for i, (x, y, side) in enumerate(windows.tolist()):
        for toy in range(len(o.train_data.scenes[i].toys)):
            rows, columns = (masks[i] == toy).nonzero(as_tuple=True)
            if not len(rows):
                continue
            inside = (rows + 0.5 > y) & (rows + 0.5 < y + side) & (columns + 0.5 > x) & (columns + 0.5 < x + side)
            if inside.all():
                assert wanted[i, o.labels_of_toys[i][toy]].all()
    assert torch.equal(o.batch(Draw(1, 2))["pixels"], o.batch(Draw(1, 2))["pixels"])


def test_a_whole_window_is_the_picture_or_its_mirror_image() -> None:
    pixels = torch.rand(6, 3, 16, 16)
    out = cut(pixels, torch.tensor([[0.0, 0.0, 16.0]]).expand(6, 3), torch.Generator().manual_seed(0))
    for got, plain in zip(out, pixels, strict=True):
        assert min(float((got - plain).abs().max()), float((got - plain.flip(2)).abs().max())) < 1e-5
    shifted = cut(pixels, torch.tensor([[0.0, 4.0, 8.0]]).expand(6, 3), torch.Generator().manual_seed(0))
    assert shifted.shape == pixels.shape


def test_biased_scenes_have_one_label(tmp_path, monkeypatch) -> None:
    o = objective(tmp_path, monkeypatch, scenery=0.9, near=0)
    batch = o.batch(Draw(0, 0))
    assert batch["wanted"].shape == (8, len(SHAPES)) and (batch["wanted"].sum(1) == 1).all()
    assert set(o.evaluate()) == {"val", "same", "shuffled", "wrong", "grounds", "colors"}


def test_starts_from_the_picture_tower_of_a_clip() -> None:
    recipe = Recipe(
        name="t", objective="vit", model={"width": 128, "layers": 5, "heads": 4}, train={"steps": 1, "batch": 8}
    )
    o = build_objective(recipe)
    o.load(registry.find("toy-clip"))
    tower = CLIPModel.from_pretrained(registry.find("toy-clip")).vision_model.eval()
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        want, got = tower(x).pooler_output, o.vit.vit(x).last_hidden_state[:, 0]
    assert torch.cosine_similarity(got, want).min() > 0.8  # one number stands for the norm that a ViT has not
