"""Stable Diffusion 3 and 3.5: a multimodal transformer (MM-DiT) trained by rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Rows
from sfumato.models.families.base import NO_CONTROL, NO_PAG, TEXT_TO_IMAGE, Family, TextStream, sibling_classes
from sfumato.models.families.unet import fewest_layers
from sfumato.models.site import Layer, Site, SiteList, is_attention


class StableDiffusion3(Family):
    """Esser et al. 2024, arXiv 2403.03206. Joint attention sees the image tokens first, then the text."""

    name = "sd3"
    penultimate_clip_layer = True
    pipeline_classes = ("StableDiffusion3Pipeline",)
    siblings = {
        **sibling_classes("StableDiffusion3Pipeline", "StableDiffusion3{}Pipeline", "Img2Img Inpaint"),
        **sibling_classes(
            "StableDiffusion3Pipeline", "StableDiffusion3{}Pipeline", "ControlNet ControlNetInpainting", NO_CONTROL
        ),
        **sibling_classes("StableDiffusion3Pipeline", "StableDiffusion3{}Pipeline", "PAG PAGImg2Img", NO_PAG),
    }
    shifts_latents = True
    denoiser_name = "transformer"
    capabilities = TEXT_TO_IMAGE | {"joint_attention"}
    defaults = {"steps": 28, "guidance": 7.0}
    max_sequence_length = 256
    half = torch.bfloat16
    read_once = ("text_encoder_3",)

    @property
    def size_multiple(self) -> int:
        return self.scale * int(self.config.patch_size)

    @property
    def size_limit(self) -> int:
        return self.size_multiple * int(self.config.pos_embed_max_size)

    @property
    def streams(self) -> list[TextStream]:
        clip = int(self.pipe.tokenizer_max_length)
        streams = self._stream("tokenizer", "clip", 0, clip, chunked=True)
        streams += self._stream("tokenizer_2", "clip2", 0, clip, chunked=True)
        if self.max_sequence_length:
            streams += self._stream("tokenizer_3", "t5", clip, self.max_sequence_length)
        return streams

    @property
    def text_length(self) -> int:
        # without its T5 the pipeline appends as many zero vectors, and attention sees them
        return int(self.pipe.tokenizer_max_length) + (self.max_sequence_length or 0)

    @property
    def clip_layers(self) -> int:
        return fewest_layers(self.pipe.text_encoder, self.pipe.text_encoder_2)

    @property
    def layers(self) -> list[Layer]:
        return [Layer(f"joint.{i}", f"transformer_blocks.{i}", 1) for i in range(len(self.denoiser.transformer_blocks))]

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        embeds, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=guidance,
            negative_prompt=negatives,
            max_sequence_length=self.max_sequence_length,
            clip_skip=self.encoding.clip_skip,
        )
        cond = {"embeds": embeds, "pooled": pooled}
        return cond, {"embeds": negative, "pooled": negative_pooled} if guidance else None

    def joined(self, chunks: Sequence[Rows]) -> Rows:
        clip = int(self.pipe.tokenizer_max_length)
        read = [rows["embeds"][:, :clip] for rows in chunks]
        return {**chunks[0], "embeds": torch.cat([*read, chunks[0]["embeds"][:, clip:]], 1)}

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        return self.denoiser(
            hidden_states=x,
            timestep=t.expand(x.shape[0]),
            encoder_hidden_states=rows["embeds"],
            pooled_projections=rows["pooled"],
            return_dict=False,
            **extra,
        )[0]

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        patch = int(self.config.patch_size)
        self._shifted_timesteps(scheduler, steps, device, (h // patch) * (w // patch), max_shift=1.16, given=given)

    def prepare(self, noise: Tensor, scheduler: Any) -> Tensor:
        return noise

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        patch = int(self.config.patch_size)
        grid = (h // patch, w // patch)
        image = (0, grid[0] * grid[1])
        found = SiteList()
        for i, block in enumerate(self.denoiser.transformer_blocks):
            path = f"transformer_blocks.{i}"
            found.put(
                f"{path}.attn",
                block.attn,
                kind="joint",
                grid=grid,
                block=f"joint.{i}",
                image=image,
                text=(image[1], image[1] + text),
            )
            # SD3.5 medium: some blocks attend once more, among the image tokens alone
            if is_attention(getattr(block, "attn2", None)):
                found.put(f"{path}.attn2", block.attn2, kind="self", grid=grid, block=f"joint.{i}")
        return found
