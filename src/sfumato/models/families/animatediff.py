"""AnimateDiff: Stable Diffusion's U-Net over the frames of a clip, with motion modules between its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models import codec
from sfumato.models.condition import Rows
from sfumato.models.families.base import NO_CONTROL, NO_PAG, sibling_classes
from sfumato.models.families.unet import StableDiffusion
from sfumato.models.site import Layer, is_attention

#: frames that the pipeline decodes at once
CHUNK = 16


class AnimateDiff(StableDiffusion):
    """AnimateDiff (Guo et al. 2023, arXiv 2307.04725), motion modules 1 to 3.

    Inside the U-Net a clip is a batch of frames, rows ``(b f)``, sample by sample; every layer of the pictures' own
    U-Net treats them alike. Motion modules fold the other way, rows ``(b h w)``, and attend along the frames.
    """

    name = "animatediff"
    pipeline_classes = ("AnimateDiffPipeline",)
    siblings = {
        **sibling_classes("AnimateDiffPipeline", "AnimateDiff{}Pipeline", "VideoToVideo"),
        **sibling_classes("AnimateDiffPipeline", "AnimateDiff{}Pipeline", "PAG", NO_PAG),
        **sibling_classes(
            "AnimateDiffPipeline",
            "AnimateDiff{}Pipeline",
            "ControlNet SparseControlNet VideoToVideoControlNet",
            NO_CONTROL,
        ),
    }
    capabilities = frozenset(
        {"clips", "noise_path", "differentiable_state", "text_attention", "temporal_attention"}
    )  # features of its layers have their frames folded into the batch, so no h-space
    state = "c f h w"
    defaults = {"steps": 50, "guidance": 7.5, "frames": 16, "fps": 8.0}

    @property
    def embeds_guidance(self) -> bool:
        return False  # the pipeline tells it nothing

    @property
    def frames_limit(self) -> int | None:
        return int(self.config.motion_max_seq_length)

    @property
    def layers(self) -> list[Layer]:
        return []

    def state_shape(self, h: int, w: int, frames: int = 1) -> tuple[int, ...]:
        return self.channels, frames, h, w

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        text = rows["embeds"].repeat_interleave(x.shape[2], 0)
        return super().predict(x, t, {**rows, "embeds": text}, None, extra)

    def decode(self, state: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = 1 / vae.config.scaling_factor * state.to(vae.dtype)  # the pipeline's order of operations
        frames = latents.transpose(1, 2).flatten(0, 1)
        pixels = torch.cat([vae.decode(part, return_dict=False)[0] for part in frames.split(CHUNK)])
        return pixels.unflatten(0, (len(state), -1)).transpose(1, 2).float()

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        vae, latents = self.pipe.vae, []
        for i, clip in enumerate(images.to(self.device, vae.dtype).transpose(1, 2)):
            own = None if generators is None else generators[i]
            parts = [codec.latents_of(vae.encode(part), own) for part in clip.split(CHUNK)]
            latents.append(torch.cat(parts).transpose(0, 1))
        return vae.config.scaling_factor * torch.stack(latents)

    def _attentions(self, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """A picture's transformer and a motion module take turns, layer by layer."""
        parts = [name for name in ("attentions", "motion_modules") if hasattr(block, name)]
        for i in range(max(len(getattr(block, name)) for name in parts)):
            for name in parts:
                for path, module in getattr(block, name)[i].named_modules():
                    if is_attention(module):
                        yield f"{name}.{i}.{path}", module

    def _kind(self, path: str, module: Any) -> str:
        return "temporal" if path.startswith("motion_modules") else super()._kind(path, module)
