"""Sana: linear self-attention, ordinary cross-attention to Gemma, a deep-compression autoencoder, flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Rows
from sfumato.models.families.base import NO_CONTROL, NO_PAG, TEXT_TO_IMAGE, sibling_classes
from sfumato.models.families.caption_cross_attention import CrossAttentionTransformer
from sfumato.models.site import Site, SiteList


class Sana(CrossAttentionTransformer):
    """Xie et al. 2024, arXiv 2410.10629. Sites are the cross-attentions alone: the linear self-attention has no
    probabilities that could be read or edited.

    Prompts are encoded without the pipeline's ``complex_human_instruction``: with it the words of a prompt and those of
    a negative prompt lie at different places of the text axis. Give it as part of the prompt where it is wanted.
    """

    name = "sana"
    pipeline_classes = ("SanaPipeline",)
    siblings = {
        **sibling_classes("SanaPipeline", "Sana{}Pipeline", "PAG", NO_PAG),
        **sibling_classes("SanaPipeline", "Sana{}Pipeline", "ControlNet", NO_CONTROL),
    }
    denoiser_name = "transformer"
    capabilities = TEXT_TO_IMAGE
    defaults = {"steps": 20, "guidance": 4.5}
    max_sequence_length = 300
    half = torch.bfloat16
    encoder = "gemma"

    @property
    def size_multiple(self) -> int:
        return self.scale * int(self.config.patch_size)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float32  # whatever the model's

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        dtype = self.denoiser.dtype
        out = self.denoiser(
            x.to(dtype),
            encoder_hidden_states=rows["embeds"].to(dtype),
            encoder_attention_mask=rows["mask"],
            timestep=t.expand(x.shape[0]) * self.config.timestep_scale,
            return_dict=False,
            **extra,
        )[0]
        learned_variance = self.config.out_channels // 2 == self.channels
        return (out.chunk(2, dim=1)[0] if learned_variance else out).float()

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        vae = self.pipe.vae  # deterministic: there is nothing to draw
        return vae.encode(images.to(self.device, vae.dtype)).latent * vae.config.scaling_factor

    def prepare(self, noise: Tensor, scheduler: Any) -> Tensor:
        return noise

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        patch = int(self.config.patch_size)
        grid = (h // patch, w // patch)
        found = SiteList()
        for i, block in enumerate(self.denoiser.transformer_blocks):
            found.put(
                f"transformer_blocks.{i}.attn2",
                block.attn2,
                kind="cross",
                grid=grid,
                block=f"block.{i}",
                text=(0, text),
            )
        return found
