"""What checkpoints for inpainting have in common: a denoiser that sees a mask and the picture outside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.models import codec
from sfumato.models.condition import Rows
from sfumato.models.families.base import Family


class Inpainting(Family):
    """Put before the family whose denoiser reads more channels.

    The denoiser sees the noisy latents and the :meth:`hole`: the mask (1: draw anew) and the latents of the picture
    with the hole in grey. It travels in the condition, as ``hole`` (b m+c h w); where a condition has none everything
    is drawn anew, so that the model makes pictures from prompts like any other. A pipeline with an ordinary denoiser
    takes no mask.
    """

    inpaints = True

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        super().__init__(pipe, max_sequence_length)
        self._empty: dict[tuple[Any, ...], Tensor] = {}

    @property
    def channels(self) -> int:
        return int(self.pipe.vae.config.latent_channels)

    @property
    def read_channels(self) -> int:
        """Channels that the denoiser reads for each place of the latents."""
        return int(self.config.in_channels)

    @property
    def mask_channels(self) -> int:
        """``m``: how many of them are the mask."""
        return 1

    @property
    def takes_mask(self) -> bool:
        return self.read_channels == 2 * self.channels + self.mask_channels

    @property
    def further_channels(self) -> int:
        return 0 if self.takes_mask else self.read_channels - self.channels

    def has(self, capability: str) -> bool:
        return super().has(capability) and (capability != "mask_input" or self.takes_mask)

    def hole(self, known: Tensor, erased: Tensor, share: Tensor) -> Tensor:
        """What the denoiser sees beside its latents (b m+c h w), of the latents ``known`` (b c h w) of pictures with a
        hole in grey; ``erased`` (b 1 H W) and ``share`` (b 1 h w) are 1 where to draw anew."""
        return torch.cat([share.to(known), known], 1)

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        super().set_timesteps(scheduler, steps, h, w, device, frames, **given)
        if self.takes_mask:  # before anybody watches the denoiser: the autoencoder has attention of its own
            self._all(torch.empty(1, self.channels, h, w, device=device, dtype=self.denoiser.dtype))

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        if self.takes_mask:
            hole = rows["hole"] if "hole" in rows else self._all(x).expand(len(x), -1, -1, -1)
            x = torch.cat([x, hole.to(x)], 1)
        return super().predict(x, t, rows, guidance, extra)

    def _all(self, x: Tensor) -> Tensor:
        """(1 m+c h w): a hole as large as the picture, for latents like ``x``."""
        key = (*x.shape[-2:], x.dtype, x.device)
        if key not in self._empty:
            vae = self.pipe.vae
            size = (x.shape[-2] * self.scale, x.shape[-1] * self.scale)
            with torch.no_grad():
                grey = torch.zeros(1, 3, *size, device=self.device, dtype=vae.dtype)
                latents = codec.finite(vae, lambda rows: self.encode_image(grey[rows], None), "encoded", self.name)
            self._empty[key] = self.hole(latents, torch.ones_like(grey[:, :1]), torch.ones_like(latents[:, :1])).to(x)
        return self._empty[key]
