"""AuraFlow: joint and single transformer blocks behind eight register tokens, trained by rectified flow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Rows
from sfumato.models.families.base import TEXT_TO_IMAGE, Family, TextStream
from sfumato.models.site import Layer, Site, SiteList


class AuraFlow(Family):
    """fal 2024. Attention sees learned register tokens first (Darcet et al. 2023, arXiv 2309.16588), then the text,
    then the image. Padding is not masked: its features are zero before the projection."""

    name = "auraflow"
    pipeline_classes = ("AuraFlowPipeline",)
    denoiser_name = "transformer"
    capabilities = TEXT_TO_IMAGE | {"joint_attention"}
    defaults = {"steps": 50, "guidance": 3.5}
    max_sequence_length = 256

    @property
    def size_multiple(self) -> int:
        return self.scale * int(self.config.patch_size)

    @property
    def size_limit(self) -> int:
        return self.size_multiple * math.isqrt(int(self.config.pos_embed_max_size))

    @property
    def default_size(self) -> tuple[int, int]:
        return 1024, 1024

    @property
    def streams(self) -> list[TextStream]:
        return self._stream("tokenizer", "t5", 0, self.max_sequence_length)

    @property
    def layers(self) -> list[Layer]:
        # joint blocks give text and image; single blocks one sequence of registers, text and image, not a picture
        joint = range(len(self.denoiser.joint_transformer_blocks))
        return [Layer(f"joint.{i}", f"joint_transformer_blocks.{i}", 1) for i in joint]

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        embeds, _, negative, _ = self.pipe.encode_prompt(
            prompts,
            negative_prompt=negatives,
            do_classifier_free_guidance=guidance,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds}, {"embeds": negative} if guidance else None

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        return self.denoiser(
            x.contiguous(),
            encoder_hidden_states=rows["embeds"],
            timestep=(t / 1000).expand(x.shape[0]).to(x.dtype),
            return_dict=False,
            **extra,
        )[0]

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        self._set(scheduler, steps, device, given)
        scheduler.set_begin_index(0)

    def prepare(self, noise: Tensor, scheduler: Any) -> Tensor:
        return noise

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        patch = int(self.config.patch_size)
        grid = (h // patch, w // patch)
        registers = int(self.denoiser.register_tokens.shape[1])
        words = (registers, registers + text)
        image = (words[1], words[1] + grid[0] * grid[1])
        found = SiteList()
        for name, blocks in (("joint", "joint_transformer_blocks"), ("single", "single_transformer_blocks")):
            found.put_joint(getattr(self.denoiser, blocks), blocks, "attn", name, grid=grid, image=image, text=words)
        return found
