"""HunyuanVideo: clips by double and single transformer blocks, guidance distilled, a language model reads the text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.models.condition import COND, UNCOND, Rows
from sfumato.models.families.base import TextStream
from sfumato.models.families.chat_template import TemplatedTokenizer
from sfumato.models.families.video import VideoTransformer
from sfumato.models.site import Site


class HunyuanVideo(VideoTransformer):
    """Kong et al. 2024, arXiv 2412.03603. Attention sees the clip first, then the text behind the template's head, its
    padding masked; CLIP contributes its pooled vector only. Attention among the text alone, in the refiner of its
    tokens, is part of its encoding and no site. A denoiser call sees one guidance branch."""

    name = "hunyuan_video"
    pipeline_classes = ("HunyuanVideoPipeline",)
    siblings = {"HunyuanSkyreelsImageToVideoPipeline": ("HunyuanVideoPipeline", "")}
    defaults = {"steps": 50, "guidance": 6.0, "frames": 129, "fps": 24.0}
    max_sequence_length = 256
    joint_branches = False
    branch_order = (COND, UNCOND)

    @property
    def embeds_guidance(self) -> bool:
        return bool(self.config.guidance_embeds)

    @property
    def patch(self) -> tuple[int, int]:
        return int(self.config.patch_size_t), int(self.config.patch_size)

    @property
    def size_multiple(self) -> int:
        return math.lcm(16, self.scale * self.patch[1])

    @property
    def default_size(self) -> tuple[int, int]:
        return 720, 1280

    @property
    def streams(self) -> list[TextStream]:
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as template

        if self.pipe.tokenizer is None:
            return []
        head = int(template["crop_start"])
        tokenizer = TemplatedTokenizer(self.pipe.tokenizer, template["template"].format)
        return [TextStream(tokenizer, "llama", -head, head + (self.max_sequence_length or 0), lambda text: text)]

    @property
    def text_length(self) -> int:
        return self.max_sequence_length or 0

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        def rows(texts: list[str]) -> Rows:
            embeds, pooled, mask = self.pipe.encode_prompt(
                texts, device=self.device, max_sequence_length=self.max_sequence_length
            )
            return {"embeds": embeds, "pooled": pooled, "mask": mask}

        return rows(prompts), rows(negatives or [""] * len(prompts)) if guidance else None

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        dtype, scale = self.denoiser.dtype, None
        if self.embeds_guidance:
            value = float(self.defaults["guidance"]) if guidance is None else guidance
            scale = torch.tensor([value] * len(x), dtype=dtype, device=x.device) * 1000.0
        return self.denoiser(
            hidden_states=x.to(dtype),
            timestep=t.expand(len(x)).to(x.dtype),
            encoder_hidden_states=rows["embeds"].to(dtype),
            encoder_attention_mask=rows["mask"].to(dtype),
            pooled_projections=rows["pooled"].to(dtype),
            guidance=scale,
            return_dict=False,
            **extra,
        )[0]

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        sigmas = self._spaced(scheduler, np.linspace(1.0, 0.0, steps + 1)[:-1], given)
        self._set(scheduler, steps, device, given, **sigmas)
        scheduler.set_begin_index(0)

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        blocks = {"joint": "transformer_blocks", "single": "single_transformer_blocks"}
        return self._joint(blocks, "attn", h, w, text, frames, text_first=False)
