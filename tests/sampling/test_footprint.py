"""The memory that a system adds, foreseen on networks without weights, is what it is measured to be with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.cards import method, methods, parse_with
from sfumato.models import Model, quiet
from sfumato.models.outline import outline
from sfumato.sampling.footprint import Footprint, adds, drawn
from tests.tiny import tiny_model, tiny_pipeline

CASES = {
    "sd": ["daam", "prompt_to_prompt"],
    "sd3": ["attend_excite"],
    "flux": ["attend_excite"],
}
SIZE = (64, 64)


def without_weights(kind: str, folder: Path) -> Model:
    with quiet():
        tiny_pipeline(kind).save_pretrained(folder)
    card = {"sampling": {**tiny_model(kind).card["sampling"], "size": SIZE, "steps": 5}}
    (folder / "sfumato.json").write_text(json.dumps(card))
    return outline(folder)


@pytest.mark.parametrize("kind", CASES)
def test_foreseen_is_measured(kind: str, tmp_path: Path, monkeypatch: Any):
    """Within a fifth, and so is the plain picture. The CPU's kernel, which hands out the log-sum-exp as no other does,
    is not asked for it."""
    monkeypatch.setattr("sfumato.attention.call.Call._kernel_gives_lse", lambda call: False)
    model = tiny_model(kind)
    noise = torch.randn(1, *model.latent_shape(*SIZE))
    foreseen = adds(without_weights(kind, tmp_path), CASES[kind])
    for key in CASES[kind]:
        steps = 5 if key == "prompt_to_prompt" else 1
        name, given = parse_with(methods()[key].example or key)
        given |= {"thresholds": []} if key == "attend_excite" else {}  # one pass is as large as twenty
        plain, own = (drawn(model, systems, steps, latents=noise) for systems in ((), method(name)(**given)))
        measured = own.peak - plain.peak
        assert measured > 0 and foreseen[key] == pytest.approx(measured, rel=0.2), key


def test_bytes_that_are_alive():
    kept = torch.zeros(100)
    with Footprint([kept]) as counted:
        kept.view(10, 10)
        assert counted.live == 0
        x = torch.ones(1000)
        y = x + 1
        assert counted.live == 8000
        del y
        assert counted.live == 4000
        z = torch.ones(250, device="meta")
        assert counted.live == 5000 and bool((x[:250] + z).isfinite().all())  # nobody knows
        del x, z
    assert counted.live == 0 and counted.peak == 8000
