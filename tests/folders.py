"""Folders of renders with captions, and a tiny CLIP on disk. Libraries are imported where they are used: the process
that deals tests out to others reads this file too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A randomly initialised CLIP of 32x32 pictures with the toybox's tokenizer."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from sfumato.models import quiet
    from sfumato.zoo.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("nets") / "tiny-clip"
    tokenizer = build_tokenizer(16)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = tower | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = tower | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]
        ).save_pretrained(folder)
    return folder


def write_renders(folder: Path, n: int, seed: int = 0, captions: bool = True, split: str = "test") -> Path:
    """``n`` renders of unseen scenes, named 000.png ..., with their captions."""
    from sfumato.toybox import caption, render
    from sfumato.toybox.dataset import draw_scene

    folder.mkdir(parents=True)
    scenes = [draw_scene(split, seed, i) for i in range(n)]
    frames = render(scenes, 64)
    rows = []
    for i, scene in enumerate(scenes):
        frames.pil(i).save(folder / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "text": caption(scene, None, "short").text, "seed": i})
    if captions:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def renders(tmp_path_factory) -> Path:
    """40 renders with captions. Read only."""
    return write_renders(tmp_path_factory.mktemp("renders") / "real", 40)


@pytest.fixture(scope="session")
def others(tmp_path_factory) -> Path:
    """30 other renders with captions. Read only."""
    return write_renders(tmp_path_factory.mktemp("others") / "fake", 30, seed=1)
