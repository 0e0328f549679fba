"""``sfumato teach`` and its examples, from the command line and from Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

import sfumato as package
from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models.quiet import quiet
from sfumato.teach.examples import read_examples, toybox_examples
from sfumato.toybox import SHAPES


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory) -> Path:
    """A transformers folder with a randomly initialised ViT of 16x16 pictures and two labels."""
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        id2label={0: "cat", 1: "dog"},
    )  # fmt: skip
    with quiet():
        ViTForImageClassification(config).save_pretrained(folder)
    return folder


def write_pictures(folder: Path, labels: list[str]) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i, label in enumerate(labels):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        mask = np.zeros((20, 20), np.uint8)
        mask[5:15, 2:9] = 1  # dark, but not black: as the toybox writes its masks
        Image.fromarray(mask).save(folder / f"{i}.mask.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "mask": f"{i}.mask.png", "label": label}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_teaches_from_a_folder(sfumato, tiny_vit) -> None:
    write_pictures(Path("pictures"), ["cat", "dog", "dog"])
    done = sfumato("teach", "robust_vit:epochs=2,lr=1e-3", "--model", tiny_vit, "--data", "pictures", "-o", "out")
    assert done.code == 0, done.err
    assert done.lines[-1] == "out"
    told = json.loads(Path("out/robust_vit.json").read_text())
    assert told["labels"] == ["cat", "dog", "dog"] and len(told["log"]) == 2 and told["params"]["lr"] == 1e-3
    ViTForImageClassification.from_pretrained("out")
    again = sfumato("teach", "robust_vit", "--model", tiny_vit, "--data", "pictures", "-o", "out")
    assert again.code == 2 and "is not empty" in again.err and len(again.err.splitlines()) == 1


def test_reads_masks_and_sizes(tmp_path) -> None:
    found = read_examples(write_pictures(tmp_path / "pictures", ["cat"]), (16, 16))
    assert found.pictures.shape == (1, 3, 16, 16) and found.labels == ("cat",)
    assert found.masks[0].mean() == pytest.approx(70 / 400, abs=0.03)


def test_bad_input_is_one_line(sfumato, tiny_vit, tmp_path) -> None:
    write_pictures(tmp_path / "owls", ["owl"])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metadata.jsonl").write_text('{"file_name": "1.png"}')
    cases = [
        (["robust_vit", "--model", tiny_vit, "--data", tmp_path / "owls"], "label 'owl'"),
        (["robust_vit", "--model", tiny_vit, "--data", tmp_path / "broken"], "line 1 of"),
        (["robust_vit", "--model", tiny_vit, "--data", tmp_path], "no metadata.jsonl"),
        (["robust_vt", "--model", tiny_vit], "Did you mean 'robust_vit'"),
        (["daam", "--model", tiny_vit], "unknown system that teaches"),
        (["robust_vit:lr=-1", "--model", tiny_vit], "lr"),
        (["robust_vit", "--model", "toy-clip"], "is none"),
    ]
    for arguments, message in cases:
        done = sfumato("teach", *arguments, "-o", "out")
        assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1, done.err
        assert not Path("out").exists()


def test_from_python_and_the_toybox(monkeypatch, tmp_path) -> None:
    few = toybox_examples(1, cache=tmp_path, n=60)
    assert few.labels == SHAPES and few.pictures.shape == (6, 3, 64, 64) and few.masks.flatten(1).any(1).all()
    with pytest.raises(BadInput, match="1 to 20"):
        toybox_examples(0)
    with pytest.raises(UnknownName, match="teaches"):
        package.teach("daam", "toy-vit")
    with pytest.raises(NotSupported, match="is none"):
        package.teach("robust_vit", "toy-clip")
