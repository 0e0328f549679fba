"""Tiny pipelines of the families beyond those of `tests.tiny`, made in the same way; ask `tests.tiny` for them.

==============  =====================================================================================================
kind            what it is (pixels per latent: 2)
==============  =====================================================================================================
chroma          Flux without pooled text, masked padding, real guidance
auraflow        UMT5, eight register tokens before the text, joint and single blocks
sana            Gemma2; linear self-attention, cross-attention; its pipeline takes multiples of 32
fill            Flux that sees a mask, pixel by pixel, and the picture outside it
kontext         Flux with a reference picture, which is scaled to 32x32 or so
flux2           Flux.2 [dev]: Mistral 3 with a chat template, padded on its left; guidance distilled
klein           Flux.2 [klein]: Qwen3 with a chat template; one place of the grid is 4 pixels wide
qwenimage       Qwen2.5-VL behind a template whose head is cut off; texts of their own length in each branch
qwenimage_edit  the same with a picture that both networks see, about 64x64; qwenimage_edit_plus: with several
hidream         two CLIPs pooled, T5, and a Llama's layers, one for each block; experts
lumina2         Gemma2; text and image in one sequence, packed per sample; 8 pixels per latent
z_image         Qwen3; image and text in one sequence, padded to multiples of 32
(clips)         see `tests.tiny_clips`
==============  =====================================================================================================
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxFillPipeline,
    FluxKontextPipeline,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from sfumato.models.processors import Processor
from tests import tiny


def _chroma() -> ChromaPipeline:
    text_encoder, tokenizer = tiny._t5()
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=tiny._vae(0.3611, 0.1159, quant=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _auraflow() -> AuraFlowPipeline:
    _, tokenizer = tiny._t5()
    config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pos_embed_max_size=1024,
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config),
        vae=tiny._vae(0.13025),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def _words(letters: list[str], blank: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges of a byte-pair tokenizer in which `tiny.WHOLE_WORDS` are one token each, alone or behind a
    blank."""
    merges: dict[tuple[str, str], None] = {}
    for first in (blank, ""):
        for word in tiny.WHOLE_WORDS:
            left, *rest = first + word
            for piece in rest:
                merges[left, piece] = None
                left += piece
    return [*letters, *dict.fromkeys(a + b for a, b in merges)], list(merges)


@functools.cache
def gemma_tokenizer() -> GemmaTokenizer:
    """Byte-pair pieces over printable ASCII, anything else by its bytes."""
    pieces, merges = _words(["▁", *(chr(code) for code in range(33, 127))], "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*special, *pieces]))}
    return GemmaTokenizer(vocab=vocab, merges=merges)


@functools.cache
def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level pieces over all 256 bytes, with the chat template of Qwen3 in short."""
    pieces, merges = _words(sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *special]))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=special[1:])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    return tokenizer


#: the sizes of a tiny language model
LANGUAGE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def _gemma(words: int) -> Gemma2Model:
    return Gemma2Model(Gemma2Config(vocab_size=words, **{**LANGUAGE, "intermediate_size": 32}))


def _sana() -> SanaPipeline:
    tokenizer = gemma_tokenizer()
    vae = AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
    )
    return SanaPipeline(
        tokenizer=copy.deepcopy(tokenizer),
        text_encoder=_gemma(len(tokenizer)),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def _kontext() -> FluxKontextPipeline:
    parts = {name: part for name, part in tiny._flux(True).components.items() if part is not None}
    pipe = FluxKontextPipeline(**parts)
    pipe.default_sample_size = 16
    return pipe


def _fill() -> FluxFillPipeline:
    parts = {name: part for name, part in tiny._flux(True).components.items() if part is not None}
    denoiser = parts["transformer"]
    parts["transformer"] = type(denoiser).from_config(denoiser.config, in_channels=48, out_channels=16)
    return FluxFillPipeline(**parts)


def _flux2_parts(guided: bool) -> tuple[AutoencoderKLFlux2, Flux2Transformer2DModel]:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guided,
    )
    return vae, transformer


def _flux2() -> Flux2Pipeline:
    tokenizer = copy.deepcopy(qwen_tokenizer())
    tokenizer.padding_side = "left"
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'][0] }}{{ m['content'][0]['text'][-80:] }}<|im_end|>{% endfor %}"
    )
    text = {
        **LANGUAGE,
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 30,  # the pipeline reads the outputs of layers 10, 20 and 30
        "initializer_range": 0.2,
    }
    vision = {key: size for key, size in LANGUAGE.items() if key != "num_key_value_heads"}
    vision |= {"model_type": "pixtral", "num_hidden_layers": 1, "patch_size": 4, "image_size": 16}
    vae, transformer = _flux2_parts(guided=True)
    pipe = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae,
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipe.system_message = "Draw."
    return pipe


def _klein() -> Flux2KleinPipeline:
    tokenizer = qwen_tokenizer()
    sizes = {**LANGUAGE, "num_hidden_layers": 27}  # the pipeline reads the outputs of layers 9, 18 and 27
    config = Qwen3Config(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)
    vae, transformer = _flux2_parts(guided=False)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=copy.deepcopy(tokenizer),
        transformer=transformer,
    )


def _qwen_parts(tokenizer: Qwen2Tokenizer, **special: int) -> dict[str, Any]:
    text = {
        **{key: size for key, size in LANGUAGE.items() if key != "head_dim"},
        "vocab_size": len(tokenizer),
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
        "patch_size": 4 if special else 14,
    }
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 2.0, 0.5],
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        "vae": vae,
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": copy.deepcopy(tokenizer),
        "transformer": transformer,
    }


def _qwenimage() -> QwenImagePipeline:
    return QwenImagePipeline(**_qwen_parts(qwen_tokenizer()))


def _qwenimage_edit(kind: type[QwenImageEditPipeline | QwenImageEditPlusPipeline]) -> Any:
    tokenizer = copy.deepcopy(qwen_tokenizer())
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    special = dict(zip(names, tokenizer.convert_tokens_to_ids(marks), strict=True))
    reader = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    pipe = kind(**_qwen_parts(tokenizer, **special), processor=Processor(tokenizer, reader))
    pipe.default_sample_size = 32
    return pipe


def _hidream() -> HiDreamImagePipeline:
    (text_encoder, tokenizer), (text_encoder_2, tokenizer_2) = tiny._clip(projection=16), tiny._clip(projection=24)
    text_encoder_3, tokenizer_3 = tiny._t5()
    tokenizer_4 = copy.deepcopy(qwen_tokenizer())
    config = LlamaConfig(vocab_size=len(tokenizer_4), **{**LANGUAGE, "num_hidden_layers": 3})
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[32, 16],
        text_emb_dim=40,
        num_routed_experts=3,
        num_activated_experts=2,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(32, 32),
        llama_layers=[0, 2, 2],
    )
    pipe = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        vae=tiny._vae(0.3611, 0.1159, quant=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        text_encoder_4=LlamaForCausalLM(config),
        tokenizer_4=tokenizer_4,
        transformer=transformer,
    )
    pipe.default_sample_size = 24  # it brings every size to the area of 48x48 pixels
    return pipe


def _lumina2() -> Lumina2Pipeline:
    tokenizer = gemma_tokenizer()
    vae = tiny._vae(0.3611, 0.1159, quant=False, levels=4)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=16,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=6.0),
        vae=vae,
        text_encoder=_gemma(len(tokenizer)),
        tokenizer=copy.deepcopy(tokenizer),
    )


def _z_image() -> ZImagePipeline:
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(vocab_size=len(tokenizer), **LANGUAGE)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[512, 64, 64],
    )
    with torch.no_grad():  # made with torch.empty
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny._vae(0.3611, 0.1159, quant=False),
        text_encoder=Qwen3Model(config),
        tokenizer=copy.deepcopy(tokenizer),
        transformer=transformer,
    )


BUILDERS = {
    "chroma": _chroma,
    "auraflow": _auraflow,
    "sana": _sana,
    "fill": _fill,
    "kontext": _kontext,
    "flux2": _flux2,
    "klein": _klein,
    "qwenimage": _qwenimage,
    "qwenimage_edit": lambda: _qwenimage_edit(QwenImageEditPipeline),
    "qwenimage_edit_plus": lambda: _qwenimage_edit(QwenImageEditPlusPipeline),
    "hidream": _hidream,
    "lumina2": _lumina2,
    "z_image": _z_image,
}
