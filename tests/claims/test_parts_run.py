"""The parts of the steering claims run from end to end: on a tiny model, or on a shipped one where a built-in CLIP must
know it; one or two samples, one step, one copy of each model."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

import pytest

from claims import (
    attend_excite,
    children,
    clip_guidance,
    conceptor,
    experts,
    inpaint,
    mgad,
    no_token_left_behind,
    sad_pad,
    structured_guidance,
)
from claims.common import load
from claims.core import Context
from sfumato.sampling import generate
from tests.tiny import tiny_model

PARTS = {
    "attend_excite": (functools.partial(attend_excite.three_toys, "tiny"), 5),
    "structured_guidance": (functools.partial(structured_guidance.binding, "tiny", "equal shapes"), 5),
    "structured_guidance patterns": (functools.partial(structured_guidance.binding, "tiny", "patterns"), 3),
    "clip_guidance": (functools.partial(clip_guidance.curves, "toy-sd"), 5),
    "clip_guidance scorers": (functools.partial(clip_guidance.scorers, "toy-sd"), 1),
    "mgad": (functools.partial(mgad.together, "toy-sd"), 5),
    "no_token_left_behind prompts": (no_token_left_behind.prompts, 2),
    "no_token_left_behind": (functools.partial(no_token_left_behind.several_toys, "tiny"), 1),
    "no_token_left_behind boxes": (functools.partial(no_token_left_behind.boxes, "tiny"), 1),
    "experts": (experts.denoising, 1),
    "conceptor": (conceptor.planted, 1),
    "conceptor two kinds": (conceptor.two_kinds, 1),
    "conceptor faithful": (conceptor.faithful, 1),
    "conceptor removal": (conceptor.removal, 1),
    "conceptor one picture": (conceptor.single, 1),
    "conceptor bias": (conceptor.bias, 1),
    "inpaint": (inpaint.remove, 2),
    "inpaint background": (inpaint.background, 1),
    "sad_pad reading": (sad_pad.reading, 1),
    "sad_pad imbalance": (sad_pad.imbalance, 1),
    "sad_pad pairs": (sad_pad.implausible_pairs, 1),
}


@pytest.fixture(scope="module")
def loaded():
    """Models that one part has loaded serve the next."""
    single = {name: SimpleNamespace(value=1.0) for name in ("shape", "color", "pattern", "ground", "sky")}
    return {"trust": SimpleNamespace(single=single), "model tiny": tiny_model("sd")}


@pytest.fixture
def context(tmp_path, monkeypatch, loaded):
    made = Context(quick=True)
    made.pictures, made.cache = tmp_path, loaded
    # distances between sets, and the densities of SaD, need more than one
    made.count = lambda full, quick: {1000: 8, 2000: 30, 250: 20, 200: 2, 100: 4}.get(full, 1)
    monkeypatch.setattr(inpaint, "STEPS", 1)
    monkeypatch.setattr(inpaint, "GUIDANCE", (4.0,))
    monkeypatch.setattr(clip_guidance, "STEPS", 1)
    monkeypatch.setattr(clip_guidance, "FREE", (1.0, 2.0, 3.0, 4.0))  # a quick run takes every third
    monkeypatch.setattr(clip_guidance, "TUNED", clip_guidance.N)
    monkeypatch.setattr(mgad, "STEPS", 1)
    monkeypatch.setattr(mgad, "PICTURES", {**mgad.PICTURES, "cutouts": 2})
    monkeypatch.setattr(no_token_left_behind, "STEPS", 1)
    monkeypatch.setattr(no_token_left_behind, "STRENGTHS", (0.2,))
    monkeypatch.setattr(no_token_left_behind, "GUIDE", {"cutouts": 1, "window": (0.0, 0.6)})
    monkeypatch.setattr(no_token_left_behind.timed, "__defaults__", (1,))
    monkeypatch.setattr(attend_excite, "STEPS", ({"strength": 20.0, "tries": 1},))
    monkeypatch.setattr(attend_excite, "ENOUGH", (0.8,))
    monkeypatch.setattr(attend_excite, "generate", functools.partial(generate, steps=1))
    base = made.folder("toy-sd")
    monkeypatch.setattr(experts, "children", lambda _: {name: base for name in (*experts.TREE, experts.CONTROL)})
    monkeypatch.setattr(experts, "child", lambda context, _: load(context, "toy-sd"))
    monkeypatch.setattr(children, "planted", lambda context, name: load(context, name))
    monkeypatch.setattr(conceptor, "DRAWING", {"steps": 1})
    return made


@pytest.mark.parametrize("part", PARTS)
def test_it_runs(part, context):
    run, rows = PARTS[part]
    found = run(context)
    assert len(found) == rows
    for row in found:
        assert row.n >= 1 and json.dumps(row.to_json()) and (not row.bars or row.void or row.holds in (True, False))
        assert row.picture is None or (context.pictures / row.picture).is_file()
