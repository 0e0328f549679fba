"""The configurations of known families, for single files, which hold weights alone. What equals the library's default
is left out; nothing heavy is imported."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: component -> (library, class, configuration)
Parts = dict[str, tuple[str, str, dict[str, Any]]]

_TRAINED = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    # said expressly, since other schedulers are made from it and have other defaults
    "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
}  # fmt: skip


def _clip(width: int, layers: int, heads: int, projection: int | None = None, act: str = "gelu") -> dict[str, Any]:
    return {
        "model_type": "clip_text_model", "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": act,
        "projection_dim": projection or 768, "vocab_size": 49408, "max_position_embeddings": 77,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip


_CLIP_L = _clip(768, 12, 12, act="quick_gelu")
_CLIP_G = _clip(1280, 32, 20, projection=1280)
_T5_XXL = {
    "model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "vocab_size": 32128, "tie_word_embeddings": False,
}  # fmt: skip


def _vae(scaling: float, size: int, **other: Any) -> dict[str, Any]:
    return {
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
        "sample_size": size, "scaling_factor": scaling, **other,
    }  # fmt: skip


def _vae16(scaling: float, shift: float) -> dict[str, Any]:
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True}
    return _vae(scaling, 1024, latent_channels=16, shift_factor=shift, **plain)


def _unet(width: int, heads: int | list[int], size: int, channels: int = 4, **other: Any) -> dict[str, Any]:
    return {
        "sample_size": size, "in_channels": channels, "cross_attention_dim": width, "attention_head_dim": heads,
        "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3], **other,
    }  # fmt: skip


def _sd1(channels: int = 4) -> Parts:
    return {
        "unet": ("diffusers", "UNet2DConditionModel", _unet(768, 8, 64, channels)),
        "vae": ("diffusers", "AutoencoderKL", _vae(0.18215, 512)),
        "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "scheduler": ("diffusers", "PNDMScheduler", _TRAINED),
    }


def _sd2(kind: str, size: int, channels: int = 4) -> Parts:
    heads = [5, 10, 20, 20]
    return {
        "unet": (
            "diffusers", "UNet2DConditionModel",
            _unet(1024, heads, size, channels, use_linear_projection=True, upcast_attention=kind == "v_prediction"),
        ),
        "vae": ("diffusers", "AutoencoderKL", _vae(0.18215, 768)),
        "text_encoder": ("transformers", "CLIPTextModel", _clip(1024, 23, 16, projection=512)),
        "tokenizer": ("transformers", "CLIPTokenizer", {"pad_token": "!"}),
        "scheduler": ("diffusers", "DDIMScheduler", {
            **_TRAINED, "prediction_type": kind,
        }),
    }  # fmt: skip


def _sdxl(**vae: Any) -> Parts:
    unet = _unet(
        2048, [5, 10, 20], 128, use_linear_projection=True, transformer_layers_per_block=[1, 2, 10],
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    unet |= {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }
    return {
        "unet": ("diffusers", "UNet2DConditionModel", unet),
        "vae": ("diffusers", "AutoencoderKL", _vae(**{"scaling": 0.13025, "size": 1024, "force_upcast": True, **vae})),
        "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", _CLIP_G),
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "tokenizer_2": ("transformers", "CLIPTokenizer", {"pad_token": "!"}),
        "scheduler": ("diffusers", "EulerDiscreteScheduler", {
            **_TRAINED, "timestep_spacing": "leading", "interpolation_type": "linear",
        }),
    }  # fmt: skip


def _sdxl_refiner() -> Parts:
    unet = _unet(
        1280, [6, 12, 24, 24], 128, use_linear_projection=True, transformer_layers_per_block=4,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2560,
    )  # fmt: skip
    unet |= {
        "block_out_channels": [384, 768, 1536, 1536],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }
    kept = ("vae", "text_encoder_2", "tokenizer_2", "scheduler")
    return {"unet": ("diffusers", "UNet2DConditionModel", unet), **{name: _sdxl()[name] for name in kept}}


def _playground() -> Parts:
    mean, std = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
    parts = _sdxl(scaling=0.5, latents_mean=mean, latents_std=std)
    settings = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "solver_order": 2}
    return {**parts, "scheduler": ("diffusers", "EDMDPMSolverMultistepScheduler", settings)}


def _cosxl() -> Parts:
    settings = {
        "sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction",
        "sigma_schedule": "exponential",
    }  # fmt: skip
    return {**_sdxl(), "scheduler": ("diffusers", "EDMEulerScheduler", settings)}


def _sd3(layers: int, positions: int, **other: Any) -> Parts:
    transformer = {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": layers,
        "attention_head_dim": 64, "num_attention_heads": layers, "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * layers, "pooled_projection_dim": 2048, "pos_embed_max_size": positions, **other,
    }  # fmt: skip
    return {
        "transformer": ("diffusers", "SD3Transformer2DModel", transformer),
        "vae": ("diffusers", "AutoencoderKL", _vae16(1.5305, 0.0609)),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection", _CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", _CLIP_G),
        "text_encoder_3": ("transformers", "T5EncoderModel", _T5_XXL),
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "tokenizer_2": ("transformers", "CLIPTokenizer", {"pad_token": "!"}),
        "tokenizer_3": ("transformers", "T5Tokenizer", {}),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    }


def _flux(guided: bool, **other: Any) -> Parts:
    transformer = {
        "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": guided,
        **other,
    }  # fmt: skip
    shifts = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guided else {"shift": 1.0}
    return {
        "transformer": ("diffusers", "FluxTransformer2DModel", transformer),
        "vae": ("diffusers", "AutoencoderKL", _vae16(0.3611, 0.1159)),
        "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("transformers", "T5EncoderModel", _T5_XXL),
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "tokenizer_2": ("transformers", "T5Tokenizer", {}),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {**shifts, **shift}),
    }


def _chroma() -> Parts:
    transformer = {
        "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "axes_dims_rope": [16, 56, 56],
        "approximator_num_channels": 64, "approximator_hidden_dim": 5120, "approximator_layers": 5,
    }  # fmt: skip
    return {
        "transformer": ("diffusers", "ChromaTransformer2DModel", transformer),
        "vae": ("diffusers", "AutoencoderKL", _vae16(0.3611, 0.1159)),
        "text_encoder": ("transformers", "T5EncoderModel", _T5_XXL),
        "tokenizer": ("transformers", "T5Tokenizer", {}),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 1.0}),
    }


def _named(encoder: str, tokenizer: str, vae: str, denoiser: str, **more: str) -> Parts:
    """Parts of a model whose released files hold the transformer alone. It has the settings that its shapes tell; the
    other parts, the schedule among them, come from a folder."""
    names = {
        "transformer": denoiser, "vae": vae, "text_encoder": encoder, "tokenizer": tokenizer,
        "scheduler": "FlowMatchEulerDiscreteScheduler", **more,
    }  # fmt: skip
    ours = ("transformer", "vae", "scheduler")
    return {part: ("diffusers" if part in ours else "transformers", cls, {}) for part, cls in names.items()}


_QWEN = "Qwen2_5_VLForConditionalGeneration"

#: kind of file -> (pipeline class, parts)
_KNOWN: dict[str, tuple[str, Parts]] = {
    "sd1": ("StableDiffusionPipeline", _sd1()),
    "sd1-inpaint": ("StableDiffusionInpaintPipeline", _sd1(9)),
    "sd2": ("StableDiffusionPipeline", _sd2("epsilon", 64)),
    "sd2-v": ("StableDiffusionPipeline", _sd2("v_prediction", 96)),
    "sd2-inpaint": ("StableDiffusionInpaintPipeline", _sd2("epsilon", 64, 9)),
    "sdxl": ("StableDiffusionXLPipeline", _sdxl()),
    "sdxl-refiner": ("StableDiffusionXLImg2ImgPipeline", _sdxl_refiner()),
    "playground": ("StableDiffusionXLPipeline", _playground()),
    "cosxl": ("StableDiffusionXLPipeline", _cosxl()),
    "sd3": ("StableDiffusion3Pipeline", _sd3(24, 192)),
    "sd35-medium": (
        "StableDiffusion3Pipeline", _sd3(24, 384, qk_norm="rms_norm", dual_attention_layers=list(range(13))),
    ),
    "sd35-large": ("StableDiffusion3Pipeline", _sd3(38, 192, qk_norm="rms_norm")),
    "flux-dev": ("FluxPipeline", _flux(True)),
    "flux-schnell": ("FluxPipeline", _flux(False)),
    "flux-fill": ("FluxFillPipeline", _flux(True, in_channels=384, out_channels=64)),
    "chroma": ("ChromaPipeline", _chroma()),
    "flux2": (
        "Flux2Pipeline",
        _named("Mistral3ForConditionalGeneration", "PixtralProcessor", "AutoencoderKLFlux2", "Flux2Transformer2DModel"),
    ),
    "flux2-klein": (
        "Flux2KleinPipeline",
        _named("Qwen3ForCausalLM", "Qwen2TokenizerFast", "AutoencoderKLFlux2", "Flux2Transformer2DModel"),
    ),
    "qwen-image": (
        "QwenImagePipeline",
        _named(_QWEN, "Qwen2Tokenizer", "AutoencoderKLQwenImage", "QwenImageTransformer2DModel"),
    ),
    "z-image": (
        "ZImagePipeline", _named("Qwen3Model", "Qwen2Tokenizer", "AutoencoderKL", "ZImageTransformer2DModel"),
    ),
    "wan": (
        "WanPipeline",
        _named("UMT5EncoderModel", "T5TokenizerFast", "AutoencoderKLWan", "WanTransformer3DModel",
               scheduler="UniPCMultistepScheduler"),
    ),
    "ltx": (
        "LTXPipeline",
        _named("T5EncoderModel", "T5TokenizerFast", "AutoencoderKLLTXVideo", "LTXVideoTransformer3DModel"),
    ),
    "hunyuan-video": (
        "HunyuanVideoPipeline",
        _named("LlamaModel", "LlamaTokenizerFast", "AutoencoderKLHunyuanVideo", "HunyuanVideoTransformer3DModel",
               text_encoder_2="CLIPTextModel", tokenizer_2="CLIPTokenizer"),
    ),
    "auraflow": (
        "AuraFlowPipeline",
        _named("UMT5EncoderModel", "LlamaTokenizerFast", "AutoencoderKL", "AuraFlowTransformer2DModel"),
    ),
    "lumina2": (
        "Lumina2Pipeline", _named("Gemma2Model", "GemmaTokenizerFast", "AutoencoderKL", "Lumina2Transformer2DModel"),
    ),
    "sana": (
        "SanaPipeline",
        _named("Gemma2Model", "GemmaTokenizerFast", "AutoencoderDC", "SanaTransformer2DModel",
               scheduler="DPMSolverMultistepScheduler"),
    ),
    "hidream": (
        "HiDreamImagePipeline",
        _named("CLIPTextModelWithProjection", "CLIPTokenizer", "AutoencoderKL", "HiDreamImageTransformer2DModel",
               text_encoder_2="CLIPTextModelWithProjection", text_encoder_3="T5EncoderModel",
               text_encoder_4="LlamaForCausalLM", tokenizer_2="CLIPTokenizer", tokenizer_3="T5Tokenizer",
               tokenizer_4="PreTrainedTokenizerFast"),
    ),
}  # fmt: skip


#: what a model_index.json says beside the parts
_SETTINGS: dict[str, dict[str, Any]] = {
    "sdxl-refiner": {
        "text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True,
        "force_zeros_for_empty_prompt": False,
    },
}  # fmt: skip


def known() -> list[str]:
    """Kinds of single files whose configuration ships."""
    return list(_KNOWN)


def pipeline_class(kind: str) -> str:
    """The diffusers class that runs a kind of file."""
    return _KNOWN[kind][0]


def index_of(kind: str) -> dict[str, Any]:
    """The content of its model_index.json."""
    name, parts = _KNOWN[kind]
    components = {part: [library, cls] for part, (library, cls, _) in parts.items()}
    return {"_class_name": name, **components, **_SETTINGS.get(kind, {})}


def config_of(kind: str, part: str) -> dict[str, Any]:
    """The configuration of one part; of a tokenizer, the settings that are not in its files."""
    _, cls, config = _KNOWN[kind][1][part]
    return copy.deepcopy({"_class_name": cls, **config} if _KNOWN[kind][1][part][0] == "diffusers" else config)


def has_config(kind: str, part: str) -> bool:
    """Whether the configuration of a part ships, rather than its class alone."""
    return bool(_KNOWN[kind][1][part][2])


def write_config(kind: str, part: str, folder: Path, more: Mapping[str, Any] | None = None) -> None:
    """Write the configuration of a network or scheduler into a folder, as the libraries read it; ``more`` goes over
    what ships."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    (folder / name).write_text(json.dumps({**config_of(kind, part), **(more or {})}), encoding="utf-8")
