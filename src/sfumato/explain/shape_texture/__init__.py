"""Shape or texture: how much of a layer is about which, unit by unit, and whether it can be read per pixel.

*Dimensions.* Two pictures that share one factor and nothing else are shown to a net; units that vary together over many
such pairs carry the factor. For jointly normal units the information shared is at least -1/2 log(1 - rho^2) (section
3.1).
The score of a factor is the covariance of the pairs summed over units and divided by the variance of all units, and

    dimensions = floor(d * softmax([scores of the factors, 1])),  the residual takes the remainder.

The softmax squeezes everything into a narrow band - scores of 0 and 0 for two factors give 21 %, 21 % and 58 %
residual, 1 and 0 give 42 %, 16 % and 42 % - so raw scores, correlations and their intervals are reported beside it.

*Read-outs.* A small head is trained on a frozen layer's maps to say what each pixel shows (section 4).

*Ablation.* Units are silenced in the order of their scores (section 3.4): :func:`ablated`.

Works on any ``torch.nn.Module`` by layer names, and on the denoiser of a :class:`~sfumato.models.Model`, which is
shown the pictures noised to one level with a fixed prompt.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato import cards
from sfumato.cards import Card, Field, register
from sfumato.errors import NoMatch, UnknownName
from sfumato.explain.shape_texture.dimensions import Dimensions, dimensions_of, estimate
from sfumato.explain.shape_texture.pictures import rendered
from sfumato.explain.shape_texture.readout import ReadOut, mean_iou, train_readout
from sfumato.explain.shape_texture.table import LayerTable, plot
from sfumato.models import Model
from sfumato.models.layers import ablated, features, layer_outputs, stages
from sfumato.sampling.noised import noised_forward
from sfumato.toybox.cues import FACTORS, factor_pairs

__all__ = [
    "Dimensions",
    "LayerTable",
    "ReadOut",
    "ShapeTexture",
    "dimensions_of",
    "estimate",
    "features",
    "mean_iou",
    "noised_forward",
    "plot",
    "rendered",
    "ablated",
    "stages",
    "train_readout",
    "layer_outputs",
]


@register
class ShapeTexture:
    """Dimensions of shape, texture and other factors in each layer of a net, from pairs of toybox pictures."""

    CARD = Card(
        key="shape_texture",
        title="Shape or Texture: Understanding Discriminative Features in CNNs",
        authors="Islam, Kowal, Esser, Jia, Ommer, Derpanis, Bruce",
        year=2021,
        arxiv="2101.11604",
        verb="explain",
        needs=("pictures", "noise_path"),
        defaults_from="the paper: covariance of pairs, softmax with a residual of 1; 500 pairs are ours",
        cost="one forward for each of 2 x pairs x factors pictures",
        not_reproduced="AdaIN-stylised PASCAL VOC: pairs are rendered, pose, colour and scenery apart",
        summary="how much of each layer is about shape and how much about texture",
    )

    class Params(cards.Params):
        factors: list[str] = Field(
            default=["shape", "texture"],
            min_length=1,
            description="what pairs share, of shape, texture, color, pose, scenery",
        )
        layers: list[str] = Field(default=[], description="module paths to look at; none: the stages of the net")
        pairs: int = Field(default=500, ge=3, le=100_000, description="pairs of pictures of each factor")
        score: Literal["covariance", "correlation"] = Field(
            default="covariance",
            description="what dimensions come from: the authors' pooled covariance, or correlation",
        )
        pool: Literal["mean", "cls", "flatten"] = Field(
            default="mean", description="how a layer's places become one row"
        )
        progress: float = Field(
            default=0.7,
            ge=0,
            lt=1,
            description="denoisers: the share of the denoising that lies behind the picture shown",
        )
        prompt: str = Field(default="", description="denoisers: the prompt of every picture")
        noise: Literal["independent", "shared"] = Field(
            default="independent", description="denoisers: the noise of a pair; shared noise is itself a shared factor"
        )
        draws: int = Field(default=200, ge=0, le=10_000, description="draws of the bootstrap over pairs")
        seed: int = Field(default=0, ge=0, description="of pairs, noise and bootstrap")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        for name in self.params.factors:
            if name not in FACTORS:
                raise UnknownName("factor of shape_texture", name, FACTORS)

    def explain_net(self, net: nn.Module | Model, name: str = "", size: int | None = None) -> LayerTable:
        """The table of a net.

        Args:
            net: any module that is called with pictures (b 3 h w) in [-1, 1], or a text-to-image model.
            size: side of the pictures in pixels; by default what the net says of itself, else 64.

        Raises:
            UnknownName, NoMatch: layers. BadInput: units that never vary.
        """
        p = self.params
        denoiser = net.denoiser if isinstance(net, Model) else net
        side = size or _side(net)
        layers = p.layers or self._stages(net, denoiser, side)
        found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {layer: {} for layer in layers}
        for factor in p.factors:
            both = factor_pairs(factor, p.pairs, p.seed)
            sides = []
            for k in range(2):
                pixels = rendered(tuple(pair[k] for pair in both), side)
                # noise of independent pairs comes from seeds that no other picture has
                seed = p.seed * 1_000_003 + (
                    0 if p.noise == "shared" else k * 500_000 + 1_000 * p.factors.index(factor)
                )
                forward = noised_forward(net, p.progress, p.prompt, seed) if isinstance(net, Model) else None
                sides.append(features(denoiser, pixels, layers, p.pool, forward))
            for layer in layers:
                found[layer][factor] = (sides[0][layer], sides[1][layer])
        tables = {layer: estimate(pairs, p.score, p.draws, p.seed) for layer, pairs in found.items()}
        return LayerTable(name or (net.name if isinstance(net, Model) else type(net).__name__), tables)

    def _stages(self, net: nn.Module | Model, denoiser: nn.Module, side: int) -> list[str]:
        """The stages that put out places, of what runs when the net sees a picture."""
        p, candidates = self.params, stages(denoiser)
        forward = noised_forward(net, p.progress, p.prompt) if isinstance(net, Model) else denoiser
        with torch.no_grad(), layer_outputs(denoiser, candidates) as outputs:
            mode = denoiser.training
            try:
                denoiser.eval()
                forward(torch.zeros(1, 3, side, side))
            finally:
                denoiser.train(mode)
        found = [name for name in candidates if name in outputs and outputs[name].ndim > 2]
        if not found:
            raise NoMatch(
                f"no stage of {type(denoiser).__name__} puts out maps or tokens; name layers among its modules."
            )
        return found


def _side(net: nn.Module | Model) -> int:
    if isinstance(net, Model):
        return net.default_size[0]
    size = getattr(getattr(net, "config", None), "image_size", None)
    return int(size) if isinstance(size, int) else 64
