"""The configuration of a transformer, read off the names and shapes of its tensors: how many layers, how wide.

What no shape says is the default of the library's class, which is that of the released model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


def derived(kind: str, shapes: Shapes) -> dict[str, Any]:
    """Settings of the transformer in a file of this ``kind``, by the shapes of its tensors without prefix; those whose
    tensor is not there are left out."""
    rule = _RULES.get(kind)
    read = {} if rule is None else rule(shapes)
    return {name: value for name, value in read.items() if value or value is False}


def _count(shapes: Shapes, blocks: str) -> int:
    """How many blocks of this name there are."""
    places = {name.split(".")[1] for name in shapes if name.startswith(f"{blocks}.")}
    return len(places)


def _rows(shapes: Shapes, name: str) -> int:
    return shapes[name][0] if shapes.get(name) else 0


def _columns(shapes: Shapes, name: str) -> int:
    return shapes[name][1] if len(shapes.get(name, ())) > 1 else 0


def _heads(shapes: Shapes, width: str, norm: str) -> dict[str, Any]:
    """Heads and their width, by the width of all and the norm of one head's queries."""
    each = _rows(shapes, norm)
    return {"num_attention_heads": _rows(shapes, width) // each, "attention_head_dim": each} if each else {}


def _flux2(shapes: Shapes) -> dict[str, Any]:
    return {
        "num_layers": _count(shapes, "double_blocks"),
        "num_single_layers": _count(shapes, "single_blocks"),
        "in_channels": _columns(shapes, "img_in.weight"),
        "joint_attention_dim": _columns(shapes, "txt_in.weight"),
        **_heads(shapes, "img_in.weight", "double_blocks.0.img_attn.norm.query_norm.scale"),
    }


def _flux2_klein(shapes: Shapes) -> dict[str, Any]:
    return {**_flux2(shapes), "guidance_embeds": False}


def _flux(shapes: Shapes) -> dict[str, Any]:
    found = {name: value for name, value in _flux2(shapes).items() if name != "in_channels"}
    return {**found, "pooled_projection_dim": _columns(shapes, "vector_in.in_layer.weight")}


def _qwen(shapes: Shapes) -> dict[str, Any]:
    return {
        "num_layers": _count(shapes, "transformer_blocks"),
        "in_channels": _columns(shapes, "img_in.weight"),
        "joint_attention_dim": _columns(shapes, "txt_in.weight"),
        "out_channels": _rows(shapes, "proj_out.weight") // 4,  # of patches of 2 x 2
        **_heads(shapes, "img_in.weight", "transformer_blocks.0.attn.norm_q.weight"),
    }


def _z_image(shapes: Shapes) -> dict[str, Any]:
    width, head = _rows(shapes, "x_embedder.weight"), _rows(shapes, "layers.0.attention.q_norm.weight")
    heads = {"n_heads": width // head, "n_kv_heads": width // head} if head else {}
    return {
        "n_layers": _count(shapes, "layers"),
        "n_refiner_layers": _count(shapes, "noise_refiner"),
        "dim": width,
        "cap_feat_dim": _columns(shapes, "cap_embedder.1.weight"),
        **heads,
    }


def _wan(shapes: Shapes) -> dict[str, Any]:
    width = _rows(shapes, "patch_embedding.weight")
    return {
        "num_layers": _count(shapes, "blocks"),
        "num_attention_heads": width // 128,
        "in_channels": _columns(shapes, "patch_embedding.weight"),
        "out_channels": _rows(shapes, "head.head.weight") // 4,
        "ffn_dim": _rows(shapes, "blocks.0.ffn.0.weight"),
        "text_dim": _columns(shapes, "text_embedding.0.weight"),
    }


def _ltx(shapes: Shapes) -> dict[str, Any]:
    width = _rows(shapes, "patchify_proj.weight")
    return {
        "num_layers": _count(shapes, "transformer_blocks"),
        "attention_head_dim": width // 32,  # every release has 32 heads
        "cross_attention_dim": width,
        "caption_channels": _columns(shapes, "caption_projection.linear_1.weight"),
    }


def _hunyuan(shapes: Shapes) -> dict[str, Any]:
    return {
        "num_layers": _count(shapes, "double_blocks"),
        "num_single_layers": _count(shapes, "single_blocks"),
        "in_channels": _columns(shapes, "img_in.proj.weight"),
        "guidance_embeds": any(name.startswith("guidance_in.") for name in shapes),
    }


def _auraflow(shapes: Shapes) -> dict[str, Any]:
    return {
        "num_mmdit_layers": _count(shapes, "double_layers"),
        "num_single_dit_layers": _count(shapes, "single_layers"),
        "pos_embed_max_size": _columns(shapes, "positional_encoding"),
    }


def _sana(shapes: Shapes) -> dict[str, Any]:
    width = _rows(shapes, "x_embedder.proj.weight")
    crosses = {2240: 20, 1152: 16}.get(width, 0)  # of the releases of 1.6 and 0.6 billion
    return {
        "num_layers": _count(shapes, "blocks"),
        "num_attention_heads": width // 32,
        "cross_attention_dim": width,
        "num_cross_attention_heads": crosses,
        "cross_attention_head_dim": width // crosses if crosses else 0,
        "caption_channels": _columns(shapes, "y_embedder.y_proj.fc1.weight"),
    }


def _hidream(shapes: Shapes) -> dict[str, Any]:
    singles, doubles = _count(shapes, "single_stream_blocks"), _count(shapes, "double_stream_blocks")
    return {
        "num_layers": doubles,
        "num_single_layers": singles,
        "patch_size": 2,
        "out_channels": 16,
        "in_channels": 16,
        "caption_channels": [4096, 4096],
        "axes_dims_rope": [64, 32, 32],
        "max_resolution": [128, 128],
        # a state of every one of Llama's 32 layers, the last for all further blocks
        "llama_layers": [min(layer, 31) for layer in range(singles + doubles)],
    }


_RULES: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "flux2": _flux2,
    "flux2-klein": _flux2_klein,
    "flux-dev": _flux,
    "flux-schnell": _flux,
    "flux-fill": _flux,
    "qwen-image": _qwen,
    "z-image": _z_image,
    "wan": _wan,
    "ltx": _ltx,
    "hunyuan-video": _hunyuan,
    "auraflow": _auraflow,
    "sana": _sana,
    "hidream": _hidream,
}
