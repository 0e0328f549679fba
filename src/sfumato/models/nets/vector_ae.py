"""An autoencoder whose code is one vector: pictures to (b, n, 1, 1) and back, with the face of ``AutoencoderKL``.

Its bottleneck has no places, so every number of the code is about the whole picture. That is what invertible networks
on codes (Esser, Rombach, Ommer 2020, https://arxiv.org/abs/2004.13166, section 4) and translations between networks
work on; the autoencoders of diffusion models keep a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from sfumato import registry
from sfumato.errors import BadInput, BadWeights, UnknownName
from sfumato.markup import described
from sfumato.models.quiet import quiet
from sfumato.models.weights import check_numbers, find_weights, read_header, read_json
from sfumato.valid import first_line

__all__ = ["VectorAutoencoder", "is_autoencoder", "load_autoencoder"]

GRID = 4  # side of the coarsest maps


@dataclass(frozen=True)
class Encoded:
    """``latent_dist``: a diagonal normal over codes (b n 1 1)."""

    latent_dist: DiagonalGaussianDistribution


@dataclass(frozen=True)
class Decoded:
    """``sample``: pictures (b 3 h w), not clamped."""

    sample: Tensor

    __repr__ = described


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


class VectorAutoencoder(ModelMixin, ConfigMixin):
    """Args:
    sample_size: side of the pictures, a power of 2 from 16; other sizes are resampled to it.
    channels: widths from the finest to the coarsest maps, which are 4 x 4; the last one goes on where sizes need more.
    latent_size: n, numbers of a code.
    blocks: residual blocks at each size, none in the encoder's finest.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        channels: tuple[int, ...] = (16, 32, 64, 64),
        latent_size: int = 64,
        blocks: int = 1,
    ):
        super().__init__()
        levels = math.log2(sample_size / GRID)
        if levels < 2 or levels % 1:
            raise BadInput(f"sample_size must be 16, 32, 64, 128 ..., got {sample_size}.")
        widths = [*channels, *[channels[-1]] * int(levels)][: int(levels)]
        down: list[nn.Module] = []
        for before, width in zip([3, *widths], widths, strict=False):
            inner = blocks if down else 0  # the finest maps cost the most and hold the least
            down += [nn.Conv2d(before, width, 4, 2, 1), *[_Block(width) for _ in range(inner)]]
        self.down = nn.Sequential(*down, nn.GroupNorm(8, widths[-1]), nn.SiLU())
        flat = widths[-1] * GRID**2
        self.to_code, self.from_code = nn.Linear(flat, 2 * latent_size), nn.Linear(latent_size, flat)
        up: list[nn.Module] = []
        back = widths[::-1]
        for width, after in zip(back, back[1:], strict=False):
            up += [*[_Block(width) for _ in range(blocks)], nn.ConvTranspose2d(width, after, 4, 2, 1)]
        up += [*[_Block(back[-1]) for _ in range(blocks)], nn.GroupNorm(8, back[-1]), nn.SiLU()]
        self.up = nn.Sequential(*up, nn.Conv2d(back[-1], 12, 3, padding=1), nn.PixelShuffle(2))

    @property
    def latent_size(self) -> int:
        return int(self.config["latent_size"])

    def encode(self, pixels: Tensor) -> Encoded:
        """Pictures (b 3 h w) in [-1, 1] as normal distributions of codes (b n 1 1). Raises BadInput."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise BadInput(f"pictures must be (b, 3, h, w), got {tuple(pixels.shape)}.")
        side = int(self.config["sample_size"])
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)
        moments = self.to_code(self.down(pixels).flatten(1))
        return Encoded(DiagonalGaussianDistribution(moments[..., None, None]))

    def decode(self, z: Tensor) -> Decoded:
        """Codes (b n) or (b n 1 1) as pictures (b 3 h w). Raises BadInput."""
        if z.shape[1:].numel() != self.latent_size:
            raise BadInput(f"codes must be (b, {self.latent_size}), got {tuple(z.shape)}.")
        maps = self.from_code(z.flatten(1)).unflatten(1, (-1, GRID, GRID))
        return Decoded(self.up(maps))

    def forward(self, pixels: Tensor, **_: Any) -> Decoded:
        """Pictures through the mean of their codes."""
        return self.decode(self.encode(pixels).latent_dist.mode())


def is_autoencoder(name_or_path: str | Path) -> bool:
    """Whether a name or folder holds a vector autoencoder."""
    folder = registry.find(str(name_or_path)) or Path(name_or_path)
    if not (folder / "config.json").is_file():
        return False
    return read_json(folder / "config.json").get("_class_name") == VectorAutoencoder.__name__


def load_autoencoder(name_or_path: str | Path) -> VectorAutoencoder:
    """A vector autoencoder by a built-in name or a folder: frozen, in float32 and eval mode.

    Raises:
        UnknownName: nothing of this name, or another kind of model. BadWeights: damaged, lacking tensors.
    """
    folder = registry.find(str(name_or_path)) or Path(name_or_path)
    if not is_autoencoder(name_or_path):
        known = [each for each in registry.names() if is_autoencoder(each)]
        raise UnknownName("autoencoder of vectors (a built-in one or a folder)", str(name_or_path), known)
    for path in find_weights(folder):
        read_header(path)
    try:
        with quiet():
            found, report = VectorAutoencoder.from_pretrained(
                folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
            )
    except Exception as error:  # diffusers has a complaint of its own for every damage
        raise BadWeights(f"{folder} cannot be read as an autoencoder: {first_line(error)}.") from None
    lost = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    if lost:
        raise BadWeights(f"{folder} lacks {len(lost)} of the tensors of the autoencoder, such as {lost[0]}.")
    check_numbers(folder.name, found)
    return found.eval().requires_grad_(False)
