"""CogVideoX: clips by a transformer that attends to text and all frames at once, trained by diffusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.models import codec
from sfumato.models.condition import Rows
from sfumato.models.families.base import TextStream, sibling_classes
from sfumato.models.families.video import VideoTransformer
from sfumato.models.site import Site


class CogVideoX(VideoTransformer):
    """Yang et al. 2024, arXiv 2408.06072. Attention sees the T5 tokens first, then the clip; padding is not masked.
    The pipeline's latents have their frames before their channels, and so is its noise drawn."""

    name = "cogvideox"
    pipeline_classes = ("CogVideoXPipeline",)
    siblings = sibling_classes("CogVideoXPipeline", "CogVideoX{}Pipeline", "VideoToVideo ImageToVideo FunControl")
    max_sequence_length = 226
    casts_state = True

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        super().__init__(pipe, max_sequence_length)
        frames = int(self.config.sample_frames)
        frames = self.frames_of(self.states_of(frames))  # CogVideoX 1.5 names a number that its patches do not fit
        self.defaults = {"steps": 50, "guidance": 6.0, "frames": frames, "fps": 8.0 if self.patch[0] == 1 else 16.0}

    @property
    def state_dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def patch(self) -> tuple[int, int]:
        return int(self.config.patch_size_t or 1), int(self.config.patch_size)

    @property
    def size_multiple(self) -> int:
        return math.lcm(8, self.scale * self.patch[1])

    @property
    def default_size(self) -> tuple[int, int]:
        return int(self.config.sample_height) * self.scale, int(self.config.sample_width) * self.scale

    @property
    def streams(self) -> list[TextStream]:
        return self._stream("tokenizer", "t5", 0, self.max_sequence_length)

    def states_of(self, frames: int) -> int:
        deep = self.patch[0]
        return -(-super().states_of(frames) // deep) * deep

    def noise(self, generators: Sequence[torch.Generator], h: int, w: int, frames: int) -> Tensor:
        c, f = self.channels, self.states_of(frames)
        return self._drawn(generators, (f, c, h, w)).transpose(1, 2)

    def grid_of_call(self, arguments: dict[str, Any]) -> tuple[int, int, int]:
        _, f, _, h, w = arguments["hidden_states"].shape
        return self.frames_of(f), h, w

    def unpacked(self, x: Tensor, h: int, w: int) -> Tensor:
        return x.transpose(1, 2)

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        b, _, f, h, w = x.shape
        rotary = None
        if self.config.use_rotary_positional_embeddings:
            rotary = self.pipe._prepare_rotary_positional_embeddings(h * self.scale, w * self.scale, f, x.device)
        out = self.denoiser(
            hidden_states=x.transpose(1, 2),
            encoder_hidden_states=rows["embeds"],
            timestep=t.expand(b),
            image_rotary_emb=rotary,
            return_dict=False,
            **extra,
        )[0]
        return out.float().transpose(1, 2)

    def prepare(self, noise: Tensor, scheduler: Any) -> Tensor:
        return noise * scheduler.init_noise_sigma

    def decode(self, state: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.decode((1 / self.pipe.vae_scaling_factor_image * state).to(vae.dtype)).sample

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        vae, latents = self.pipe.vae, []
        for clip, generator in zip(images, generators or [None] * len(images), strict=True):
            latents.append(codec.latents_of(vae.encode(clip[None].to(self.device, vae.dtype)), generator))
        return torch.cat(latents) * vae.config.scaling_factor

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        return self._joint({"joint": "transformer_blocks"}, "attn1", h, w, text, frames, text_first=True)
