"""LoRA files for the tiny models in every dialect, by the writers of diffusers and peft, and own ones for kohya's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.models import Model

Factors = dict[str, dict[str, Tensor]]
"""``component.path`` -> down (r in), up (out r) and perhaps alpha ()."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def factors(
    model: Model,
    *,
    rank: int = 4,
    alpha: float | None = None,
    text: bool = True,
    seed: int = 0,
    size: float = 0.3,
    convolutions: bool = False,
) -> Factors:
    """Random factors for the attention of the denoiser and, with ``text``, for its CLIPs."""
    generator = torch.Generator().manual_seed(seed)
    out: Factors = {}
    for component, network in model.modules.items():
        if component != model.family.denoiser_name and not (text and "CLIP" in type(network).__name__):
            continue
        ends = TEXT if component.startswith("text_encoder") else ATTENTION
        for path, module in network.named_modules():
            fits = isinstance(module, nn.Linear) and path.endswith(ends)
            fits = fits or (convolutions and isinstance(module, nn.Conv2d) and "resnets" in path)
            if not fits:
                continue
            shape = module.weight.shape
            down = torch.randn(rank, *shape[1:], generator=generator) * size
            up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * size
            out[f"{component}.{path}"] = {"down": down, "up": up}
            if alpha is not None:
                out[f"{component}.{path}"]["alpha"] = torch.tensor(float(alpha))
    assert out
    return out


def by_component(given: Factors) -> dict[str, Factors]:
    found: dict[str, Factors] = {}
    for name, parts in given.items():
        component, _, path = name.partition(".")
        found.setdefault(component, {})[path] = parts
    return found


def write_peft(path: Path, given: Factors) -> Path:
    """As diffusers writes today: ``unet.<path>.lora_A.weight``, without alpha."""
    tensors = {f"{n}.lora_{ab}.weight": p[part] for n, p in given.items() for ab, part in (("A", "down"), ("B", "up"))}
    save_file(tensors, path)
    return path


def write_saved(folder: Path, model: Model, given: Factors) -> Path:
    """By the pipeline's own ``save_lora_weights``."""
    layers = {}
    for component, each in by_component(given).items():
        layers[f"{component}_lora_layers"] = {
            f"{path}.lora_{ab}.weight": parts[part]
            for path, parts in each.items()
            for ab, part in (("A", "down"), ("B", "up"))
        }
    model.pipe.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


def write_attention_processors(path: Path, given: Factors) -> Path:
    """diffusers of 2023: ``unet.<...>.attn1.processor.to_q_lora.down.weight``, ``text_encoder.<...>.to_q_lora...``."""
    tensors = {}
    for name, parts in given.items():
        stem, _, last = name.removesuffix(".0").rpartition(".")
        if name.startswith("text_encoder"):
            if "self_attn" not in name:
                name = f"{name}.lora_linear_layer"
            else:
                stem = stem.replace("text_encoder.", "text_encoder.text_model.", 1)
                last = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}[last]
                name = f"{stem}.{last}_lora"
        else:
            name = f"{stem}.processor.{last}_lora"
        tensors |= {f"{name}.down.weight": parts["down"], f"{name}.up.weight": parts["up"]}
    save_file(tensors, path)
    return path


def write_layers(path: Path, given: Factors) -> Path:
    """diffusers of 2023-24: ``unet.<path>.lora.down.weight``, ``text_encoder.<path>.lora_linear_layer.down.weight``."""
    tensors = {}
    for name, parts in given.items():
        middle = "lora_linear_layer" if name.startswith("text_encoder") else "lora"
        tensors |= {f"{name}.{middle}.down.weight": parts["down"], f"{name}.{middle}.up.weight": parts["up"]}
    save_file(tensors, path)
    return path


def write_kohya(
    path: Path, given: Factors, names: Mapping[str, str] = {}, metadata=None, one_text: bool = True
) -> Path:
    """``lora_unet_<path with _>.lora_down.weight`` with alpha; ``names``: other spellings of paths in the denoiser."""
    tensors = {}
    for name, parts in given.items():
        component, _, where = name.partition(".")
        where = names.get(where, where)
        prefix = {"text_encoder": "lora_te" if one_text else "lora_te1", "text_encoder_2": "lora_te2"}.get(
            component, "lora_unet"
        )
        where = f"text_model.{where}" if component.startswith("text_encoder") else where
        stem = f"{prefix}_{where.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": parts["down"], f"{stem}.lora_up.weight": parts["up"]}
        if "alpha" in parts:
            tensors[f"{stem}.alpha"] = parts["alpha"]
    save_file(tensors, path, metadata=metadata)
    return path
