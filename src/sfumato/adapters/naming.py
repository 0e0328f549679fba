"""Names of modules: how files of every dialect spell them, and where they lie in a model.

A file's key is taken apart into the network it belongs to, the module's name and the tensor's part in the adapter
(:func:`read_key`); names are compared with ``_`` in place of ``.``, as kohya's trainer writes them. A model's modules
are known under their diffusers path and under the names of the code that the checkpoint was first published with
(:func:`places`): LDM's for U-Nets, those of the reference implementations for SD3 and Flux. Where such a module holds
several of diffusers' (a fused query-key-value projection), each takes its rows of the file's tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DENOISER",
    "LDM",
    "FileKey",
    "Index",
    "Place",
    "parameters_of_ldm",
    "places",
    "published",
    "read_key",
    "word_beside",
]

DENOISER = "denoiser"
LDM = "model.diffusion_model."  # before the names of a U-Net in files of the original code

Index = Mapping[str, Mapping[str, tuple[int, ...]]]
"""A model in names: component -> path of a module -> shape of its weight."""


@dataclass(frozen=True)
class Place:
    """Where a file's module lies in a model. ``rows``: the stretches of its output rows that this one takes, in order;
    empty: all of them."""

    component: str
    path: str
    rows: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"


@dataclass(frozen=True)
class FileKey:
    """``network``: :data:`DENOISER`, ``text_encoder`` (``_2``, ``_3``), or empty where the file does not say; ``name``
    of the module with ``_`` for ``.``; ``part`` of the adapter, such as ``down``; ``dialect`` of the spelling."""

    network: str
    name: str
    part: str
    dialect: str


_NETWORKS = (
    ("lora_unet_", DENOISER, "kohya"),
    ("lora_transformer_", DENOISER, "kohya"),
    ("lora_te1_", "text_encoder", "kohya"),
    ("lora_te2_", "text_encoder_2", "kohya"),
    ("lora_te3_", "text_encoder_3", "kohya"),
    ("lora_te_", "text_encoder", "kohya"),
    ("lycoris_", DENOISER, "LyCORIS"),
    (LDM, DENOISER, "ComfyUI"),
    ("diffusion_model.", DENOISER, "ComfyUI"),
    ("base_model.model.", "", "PEFT"),
    ("unet.", DENOISER, "diffusers"),
    ("transformer.", DENOISER, "diffusers"),
    ("text_encoder_2.", "text_encoder_2", "diffusers"),
    ("text_encoder_3.", "text_encoder_3", "diffusers"),
    ("text_encoder.", "text_encoder", "diffusers"),
)
# the end of a key -> the tensor's part in the adapter, and what the spelling tells of the dialect
_PARTS = (
    (r"\.lora_A(?:\.\w+)?\.weight", "down", ""),
    (r"\.lora_B(?:\.\w+)?\.weight", "up", ""),
    (r"\.lora_B(?:\.\w+)?\.bias", "up_bias", ""),
    (r"\.lora_down\.weight", "down", ""),
    (r"\.lora_up\.weight", "up", ""),
    (r"\.lora_mid\.weight", "mid", ""),
    (r"\.lora_linear_layer\.down\.weight", "down", "old diffusers"),
    (r"\.lora_linear_layer\.up\.weight", "up", "old diffusers"),
    (r"[._]lora\.down\.weight", "down", "old diffusers"),
    (r"[._]lora\.up\.weight", "up", "old diffusers"),
    (r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?", "magnitude", ""),
    (r"\.dora_scale", "magnitude", ""),
    (r"\.alpha", "alpha", ""),
    (r"\.weight\.v", "down", "Custom Diffusion"),
    (r"\.weight\.u", "up", "Custom Diffusion"),
    (r"\.(hada_(?:w[12]_[ab]|t[12]))(?:\.\w+)?", "", ""),
    (r"\.(lokr_(?:w[12](?:_[ab])?|t2))(?:\.\w+)?", "", ""),
    (r"\.(diff_b|diff)", "", ""),
    (r"\.([ab][12])\.weight", "glora", ""),
    (r"\.(oft_\w+)", "oft", ""),
    (r"\.(on_input)", "ia3", ""),
)
_PART = [(re.compile(f"(?P<name>.+?){end}$"), part, dialect) for end, part, dialect in _PARTS]


def read_key(key: str) -> FileKey | None:
    """A key of an adapter file taken apart, or None for one that is no part of a low-rank adapter."""
    for pattern, fixed, spelling in _PART:
        if match := pattern.match(key):
            part, dialect = fixed or match[2], spelling
            break
    else:
        return None
    name, network = match["name"], ""
    for prefix, which, spelling in _NETWORKS:
        if name.startswith(prefix):
            name, network, dialect = name[len(prefix) :], which, dialect or spelling
            break
    if dialect == "PEFT":  # its own prefix may stand before that of a network
        for prefix, which, _ in _NETWORKS:
            if which and name.startswith(prefix):
                name, network = name[len(prefix) :], which
                break
    return FileKey(network, _plain(name), part, dialect or "PEFT")


_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def _plain(name: str) -> str:
    """A module's name with ``_`` for ``.`` and without what only some versions of the libraries put into it."""
    name = name.replace(".processor", "").replace(".", "_").removeprefix("text_model_")
    if "_temporal_transformer_" in name:  # AnimateDiff's own code
        name = name.replace("_temporal_transformer_", "_")
        name = name.replace("_attention_blocks_0_", "_attn1_").replace("_attention_blocks_1_", "_attn2_")
    stem, _, last = name.rpartition("self_attn_")
    if stem and last in _OLD_TEXT:
        return f"{stem}self_attn_{_OLD_TEXT[last]}"
    return f"{name}_0" if name.endswith("_to_out") else name


def places(index: Index) -> dict[tuple[str, str], list[Place]]:
    """(network, name) -> where it lies, for every name under which a file may know a module of the model. A name that
    diffusers itself uses goes before one of the original code."""
    found: dict[tuple[str, str], list[Place]] = {}
    for component, shapes in index.items():
        network = component if component.startswith("text_encoder") else DENOISER
        for path in shapes:
            found[network, _plain(path)] = [Place(component, path)]
    for component, shapes in index.items():
        if component.startswith("text_encoder"):
            continue
        for name, several in published(shapes):
            there = [(path, rows) for path, rows in several if path in shapes]
            if there:
                found.setdefault((DENOISER, _plain(name)), [Place(component, path, rows) for path, rows in there])
    if "text_encoder_3" not in index and "text_encoder_2" in index:  # Flux: kohya's third is its T5
        also = {("text_encoder_3", name): at for (network, name), at in found.items() if network == "text_encoder_2"}
        found |= {key: at for key, at in also.items() if key not in found}
    return found


def parameters_of_ldm(keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Keys of whole parameters in the names of LDM -> in those of diffusers, as far as ``shapes`` (paths of the
    denoiser) has them."""
    names = {old: at[0][0] for old, at in published(shapes) if len(at) == 1 and not at[0][1]}
    out = {}
    for key in keys:
        name, _, end = key.removeprefix(LDM).rpartition(".")
        if key.startswith(LDM) and name in names:
            out[key] = f"{names[name]}.{end}"
    return out


Rows = tuple[tuple[int, int], ...]
Named = Iterator[tuple[str, list[tuple[str, Rows]]]]


def published(shapes: Mapping[str, tuple[int, ...]]) -> Named:
    """Names of the original code, each with the paths and rows of diffusers that it stands for."""
    if any(path.startswith("single_transformer_blocks.") for path in shapes):
        yield from _flux(shapes)
    elif "transformer_blocks.0.attn.add_k_proj" in shapes:
        yield from _sd3(shapes)
    elif any(path.startswith("down_blocks.") for path in shapes):
        yield from _ldm(shapes)


# --- U-Nets: Rombach et al.'s code (LDM, and "sgm" for SDXL) -----------------------------------------------------

_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_IN_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def _ldm(shapes: Mapping[str, tuple[int, ...]]) -> Named:
    layers = 1 + max((int(found[4]) for path in shapes if (found := _IN_BLOCK.match(path)) and found[1] == "down"
                      and found[3] == "resnets"), default=0)  # fmt: skip
    attending = {found[2] for path in shapes if (found := _IN_BLOCK.match(path)) and found[1] == "up"
                 and found[3] == "attentions"}  # fmt: skip
    for path in shapes:
        name = _OUTSIDE.get(path)
        if found := _IN_MIDDLE.match(path):
            at = 1 if found[1] == "attentions" else 2 * int(found[2])
            name = f"middle_block.{at}.{_RESNET.get(found[3], found[3])}"
        elif found := _IN_BLOCK.match(path):
            block, kind, j, rest = int(found[2]), found[3], int(found[4]), found[5]
            first = block * (layers + 1) + (found[1] == "down")
            side = "input_blocks" if found[1] == "down" else "output_blocks"
            if kind == "downsamplers":
                name = f"{side}.{first + layers}.0.op"
            elif kind == "upsamplers":
                name = f"{side}.{first + layers}.{2 if found[2] in attending else 1}.conv"
            else:
                name = f"{side}.{first + j}.{int(kind == 'attentions')}.{_RESNET.get(rest, rest)}"
        if name is not None:
            yield name, [(path, ())]


# --- transformers: the reference implementations -----------------------------------------------------------------


def _fused(shapes: Mapping[str, tuple[int, ...]], paths: list[str]) -> list[tuple[str, Rows]]:
    """The modules that a fused projection holds, one below the other."""
    out: list[tuple[str, Rows]] = []
    start = 0
    for path in paths:
        height = shapes.get(path, (0,))[0]
        out.append((path, ((start, start + height),)))
        start += height
    return out


def _swapped(shapes: Mapping[str, tuple[int, ...]], path: str) -> list[tuple[str, Rows]]:
    """Scale and shift of the last modulation stand in the other order in diffusers."""
    half = shapes.get(path, (0,))[0] // 2
    return [(path, ((half, 2 * half), (0, half)))]


def _count(shapes: Mapping[str, tuple[int, ...]], start: str) -> int:
    return 1 + max((int(path.split(".")[1]) for path in shapes if path.startswith(f"{start}.")), default=-1)


def _flux(shapes: Mapping[str, tuple[int, ...]]) -> Named:
    for i in range(_count(shapes, "transformer_blocks")):
        new, old = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for side, attention, out, ff, norm in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
        ):
            yield f"{old}.{side}_attn.qkv", _fused(shapes, [f"{new}.attn.{each}" for each in attention])
            yield f"{old}.{side}_attn.proj", [(f"{new}.attn.{out}", ())]
            yield f"{old}.{side}_mlp.0", [(f"{new}.{ff}.net.0.proj", ())]
            yield f"{old}.{side}_mlp.2", [(f"{new}.{ff}.net.2", ())]
            yield f"{old}.{side}_mod.lin", [(f"{new}.{norm}.linear", ())]
    for i in range(_count(shapes, "single_transformer_blocks")):
        new, old = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        parts = [f"{new}.attn.to_q", f"{new}.attn.to_k", f"{new}.attn.to_v", f"{new}.proj_mlp"]
        yield f"{old}.linear1", _fused(shapes, parts)
        yield f"{old}.linear2", [(f"{new}.proj_out", ())]
        yield f"{old}.modulation.lin", [(f"{new}.norm.linear", ())]
    yield from _ends(shapes, {"img_in": "x_embedder", "txt_in": "context_embedder"})
    for old, new in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        for layer, number in (("in_layer", 1), ("out_layer", 2)):
            yield f"{old}.{layer}", [(f"time_text_embed.{new}_embedder.linear_{number}", ())]


def _sd3(shapes: Mapping[str, tuple[int, ...]]) -> Named:
    blocks = _count(shapes, "transformer_blocks")
    for i in range(blocks):
        new, old = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        for side, attention, out, ff, norm in (
            ("x_block", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
            ("context_block", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
        ):
            yield f"{old}.{side}.attn.qkv", _fused(shapes, [f"{new}.attn.{each}" for each in attention])
            yield f"{old}.{side}.attn.proj", [(f"{new}.attn.{out}", ())]
            yield f"{old}.{side}.mlp.fc1", [(f"{new}.{ff}.net.0.proj", ())]
            yield f"{old}.{side}.mlp.fc2", [(f"{new}.{ff}.net.2", ())]
            path = f"{new}.{norm}.linear"
            last = side == "context_block" and i == blocks - 1
            yield f"{old}.{side}.adaLN_modulation.1", _swapped(shapes, path) if last else [(path, ())]
        yield f"{old}.x_block.attn2.qkv", _fused(shapes, [f"{new}.attn2.{each}" for each in ("to_q", "to_k", "to_v")])
        yield f"{old}.x_block.attn2.proj", [(f"{new}.attn2.to_out.0", ())]
    yield from _ends(shapes, {"x_embedder.proj": "pos_embed.proj"})
    for old, new in (("t_embedder", "timestep"), ("y_embedder", "text")):
        for layer, number in ((0, 1), (2, 2)):
            yield f"{old}.mlp.{layer}", [(f"time_text_embed.{new}_embedder.linear_{number}", ())]


def _ends(shapes: Mapping[str, tuple[int, ...]], more: Mapping[str, str]) -> Named:
    for old, new in {**more, "final_layer.linear": "proj_out"}.items():
        yield old, [(new, ())]
    yield "final_layer.adaLN_modulation.1", _swapped(shapes, "norm_out.linear")


def word_beside(path: Path, number: int = 1) -> Path:
    """Where the first, second ... word lies that was learnt together with the weights in ``path``."""
    return path.with_stem(f"{path.stem}-word{number if number > 1 else ''}")
