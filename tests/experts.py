"""Experts of the tiny models: children whose weights were moved a little, in the folders that training would write."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny import tiny_model


def write_expert(cache: Path, kind: str, name: str, timesteps: tuple[float, float], seed: int = 1) -> Path:
    """A finished run ``name`` in the cache: an expert of the tiny model of this kind. Returns its folder."""
    model = tiny_model(kind)
    folder = cache / "runs" / name / "export"
    component = folder / model.family.denoiser_name
    component.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().clone() for key, value in model.denoiser.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.denoiser.named_parameters():
        weights[key] += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_file(weights, component / "diffusion_pytorch_model.safetensors")
    card = {"name": name, "expert": {"of": model.name, "timesteps": timesteps}}
    (folder / "sfumato.json").write_text(json.dumps(card))
    return folder
