"""Small, randomly initialised, *genuine* pipelines of every supported family, with real tokenizers built in-process.

Nothing is downloaded and nothing is mocked: each pipeline is the diffusers class a user loads, only with few channels.
Weights depend on (kind, seed) only; the global random state is left untouched. Pipelines are cached for the session:
treat them as read-only, or take your own with ``fresh=True``.

==============  =====================================================================================================
kind            what it is (pixels per latent: 2; pictures are 32x32 unless a size is given)
==============  =====================================================================================================
sd              Stable Diffusion 1: epsilon, DDIM; 2 levels, cross attention at 16x16 and in the middle, at 8x8
sd2             Stable Diffusion 2: v-prediction, DDIM, linear projections, "!" as padding
sdxl            two text encoders, pooled text and size conditions, Euler; cross attention at 8x8 only
refiner         the SDXL refiner: the second text encoder alone, an aesthetic score (not in KINDS: it draws no picture)
sd3             MM-DiT, flow; two CLIPs and a T5 (image tokens first)
sd35            as sd3 with query-key norms and a second, image-only attention in the first block
sd3clip         as sd3 without T5 and with max_sequence_length 0 (only the 77 CLIP tokens reach attention)
flux            guidance-distilled, text tokens first, double and single blocks
schnell         as flux without guidance embedding
pixart          PixArt-Sigma: T5 with a mask, learned sigma, DPM-Solver++
inpaint         Stable Diffusion's inpainting pipeline: as sd, mask and masked latents beside the latents (9 channels)
pixart_alpha    PixArt-Alpha with resolution and aspect-ratio conditions
amused          aMUSEd: masked tokens of a VQ-GAN, U-ViT; cross attention at 16x16 around blocks at 16x16 (not in KINDS:
                its state is token ids)
animatediff     clips: as sd with DDIM, and a motion module behind every layer; 2 frames unless told
(further)       see `tests.tiny_families`
==============  =====================================================================================================
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AmusedPipeline,
    AmusedScheduler,
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    MotionAdapter,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UVit2DModel,
    VQModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from sfumato.models import Model, quiet

KINDS = ("sd", "sd2", "sdxl", "sd3", "sd35", "sd3clip", "flux", "schnell", "pixart", "pixart_alpha", "inpaint")

#: of those that make clips, as their cards say: frames, and (height, width)
FRAMES = {"animatediff": 2, "wan": 5, "ltx": 9, "cogvideox": 9, "hunyuan": 9}
SIZES = {"wan": (32, 48), "ltx": (32, 64), "cogvideox": (48, 80), "hunyuan": (48, 80)}

#: how many tokens: attention among hundreds of paddings takes long
TOKENS = {
    **dict.fromkeys(("sd3", "sd35", "flux", "schnell", "kontext", "fill", "pixart", "pixart_alpha", "chroma"), 64),
    **dict.fromkeys(("auraflow", "sana", "hidream", "z_image", "wan", "ltx", "cogvideox", "hunyuan"), 64),
    "sd3clip": 0,
    "klein": 48,
    "flux2": 48,
}

# One token each in both tokenizers; every other word falls into several pieces ("green" -> g, re, e, n).
WHOLE_WORDS = "a an and the of on in to left right small big red blue yellow black white cube ball cone dog cat".split()


def tiny_pipeline(kind: str, seed: int = 0, fresh: bool = False) -> DiffusionPipeline:
    """The pipeline of this kind; ``fresh=True`` gives a copy that is yours to change."""
    pipe = _cached_pipeline(kind, seed)
    return copy.deepcopy(pipe) if fresh else pipe


def tiny_model(kind: str, seed: int = 0, fresh: bool = False, own_length: bool = False) -> Model:
    """The same as a `sfumato.models.Model`; with ``own_length`` its texts are as long as the pipeline makes them."""
    make = _model if fresh else _cached_model
    return make(kind, seed, fresh, own_length)


def _model(kind: str, seed: int, fresh: bool, own_length: bool) -> Model:
    card = {"sampling": {"size": [32, 32]}}
    if kind in FRAMES:
        card["sampling"] |= {"frames": FRAMES[kind], "size": list(SIZES.get(kind, (32, 32)))}
    if kind in TOKENS and not own_length:
        card["sampling"]["max_sequence_length"] = TOKENS[kind]
    return Model(tiny_pipeline(kind, seed, fresh), name=f"tiny-{kind}", card=card)


_cached_model = functools.cache(_model)  # which also remembers the hash of its weights


def length_of(model: Model) -> dict[str, int]:
    """How long the texts of such a model are, as its pipeline is told; nothing where that is the pipeline's matter."""
    return {key: value for key, value in model.card["sampling"].items() if key == "max_sequence_length"}


def forget_pipelines() -> None:
    """Build anew from now on: somebody has changed one."""
    _cached_pipeline.cache_clear()
    _cached_model.cache_clear()


@functools.cache
def _cached_pipeline(kind: str, seed: int) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = (_BUILDERS.get(kind) or _further(kind))()
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
            _primed(component)
    with tempfile.TemporaryDirectory() as folder:  # diffusers notes two more things in its settings when it saves it
        pipe.scheduler.save_pretrained(folder)
    return pipe


def _further(kind: str) -> Callable[[], DiffusionPipeline]:
    from tests import tiny_clips, tiny_families  # build on the parts here

    return {**tiny_families.BUILDERS, **tiny_clips.BUILDERS}[kind]


def _primed(module: torch.nn.Module) -> None:
    """transformers hangs hooks of its own on a text encoder when hidden states are first asked for, and leaves them: it
    shall have done so before a test looks at what *we* leave."""
    if any(name in type(module).__name__ for name in ("Text", "T5", "Qwen2_5", "Qwen3", "Gemma", "Llama")):
        with torch.no_grad():
            module(torch.zeros(1, 2, dtype=torch.long), output_hidden_states=True)


# --- text -------------------------------------------------------------------------------------------------------------


@functools.cache
def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Byte-level BPE over all 256 bytes, so any text tokenizes; 77 positions like CLIP."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in WHOLE_WORDS:  # build each word left to right
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for piece in rest:
            merges[left, piece] = None
            left += piece
    pieces = [*letters, *(x + "</w>" for x in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), pad_token=pad_token, model_max_length=77)


@functools.cache
def t5_tokenizer() -> T5Tokenizer:
    """Unigram over whole words and single ASCII letters; anything else becomes <unk>."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in WHOLE_WORDS] + [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _clip(projection: int | None = None, pad_token: str = "<|endoftext|>"):
    tokenizer = clip_tokenizer(pad_token)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or 16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config), copy.deepcopy(tokenizer)


def _t5():
    tokenizer = t5_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config), copy.deepcopy(tokenizer)


# --- pictures and denoisers -------------------------------------------------------------------------------------------


def _vae(scaling: float, shift: float | None = None, quant: bool = True, levels: int = 2) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * (levels - 1) + (16,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        force_upcast=False,
    )


_SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def _stable_diffusion(version: int, inpaint: bool = False) -> StableDiffusionPipeline | StableDiffusionInpaintPipeline:
    text_encoder, tokenizer = _clip(pad_token="!" if version == 2 else "<|endoftext|>")
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=9 if inpaint else 4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2 if version == 1 else (2, 4),
        use_linear_projection=version == 2,
        norm_num_groups=8,
    )
    if version == 1:
        scheduler = DDIMScheduler(**_SD_BETAS, clip_sample=False)
    else:
        scheduler = DDIMScheduler(
            **_SD_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False
        )
    return (StableDiffusionInpaintPipeline if inpaint else StableDiffusionPipeline)(
        vae=_vae(0.18215),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _animatediff() -> AnimateDiffPipeline:
    pictures = _stable_diffusion(1)
    motion = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
    )
    return AnimateDiffPipeline(
        vae=pictures.vae,
        text_encoder=pictures.text_encoder,
        tokenizer=pictures.tokenizer,
        unet=pictures.unet,
        motion_adapter=motion,
        scheduler=DDIMScheduler(**_SD_BETAS, clip_sample=False, set_alpha_to_one=False),
    )


def _sdxl_parts(width: int, conditions: int) -> dict[str, Any]:
    """What the base model, whose text is ``width`` wide, and its refiner have both, with so many numbers to be told."""
    text_encoder_2, tokenizer_2 = _clip(projection=24, pad_token="!")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=width,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=conditions * 8 + 24,
    )
    return {
        "vae": _vae(0.13025),
        "text_encoder_2": text_encoder_2,
        "tokenizer_2": tokenizer_2,
        "unet": unet,
        "scheduler": EulerDiscreteScheduler(**_SD_BETAS, timestep_spacing="leading"),
        "add_watermarker": False,
    }


def _sdxl() -> StableDiffusionXLPipeline:
    text_encoder, tokenizer = _clip()
    return StableDiffusionXLPipeline(text_encoder=text_encoder, tokenizer=tokenizer, **_sdxl_parts(32, 6))


def _refiner() -> StableDiffusionXLImg2ImgPipeline:
    return StableDiffusionXLImg2ImgPipeline(
        text_encoder=None,
        tokenizer=None,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        **_sdxl_parts(16, 5),
    )


def _sd3(dual: bool = False, t5: bool = True) -> StableDiffusion3Pipeline:
    text_encoder, tokenizer = _clip(projection=16)
    text_encoder_2, tokenizer_2 = _clip(projection=24, pad_token="!")
    text_encoder_3, tokenizer_3 = _t5() if t5 else (None, None)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        out_channels=4,
        pos_embed_max_size=32,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(1.5305, 0.0609, quant=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def _flux(guidance_embeds: bool) -> FluxPipeline:
    text_encoder, tokenizer = _clip()
    text_encoder_2, tokenizer_2 = _t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds, shift=3.0),
        vae=_vae(0.3611, 0.1159, quant=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def _pixart(alpha: bool) -> PixArtSigmaPipeline | PixArtAlphaPipeline:
    text_encoder, tokenizer = _t5()
    transformer = PixArtTransformer2DModel(
        sample_size=128 if alpha else 16,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        # the size conditions of PixArt-Alpha take a third of the width each
        attention_head_dim=12 if alpha else 8,
        cross_attention_dim=24 if alpha else 16,
        caption_channels=32,
        use_additional_conditions=alpha,
    )
    return (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=_vae(0.13025),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


def _amused(downsample: bool = False) -> AmusedPipeline:
    text_encoder, tokenizer = _clip(projection=16)
    transformer = UVit2DModel(
        hidden_size=32,
        cond_embed_dim=16,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=16,
        vocab_size=34,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        downsample=downsample,
        upsample=downsample,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        sample_size=16,
    )
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=32,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    with quiet():  # diffusers calls the pipeline deprecated
        return AmusedPipeline(
            vqvae=vqvae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            scheduler=AmusedScheduler(mask_token_id=33),
        )


_BUILDERS = {
    "sd": lambda: _stable_diffusion(1),
    "sd2": lambda: _stable_diffusion(2),
    "sdxl": _sdxl,
    "refiner": _refiner,
    "sd3": _sd3,
    "sd35": lambda: _sd3(dual=True),
    "sd3clip": lambda: _sd3(t5=False),
    "flux": lambda: _flux(True),
    "schnell": lambda: _flux(False),
    "pixart": lambda: _pixart(False),
    "pixart_alpha": lambda: _pixart(True),
    "amused": lambda: _amused(),
    "amused_down": lambda: _amused(downsample=True),
    "inpaint": lambda: _stable_diffusion(1, inpaint=True),
    "animatediff": _animatediff,
}
