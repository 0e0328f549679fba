"""Experts of the tiny models: children whose weights were moved a little, in the folders that training would write."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

from sfumato.models.quiet import quiet
from tests.tiny import tiny_model


def write_expert(cache: Path, kind: str, name: str, timesteps: tuple[float, float], seed: int = 1) -> Path:
    """A finished run ``name`` in the cache: an expert of the tiny model of this kind. Returns its folder."""
    model = tiny_model(kind)
    folder = cache / "runs" / name / "export"
    child = copy.deepcopy(model.denoiser)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), quiet():
        for parameter in child.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        child.save_pretrained(folder / model.family.denoiser_name)
    card = {"name": name, "expert": {"of": model.name, "timesteps": timesteps}}
    (folder / "sfumato.json").write_text(json.dumps(card))
    return folder
