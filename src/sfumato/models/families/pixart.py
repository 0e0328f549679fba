"""PixArt-Alpha and PixArt-Sigma: a diffusion transformer with cross attention to T5."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Rows
from sfumato.models.families.base import NO_PAG, TEXT_TO_IMAGE, sibling_classes
from sfumato.models.families.caption_cross_attention import CrossAttentionTransformer
from sfumato.models.site import Site, SiteList


class PixArtSigma(CrossAttentionTransformer):
    """Chen et al. 2024, arXiv 2403.04692. The denoiser also predicts a variance, which the sampler does not use."""

    name = "pixart"
    pipeline_classes = ("PixArtSigmaPipeline",)
    siblings = sibling_classes("PixArtSigmaPipeline", "PixArtSigma{}Pipeline", "PAG", NO_PAG)
    denoiser_name = "transformer"
    capabilities = TEXT_TO_IMAGE
    defaults = {"steps": 20, "guidance": 4.5}
    max_sequence_length = 300

    @property
    def size_multiple(self) -> int:
        return math.lcm(8, self.scale * int(self.config.patch_size))

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        out = self.denoiser(
            x,
            encoder_hidden_states=rows["embeds"],
            encoder_attention_mask=rows["mask"],
            timestep=t.expand(x.shape[0]),
            added_cond_kwargs=self._added(x, rows),
            return_dict=False,
            **extra,
        )[0]
        learned_variance = self.config.out_channels // 2 == self.channels
        return out.chunk(2, dim=1)[0] if learned_variance else out

    def _added(self, x: Tensor, rows: Rows) -> dict[str, Tensor | None]:
        return {"resolution": None, "aspect_ratio": None}

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        patch = int(self.config.patch_size)
        grid = (h // patch, w // patch)
        found = SiteList()
        for i, block in enumerate(self.denoiser.transformer_blocks):
            for name in ("attn1", "attn2"):
                module = getattr(block, name)
                cross = bool(module.is_cross_attention)
                found.put(
                    f"transformer_blocks.{i}.{name}",
                    module,
                    kind="cross" if cross else "self",
                    grid=grid,
                    block=f"block.{i}",
                    text=(0, text) if cross else None,
                )
        return found


class PixArtAlpha(PixArtSigma):
    """Chen et al. 2023, arXiv 2310.00426. The 1024-pixel checkpoints also take the picture's size and aspect ratio."""

    name = "pixart-alpha"
    pipeline_classes = ("PixArtAlphaPipeline",)
    max_sequence_length = 120

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        super().set_timesteps(scheduler, steps, h, w, device, frames, **given)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    def _added(self, x: Tensor, rows: Rows) -> dict[str, Tensor | None]:
        if self.config.sample_size != 128:
            return super()._added(x, rows)
        b, height, width = x.shape[0], x.shape[-2] * self.scale, x.shape[-1] * self.scale
        return {
            "resolution": torch.tensor([height, width]).repeat(b, 1).to(rows["embeds"]),
            "aspect_ratio": torch.tensor([float(height / width)]).repeat(b, 1).to(rows["embeds"]),
        }
