"""Stable Diffusion 1 and 2, their inpainting variants, and SDXL: a U-Net with separate self and cross attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.models.condition import Rows
from sfumato.models.families.base import NO_CONTROL, NO_PAG, TEXT_TO_IMAGE, Family, TextStream, sibling_classes
from sfumato.models.families.inpainting import Inpainting
from sfumato.models.site import Layer, Site, SiteList, is_attention


@contextmanager
def _with_text_model(encoder: Any) -> Iterator[None]:
    """diffusers looks for the last norm of a CLIP under ``text_model``, where transformers 5 has it no more."""
    lent = not hasattr(encoder, "text_model")
    if lent:
        vars(encoder)["text_model"] = encoder
    try:
        yield
    finally:
        if lent:
            del vars(encoder)["text_model"]


def fewest_layers(*encoders: Any) -> int:
    """How many layers can be left out of several CLIPs of which the last but one is read; 0 where there are none."""
    return min((int(each.config.num_hidden_layers) - 1 for each in encoders if each is not None), default=0)


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv 2112.10752)."""

    name = "sd"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    siblings: ClassVar[dict[str, tuple[str, str]]] = {
        **sibling_classes("StableDiffusionPipeline", "StableDiffusion{}Pipeline", "Img2Img"),
        **sibling_classes(
            "StableDiffusionPipeline",
            "StableDiffusion{}Pipeline",
            "ControlNet ControlNetImg2Img ControlNetPAG Adapter",
            NO_CONTROL,
        ),
        **sibling_classes("StableDiffusionPipeline", "StableDiffusion{}Pipeline", "PAG PAGImg2Img", NO_PAG),
        "LatentConsistencyModelImg2ImgPipeline": ("LatentConsistencyModelPipeline", ""),
    }
    denoiser_name = "unet"
    capabilities = TEXT_TO_IMAGE | {"linear_text_values", "h_space"}
    defaults: dict[str, Any] = {"steps": 50, "guidance": 7.5}

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        super().__init__(pipe, max_sequence_length)
        if type(pipe).__name__.startswith("LatentConsistency"):  # Luo et al. 2023: few steps, guidance distilled
            self.defaults = {"steps": 4, "guidance": 8.5}

    @property
    def embeds_guidance(self) -> bool:
        return self.config.time_cond_proj_dim is not None

    @property
    def size_multiple(self) -> int:
        return math.lcm(8, self.scale)

    @property
    def default_size(self) -> tuple[int, int]:
        size = self.config.sample_size
        h, w = (size, size) if isinstance(size, int) else size
        return h * self.scale, w * self.scale

    @property
    def streams(self) -> list[TextStream]:
        return self._stream("tokenizer", "clip", 0, chunked=True)

    @property
    def clip_layers(self) -> int:
        return int(self.pipe.text_encoder.config.num_hidden_layers)

    @property
    def layers(self) -> list[Layer]:
        unet = self.denoiser
        down = [Layer(f"down.{i}", f"down_blocks.{i}", 0) for i in range(len(unet.down_blocks))]
        up = [Layer(f"up.{i}", f"up_blocks.{i}") for i in range(len(unet.up_blocks))]
        return down + ([Layer("mid", "mid_block")] if unet.mid_block is not None else []) + up

    @property
    def bottleneck(self) -> Layer | None:
        return next((layer for layer in self.layers if layer.name == "mid"), None)

    def has(self, capability: str) -> bool:
        return super().has(capability) and (capability != "h_space" or self.bottleneck is not None)

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        skip = self.encoding.clip_skip
        with nullcontext() if skip is None else _with_text_model(self.pipe.text_encoder):
            embeds, negative = self.pipe.encode_prompt(prompts, self.device, 1, guidance, negatives, clip_skip=skip)
        return {"embeds": embeds}, {"embeds": negative} if guidance else None

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        return self.denoiser(
            x,
            t,
            encoder_hidden_states=rows["embeds"],
            timestep_cond=self._guidance_embedding(x, guidance),
            added_cond_kwargs=self._added(x, rows),
            return_dict=False,
            **extra,
        )[0]

    def _added(self, x: Tensor, rows: Rows) -> dict[str, Tensor] | None:
        return None

    def _guidance_embedding(self, x: Tensor, guidance: float | None) -> Tensor | None:
        if guidance is None or not self.embeds_guidance:
            return None
        scale = torch.tensor(guidance - 1).repeat(x.shape[0])
        return self.pipe.get_guidance_scale_embedding(scale, embedding_dim=self.config.time_cond_proj_dim).to(x)

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        unet = self.denoiser
        found = SiteList()

        def walk(block: nn.Module, path: str, name: str, grid: tuple[int, int]) -> None:
            for inner, module in self._attentions(block):
                kind = self._kind(inner, module)
                found.put(
                    f"{path}.{inner}",
                    module,
                    kind=kind,
                    grid=grid,
                    block=name,
                    text=(0, text) if kind == "cross" else None,
                    frames=frames,
                )

        grid, grids = (h, w), []
        for i, block in enumerate(unet.down_blocks):
            grids.append(grid)
            walk(block, f"down_blocks.{i}", f"down.{i}", grid)
            if block.downsamplers is not None:  # convolutions of stride 2, padded: odd sides round up
                grid = (-(-grid[0] // 2), -(-grid[1] // 2))
        if unet.mid_block is not None:
            walk(unet.mid_block, "mid_block", "mid", grid)
        for i, (block, grid) in enumerate(zip(unet.up_blocks, reversed(grids), strict=True)):
            walk(block, f"up_blocks.{i}", f"up.{i}", grid)
        return found

    def _attentions(self, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The attention layers of a block by their path in it, in the order of execution."""
        yield from ((path, module) for path, module in block.named_modules() if is_attention(module))

    def _kind(self, path: str, module: Any) -> str:
        """The kind of attention at this path of a block."""
        return "cross" if module.is_cross_attention else "self"


class StableDiffusionInpaint(Inpainting, StableDiffusion):
    """Stable Diffusion with a mask for input (GLIDE's fine-tune, Nichol et al. 2021, section 3.2, on latents): the mask
    on the latents' grid, then the latents of the picture with the hole in grey."""

    name = "sd_inpaint"
    capabilities = StableDiffusion.capabilities | {"mask_input"}
    pipeline_classes = ("StableDiffusionInpaintPipeline",)
    siblings = {
        **sibling_classes(
            "StableDiffusionInpaintPipeline", "StableDiffusion{}Pipeline", "ControlNetInpaint", NO_CONTROL
        ),
        **sibling_classes("StableDiffusionInpaintPipeline", "StableDiffusion{}Pipeline", "PAGInpaint", NO_PAG),
        **sibling_classes(
            "StableDiffusionInpaintPipeline",
            "StableDiffusion{}Pipeline",
            "ControlNetPAGInpaint",
            f"{NO_CONTROL}; {NO_PAG}",
        ),
    }


class StableDiffusionXL(StableDiffusion):
    """SDXL (Podell et al. 2023, arXiv 2307.01952): also takes a second encoding, pooled text and the picture size."""

    name = "sdxl"
    pipeline_classes = ("StableDiffusionXLPipeline",)
    siblings = {
        **sibling_classes(
            "StableDiffusionXLPipeline", "StableDiffusionXL{}Pipeline", "Img2Img Inpaint InstructPix2Pix"
        ),
        **sibling_classes(
            "StableDiffusionXLPipeline",
            "StableDiffusionXL{}Pipeline",
            "ControlNet ControlNetImg2Img ControlNetInpaint ControlNetUnion ControlNetUnionImg2Img"
            " ControlNetUnionInpaint ControlNetPAG ControlNetPAGImg2Img Adapter",
            NO_CONTROL,
        ),
        **sibling_classes(
            "StableDiffusionXLPipeline", "StableDiffusionXL{}Pipeline", "PAG PAGImg2Img PAGInpaint", NO_PAG
        ),
    }
    defaults = {"steps": 50, "guidance": 5.0}
    upcasts_vae = True
    micro_conditions = True
    penultimate_clip_layer = True

    @property
    def streams(self) -> list[TextStream]:
        first, second = ("tokenizer", "clip", 0), ("tokenizer_2", "clip2", 0)
        return self._stream(*first, chunked=True) + self._stream(*second, chunked=True)

    @property
    def clip_layers(self) -> int:
        return fewest_layers(self.pipe.text_encoder, self.pipe.text_encoder_2)

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        embeds, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=guidance,
            negative_prompt=negatives,
            clip_skip=self.encoding.clip_skip,
        )
        cond = {"embeds": embeds, "pooled": pooled}
        uncond = {"embeds": negative, "pooled": negative_pooled} if guidance else None
        for rows, numbers in zip((cond, uncond), self.encoding.micro or (), strict=False):
            if rows is not None:
                ids = torch.tensor([numbers], dtype=embeds.dtype, device=embeds.device)
                rows["time_ids"] = ids.repeat(len(embeds), 1)
        return cond, uncond

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        super().set_timesteps(scheduler, steps, h, w, device, frames, **given)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    def _added(self, x: Tensor, rows: Rows) -> dict[str, Tensor] | None:
        return {"text_embeds": rows["pooled"], "time_ids": rows.get("time_ids", self._time_ids(x, rows))}

    def _time_ids(self, x: Tensor, rows: Rows) -> Tensor:
        """(b 6): original size, crop corner and target size in pixels (the paper's section 2.2), all from x."""
        size = (x.shape[-2] * self.scale, x.shape[-1] * self.scale)
        encoder = self.pipe.text_encoder_2
        ids = self.pipe._get_add_time_ids(
            size,
            (0, 0),
            size,
            dtype=rows["embeds"].dtype,
            text_encoder_projection_dim=rows["pooled"].shape[-1] if encoder is None else encoder.config.projection_dim,
        )
        return ids.to(x.device).repeat(x.shape[0], 1)
