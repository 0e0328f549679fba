"""Flux.1: double and single transformer blocks over packed latents, trained by rectified flow, guidance distilled."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import NotSupported
from sfumato.models.condition import COND, UNCOND, Rows
from sfumato.models.families.base import NO_CONTROL, TEXT_TO_IMAGE, Family, TextStream, sibling_classes
from sfumato.models.site import Layer, Site, SiteList


class Flux(Family):
    """Black Forest Labs 2024. Attention sees the T5 tokens first, then the image, in double and in single blocks;
    CLIP contributes its pooled vector only. A denoiser call sees one guidance branch."""

    name = "flux"
    pipeline_classes = ("FluxPipeline",)
    siblings = {
        **sibling_classes("FluxPipeline", "Flux{}Pipeline", "Img2Img Inpaint Control ControlImg2Img ControlInpaint"),
        **sibling_classes("FluxPipeline", "FluxControlNet{}Pipeline", "Img2Img Inpaint", NO_CONTROL),
        "FluxControlNetPipeline": ("FluxPipeline", NO_CONTROL),
    }
    shifts_latents = True
    denoiser_name = "transformer"
    capabilities = TEXT_TO_IMAGE | {"joint_attention"}
    defaults: dict[str, Any] = {"steps": 28, "guidance": 3.5}
    max_sequence_length = 512
    joint_branches = False
    branch_order = (COND, UNCOND)
    #: kinds of blocks with the denoiser's attribute that holds them, in the order of execution
    blocks: ClassVar[tuple[tuple[str, str], ...]] = (
        ("joint", "transformer_blocks"),
        ("single", "single_transformer_blocks"),
    )
    half = torch.bfloat16

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        super().__init__(pipe, max_sequence_length)
        if not self.embeds_guidance:  # schnell is distilled to few steps and takes no guidance
            self.defaults = {"steps": 4, "guidance": 1.0}

    @property
    def channels(self) -> int:
        return int(self.config.in_channels) // 4  # 2x2 latents are packed into one token

    @property
    def embeds_guidance(self) -> bool:
        return bool(self.config.guidance_embeds)

    @property
    def size_multiple(self) -> int:
        return self.scale * 2

    @property
    def streams(self) -> list[TextStream]:
        return self._stream("tokenizer_2", "t5", 0, self.max_sequence_length)

    @property
    def layers(self) -> list[Layer]:
        return [
            Layer(f"{name}.{i}", f"{blocks}.{i}", 1)
            for name, blocks in self.blocks
            for i in range(len(getattr(self.denoiser, blocks)))
        ]

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        def rows(texts: list[str]) -> Rows:
            embeds, pooled, _ = self.pipe.encode_prompt(
                texts, device=self.device, max_sequence_length=self.max_sequence_length
            )
            return {"embeds": embeds, "pooled": pooled}

        return rows(prompts), rows(negatives or [""] * len(prompts)) if guidance else None

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        b, c, h, w = x.shape
        embeds = rows["embeds"]
        scale = None
        if self.embeds_guidance:
            value = self.defaults["guidance"] if guidance is None else guidance
            scale = torch.full([1], value, device=x.device, dtype=torch.float32).expand(b)
        cached = getattr(self.denoiser, "is_cache_enabled", False)
        tokens, ids = self._sequence(x, rows)
        with self.denoiser.cache_context("cond") if cached else nullcontext():
            out = self.denoiser(
                hidden_states=tokens,
                timestep=t.expand(b).to(x.dtype) / 1000,
                guidance=scale,
                pooled_projections=rows["pooled"],
                encoder_hidden_states=embeds,
                txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device, dtype=embeds.dtype),
                img_ids=ids,
                return_dict=False,
                **extra,
            )[0]
        drawn = out[:, : (h // 2) * (w // 2)]
        return self.pipe._unpack_latents(drawn, h * self.scale, w * self.scale, self.scale)

    def _sequence(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Tokens (b n c) of the picture that is drawn, then of those it is drawn by, and their places (n 3): whose
        picture, row, column."""
        tokens, places = [], []
        for i, state in enumerate((x, *self.references_of(rows))):
            b, c, h, w = state.shape
            tokens.append(self.pipe._pack_latents(state.contiguous(), b, c, h, w))
            places.append(self.pipe._prepare_latent_image_ids(b, h // 2, w // 2, x.device, rows["embeds"].dtype))
            places[-1][..., 0] = i
        return torch.cat(tokens, 1), torch.cat(places)

    def grid_of_call(self, arguments: dict[str, Any]) -> tuple[int, int, int]:
        h, w = self.tokens_of_call(arguments)
        return 1, 2 * h, 2 * w

    @staticmethod
    def tokens_of_call(arguments: dict[str, Any]) -> tuple[int, int]:
        """(h, w) of the tokens that are drawn; those of reference pictures follow them and count in their first
        place."""
        ids = arguments["img_ids"]
        ids = ids if ids.dim() == 2 else ids[0]
        drawn = ids[ids[:, 0] == 0]
        h, w = int(drawn[:, 1].max()) + 1, int(drawn[:, 2].max()) + 1
        if not torch.equal(drawn, ids[: h * w]) or len(drawn) != h * w:
            raise NotSupported("the tokens that are drawn do not come first, row by row, so their places are unknown.")
        return h, w

    def unpacked(self, x: Tensor, h: int, w: int) -> Tensor:
        drawn = x[:, : (h // 2) * (w // 2)]  # tokens of reference pictures follow
        cells = drawn.unflatten(1, (h // 2, w // 2)).unflatten(-1, (-1, 2, 2))  # b h w c 2 2
        return cells.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4)

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        sigmas = self._spaced(scheduler, np.linspace(1.0, 1 / steps, steps), given)
        self._shifted_timesteps(scheduler, steps, device, (h // 2) * (w // 2), max_shift=1.15, given=given, **sigmas)
        scheduler.set_begin_index(0)

    def prepare(self, noise: Tensor, scheduler: Any) -> Tensor:
        return noise

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        grid = (h // 2, w // 2)
        image = (text, text + grid[0] * grid[1])
        found = SiteList()
        for name, blocks in self.blocks:
            found.put_joint(
                getattr(self.denoiser, blocks), blocks, "attn", name, grid=grid, image=image, text=(0, text)
            )
        return found
