"""Files that the examples of cards name, in a cache of the tests' own: one LoRA that has something for each tiny model,
one taught word with vectors as wide as their text encoders."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.contract.systems import KINDS
from tests.experts import write_expert

LORA_MODULES = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 32,
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 16,
    "transformer.transformer_blocks.1.attn.to_q": 16,
    "transformer.transformer_blocks.1.attn1.to_q": 16,
    "transformer.joint_transformer_blocks.0.attn.to_q": 32,
    "transformer.single_transformer_blocks.0.attn.to_q": 32,
    "text_encoder.encoder.layers.0.self_attn.v_proj": 16,
}
"""Module -> width; no two tiny models have a module of one name and different widths."""

WORD_WIDTHS = {"clip_l": 16, "clip_g": 16, "t5xxl": 32}
"""Widths of the text encoders of all tiny models."""


def write_examples(cache: Path) -> Path:
    """Everything that the examples need besides a model."""
    for kind in KINDS:
        for i, ends in enumerate(((0, 500), (500, 1000))):
            write_expert(cache, kind, f"tiny-{kind}-expert-1-{i}", ends, i)
    return write_adapters(cache)


def write_adapters(cache: Path) -> Path:
    """The adapters alone."""
    folder = cache / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)
    lora = {
        f"{name}.lora_{part}.weight": torch.randn(shape, generator=generator) * 0.5
        for name, width in LORA_MODULES.items()
        for part, shape in (("A", (4, width)), ("B", (width, 4)))
    }
    save_file(lora, folder / "example-lora.safetensors")
    whole = {
        f"{name}.weight": torch.randn(width, width, generator=generator) * 0.5 for name, width in LORA_MODULES.items()
    }
    save_file(whole, folder / "example-weights.safetensors")
    word = {key: torch.randn(2, width, generator=generator) for key, width in WORD_WIDTHS.items()}
    save_file(word, folder / "example-word.safetensors")
    return cache
