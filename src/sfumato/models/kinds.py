"""What a single ``.safetensors`` file is, from the names and shapes in its header alone; no tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfumato.models.derived import derived
from sfumato.models.weights import TensorEntry

#: how checkpoints of transformers name the denoiser's tensors, beside naming them plainly
_DENOISER = "model.diffusion_model."
_DENOISERS = (_DENOISER, "diffusion_model.", "net.")


@dataclass(frozen=True)
class FileKind:
    """A kind of file. ``name``: of a model, a key of the shipped architectures where there is one. ``family``: the name
    of the family that serves it, empty where none does. ``parts``: the components that the file holds. ``advice``: what
    to do with a file that is no model. ``settings``: of its transformer, as its shapes tell them."""

    name: str
    title: str
    family: str = ""
    parts: frozenset[str] = frozenset()
    advice: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def serves(self, family: str) -> bool:
        """Whether such a file is a model of ``family``: its own, or one whose denoiser has the same tensors."""
        return bool(self.family) and family in (self.family, *_ALIKE.get(self.family, ()))

    @property
    def refusal(self) -> str:
        """Why it cannot be loaded as a model, and what to do instead; empty for a model."""
        return "" if self.family else f"is {self.title}; {self.advice}"


def kind_of_file(entries: Sequence[TensorEntry]) -> FileKind:
    """The kind of a file with these tensors."""
    shapes = {entry.name: entry.shape for entry in entries}
    for detect in (_quantized, _adapter, _part, _unet, _transformer):
        found = detect(shapes)
        if found is not None:
            return found
    return FileKind(
        "unknown",
        "no kind of file that is known",
        advice=f"its first tensor is {min(shapes, default='none')!r}. Give a checkpoint, or the folder of a diffusers "
        "model.",
    )


# --- what is no model ------------------------------------------------------------------------------------------------

_LORA = re.compile(
    r"\.(lora_(up|down|A|B|linear_layer)\b|lora\.(up|down)|hada_w\d|lokr_w\d|oft_|dora_scale|diff(_b)?$)|^lora_(unet|te)|_lora\."
)
_MORE = {
    "vae": "put it into the folder of a model as its vae/, with its config.json.",
    "text encoder": "it belongs into the folder of a model, as its text_encoder/.",
}


def _quantized(shapes: Mapping[str, Any]) -> FileKind | None:
    marks = (".quant_state.", ".weight_scale", ".scale_weight", ".absmax", ".comfy_quant", ".qweight")
    if "scaled_fp8" in shapes or any(mark in name for name in shapes for mark in marks):
        advice = "only whole weights are read: get the file in bf16, fp16 or fp32."
        return FileKind("quantized", "a quantized checkpoint", advice=advice)
    return None


def _adapter(shapes: Mapping[str, Any]) -> FileKind | None:
    names = list(shapes)
    if any(_LORA.search(name) for name in names):
        return FileKind(
            "lora", "a LoRA or another adapter", advice="load its base model and attach it: --with lora:file=FILE."
        )
    if names and _is_word(shapes):
        return FileKind(
            "embedding", "a textual inversion", advice="load its base model and attach it: --with word:file=FILE."
        )
    control = (
        "control_model.",
        "controlnet_",
        "control_",
        "input_hint_block.",
        "adapter.",
        "control_layers.",
        "lllite_",
    )
    if any(name.startswith(control) for name in names):
        advice = "none is attached by sfumato; guide with paint_with_words or shape_guided."
        return FileKind("controlnet", "a ControlNet", advice=advice)
    if any(name.startswith(("image_proj.", "ip_adapter.")) for name in names):
        return FileKind(
            "ip-adapter", "an IP-Adapter", advice="none is attached by sfumato; begin from a picture with --image."
        )
    if any("motion_modules." in name for name in names) and not any(name.startswith(_DENOISER) for name in names):
        return FileKind("motion", "a motion module of AnimateDiff",
                        advice="load an AnimateDiff folder that holds it as motion_adapter/.")  # fmt: skip
    if any(".rdb1." in name or ".RDB1." in name for name in names) or "params_ema" in shapes:
        return FileKind("upscaler", "an upscaler", advice="it enlarges pictures and draws none.")
    return None


def _is_word(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    if {"emb_params", "string_to_param"} & set(shapes) or any(name.startswith("string_to_param.") for name in shapes):
        return True
    widths = {768, 1024, 1280, 2048, 4096}
    encoders = set(shapes) <= {"clip_l", "clip_g", "clip_h", "t5xxl", "t5", "text_encoders_0", "text_encoders_1"}
    small = all(len(shape) in (1, 2) and (len(shape) == 1 or shape[0] <= 128) for shape in shapes.values())
    alone = len(shapes) <= 2 and all(shape and shape[-1] in widths for shape in shapes.values())
    return small and (encoders or (alone and not any("." in name for name in shapes)))


def _part(shapes: Mapping[str, tuple[int, ...]]) -> FileKind | None:
    """One part of a model, in the layout of a library or of the original release."""

    def all_begin(*starts: str) -> bool:
        return bool(shapes) and all(name.startswith(starts) for name in shapes)

    t5 = any(".layer.0.SelfAttention" in name for name in shapes)
    if (
        all_begin("first_stage_model.", "vae.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "bn.")
        and not t5
    ):
        return FileKind("vae", "an autoencoder (VAE)", advice=_MORE["vae"])
    inside = r"(encoder|decoder)\.(conv_in|layers\.0|down\.0|mid\.|middle\.|downsamples|upsamples)"
    small = all(re.match(r"\d+\.(conv\.|skip|weight|bias)", name) for name in shapes)  # TAESD as released
    if shapes and (small or any(re.match(inside, name) for name in shapes)):
        return FileKind("vae", "an autoencoder (VAE)", advice=_MORE["vae"])
    if any(name.startswith(("vision_model.", "visual.", "vision_tower.")) for name in shapes):
        return FileKind(
            "clip",
            "a CLIP or another encoder of pictures",
            advice="load its folder as a reader: sfumato.models.readers.",
        )
    text = r"(text_model|encoder\.block\.0|model\.layers\.0|transformer\.resblocks|shared\.weight|text_projection)"
    if any(re.match(text, name) for name in shapes) and not any(name.startswith(_DENOISERS) for name in shapes):
        return FileKind("text encoder", "a text encoder", advice=_MORE["text encoder"])
    if "conv_in.weight" in shapes and any(name.startswith("down_blocks.0.") for name in shapes):
        return FileKind("part", "the U-Net of a diffusers folder", advice="give the folder of the whole model.")
    diffusers = r"(single_)?transformer_blocks\.0\.(attn|attn1|norm1|ff)\.|joint_transformer_blocks\.0\."
    if any(re.match(diffusers, name) for name in shapes) and not any(name.startswith(_DENOISERS) for name in shapes):
        if any(re.match(r"patchify_proj|transformer_blocks\.0\.img_mod", name) for name in shapes):
            return None  # LTX-Video and Qwen-Image are released under the names of diffusers
        return FileKind("part", "the transformer of a diffusers folder", advice="give the folder of the whole model.")
    return None


# --- models ----------------------------------------------------------------------------------------------------------


def _held(shapes: Mapping[str, Any], denoiser: str, **starts: tuple[str, ...]) -> frozenset[str]:
    found = {part for part, prefixes in starts.items() if any(name.startswith(prefixes) for name in shapes)}
    return frozenset(found | {denoiser})


def _unet(shapes: Mapping[str, tuple[int, ...]]) -> FileKind | None:
    """The U-Nets of Stability AI's layout."""
    places = [p for p in (*_DENOISERS, "") if any(name.startswith(f"{p}input_blocks.") for name in shapes)]
    if not places:
        return None
    first = shapes.get(f"{places[0]}input_blocks.0.0.weight", ())
    crosses = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2]
    width, channels = (crosses[0] if crosses else 0), (first[1] if len(first) == 4 else 4)
    parts = _held(
        shapes, "unet", vae=("first_stage_model.",),
        text_encoder=("cond_stage_model.", "conditioner.embedders.0."), text_encoder_2=("conditioner.embedders.1.",),
    )  # fmt: skip
    if any(".label_emb." in name or name.startswith("label_emb.") for name in shapes):
        if any(name.startswith("conditioner.embedders.0.model.") for name in shapes) or width == 1280:
            encoder = ("conditioner.embedders.0.",)
            parts = _held(shapes, "unet", vae=("first_stage_model.",), text_encoder_2=encoder)
            return FileKind("sdxl-refiner", "the SDXL refiner", "sdxl_refiner", parts)
        name, title = ("sdxl", "an SDXL checkpoint")
        if any(each.startswith("edm_vpred.") for each in shapes):
            name, title = "cosxl", "a CosXL checkpoint"
        elif "edm_mean" in shapes:
            name, title = "playground", "a Playground v2.5 checkpoint"
        return _with_channels(FileKind(name, title, "sdxl", parts), channels)
    second = any(name.startswith("cond_stage_model.model.") for name in shapes) or width == 1024
    name, title = ("sd2", "a Stable Diffusion 2 checkpoint") if second else ("sd1", "a Stable Diffusion 1 checkpoint")
    return _with_channels(FileKind(name, title, "sd", parts), channels)


def _with_channels(kind: FileKind, channels: int) -> FileKind:
    """U-Nets that read more than the latents."""
    if channels == 9 and kind.name in ("sd1", "sd2"):
        title = kind.title.replace("checkpoint", "inpainting checkpoint")
        return FileKind(f"{kind.name}-inpaint", title, "sd_inpaint", kind.parts)
    other = {
        5: "that reads a depth map", 7: "that enlarges pictures", 8: "that edits by instruction (InstructPix2Pix)",
        9: "for inpainting",
    }.get(channels)  # fmt: skip
    if other is None:
        return kind
    advice = "no family of sfumato feeds it; load a text-to-image checkpoint, with which blend redraws regions."
    return FileKind(f"{kind.name}-other", f"{kind.title} {other}", advice=advice)


#: family -> others that no tensor tells apart from it
_ALIKE = {"flux": ("flux-kontext",), "qwenimage": ("qwenimage-edit", "qwenimage-edit-plus")}
_NO_FAMILY = "no family of sfumato serves it: see sfumato methods."
#: family -> text encoders by the prefixes of their tensors, where a checkpoint holds them too
_ENCODERS: dict[str, dict[str, tuple[str, ...]]] = {
    "sd3": {
        "text_encoder": ("text_encoders.clip_l.",), "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    },
    "flux": {"text_encoder": ("text_encoders.clip_l.",), "text_encoder_2": ("text_encoders.t5xxl.",)},
    "chroma": {"text_encoder": ("text_encoders.t5xxl.",)},
}  # fmt: skip
#: name, title, family (empty: none serves it), and a pattern that one of the denoiser's tensors must match
_TRANSFORMERS = (
    ("sd3", "a Stable Diffusion 3 checkpoint", "sd3", r"joint_blocks\.0\."),
    ("flux2", "a Flux.2 [dev] checkpoint", "flux2", r"(single|double)_stream_modulation"),
    ("flux3", "a Flux.3 checkpoint", "", r"early_stream_modulations\."),
    ("chroma", "a Chroma checkpoint", "chroma", r"distilled_guidance_layer\."),
    ("hunyuan-video", "a HunyuanVideo checkpoint", "hunyuan_video", r"txt_in\.individual_token_refiner"),
    ("flux", "a Flux.1 checkpoint", "flux", r"double_blocks\.0\.img_"),
    ("auraflow", "an AuraFlow checkpoint", "auraflow", r"double_layers\.0\.attn\.w1q"),
    ("qwen-image", "a Qwen-Image checkpoint", "qwenimage", r"transformer_blocks\.0\.img_mod"),
    ("ltx", "an LTX-Video checkpoint", "ltx", r"(patchify_proj|(transformer_blocks\.0\.)?scale_shift_table)"),
    ("wan", "a Wan checkpoint", "wan", r"(head\.modulation|blocks\.0\.self_attn\.norm_q)"),
    ("mochi", "Mochi", "", r"blocks\.0\.attn\.qkv_x"),
    ("z-image", "a Z-Image checkpoint", "z_image", r"layers\.0\.adaLN_modulation\.0\.weight"),
    ("lumina2", "a Lumina 2 checkpoint", "lumina2", r"cap_embedder\.0\."),
    ("hidream", "a HiDream-I1 checkpoint", "hidream", r"double_stream_blocks\.0\."),
    ("cosmos", "Cosmos", "", r"x_embedder\.proj\.1\."),
    ("sana", "a Sana checkpoint", "sana", r"blocks\.0\.cross_attn\.kv_linear"),
    ("cascade", "Stable Cascade", "", r"(clip_txt_mapper|down_blocks\.\d+\.\d+\.channelwise)"),
    ("hunyuan-dit", "Hunyuan-DiT", "", r"blocks\.0\.attn1\.Wqkv"),
)  # fmt: skip


#: variants that are families of their own
_OWN = {"flux2-klein": "a Flux.2 [klein] checkpoint", "flux-fill": "a Flux.1 Fill checkpoint"}


def _transformer(shapes: Mapping[str, tuple[int, ...]]) -> FileKind | None:
    plain: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        prefix = next((p for p in _DENOISERS if name.startswith(p)), "")
        plain[name.removeprefix(prefix)] = shape
    for name, title, family, pattern in _TRANSFORMERS:
        if not any(re.match(pattern, each) for each in plain):
            continue
        if not family:
            return FileKind(name, title, advice=_NO_FAMILY)
        if name == "sana" and "y_embedder.y_embedding" in plain and "attention_y_norm.weight" not in plain:
            advice = "no library reads such files; give the folder of the diffusers model."
            return FileKind("pixart", "a PixArt checkpoint", advice=advice)
        name = _variant(name, plain)
        if name in _OWN:
            title, family = _OWN[name], name
        encoders = _ENCODERS.get(family, {})
        parts = _held(shapes, "transformer", vae=("first_stage_model.", "vae."), **encoders)
        if name.startswith("flux-") and plain.get("img_in.weight", (0, 64))[-1] == 128:
            advice = "no family of sfumato feeds it; load Flux.1 [dev], which begins from a picture with --image."
            return FileKind("flux-other", "a Flux.1 tool that reads edges or depths", advice=advice)
        return FileKind(name, title, family, parts, settings=derived(name, plain))
    return None


def _variant(name: str, plain: Mapping[str, tuple[int, ...]]) -> str:
    if name == "flux2":
        return "flux2" if any(each.startswith("guidance_in.") for each in plain) else "flux2-klein"
    if name == "flux" and plain.get("img_in.weight", (0, 64))[-1] == 384:
        return "flux-fill"
    if name == "flux":
        return "flux-dev" if any(each.startswith("guidance_in.") for each in plain) else "flux-schnell"
    if name == "sd3":
        if any(".x_block.attn2." in each for each in plain):
            return "sd35-medium"
        if any(".ln_k." in each or ".ln_q." in each for each in plain):
            return "sd35-large"
    return name
