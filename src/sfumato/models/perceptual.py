"""A perceptual distance between two pictures, in the form of LPIPS, on the encoder of an autoencoder; nothing fitted.

Zhang et al. 2018 (https://arxiv.org/abs/1801.03924), equation 1 with every weight 1: at each layer the channels of
every place are scaled to length 1, and the squared differences are averaged over places and summed over layers. Each
layer adds a number in [0, 4], 0 for equal directions.

Why an autoencoder's encoder and not toy-clip's vision tower. (1) An encoder E with decoder D gives
|x - y| <= |x - D(E(x))| + L |E(x) - E(y)| + |y - D(E(y))|, L the decoder's Lipschitz constant: what it sees as equal
differs at most by twice its reconstruction error. A contrastive tower has no such bound: it is trained to forget
whatever captions leave out. (2) Its layers are convolutions at several resolutions, so a place means the same patch of
both pictures, and moving both moves the features along; a vision transformer mixes all places from its first layer on
and adds a code for each. The bound holds for features, not for their directions, which LPIPS compares so that no layer
outweighs another by its scale. No weights were fitted to human judgement, and no figure here says how well it agrees
with it. The name in every report is ``perceptual(toy-vae)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato import registry
from sfumato.errors import BadInput, BadWeights
from sfumato.models.readers.loading import net_folder
from sfumato.models.readers.preprocessing import as_tensor, square
from sfumato.once import once

DEFAULT_ENCODER = "toy-vae"


class Perceptual:
    """Distances on the encoder of any ``AutoencoderKL``: the outputs of its down blocks and of its mid block."""

    def __init__(self, codec: Any, name: str, side: int = 64):
        self.encoder, self.name, self.side = codec.encoder, f"perceptual({name})", side

    def layers(self, pixels: Tensor) -> list[Tensor]:
        """Features of pictures (b, 3, h, w) in [-1, 1], one (b, c, h', w') per layer."""
        x = self.encoder.conv_in(pixels)
        out = []
        for block in [*self.encoder.down_blocks, self.encoder.mid_block]:
            x = block(x)
            out.append(x)
        return out

    @torch.no_grad()
    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance (b,) of pictures (b, 3, h, w) in [-1, 1] to their partners. Raises BadInput on unequal shapes."""
        if first.shape != second.shape or first.ndim != 4 or first.shape[1] != 3:
            raise BadInput(
                f"pictures must share one shape (b, 3, h, w); got {tuple(first.shape)}, {tuple(second.shape)}."
            )
        total = torch.zeros(len(first), dtype=torch.float64)
        for a, b in zip(self.layers(first), self.layers(second), strict=True):
            gap = _directions(a) - _directions(b)
            total += gap.square().sum(1).mean((1, 2)).cpu()
        return total

    def between(self, first: Sequence[Image.Image], second: Sequence[Image.Image]) -> np.ndarray:
        """The same for PIL pictures of any size: their centre crops at the encoder's own size."""
        one, two = (as_tensor([square(picture, self.side) for picture in side]) for side in (first, second))
        return self.distances(one, two).numpy()


def _directions(features: Tensor) -> Tensor:
    features = features.double()
    return features / features.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10)


@once(2)
def load_perceptual(name: str = DEFAULT_ENCODER) -> Perceptual:
    """The distance on a built-in autoencoder or on an ``AutoencoderKL`` folder, such as a pipeline's ``vae/``.

    Raises UnknownName when there is no such net, BadWeights when it is no autoencoder.
    """
    from diffusers import AutoencoderKL

    from sfumato.models import quiet
    from sfumato.models.weights import find_weights, read_header
    from sfumato.valid import first_line

    folder = net_folder(name, "autoencoder", [each for each in registry.names() if "vae" in each])
    for path in find_weights(folder):
        read_header(path)
    try:
        with quiet():
            codec = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    except Exception as error:  # diffusers has a complaint of its own for every damage
        raise BadWeights(f"{folder} cannot be read as an autoencoder: {first_line(error)}") from None
    side = codec.config.sample_size
    side = int(side[0] if isinstance(side, Sequence) else side)
    return Perceptual(codec.eval().requires_grad_(False), name if Path(name).name == name else folder.name, side)
