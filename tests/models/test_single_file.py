"""Single-file checkpoints in the layout that A1111 and ComfyUI exchange, written here from a tiny pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.errors import BadInput, BadWeights
from sfumato.models import load
from tests.checkpoints import original_layout
from tests.tiny import tiny_model, tiny_pipeline


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(original_layout(tiny_pipeline("sd")), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def config(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """Configuration and tokenizer alone, without any weights."""
    return Path(
        shutil.copytree(saved("sd"), tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    )


def test_same_model_as_the_folder(checkpoint: Path, config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load(checkpoint, config=config)
    assert capfd.readouterr() == ("", "")
    original = tiny_model("sd")
    for name, module in model.modules.items():
        expected = original.modules[name].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert len(model.weight_hash) == 64
    assert load(checkpoint, config=config, dtype="bf16").dtype == torch.bfloat16


def test_without_configuration(checkpoint: Path) -> None:
    with pytest.raises(BadInput, match="its tokenizer .* is not in the file .* give config=<folder") as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["nowhere", "."])
def test_configuration_that_is_none(checkpoint: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    with pytest.raises(BadInput, match=f"config='{given}' is not the folder of a diffusers model"):
        load(checkpoint, config=given)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_damaged(checkpoint: Path, config: Path, name: str, damage: str) -> None:
    tensors = load_file(checkpoint)
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = torch.zeros(5)
    else:
        tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, checkpoint)
    with pytest.raises(BadWeights) as caught:
        load(checkpoint, config=config)
    assert "\n" not in str(caught.value)


def test_other_architecture(checkpoint: Path, saved: Callable[[str], Path]) -> None:
    with pytest.raises(BadWeights, match="does not fit the StableDiffusionXLPipeline described in") as caught:
        load(checkpoint, config=saved("sdxl"))
    assert "\n" not in str(caught.value)


def test_pickle(tmp_path: Path, config: Path) -> None:
    path = tmp_path / "old.ckpt"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(BadWeights, match="is a pickle"):
        load(path, config=config)
