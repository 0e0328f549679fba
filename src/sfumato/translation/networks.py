"""Frozen networks as givers of vectors: pictures in, one vector each, and pictures back where the network decodes.

=====================================  ===============================================================================
network                                its vector
=====================================  ===============================================================================
a vector autoencoder (``toy-ae``)      the mean of the code; ``spread`` its deviation; decodes
any net for pictures (ResNet, ViT,     a layer's output, averaged over places (or laid out); by default the image
CLIP's vision tower)                   embedding, else the last stage
a text-to-image model                  a layer of its denoiser (``mid_block``) shown the noised picture, or ``vae``: the
                                       latents, averaged over places
=====================================  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models import Model
from sfumato.models.layers import features, stages
from sfumato.models.nets.vector_ae import VectorAutoencoder
from sfumato.sampling.noised import noised_forward

__all__ = ["Network", "network_of", "side_of"]

CODE = "code"
HEADS = ("classifier", "fc", "head")
BATCH = 64


@dataclass(eq=False)
class Network:
    """A frozen network. ``side``: of the pictures that it is shown, in pixels.

    ``read`` gives vectors (b n), or maps (b c h w), and their spread (same shape) or None; ``decode`` pictures
    (b 3 h w) in [-1, 1], None where it cannot.
    """

    name: str
    layer: str
    side: int
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    decode: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def vectors(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Vectors (b n) of pictures (b 3 h w) in [-1, 1], in float32 on the CPU, and their spread.

        Raises BadInput: values that are not finite, or others for the same pictures a second time.
        """
        parts = [self.read(chunk) for chunk in pixels.split(BATCH)]
        found = torch.cat([mean.float().cpu() for mean, _ in parts])
        spreads = [spread for _, spread in parts if spread is not None]
        wrong = int((~torch.isfinite(found).flatten(1)).any(1).sum())
        if wrong:
            raise BadInput(f"{self.name} ({self.layer}) gives values that are not finite for {wrong} pictures.")
        again = self.read(pixels[:2])[0].float().cpu()
        if not torch.allclose(again, found[: len(again)], rtol=1e-3, atol=1e-4 * float(found.abs().mean() + 1e-12)):
            raise BadInput(f"{self.name} ({self.layer}) gives other vectors for the same pictures; call eval().")
        return found, torch.cat([each.float().cpu() for each in spreads]) if spreads else None

    def pictures(self, z: Tensor) -> Tensor:
        """Pictures (b 3 h w) of vectors (b n). Raises NotSupported for networks that do not decode, BadInput for
        vectors whose pictures are not numbers."""
        if self.decode is None:
            raise NotSupported(f"{self.name} ({self.layer}) decodes no vectors; use an autoencoder (toy-ae).")
        with torch.no_grad():
            found = torch.cat([self.decode(chunk).float().clamp(-1, 1) for chunk in z.split(BATCH)])
        if wrong := int(found.isnan().flatten(1).any(1).sum()):
            raise BadInput(f"{self.name} decodes {wrong} of {len(z)} vectors to pictures that are not numbers.")
        return found


def side_of(net: nn.Module | Model) -> int:
    """Side of the pictures that a net is shown: what it says of itself, else 64."""
    if isinstance(net, Model):
        return net.default_size[0]
    size = getattr(getattr(net, "config", None), "image_size", None)
    size = size or getattr(getattr(net, "config", None), "sample_size", None)
    own = getattr(getattr(net, "preprocessing", None), "size", None)
    return int(size) if isinstance(size, int) else int(own[0]) if own else 64


def network_of(
    net: Any, layer: str = "", name: str = "", *, pool: str | None = "mean", progress: float = 0.7
) -> Network:
    """A network that gives vectors; the table above says which.

    Args:
        net: a module or a :class:`Model`.
        layer: which output; empty: the network's own vector.
        pool: how a layer's places become one vector, see :func:`sfumato.models.layers.pooled`; None keeps maps.
        progress: denoisers: the share of the denoising that lies behind the picture shown.

    Raises UnknownName (layer), NotSupported (nothing that looks at pictures).
    """
    name = name or getattr(net, "name", "") or type(net).__name__
    if isinstance(net, VectorAutoencoder):
        if layer not in ("", CODE):
            raise UnknownName("layer of a vector autoencoder", layer, [CODE])
        return _autoencoder(net, name)
    side = side_of(net)
    if isinstance(net, Model):
        return _model(net, layer or "mid_block", name, side, pool, progress)
    if not isinstance(net, nn.Module):
        raise NotSupported(f"{type(net).__name__} is no network that looks at pictures.")
    if not layer and hasattr(net, "visual_projection"):
        layer = "visual_projection"
    if not layer:
        own = [stage for stage in stages(net) if stage not in HEADS]
        if not own:
            raise NotSupported(f"{name} has no layers to read but its answer.")
        layer = own[-1]

    def read(pixels: Tensor) -> tuple[Tensor, None]:
        return features(net, pixels, [layer], pool)[layer], None

    return Network(name, layer, side, read)


def _autoencoder(net: VectorAutoencoder, name: str) -> Network:
    def read(pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = net.encode(pixels.to(net.device, net.dtype)).latent_dist
        return found.mean.flatten(1), found.std.flatten(1)

    def decode(z: Tensor) -> Tensor:
        return net.decode(z.to(net.device, net.dtype)).sample.cpu()

    return Network(name, CODE, int(net.config["sample_size"]), read, decode)


def _model(model: Model, layer: str, name: str, side: int, pool: str | None, progress: float) -> Network:
    if layer == "vae":

        def latents(pixels: Tensor) -> tuple[Tensor, None]:
            found = model.encode_image(pixels.to(model.device, model.dtype))
            return found.flatten(2).mean(2) if pool == "mean" else found.flatten(1) if pool else found, None

        return Network(name, layer, side, latents)

    def read(pixels: Tensor) -> tuple[Tensor, None]:
        forward = noised_forward(model, progress)
        return features(model.denoiser, pixels, [layer], pool, forward)[layer], None

    return Network(name, layer, side, read)
