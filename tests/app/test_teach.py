"""``sfumato teach`` and its examples, from the command line and from Python."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification

import sfumato as package
from sfumato.adapters.metadata import BASE
from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models.quiet import quiet
from sfumato.teach.examples import read_examples, toybox_examples
from sfumato.toybox import SHAPES
from tests.teach.conftest import photos  # noqa: F401  (a fixture)


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
    done = sfumato("teach", "pictures", "--by", "robust_vit:epochs=2,lr=1e-3", "--model", tiny_vit, "-o", "out")
    assert done.code == 0, done.err
    assert done.lines[-1] == "out"
    told = json.loads(Path("out/robust_vit.json").read_text())
    assert told["labels"] == ["cat", "dog", "dog"] and len(told["log"]) == 2 and told["params"]["lr"] == 1e-3
    ViTForImageClassification.from_pretrained("out")
    again = sfumato("teach", "pictures", "--by", "robust_vit", "--model", tiny_vit, "-o", "out")
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
        ([tmp_path / "owls", "--by", "robust_vit", "--model", tiny_vit], "label 'owl'"),
        ([tmp_path / "broken", "--by", "robust_vit", "--model", tiny_vit], "line 1 of"),
        ([tmp_path, "--by", "robust_vit", "--model", tiny_vit], "no metadata.jsonl"),
        (["toybox", "--by", "robust_vt", "--model", tiny_vit], "Did you mean 'robust_vit'"),
        (["toybox", "--by", "daam", "--model", tiny_vit], "unknown system that teaches"),
        (["toybox", "--by", "robust_vit:lr=-1", "--model", tiny_vit], "lr"),
        (["toybox", "--by", "robust_vit", "--model", "toy-clip"], "is none"),
        (["toybox", "--by", "robust_vit", "--model", tiny_vit, "--resume"], "keeps no checkpoints"),
        (["toybox", "--by", "robust_vit", "--model", tiny_vit, "--class", "x"], "parameter of robust_vit 'class_noun'"),
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
        package.teach("toybox", by="daam", model="toy-vit")
    with pytest.raises(NotSupported, match="is none"):
        package.teach("toybox", by="robust_vit", model="toy-clip")


def test_the_command_and_the_picture(sfumato, tiny_sd, photos, monkeypatch):  # noqa: F811
    by = "textual_inversion:batch=1,lr=0.05,probe_every=2"
    said = ["teach", photos, "--by", by, "--name", "<rex>", "--class", "ball", "--steps", 2, "--model", tiny_sd]
    done = sfumato(*said, "-o", "rex.safetensors")
    assert done.code == 0 and done.lines == ["rex.safetensors"], done.err
    assert os.listdir() == ["rex.safetensors"]
    with safe_open("rex.safetensors", "pt") as file:
        told = file.metadata()
    assert told["sfumato.method"] == "textual_inversion" and len(told[BASE]) == 64
    assert told["modelspec.trigger_phrase"] == "<rex>" and told["ss_steps"] == "2"
    assert json.loads(told["sfumato.facts"])["class"] == "ball"
    make = ["make", "a <rex> on the left", "--with", "word:file=rex.safetensors", "--steps", 1]
    made = sfumato(*make, "-o", "x.png", "--model", tiny_sd)
    assert made.code == 0, made.err
    monkeypatch.setattr("sys.argv", ["sfumato", *map(str, said), "--minutes", "1e-6", "-o", "rex2.safetensors"])
    stopped = sfumato(*said, "--minutes", 1e-6, "-o", "rex2.safetensors")
    assert stopped.code == 130 and stopped.err.strip().endswith("--resume")
    resumed = sfumato(*said, "-o", "rex2.safetensors", "--resume")
    assert resumed.code == 0, resumed.err
    one, other = load_file("rex.safetensors"), load_file("rex2.safetensors")
    assert torch.equal(one["<rex>"], other["<rex>"])
