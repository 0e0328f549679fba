"""The experiments about the h-space, on tiny models and with a judge whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from claims import inject_fusion, pullback
from claims.core import Context
from sfumato.edit.pullback import Pullback
from sfumato.hspace import basis
from sfumato.toybox.oracle import ObjectReading, SceneReading
from tests.tiny import tiny_model


def reading(shape, color, ground, sky="day"):
    toy = ObjectReading(shape, color, "plain", "large", torch.ones(4, 4, dtype=torch.bool), (0, 0, 4, 4), 0.9)
    return SceneReading((toy,), ground, sky)


class Eye:
    """Sees by turns a red ball on grass and a blue cube on sand."""

    def read(self, pictures):
        seen = reading("ball", "red", "grass"), reading("cube", "blue", "sand")
        return [seen[i % 2] for i in range(len(pictures))]


@pytest.fixture
def context(tmp_path, monkeypatch):
    made = Context(quick=True)
    made.pictures = tmp_path
    made.count = lambda full, quick: min(quick, 2)
    single = {name: SimpleNamespace(value=1.0) for name in ("shape", "color")}
    model = tiny_model("sd")
    monkeypatch.setattr(model, "card", {"sampling": {"size": [32, 32]}})
    made.cache = {"judge": Eye(), "model tiny": model, "trust": SimpleNamespace(single=single)}
    for module in (inject_fusion, pullback):
        monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(inject_fusion, "STRENGTHS", (1.0,))
    monkeypatch.setattr(inject_fusion, "LAYERS", ("up.0",))
    monkeypatch.setattr(inject_fusion, "RATIOS", (0.5,))
    monkeypatch.setattr(basis, "OVERSAMPLING", 1)
    monkeypatch.setattr(pullback, "RANK", 2)
    monkeypatch.setattr(pullback, "POWER", {"rank": 2, "iterations": 2, "tolerance": 0.1})
    few = {"iterations": 1, "repeats": 2}
    monkeypatch.setattr(pullback, "Pullback", lambda **given: Pullback(**given | few))
    return made


def test_an_outcome_is_fused_only_with_the_contents_shape_in_the_looks_scenery():
    one, two = reading("ball", "red", "grass"), reading("cube", "blue", "sand", "night")
    pair = inject_fusion.Pair("", "", 0, 1, (torch.zeros(3, 4, 4),) * 2, (one, two))

    def judged(seen):
        context = Context(quick=True)
        context.cache = {"judge": SimpleNamespace(read=lambda pictures: [seen])}
        return inject_fusion.outcomes(context, [pair], lambda _: torch.zeros(1, 3, 4, 4), "")[0]

    assert judged(reading("cube", "red", "grass", "night")).fused
    assert judged(reading("cube", "blue", "grass", "night")).look == (False, True, False)
    assert not judged(two).fused and not judged(one).fused and not judged(SceneReading((), "grass", "day")).shape
    found = inject_fusion.score([judged(reading("cube", "red", "grass"))])
    assert found > inject_fusion.score([judged(one)]) > inject_fusion.score([judged(SceneReading((), "sand", "night"))])


def test_pairs_differ(context):
    [pair] = inject_fusion.pairs(context, context.cache["model tiny"], 5, 1)
    assert pair.readings[0].objects[0].shape == "ball" and pair.readings[1].objects[0].shape == "cube"
    assert pair.other == pair.seed + 1 and pair.look != pair.content


def test_fine_is_the_share_of_high_frequencies():
    x = torch.arange(32.0)
    low, high = (torch.cos(2 * torch.pi * k * x / 32).expand(3, 32, 32) for k in (2, 9))
    assert pullback.fine(low) < 1e-6 and pullback.fine(high) > 1 - 1e-6
    assert pullback.fine(low + high) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        (inject_fusion.influence, 1),
        (inject_fusion.fused, 5),
        (pullback.exact, 1),
        (pullback.over_time, 2),
        (pullback.edits, 2),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_every_part_runs(part, rows, context):
    if part in (inject_fusion.fused, pullback.edits):
        context.count = lambda full, quick: 1  # its arms are many
    found = part("tiny", context)
    assert len(found) == rows
    for row in found:
        assert row.n >= 1 and (row.holds in (True, False) or row.void) and row.measured and row.baseline
        assert row.picture is None or (context.pictures / row.picture).is_file()
