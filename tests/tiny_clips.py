"""Tiny pipelines of the families that make clips, made as those of `tests.tiny`; ask `tests.tiny` for them.

==============  =====================================================================================================
kind            what it is
==============  =====================================================================================================
wan             self- and cross-attention, padding of zeros; 2 pixels per latent and 2 frames per state
ltx             strong compression: 4 pixels and 4 frames; masked T5; its pipeline takes multiples of 32
cogvideox       text first, frames before channels; 8 pixels and 4 frames; diffusion with DDIM
hunyuan         image first, double and single blocks, a template whose head is cut off, guidance distilled
==============  =====================================================================================================
"""

from __future__ import annotations

import copy
import functools
import re

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import GemmaTokenizer, LlamaConfig, LlamaModel, UMT5Config, UMT5EncoderModel

from tests import tiny, tiny_families


def _wan() -> WanPipeline:
    _, tokenizer = tiny._t5()
    config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 2.0, 0.5],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config),
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    )


def _ltx() -> LTXPipeline:
    text_encoder, tokenizer = tiny._t5()
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=32,
    )
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _cogvideox() -> CogVideoXPipeline:
    text_encoder, tokenizer = tiny._t5()
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=10,
        sample_height=6,
        sample_frames=9,
        use_rotary_positional_embeddings=True,
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=True,
        ),
    )


@functools.cache
def template_tokenizer() -> GemmaTokenizer:
    """As Gemma's here, with the words of HunyuanVideo's template as tokens: it counts on a head of 95 or less."""
    tokenizer = copy.deepcopy(tiny_families.gemma_tokenizer())
    pieces = re.findall(r"<\|\w+\|>|\w{3,}", DEFAULT_PROMPT_TEMPLATE["template"])
    tokenizer.add_tokens([piece for piece in dict.fromkeys(pieces) if piece not in tiny.WHOLE_WORDS])
    return tokenizer


def _hunyuan() -> HunyuanVideoPipeline:
    tokenizer, (clip, clip_tokenizer) = template_tokenizer(), tiny._clip()
    sizes = {**tiny_families.LANGUAGE, "num_hidden_layers": 3, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 4, 4),
    )
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(config),
        tokenizer=copy.deepcopy(tokenizer),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip,
        tokenizer_2=clip_tokenizer,
    )


BUILDERS = {"wan": _wan, "ltx": _ltx, "cogvideox": _cogvideox, "hunyuan": _hunyuan}
