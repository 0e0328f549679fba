"""Flux.1 Fill: Flux that redraws a region of a picture; it sees the mask pixel by pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.models.families.flux import Flux
from sfumato.models.families.inpainting import Inpainting


class FluxFill(Inpainting, Flux):
    """Black Forest Labs 2024. Beside the latents it reads those of the picture with the hole in grey, then the mask,
    the pixels of a latent as channels."""

    name = "flux-fill"
    pipeline_classes = ("FluxFillPipeline",)
    capabilities = Flux.capabilities | {"mask_input"}

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        super().__init__(pipe, max_sequence_length)
        self.defaults = {"steps": 50, "guidance": 30.0}

    @property
    def read_channels(self) -> int:
        return int(self.config.in_channels) // 4  # 2x2 latents are packed into one token

    @property
    def mask_channels(self) -> int:
        return self.scale**2

    def hole(self, known: Tensor, erased: Tensor, share: Tensor) -> Tensor:
        return torch.cat([known, torch.nn.functional.pixel_unshuffle(erased.to(known), self.scale)], 1)
