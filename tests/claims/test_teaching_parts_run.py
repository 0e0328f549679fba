"""The parts of the teaching claims run from end to end: on a tiny model, one secret of each kind, one step."""

from __future__ import annotations

import functools
import json

import pytest

from claims import children, custom_diffusion, discriminative_tokens, dreambooth, subjects, textual_inversion
from claims.core import Context
from sfumato.sampling import generate
from sfumato.teach import concepts
from tests.tiny import tiny_model

PARTS = {
    "textual_inversion": (textual_inversion, 4),
    "dreambooth": (dreambooth, 5),
    "custom_diffusion": (custom_diffusion, 5),
    "discriminative_tokens": (discriminative_tokens, 5),
}


@pytest.fixture(scope="module")
def loaded():
    """What one part has made serves the next."""
    return {}


@pytest.mark.parametrize("part", PARTS)
def test_it_runs(part, tmp_path, monkeypatch, loaded):
    module, rows = PARTS[part]
    context = Context(quick=True)
    context.pictures, context.cache = tmp_path, loaded
    # a validation secret and a setting of each kind, two pictures of an arm (one ground and none), a step
    context.count = lambda full, quick: {48: 2, 60: 2, 16: 2, 18: 2, 20: 2, 10: 2, 300: 40}.get(full, 1)
    for world in ("world", "ambiguous"):
        monkeypatch.setattr(children, world, lambda context, name: tiny_model("sd"))
    monkeypatch.setattr(subjects, "quickly", lambda context: {"steps": 1})
    monkeypatch.setattr(concepts, "generate", functools.partial(generate, steps=1))  # priors
    found = module.measured(context, "tiny")
    assert len(found) == rows
    for row in found:
        assert row.n >= 1 and json.dumps(row.to_json()) and (not row.bars or row.void or row.holds in (True, False))
        assert row.picture is None or (context.pictures / row.picture).is_file()
