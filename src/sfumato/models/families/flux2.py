"""Flux.2 [klein]: double and single transformer blocks over patched latents, Qwen3 as text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.models.condition import Rows
from sfumato.models.families.base import TEXT_TO_IMAGE, TextStream
from sfumato.models.families.flux import Flux
from sfumato.models.families.templated import Templated, chat
from sfumato.models.site import Layer, Site


class Flux2Klein(Flux):
    """Black Forest Labs 2026. Attention sees the tokens of the whole chat template first, padding included and not
    masked, then the image, in double and in single blocks. A state is patched and normalised as the denoiser gets it:
    one token is one place of the grid."""

    name = "flux2-klein"
    pipeline_classes = ("Flux2KleinPipeline",)
    further_channels = 0  # four latents make one place
    capabilities = TEXT_TO_IMAGE | {"joint_attention"}

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        super().__init__(pipe, max_sequence_length)
        distilled = bool(pipe.config.is_distilled)
        self.defaults = {"steps": 4, "guidance": 1.0} if distilled else {"steps": 50, "guidance": 4.0}

    @property
    def embeds_guidance(self) -> bool:
        return False

    @property
    def channels(self) -> int:
        return int(self.config.in_channels)

    @property
    def scale(self) -> int:
        return int(self.pipe.vae_scale_factor) * 2

    @property
    def size_multiple(self) -> int:
        return self.scale

    @property
    def default_size(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size * int(self.pipe.vae_scale_factor)
        return side, side

    @property
    def streams(self) -> list[TextStream]:
        tokenizer = self.pipe.tokenizer
        if tokenizer is None:
            return []
        length = self.max_sequence_length or 0
        templated = Templated(tokenizer, chat(tokenizer, thinking=False))
        return [TextStream(templated, "qwen", 0, length, lambda text: text)]

    @property
    def layers(self) -> list[Layer]:
        # single blocks give one sequence of text and image, not a picture
        return [layer for layer in super().layers if layer.name.startswith("joint")]

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        def rows(texts: list[str]) -> Rows:
            embeds, _ = self.pipe.encode_prompt(texts, device=self.device, max_sequence_length=self.max_sequence_length)
            return {"embeds": embeds}

        return rows(prompts), rows(negatives or [""] * len(prompts)) if guidance else None

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        embeds = rows["embeds"]
        out = self.denoiser(
            hidden_states=self.pipe._pack_latents(x).to(self.denoiser.dtype),
            timestep=t.expand(x.shape[0]).to(x.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=self.pipe._prepare_text_ids(embeds).to(x.device),
            img_ids=self.pipe._prepare_latent_ids(x).to(x.device),
            return_dict=False,
            **extra,
        )[0]
        return out.transpose(1, 2).reshape(x.shape)

    def grid_of_call(self, arguments: dict[str, Any]) -> tuple[int, int, int]:
        return 1, *self.tokens_of_call(arguments)

    def unpacked(self, x: Tensor, h: int, w: int) -> Tensor:
        return x[:, : h * w].transpose(1, 2).unflatten(-1, (h, w))

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        kwargs = self._spaced(scheduler, np.linspace(1.0, 1 / steps, steps), given)
        if scheduler.config.get("use_dynamic_shifting"):
            kwargs["mu"] = compute_empirical_mu(image_seq_len=h * w, num_steps=steps)
        self._set(scheduler, steps, device, given, **kwargs)
        scheduler.set_begin_index(0)

    def decode(self, state: Tensor) -> Tensor:
        mean, std = self._statistics(state)
        latents = self.pipe._unpatchify_latents(state * std + mean)
        return self.pipe.vae.decode(latents.to(self.pipe.vae.dtype), return_dict=False)[0]

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        vae = self.pipe.vae
        spread = vae.encode(images.to(self.device, vae.dtype)).latent_dist
        latents = self.pipe._patchify_latents(spread.mode())  # as the pipeline reads pictures: nothing is drawn
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel of patched latents (1 c 1 1)."""
        norm = self.pipe.vae.bn
        variance = norm.running_var.view(1, -1, 1, 1) + self.pipe.vae.config.batch_norm_eps
        return norm.running_mean.view(1, -1, 1, 1).to(like), torch.sqrt(variance).to(like)

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        return super().sites(2 * h, 2 * w, text)  # Flux counts latents before they are patched
