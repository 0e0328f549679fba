"""The SDXL refiner: SDXL with its larger CLIP alone, trained on low noise, told an aesthetic score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Rows
from sfumato.models.families.unet import StableDiffusionXL


class StableDiffusionXLRefiner(StableDiffusionXL):
    """Podell et al. 2023, section 2.5. It finishes pictures: give it an image and a strength, or the latents with which
    the base model ends (``denoising_end``) at ``denoising_start``. In place of the target size it is told how pleasing
    the picture is, ``aesthetic`` (b 1) of the rows: 6 with the prompt and 2.5 without, as in its pipeline."""

    name = "sdxl_refiner"
    pipeline_classes = ("StableDiffusionXLImg2ImgPipeline",)
    siblings = {}
    told_by = {"requires_aesthetics_score": True}
    finishes = True

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        cond, uncond = super().encode(prompts, negatives, guidance)
        for rows, score in ((cond, 6.0), (uncond, 2.5)):
            if rows is not None:
                rows["aesthetic"] = torch.full_like(rows["pooled"][:, :1], score)
        return cond, uncond

    def _time_ids(self, x: Tensor, rows: Rows) -> Tensor:
        size = (x.shape[-2] * self.scale, x.shape[-1] * self.scale)
        return rows["pooled"].new_tensor((*size, 0, 0, 0, 0)).repeat(len(x), 1)

    def _added(self, x: Tensor, rows: Rows) -> dict[str, Any] | None:
        ids = rows.get("time_ids", self._time_ids(x, rows))
        return {"text_embeds": rows["pooled"], "time_ids": torch.cat([ids[:, :4], rows["aesthetic"].to(ids)], 1)}
