"""Pipeline classes of diffusers that no family here serves although their siblings are, and why."""

from __future__ import annotations

_GUEST = "attach systems to a pipeline of your own (sfumato.attached)"
_READS_MORE = f"its denoiser reads another picture beside the latents; {_GUEST}, or load a text-to-image checkpoint"
_OTHER_NET = f"its denoiser is another network than that of its family; {_GUEST}"

_KOLORS = (
    "diffusers reads its prompts with ChatGLM3 in code of its own, which needs the package sentencepiece and a"
    " tokenizer that does not say which characters a token stands for, so no word could be found"
)
_CLIP_BY_PICTURE = f"its text encoder reads the first picture too (LLaVA); {_GUEST}, or load HunyuanVideoPipeline"

#: class -> why, and what to use
UNSUPPORTED = {
    **dict.fromkeys(("KolorsPipeline", "KolorsImg2ImgPipeline", "KolorsPAGPipeline"), _KOLORS),
    **dict.fromkeys(
        (
            "StableDiffusionUpscalePipeline",
            "StableDiffusionLatentUpscalePipeline",
            "StableDiffusionDepth2ImgPipeline",
            "StableDiffusionInstructPix2PixPipeline",
            "StableDiffusionImageVariationPipeline",
        ),
        _READS_MORE,
    ),
    **dict.fromkeys(
        (
            "StableDiffusionControlNetXSPipeline",
            "StableDiffusionXLControlNetXSPipeline",
            "WanVACEPipeline",
            "WanAnimatePipeline",
            "HunyuanVideoFramepackPipeline",
            "ZImageOmniPipeline",
            "QwenImageLayeredPipeline",
        ),
        _OTHER_NET,
    ),
    "HunyuanVideoImageToVideoPipeline": _CLIP_BY_PICTURE,
    "SanaSprintPipeline": f"it is distilled to draw by a scheduler without a noise path (TrigFlow); {_GUEST}",
    "AnimateDiffSDXLPipeline": f"its U-Net takes SDXL's conditions for clips, which no family here gives; {_GUEST}",
}
