"""Lumina-Image 2.0: one sequence of text and image through every block, packed anew for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.models.condition import COND, UNCOND, Rows
from sfumato.models.families.base import TEXT_TO_IMAGE, Family, TextStream
from sfumato.models.families.chat_template import TemplatedTokenizer
from sfumato.models.site import Site, SiteList


class Lumina2(Family):
    """Qin et al. 2025, arXiv 2503.21758. A sample's sequence is its own text, without padding, then the image, so
    where the image begins differs within a batch: :meth:`places`. Attention among the text alone, in the blocks that
    refine it first, is part of its encoding and no site. A denoiser call sees one guidance branch; the guided output
    gets the length, row of latents by row of latents, that the conditional one has (as the pipeline does it)."""

    name = "lumina2"
    pipeline_classes = ("Lumina2Pipeline",)
    shifts_latents = True
    denoiser_name = "transformer"
    capabilities = TEXT_TO_IMAGE
    defaults = {"steps": 30, "guidance": 4.0}
    max_sequence_length = 256
    joint_branches = False
    branch_order = (COND, UNCOND)
    half = torch.bfloat16
    negates = True

    @property
    def size_multiple(self) -> int:
        return self.scale * int(self.config.patch_size)

    @property
    def size_limit(self) -> int:
        return self.size_multiple * min(self.config.axes_lens[1:])

    @property
    def streams(self) -> list[TextStream]:
        def template(text: str) -> str:
            return f"{self.pipe.system_prompt} <Prompt Start> {text}"

        tokenizer = self.pipe.tokenizer
        if tokenizer is None:
            return []
        length = self.max_sequence_length or 0
        return [
            TextStream(TemplatedTokenizer(tokenizer, template), "gemma", 0, length, lambda text: text, padded=False)
        ]

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        embeds, mask, negative, negative_mask = self.pipe.encode_prompt(
            prompts,
            guidance,
            negative_prompt=negatives,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds, "mask": mask}, {"embeds": negative, "mask": negative_mask} if guidance else None

    def text_in(self, rows: Rows) -> int:
        return int(rows["mask"].sum(1).max())

    def places(self, rows: Rows, site: Site) -> Tensor | None:
        own = rows["mask"].sum(1, keepdim=True)
        if site.kind != "joint" or bool((own == own[0]).all()):
            return None
        n = site.image[1] - site.image[0]
        text = torch.arange(int(own.max()), device=own.device)[None]
        image = own + torch.arange(n, device=own.device)
        return torch.cat([torch.where(text < own, text, text + n), image], 1)  # padding comes behind the image

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        time = 1 - t / self.pipe.scheduler.config.num_train_timesteps  # it counts from noise to picture
        return -self.denoiser(
            hidden_states=x,
            timestep=time.expand(x.shape[0]),
            encoder_hidden_states=rows["embeds"],
            encoder_attention_mask=rows["mask"],
            return_dict=False,
            **extra,
        )[0]

    def combine(self, uncond: Tensor, conds: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        guided = super().combine(uncond, conds, weights)
        wanted, length = (torch.norm(each, dim=-1, keepdim=True) for each in (conds[0], guided))
        return guided * (wanted / length)

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        sigmas = self._spaced(scheduler, np.linspace(1.0, 1 / steps, steps), given)
        # the pipeline takes the channels for the number of image tokens
        self._shifted_timesteps(scheduler, steps, device, self.channels, max_shift=1.15, given=given, **sigmas)
        scheduler.set_begin_index(0)

    def prepare(self, noise: Tensor, scheduler: Any) -> Tensor:
        return noise

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        patch = int(self.config.patch_size)
        grid = (h // patch, w // patch)
        image = (text, text + grid[0] * grid[1])
        found = SiteList()
        for i, block in enumerate(self.denoiser.noise_refiner):
            found.put(f"noise_refiner.{i}.attn", block.attn, kind="self", grid=grid, block=f"refiner.{i}")
        found.put_joint(self.denoiser.layers, "layers", "attn", "joint", grid=grid, image=image, text=(0, text))
        return found
