"""Single-file checkpoints in the layout that A1111 and ComfyUI exchange, written here from a tiny pipeline."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.errors import BadInput, BadWeights
from sfumato.models import load
from tests.tiny import tiny_model, tiny_pipeline

_RESNET = [
    ("time_emb_proj", "emb_layers.1"),
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
_VAE_ATTENTION = [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")]


def original_layout(pipe: object) -> dict[str, torch.Tensor]:
    """The tensors of a Stable Diffusion 1 pipeline under the names of the original release."""
    layers = pipe.unet.config.layers_per_block
    blocks = len(pipe.vae.config.block_out_channels)
    tensors = {}
    for name, value in pipe.unet.state_dict().items():
        tensors["model.diffusion_model." + _unet_name(name, layers)] = value
    for name, value in pipe.vae.state_dict().items():
        name = _vae_name(name, blocks)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            value = value[..., None, None]  # a 1x1 convolution
        tensors["first_stage_model." + name] = value
    for name, value in pipe.text_encoder.state_dict().items():
        tensors["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = value
    return {name: value.contiguous() for name, value in tensors.items()}


def _unet_name(name: str, layers: int) -> str:
    heads = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    heads |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    for new, old in heads.items():
        if name.startswith(new + "."):
            return name.replace(new, old)
    where, rest = _unet_place(name, layers)
    if "resnets" in name:
        for new, old in _RESNET:
            rest = re.sub(rf"^{new}\.", f"{old}.", rest)
    return f"{where}.{rest}"


def _unet_place(name: str, layers: int) -> tuple[str, str]:
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        kind, i, rest = match[1], int(match[2]), match[3]
        return f"middle_block.{1 if kind == 'attentions' else 2 * i}", rest
    if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        return (
            f"input_blocks.{1 + int(match[1]) * (layers + 1) + int(match[3])}.{int(match[2] == 'attentions')}",
            match[4],
        )
    if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op", match[2]
    if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        return f"output_blocks.{int(match[1]) * (layers + 1) + int(match[3])}.{int(match[2] == 'attentions')}", match[4]
    match = re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.(.*)", name)
    block = int(match[1])
    # the first block of the tiny U-Net has no attention, so its upsampler comes one place earlier
    return f"output_blocks.{block * (layers + 1) + layers}.{1 if block == 0 else 2}", match[2]


def _vae_name(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    if "attn_1" in name:
        for new, old in _VAE_ATTENTION:
            name = name.replace(f".{new}.", f".{old}.")
    return name


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
    with pytest.raises(BadInput, match="is a single file without configuration, .* give config=<folder") as caught:
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
