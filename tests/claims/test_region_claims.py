"""The experiments about regions, on tiny models and with a judge whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from claims import blend, paint_with_words, shape_guided
from claims.core import Context
from sfumato.toybox import render
from sfumato.toybox.oracle import ObjectReading, RequestedToy, SceneReading
from tests.tiny import tiny_model


def toy(request, mask):
    ys, xs = torch.nonzero(mask, as_tuple=True)
    box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
    return ObjectReading(request.shape, request.color, "plain", "large", mask, box, 0.9)


class Eye:
    """Sees a red ball in the left half of every other picture."""

    def read(self, pictures):
        mask = torch.zeros(pictures[0].shape[-2:], dtype=torch.bool)
        mask[:, : mask.shape[1] // 2] = True
        seen = SceneReading((toy(RequestedToy("ball", "red"), mask),), "grass", "day")
        return [seen if i % 2 == 0 else SceneReading((), "grass", "day") for i in range(len(pictures))]


@pytest.fixture
def context(tmp_path, monkeypatch):
    made = Context(quick=True)
    made.pictures = tmp_path
    made.count = lambda full, quick: 1
    single = {name: SimpleNamespace(value=1.0) for name in ("shape", "color")}
    made.cache = {"judge": Eye(), "model tiny": tiny_model("sd"), "trust": SimpleNamespace(single=single)}
    monkeypatch.setattr(blend, "STEPS", 2)
    monkeypatch.setattr(blend, "STRENGTHS", (0.5, 1.0))
    monkeypatch.setattr(shape_guided, "SETTINGS", ({}, {"boost": 1.0}))
    monkeypatch.setattr(paint_with_words, "STEPS", 1)
    monkeypatch.setattr(paint_with_words, "STRENGTHS", (0.1, 0.4))
    monkeypatch.setattr(made.cache["model tiny"], "card", {"sampling": {"size": [48, 48]}})
    return made


def test_cases_differ_in_one_colour():
    asked = blend.cases("test", 5, 3, 64)
    assert [one.before for one in asked] == [one.before for one in blend.cases("test", 5, 3, 64)]
    for one in asked:
        assert one.toy_before in one.before and one.toy_after in one.after and one.request.color in one.toy_after
        assert one.before != one.after and one.around.split()[1] in one.before
        assert one.mask.float().mean() >= blend.SMALLEST and (one.picture - one.truth).abs()[:, one.mask].max() > 0.2
        far = torch.nn.functional.max_pool2d(one.mask[None].float(), 9, 1, 4)[0] == 0
        assert (one.picture - one.truth).abs()[:, far].max() < 0.2  # reflections and shadows aside, nothing else


def test_the_true_answer_scores_best():
    [one] = blend.cases("test", 5, 1, 64)
    right = SceneReading((toy(one.request, one.mask),), "grass", "day")
    best = blend.measured(one, one.truth, right)
    assert best.there and best.iou == 1 and best.seam == 0 and best.background > 30
    worse = blend.measured(one, one.truth.roll(8, 2), SceneReading((), "grass", "day"))
    assert not worse.there and worse.iou == 0 and worse.seam > 0 and worse.background < best.background


def test_silhouettes_that_no_toy_has_by_nature():
    for side in (64, 128):
        for i, one in enumerate(shape_guided.cases("test", 5, 2, side)):
            assert one.picture.shape == one.truth.shape == (3, side, side) and one.mask.shape == (side, side)
            ys, xs = torch.nonzero(one.mask, as_tuple=True)
            assert min(ys.min(), xs.min()) > 0 and max(ys.max(), xs.max()) < side - 1
            assert (one.picture - one.truth).abs()[:, one.mask].mean() > 0.1 and one.request.shape is None
            assert torch.equal(one.picture[:, ~one.mask], one.truth[:, ~one.mask])
            assert shape_guided.STRETCH[i % 2]  # wide and long in turn
    mask = torch.zeros(1, 40, 40)
    mask[0, 10:30, 10:30] = 1
    wide = shape_guided.stretched(mask, (19.5, 19.5), (1.5, 0.5), exact=True)[0]
    assert int(wide.any(0).sum()) == 30 and int(wide.any(1).sum()) == 10


def test_layouts_and_where_toys_came_to_lie():
    asked = paint_with_words.layouts("test", 5, 3, 64)
    assert [len(layout.phrases) for layout in asked] == [2, 3, 2]
    for layout in asked:
        frames = render([layout.prompt.scene], 64)
        assert all(phrase in layout.prompt.text for phrase in layout.phrases)
        for phrase, box in zip(layout.prompt.caption.phrases, layout.boxes, strict=True):
            assert list(box) == frames.boxes[0][phrase.object].tolist()
    layout = asked[0]
    frames = render([layout.prompt.scene], 64)
    objects = [phrase.object for phrase in layout.prompt.caption.phrases]
    toys = tuple(toy(w, frames.mask[0] == i) for w, i in zip(layout.prompt.requests, objects, strict=True))
    eye = SimpleNamespace(read=lambda pictures: [SceneReading(toys, "grass", "day")])
    context = Context(quick=True)
    context.cache = {"judge": eye}
    [found] = paint_with_words.placed(context, [layout], torch.zeros(1, 3, 64, 64))
    assert [(one.there, one.iou, one.inside) for one in found] == [(True, 1.0, True)] * 2
    [other] = paint_with_words.placed(context, [paint_with_words.swapped(layout)], torch.zeros(1, 3, 64, 64))
    assert all(one.there and one.iou < 1 for one in other)


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        (blend.edits, 1),
        (blend.resampling, 1),
        (shape_guided.on_pictures, 3),
        (shape_guided.from_noise, 1),
        (paint_with_words.painting, 2),
        (paint_with_words.ablations, 2),
    ],
)
def test_every_part_runs(part, rows, context):
    found = part("tiny", context)
    assert len(found) == rows
    for row in found:
        assert row.n == 1 and (row.picture is None or (context.pictures / row.picture).is_file())
