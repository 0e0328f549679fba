"""toy-detr and toy-vqa: their truths, that they can learn, and their exports through plain transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, DetrForObjectDetection, LxmertForQuestionAnswering

from sfumato.explain.attention_relevance.questions import ask
from sfumato.models.readers import load_reader
from sfumato.toybox import ANSWERS, QUESTION_KINDS, questions_about
from sfumato.training.draw import Draw
from sfumato.training.objective import Objective, build_objective
from sfumato.training.recipe import Recipe
from sfumato.zoo.objectives.detr import ToyBoxes, to_centre, to_corners
from sfumato.zoo.objectives.vqa import draw_regions, question_tokenizer, region_labels

CPU = torch.device("cpu")
SMALL = {
    "detr": {"backbone": [16], "blocks": [1], "width": 32, "encoder_layers": 1, "decoder_layers": 2, "queries": 5},
    "vqa": {"width": 32, "text_layers": 1, "region_layers": 1, "cross_layers": 2, "cells": 6},
}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(folder))
        yield folder


def build(kind: str, batch: int = 4, **loss) -> Objective:
    values = {"name": "x", "objective": kind, "model": SMALL[kind], "loss": loss}
    made = build_objective(Recipe(**values, data={"train": 16, "val": 8}, train={"steps": 1, "batch": batch}))
    made.setup(CPU)
    return made


def test_boxes_are_those_of_the_masks() -> None:
    source = build("detr").train_data
    for mask, boxes in zip(source.masks, ToyBoxes(source), strict=True):
        for toy, box in enumerate(boxes):
            rows, columns = np.nonzero(mask == toy)
            if len(rows):
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert (box * source.size).tolist() == [float(v) for v in expected]
            else:
                assert box.isnan().all()
    boxes = torch.rand(5, 4)
    assert torch.allclose(to_corners(to_centre(boxes)), boxes, atol=1e-6)


def test_regions_hold_every_toy_once_and_background_apart() -> None:
    boxes = torch.tensor([[0.1, 0.4, 0.4, 0.8], [0.6, 0.4, 0.9, 0.8]])
    regions, owner = draw_regions(boxes, 8, 0.0, torch.Generator().manual_seed(0))
    assert sorted(owner.tolist()) == [-1] * 6 + [0, 1]
    for toy in (0, 1):
        assert torch.equal(regions[owner == toy][0], boxes[toy])
    assert float(regions.min()) >= 0 and float(regions.max()) <= 1
    again, _ = draw_regions(boxes, 8, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(regions, again)


def test_region_labels_name_the_toy() -> None:
    made = build("vqa")
    scene = made.train_data.scenes[0]
    from sfumato.toybox import COLORS, PATTERNS, SHAPES

    rows = region_labels(scene, torch.tensor([0, -1]))
    toy = scene.toys[0]
    named = SHAPES.index(toy.shape), COLORS.index(toy.color), PATTERNS.index(toy.pattern)
    assert rows[0].tolist() == [1 + index for index in named]
    assert rows[1].tolist() == [0, 0, 0]


def test_every_question_is_within_the_vocabulary_and_the_length() -> None:
    made = build("vqa")
    tokenizer = question_tokenizer()
    for scene in made.train_data.scenes[:6]:
        for question in questions_about(scene):
            ids = tokenizer(question.text).input_ids
            assert tokenizer.unk_token_id not in ids and len(ids) <= tokenizer.model_max_length


def test_flips_move_boxes_with_the_picture() -> None:
    made = build("detr", 8)
    batch = made.batch(Draw(0, 0))
    for boxes, owner in zip(batch["boxes"], batch["owner"], strict=True):
        for toy in range(len(boxes)):
            rows, columns = (owner == toy).nonzero(as_tuple=True)
            if len(rows):  # the middle of the toy's cells lies inside its box
                middle = (columns.float().mean() + 0.5) / made.cells, (rows.float().mean() + 0.5) / made.cells
                assert boxes[toy, 0] <= middle[0] <= boxes[toy, 2] and boxes[toy, 1] <= middle[1] <= boxes[toy, 3]


def test_each_answer_by_itself_is_a_sum_of_binary_cross_entropies() -> None:
    made = build("vqa", places=0.0, answers="each")
    batch = made.batch(Draw(0, 0))
    loss, _ = made.loss(batch, Draw(0, 0))
    scores, _ = made.answer(batch["pixels"], batch["regions"], batch["tokens"], batch["mask"])
    chance = scores.double().sigmoid()
    right = torch.arange(len(ANSWERS)) == batch["answers"][:, None]
    expected = -torch.where(right, chance, 1 - chance).log().sum() / len(scores)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["detr", "vqa"])
def test_a_few_steps_on_one_batch_lower_the_loss(kind: str) -> None:
    made = build(kind)
    batch = made.batch(Draw(0, 0))
    assert all(torch.equal(v, made.batch(Draw(0, 0))[k]) or v.isnan().any() for k, v in batch.items())
    parameters = [p for module in made.modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    losses = []
    for _ in range(15):
        loss, logs = made.loss(batch, Draw(0, 0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0] and all(value.isfinite() for value in logs.values())
    for module in made.modules.values():
        module.eval()
    figures = made.evaluate()
    assert all(0 <= value <= 1 for value in figures.values()) and figures


@pytest.mark.parametrize(("kind", "cls"), [("detr", DetrForObjectDetection), ("vqa", LxmertForQuestionAnswering)])
def test_exports_are_half_the_size_and_read_back(kind: str, cls: type, tmp_path: Path) -> None:
    made = build(kind)
    card = made.export(tmp_path)
    (tmp_path / "sfumato.json").write_text("{}" if kind == "detr" else '{"regions": 8}')
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    plain = cls.from_pretrained(tmp_path)  # computes in float32, whatever the file holds
    assert next(plain.parameters()).dtype == torch.float32
    reader = load_reader(tmp_path)
    assert reader.dtype == torch.float32 and reader.kind == {"detr": "detector", "vqa": "answerer"}[kind]
    assert next(made.modules[kind].parameters()).dtype == torch.float32
    again = build(kind)
    again.load(tmp_path)
    own = dict(made.modules[kind].named_parameters())
    assert all(torch.allclose(p, own[n], atol=2e-3) for n, p in again.modules[kind].named_parameters())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if kind == "detr":
        assert reader.preprocessing.size == (64, 64)
        found = ask(reader, images, [None, None], least=0.0)
        assert [len(each.answers) for each in found] == [5, 5] and found[0].map(0).shape == (64, 64)
        return
    assert card["regions"] == 8 and reader.cells == 6 and reader.labels == list(ANSWERS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "how many cubes are there ?"
    assert tokenizer(text).input_ids == question_tokenizer()(text).input_ids
    regions = torch.rand(2, 8, 2).repeat(1, 1, 2) * 0.5 + torch.tensor([0.0, 0.0, 0.4, 0.4])
    found = ask(reader, images, ["what colour is the cube?", "how many balls are there ?"], regions=regions)
    assert [word for word, _ in found[0].words()] == ["what", "color", "is", "the", "cube", "?"]
    assert found[1].answer().region_values.shape == (8,) and set(QUESTION_KINDS) >= {"count"}
    alone = ask(reader, images[:1], ["what colour is the cube?"], regions=regions[:1])[0]
    assert torch.allclose(alone.answer().region_values, found[0].answer().region_values, atol=1e-5)
