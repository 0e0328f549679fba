"""Training of toy-ae: one toy seen from near, in one vector (:class:`sfumato.models.nets.vector_ae.VectorAutoencoder`).

The scenes are those of the *cues* (:mod:`sfumato.toybox.cues`): shape, texture, colour, pose and scenery are drawn
apart, so that no concept is tied to another by the data. A share of the pictures is shown in other styles, so that one
code serves several data sets. No adversary and no perceptual net: what is kept is what weighs in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL.Image import Image
from pydantic import Field
from torch import Tensor, nn

from sfumato import sheets
from sfumato.models.nets.vector_ae import VectorAutoencoder
from sfumato.toybox.cues import CueDataset
from sfumato.toybox.styles import styled
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.losses import reconstruction_loss
from sfumato.training.objective import Objective
from sfumato.training.recipe import Section


class VectorModel(Section):
    """Architecture (:class:`VectorAutoencoder`)."""

    channels: tuple[int, ...] = Field((16, 32, 64, 64), description="widths from the finest to the coarsest maps")
    latent_size: int = Field(64, ge=1, description="numbers of a code")
    blocks: int = Field(1, ge=0, description="residual blocks at each size")


class VectorLoss(Section):
    """Weights of the terms, all means over elements."""

    l1: float = Field(1.0, ge=0)
    l2: float = Field(1.0, ge=0)
    edge: float = Field(0.5, ge=0, description="L1 of the differences between neighbouring pixels")
    kl: float = Field(1e-3, ge=0, description="KL to the unit normal, per number of the code")
    toy_weight: float = Field(3.0, gt=0, description="weight of toy pixels beside background pixels")
    styles: tuple[str, ...] = Field((), description="styles in which a share of the pictures is shown")
    styled: float = Field(0.0, ge=0, le=1, description="that share")


class VectorAEObjective(Objective):
    """Reconstruction of pictures of one toy."""

    NAME = "vector_ae"
    EXPORTED = "ae"
    Model, Loss = VectorModel, VectorLoss

    def build(self) -> dict[str, nn.Module]:
        o = self.model_options
        return {"ae": VectorAutoencoder(self.recipe.data.size, o.channels, o.latent_size, o.blocks)}

    @property
    def ae(self) -> VectorAutoencoder:
        return self.modules["ae"]  # type: ignore[return-value]

    def open_data(self) -> None:
        o = self.recipe.data
        self.train_data = CueDataset("train", o.train, o.size, o.seed, 1.0, 0.25, lazy=True)
        self.val_data = CueDataset("val", o.val, o.size, o.seed, 1.0, 0.25, lazy=True)

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        o: VectorLoss = self.loss_options
        chosen = draw.indices(len(self.train_data), self.recipe.train.batch)
        x = data.pictures(self.train_data, chosen)
        weight = data.toy_weights(self.train_data, chosen, o.toy_weight)
        generator = draw.generator("augment")
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x[mirrored], weight[mirrored] = x[mirrored].flip(-1), weight[mirrored].flip(-1)
        if o.styles:
            kind = torch.rand(len(x), generator=generator) / max(o.styled, 1e-9) * len(o.styles)
            for k, style in enumerate(o.styles):
                rows = (kind >= k) & (kind < k + 1)
                if rows.any():
                    x[rows] = styled(x[rows], style)
        noise = torch.randn(len(x), self.model_options.latent_size, generator=draw.generator("noise"))
        return {"x": x, "weight": weight, "noise": noise}

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        x, weight = batch["x"], batch["weight"]
        posterior = self.ae.encode(x).latent_dist
        z = posterior.mean + posterior.std * batch["noise"][..., None, None]
        error = self.ae.decode(z).sample.float() - x
        return reconstruction_loss(error, weight, posterior, self.loss_options)

    @torch.no_grad()
    def evaluate(self, n: int = 256) -> dict[str, float]:
        found: dict[str, list[Tensor]] = {}
        for part in torch.arange(min(n, len(self.val_data))).split(64):
            plain = data.pictures(self.val_data, part)
            for style in ("plain", *self.loss_options.styles):
                x = styled(plain, style).to(self.device)
                error = (self.ae(x).sample.float().clamp(-1, 1) - x).square().mean((1, 2, 3)) / 4
                found.setdefault("psnr" if style == "plain" else f"psnr_{style}", []).append(-10 * error.log10())
        return {name: float(torch.cat(values).mean()) for name, values in found.items()}

    @torch.no_grad()
    def grid(self) -> Image:
        x = data.pictures(self.val_data, torch.arange(min(8, len(self.val_data))))
        rows = [styled(x, style) for style in ("plain", *self.loss_options.styles)]
        both = [part for row in rows for part in (row, self.ae(row.to(self.device)).sample.cpu().clamp(-1, 1))]
        return sheets.sheet(torch.cat(both), len(x), scale=2, gap=0)

    def export(self, folder: Any) -> dict[str, Any]:
        return {**super().export(folder), "world": "cues"}
