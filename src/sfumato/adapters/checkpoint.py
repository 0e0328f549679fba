"""A whole model as one file in the names of the code that it was first published with, which webui, ComfyUI and
``from_single_file`` of diffusers read: Stable Diffusion 1 and 2 (LDM) and SDXL (SGM).

The U-Net's names are those of :mod:`sfumato.adapters.naming`; the autoencoder's and OpenCLIP's are written out here.
Where a name stands for several modules of ours (OpenCLIP's query-key-value), they are put below each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor
from torch import cat as joined

from sfumato import files
from sfumato.adapters.metadata import architecture
from sfumato.adapters.naming import published
from sfumato.errors import BadInput, NotSupported
from sfumato.models import Model

__all__ = ["save_checkpoint", "single_file"]


def save_checkpoint(model: Model, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes :func:`single_file`. Raises BadInput for another ending than .safetensors or a file that exists."""
    path = Path(path)
    if path.suffix != ".safetensors" or path.exists():
        raise BadInput(f"{path} exists or does not end in .safetensors; name a new file.")
    return files.save_tensors(path, single_file(model), dict(metadata or {}) or None)


def single_file(model: Model) -> dict[str, Tensor]:
    """The model's tensors as they are now, under their published names. Raises NotSupported for other families."""
    family = architecture(model)
    if family not in ("sd", "sd2", "sdxl"):
        raise NotSupported(f"{model.name} is {family}: single files are written for Stable Diffusion 1, 2 and XL.")
    parts = model.modules
    out = _named(parts["unet"].state_dict(), _unet_names(parts["unet"].state_dict()), "model.diffusion_model.")
    out |= _vae(parts["vae"].state_dict())
    texts = {name: part.state_dict() for name, part in parts.items() if name.startswith("text_encoder")}
    if family == "sdxl":
        out |= _clip(texts["text_encoder"], "conditioner.embedders.0.transformer.")
        out |= _open_clip(texts["text_encoder_2"], "conditioner.embedders.1.model.")
    elif family == "sd2":
        out |= _open_clip(texts["text_encoder"], "cond_stage_model.model.")
    else:
        out |= _clip(texts["text_encoder"], "cond_stage_model.transformer.")
    return {key: tensor.detach().cpu().contiguous() for key, tensor in out.items()}


def _named(state: Mapping[str, Tensor], name: Callable[[str], str], prefix: str) -> dict[str, Tensor]:
    out = {}
    for key, tensor in state.items():
        path, dot, end = key.rpartition(".")
        out[f"{prefix}{name(path)}{dot}{end}"] = tensor
    return out


def _unet_names(state: Mapping[str, Tensor]) -> Callable[[str], str]:
    paths = dict.fromkeys((key.rpartition(".")[0] for key in state), (0, 0))
    names = {several[0][0]: name for name, several in published(paths)}

    def name(path: str) -> str:
        if path not in names:
            raise NotSupported(f"the U-Net's {path} has no name in a single file.")
        return names[path]

    return name


# --- autoencoder -----------------------------------------------------------------------------------------------------

_VAE = (
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", lambda m: "mid.attn_1"),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"down.{m[1]}.block.{m[2]}"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", lambda m: f"down.{m[1]}.downsample"),
    (r"conv_shortcut", lambda m: "nin_shortcut"),
    (r"conv_norm_out", lambda m: "norm_out"),
    (r"group_norm", lambda m: "norm"),
    (r"to_out\.0", lambda m: "proj_out"),
    (r"\bto_([qkv])\b", lambda m: m[1]),
)


def _vae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    last = max((int(m[1]) for key in state if (m := re.match(r"decoder\.up_blocks\.(\d+)", key))), default=0)
    out = {}
    for key, tensor in state.items():
        for pattern, name in _VAE:
            key = re.sub(pattern, name, key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)
        if ".attn_1." in key and tensor.ndim == 2:  # 1x1 convolutions there
            tensor = tensor[:, :, None, None]
        out[f"first_stage_model.{key}"] = tensor
    return out


# --- text encoders ---------------------------------------------------------------------------------------------------


def _clip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in state.items()}


_OPEN_CLIP = (
    ("final_layer_norm", "ln_final"),
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.", "attn."),
    ("embeddings.token_embedding", "token_embedding"),
)


def _open_clip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        key = key.removeprefix("text_model.")
        if key == "embeddings.position_embedding.weight":
            out[f"{prefix}positional_embedding"] = tensor
        elif key == "text_projection.weight":
            out[f"{prefix}text_projection"] = tensor.T
        elif "position_ids" not in key:
            for ours, theirs in _OPEN_CLIP:
                key = key.replace(ours, theirs)
            if match := re.fullmatch(r"(.+\.attn)\.([qkv])_proj\.(weight|bias)", key):
                fused.setdefault(f"{prefix}{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
            else:
                out[f"{prefix}{key}"] = tensor
    return out | {name: joined([parts[letter] for letter in "qkv"]) for name, parts in fused.items()}
