"""Representation alignment (REPA, Yu et al. 2024, https://arxiv.org/abs/2410.06940): features in the middle of a
denoiser, which sees a noised picture, are drawn to what a frozen network makes of the clean one."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from sfumato.models.readers.preprocessing import Preprocessing

PROBED = 256  # pictures from which the teacher's means and deviations are measured


class Teacher:
    """The patches of a CLIP's picture tower as (b, h, w, width) maps, and how each feature varies over pictures."""

    def __init__(self, folder: Path):
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        self.tower, config = clip.vision_model.eval().requires_grad_(False), clip.config.vision_config
        self.width, self.cells = config.hidden_size, config.image_size // config.patch_size
        self.preprocessing = Preprocessing.of(folder, config)
        self.mean, self.deviation = torch.zeros(self.width), torch.ones(self.width)

    def probe(self, features: Tensor) -> None:
        """Measures each feature's mean and deviation over ``features`` (n, h, w, width)."""
        flat = features.flatten(0, 2)
        self.mean, self.deviation = flat.mean(0), flat.std(0).clamp(min=1e-6)

    def standardised(self, features: Tensor) -> Tensor:
        """``features`` (b, h, w, width) by the mean and deviation that were measured."""
        return (features - self.mean) / self.deviation

    @torch.no_grad()
    def patches(self, pixels: Tensor) -> Tensor:
        """The features (b, h, w, width) of pictures (b, 3, h, w) in [-1, 1], as they are."""
        hidden = self.tower(self.preprocessing.tensor(pixels)).last_hidden_state[:, 1:]  # the first is the class token
        return hidden.float().unflatten(1, (self.cells, self.cells))


def repa_loss(projected: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """One minus the cosine of projected and wanted features (b, h, w, width), the mean over places: a scalar.

    Args:
        projected: the denoiser's features behind the projection; averaged to the grid of ``wanted`` where finer.
        wanted: of :class:`Teacher`, standardised.
        weight: of places (b, 1, h', w'), mean 1.
    """
    side = wanted.shape[1:3]
    projected = F.adaptive_avg_pool2d(projected.float().permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
    places = F.adaptive_avg_pool2d(weight, side)[:, 0]
    return ((1 - F.cosine_similarity(projected, wanted, dim=-1)) * places).mean()
