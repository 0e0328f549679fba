"""LTX-Video: clips by a transformer over strongly compressed latents, with cross-attention to T5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.models import codec
from sfumato.models.condition import Rows
from sfumato.models.families.base import NO_PICTURE, TextStream, sibling_classes
from sfumato.models.families.video import VideoTransformer
from sfumato.models.site import Site


class LTX(VideoTransformer):
    """HaCohen et al. 2024, arXiv 2501.00103. The denoiser is given the pipeline's default frame rate, 25 frames a
    second, whatever the clip is shown at."""

    name = "ltx"
    pipeline_classes = ("LTXPipeline",)
    siblings = sibling_classes("LTXPipeline", "LTX{}Pipeline", "ImageToVideo Condition I2VLongMultiPrompt", NO_PICTURE)
    defaults = {"steps": 50, "guidance": 3.0, "frames": 161, "fps": 25.0}
    max_sequence_length = 128

    @property
    def scale(self) -> int:
        return int(self.pipe.vae_spatial_compression_ratio)

    @property
    def frames_per_state(self) -> int:
        return int(self.pipe.vae_temporal_compression_ratio)

    @property
    def patch(self) -> tuple[int, int]:
        return int(self.pipe.transformer_temporal_patch_size), int(self.pipe.transformer_spatial_patch_size)

    @property
    def size_multiple(self) -> int:
        return math.lcm(32, self.scale * self.patch[1])

    @property
    def default_size(self) -> tuple[int, int]:
        return 512, 704

    @property
    def streams(self) -> list[TextStream]:
        return self._stream("tokenizer", "t5", 0, self.max_sequence_length)

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        embeds, mask, negative, negative_mask = self.pipe.encode_prompt(
            prompts,
            negatives,
            guidance,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return {"embeds": embeds, "mask": mask}, {"embeds": negative, "mask": negative_mask} if guidance else None

    def grid_of_call(self, arguments: dict[str, Any]) -> tuple[int, int, int]:
        return self.frames_of(arguments["num_frames"]), arguments["height"], arguments["width"]

    def unpacked(self, x: Tensor, h: int, w: int) -> Tensor:
        deep, wide = self.patch
        h, w = h // wide, w // wide
        return self.pipe._unpack_latents(x, x.shape[1] // (h * w), h, w, wide, deep)

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        b, _, f, h, w = x.shape
        deep, wide = self.patch
        out = self.denoiser(
            hidden_states=self.pipe._pack_latents(x, wide, deep).to(rows["embeds"].dtype),
            encoder_hidden_states=rows["embeds"],
            timestep=t.expand(b),
            encoder_attention_mask=rows["mask"],
            num_frames=f,
            height=h,
            width=w,
            rope_interpolation_scale=(self.frames_per_state / int(self.defaults["fps"]), self.scale, self.scale),
            return_dict=False,
            **extra,
        )[0]
        return self.pipe._unpack_latents(out.float(), f // deep, h // wide, w // wide, wide, deep)

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        sigmas = self._spaced(scheduler, np.linspace(1.0, 1 / steps, steps), given)
        tokens = self.states_of(frames) * h * w
        self._shifted_timesteps(scheduler, steps, device, tokens, max_shift=1.15, given=given, **sigmas)

    def decode(self, state: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = self.pipe._denormalize_latents(state, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        # told its level, 0 as in the pipeline, which so adds no noise
        time = latents.new_zeros(len(latents), dtype=vae.dtype) if vae.config.timestep_conditioning else None
        return vae.decode(latents.to(self.denoiser.dtype).to(vae.dtype), time, return_dict=False)[0]

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        vae, pairs = self.pipe.vae, zip(images, generators or [None] * len(images), strict=True)
        latents = []
        for clip, generator in pairs:
            latents.append(codec.latents_of(vae.encode(clip[None].to(self.device, vae.dtype)), generator))
        return self.pipe._normalize_latents(
            torch.cat(latents), vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        return self._crossing("transformer_blocks", h, w, text, frames)
