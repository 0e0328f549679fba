"""Wan 2.1 and 2.2: clips by a transformer with self-attention over all frames and cross-attention to UMT5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import NotSupported
from sfumato.models import codec
from sfumato.models.condition import COND, UNCOND, Rows
from sfumato.models.families.base import NO_PICTURE, TextStream, sibling_classes
from sfumato.models.families.video import VideoTransformer
from sfumato.models.site import Site


class Wan(VideoTransformer):
    """Wan Team 2025, arXiv 2503.20314. Padding is zeros and takes part in attention. A denoiser call sees one guidance
    branch. Checkpoints of two denoisers, one for the noisy half of the levels (Wan 2.2 A14B), are refused: sites,
    adapters and gradients belong to one."""

    name = "wan"
    pipeline_classes = ("WanPipeline",)
    siblings = {
        **sibling_classes("WanPipeline", "Wan{}Pipeline", "VideoToVideo"),
        **sibling_classes("WanPipeline", "Wan{}Pipeline", "ImageToVideo", NO_PICTURE),
    }
    defaults = {"steps": 50, "guidance": 5.0, "frames": 81, "fps": 16.0}
    max_sequence_length = 512
    joint_branches = False
    branch_order = (COND, UNCOND)

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        super().__init__(pipe, max_sequence_length)
        if getattr(pipe, "transformer_2", None) is not None:
            raise NotSupported("Wan 2.2 A14B draws with two denoisers in turn, and a sfumato model has one.")

    @property
    def patch(self) -> tuple[int, int]:
        return int(self.config.patch_size[0]), int(self.config.patch_size[1])

    @property
    def size_multiple(self) -> int:
        return math.lcm(16, self.scale * self.patch[1])

    @property
    def default_size(self) -> tuple[int, int]:
        return 480, 832

    @property
    def streams(self) -> list[TextStream]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        length = self.max_sequence_length or 0
        return [TextStream(self.pipe.tokenizer, "t5", 0, length, prompt_clean)] if self.pipe.tokenizer else []

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        time = t.expand(len(x))
        if self.pipe.config.expand_timesteps:  # a level for each token: all alike without a picture to begin with
            time = time[:, None].expand(-1, x[0, 0, :, ::2, ::2].numel())
        dtype = self.denoiser.dtype
        return self.denoiser(
            hidden_states=x.to(dtype),
            timestep=time,
            encoder_hidden_states=rows["embeds"].to(dtype),
            return_dict=False,
            **extra,
        )[0]

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        super().set_timesteps(scheduler, steps, h, w, device, frames, **given)
        scheduler.set_begin_index(0)

    def decode(self, state: Tensor) -> Tensor:
        return codec.decode_frames(self.pipe.vae, state)

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        return codec.encode_frames(self.pipe.vae, images, generators)

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        return self._crossing("blocks", h, w, text, frames)
