"""Single-file checkpoints in the layout that A1111 and ComfyUI exchange, written from tiny pipelines."""

from __future__ import annotations

import re
from typing import Any

import torch

_RESNET = [
    ("time_emb_proj", "emb_layers.1"),
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
_VAE_ATTENTION = [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")]


def original_layout(pipe: Any) -> dict[str, torch.Tensor]:
    """The tensors of a Stable Diffusion 1 or 2 or SDXL pipeline under the names of the original release."""
    layers = pipe.unet.config.layers_per_block
    blocks = len(pipe.vae.config.block_out_channels)
    plain = [i for i, kind in enumerate(pipe.unet.config.up_block_types) if kind == "UpBlock2D"]
    tensors = {}
    for name, value in pipe.unet.state_dict().items():
        tensors["model.diffusion_model." + _unet_name(name, layers, plain)] = value
    for name, value in pipe.vae.state_dict().items():
        name = _vae_name(name, blocks)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            value = value[..., None, None]  # a 1x1 convolution
        tensors["first_stage_model." + name] = value
    second = getattr(pipe, "text_encoder_2", None)
    if pipe.unet.config.use_linear_projection and second is None:
        tensors |= open_clip(pipe.text_encoder, "cond_stage_model.model.")
    elif pipe.text_encoder is not None:
        prefix = "cond_stage_model." if second is None else "conditioner.embedders.0."
        for name, value in pipe.text_encoder.state_dict().items():
            tensors[f"{prefix}transformer.text_model." + name.removeprefix("text_model.")] = value
    if second is not None:
        tensors |= open_clip(second, f"conditioner.embedders.{int(pipe.text_encoder is not None)}.model.")
    return {name: value.contiguous() for name, value in tensors.items()}


def _unet_name(name: str, layers: int, plain: list[int]) -> str:
    heads = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    heads |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    heads |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    for new, old in heads.items():
        if name.startswith(new + "."):
            return name.replace(new, old)
    where, rest = _unet_place(name, layers, plain)
    if "resnets" in name:
        for new, old in _RESNET:
            rest = re.sub(rf"^{new}\.", f"{old}.", rest)
    return f"{where}.{rest}"


def _unet_place(name: str, layers: int, plain: list[int]) -> tuple[str, str]:
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
    # in a block without attention the upsampler comes one place earlier
    return f"output_blocks.{block * (layers + 1) + layers}.{1 if block in plain else 2}", match[2]


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


_OPEN_CLIP = [
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers", "transformer.resblocks"),
    ("final_layer_norm", "ln_final"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
]


def open_clip(encoder: Any, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a CLIP's text encoder under the names of OpenCLIP, queries, keys and values in one."""
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    tensors = {}
    for name, value in state.items():
        if "self_attn.q_proj" in name:
            parts = torch.cat([state[name.replace("q_proj", f"{each}_proj")] for each in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
            value = parts
        elif ".k_proj" in name or ".v_proj" in name:
            continue
        elif name == "text_projection.weight":
            name, value = "text_projection", value.T
        for new, old in _OPEN_CLIP:
            name = name.replace(new, old)
        tensors[prefix + name] = value
    return tensors
