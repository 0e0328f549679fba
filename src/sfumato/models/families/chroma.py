"""Chroma: Flux without guidance distillation, its modulations computed by one small network, its padding masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Rows
from sfumato.models.families.base import TextStream, sibling_classes
from sfumato.models.families.flux import Flux
from sfumato.models.site import Layer


class Chroma(Flux):
    """Lodestone Rock 2025, Chroma1. As in Flux, attention sees the T5 tokens first, then the image, and a denoiser call
    sees one guidance branch. The pipeline adds its mask (1: the text and one padding token) to the scores, so padding
    is weighed down by a factor e rather than hidden."""

    name = "chroma"
    pipeline_classes = ("ChromaPipeline",)
    siblings = sibling_classes("ChromaPipeline", "Chroma{}Pipeline", "Img2Img Inpaint")

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        super().__init__(pipe, max_sequence_length)
        self.defaults = {"steps": 35, "guidance": 5.0}

    @property
    def embeds_guidance(self) -> bool:
        return False

    @property
    def layers(self) -> list[Layer]:
        # single blocks give one sequence of text and image, not a picture
        return [layer for layer in super().layers if layer.name.startswith("joint")]

    @property
    def streams(self) -> list[TextStream]:
        return self._stream("tokenizer", "t5", 0, self.max_sequence_length)

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        embeds, _, mask, negative, _, negative_mask = self.pipe.encode_prompt(
            prompts,
            negatives or [""] * len(prompts),
            device=self.device,
            do_classifier_free_guidance=guidance,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds, "mask": mask}, {"embeds": negative, "mask": negative_mask} if guidance else None

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        b, c, h, w = x.shape
        embeds = rows["embeds"]
        packed = self.pipe._pack_latents(x.contiguous(), b, c, h, w)
        out = self.denoiser(
            hidden_states=packed,
            timestep=t.expand(b).to(x.dtype) / 1000,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device, dtype=embeds.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(b, h // 2, w // 2, x.device, embeds.dtype),
            attention_mask=self.pipe._prepare_attention_mask(b, packed.shape[1], x.dtype, rows["mask"]),
            return_dict=False,
            **extra,
        )[0]
        return self.pipe._unpack_latents(out, h * self.scale, w * self.scale, self.scale)
