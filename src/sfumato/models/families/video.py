"""What the video transformers have in common: latents of a clip, compressed in time too, attended to all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.models.condition import Rows
from sfumato.models.families.base import Family
from sfumato.models.site import Site, SiteList


class VideoTransformer(Family):
    """The base of such families. Nothing is folded: a sequence holds the places of all frames, (f h w)."""

    denoiser_name = "transformer"
    capabilities = frozenset({"clips", "noise_path", "differentiable_state", "text_attention"})
    state = "c f h w"
    half = torch.bfloat16

    @property
    def scale(self) -> int:
        return int(self.pipe.vae_scale_factor_spatial)

    @property
    def frames_per_state(self) -> int:
        return int(self.pipe.vae_scale_factor_temporal)

    @property
    def patch(self) -> tuple[int, int]:
        """Frames and cells along one side of the state that make one token."""
        raise NotImplementedError

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float32  # whatever the model's

    def state_shape(self, h: int, w: int, frames: int = 1) -> tuple[int, ...]:
        return self.channels, self.states_of(frames), h, w

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        embeds, negative = self.pipe.encode_prompt(
            prompts,
            negatives,
            guidance,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return {"embeds": embeds}, {"embeds": negative} if guidance else None

    def prepare(self, noise: Tensor, scheduler: Any) -> Tensor:
        return noise

    def _tokens(self, h: int, w: int, frames: int) -> tuple[int, tuple[int, int]]:
        """Frames and grid (h, w) of the tokens."""
        deep, wide = self.patch
        return self.states_of(frames) // deep, (h // wide, w // wide)

    def _crossing(self, blocks: str, h: int, w: int, text: int, frames: int) -> list[Site]:
        """Sites of blocks with self-attention, ``attn1``, and cross-attention to the text, ``attn2``."""
        f, grid = self._tokens(h, w, frames)
        found = SiteList()
        for i, block in enumerate(getattr(self.denoiser, blocks)):
            for name, kind in (("attn1", "self"), ("attn2", "cross")):
                found.put(
                    f"{blocks}.{i}.{name}",
                    getattr(block, name),
                    kind=kind,
                    grid=grid,
                    block=f"block.{i}",
                    image=(0, f * grid[0] * grid[1]),
                    text=(0, text) if kind == "cross" else None,
                    frames=f,
                )
        return found

    def _joint(
        self, blocks: dict[str, str], at: str, h: int, w: int, text: int, frames: int, text_first: bool
    ) -> list[Site]:
        """Sites of ``blocks`` (name -> the denoiser's attribute) whose attention ``at`` sees text and clip in one
        sequence."""
        f, grid = self._tokens(h, w, frames)
        n = f * grid[0] * grid[1]
        image, words = ((text, text + n), (0, text)) if text_first else ((0, n), (n, n + text))
        found = SiteList()
        for name, attribute in blocks.items():
            layers = getattr(self.denoiser, attribute)
            found.put_joint(layers, attribute, at, name, grid=grid, image=image, text=words, frames=f)
        return found
