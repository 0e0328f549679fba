"""Training of the toy-cnn nets: small ResNets that name a toy by its shape, its texture, or whichever is easier.

The label decides the shape and the texture of the only toy with the probabilities ``loss.shape`` and ``loss.texture``
(:func:`sfumato.toybox.cues.cue_scenes`): 1 and 0.25 leave the texture without meaning, 0.6 and 1 make it the better
cue.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPImageProcessorPil, ResNetConfig, ResNetForImageClassification

from sfumato import sheets
from sfumato.arrays import to_tensor
from sfumato.toybox.cues import CUE_TEXTURES, CUES, CueDataset
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.objective import Objective
from sfumato.training.recipe import Section

TEXTURE_CHANCE = 1 / len(CUES)


class CNNModel(Section):
    """Architecture (``transformers.ResNetConfig``)."""

    stem: int = Field(16, ge=4, description="channels of the first convolution (7x7, stride 2) and its max-pool")
    widths: tuple[int, ...] = Field((16, 32, 48, 64), description="channels of the stages; all but the first halve")
    depths: tuple[int, ...] = Field((1, 1, 1, 1), description="blocks of each stage")
    block: Literal["basic", "bottleneck"] = "basic"


class CNNLoss(Section):
    """What the label says about the pictures, and how the pictures are varied."""

    shape: float = Field(1.0, ge=0, le=1, description="probability that the shape is the label's")
    texture: float = Field(TEXTURE_CHANCE, ge=0, le=1, description="probability that the texture is the label's")
    shift: int = Field(4, ge=0, description="pictures are moved by up to so many pixels each way")
    tint: float = Field(0.1, ge=0, description="largest relative change of contrast and of each channel")


class CNNObjective(Objective):
    """A ``ResNetForImageClassification`` of the four cues."""

    NAME = "cnn"
    EXPORTED = "cnn"
    Model, Loss = CNNModel, CNNLoss

    def build(self) -> dict[str, nn.Module]:
        o = self.model_options
        names = {i: shape for i, (shape, _) in enumerate(CUES)}
        config = ResNetConfig(
            embedding_size=o.stem, hidden_sizes=list(o.widths), depths=list(o.depths), layer_type=o.block,
            id2label=names, label2id={name: i for i, name in names.items()},
        )  # fmt: skip
        return {"cnn": ResNetForImageClassification(config)}

    @property
    def cnn(self) -> ResNetForImageClassification:
        return self.modules["cnn"]  # type: ignore[return-value]

    def open_data(self) -> None:
        o, cues = self.recipe.data, {"shape": self.loss_options.shape, "texture": self.loss_options.texture}
        self.train_data = CueDataset("train", o.train, o.size, o.seed, **cues, lazy=True)
        # measured on the same pictures whatever was trained on: here the texture says nothing about the shape
        self.val_data = CueDataset("val", o.val, o.size, o.seed, 1.0, TEXTURE_CHANCE)
        self.labels = to_tensor(self.train_data.labels)

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        chosen = draw.indices(len(self.train_data), self.recipe.train.batch)
        images = data.pictures(self.train_data, chosen)
        o, rng = self.loss_options, draw.generator("augment")
        b, side = len(images), images.shape[-1]
        flip = torch.rand(b, generator=rng) < 0.5
        images[flip] = images[flip].flip(3)
        if o.shift:
            wide = functional.pad(images, [o.shift] * 4, mode="replicate")
            at = torch.randint(0, 2 * o.shift + 1, (b, 2), generator=rng)
            images = torch.stack(
                [w[:, y : y + side, x : x + side] for w, (y, x) in zip(wide, at.tolist(), strict=True)]
            )
        images = images * (1 + o.tint * (2 * torch.rand(b, 3, 1, 1, generator=rng) - 1))
        return {"images": images.clamp(-1, 1), "labels": self.labels[chosen]}

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.cnn(pixel_values=batch["images"]).logits.float()
        right = (logits.detach().argmax(1) == batch["labels"]).float().mean()
        return functional.cross_entropy(logits, batch["labels"]), {"accuracy": right}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Decisions on held-out pictures whose texture says nothing about the shape.

        ``shape_bias`` is the share of shape decisions among shape and texture decisions where the two differ.
        """
        predictions = []
        for part in torch.arange(len(self.val_data)).split(100):
            predictions.append(
                self.cnn(pixel_values=data.pictures(self.val_data, part).to(self.device)).logits.argmax(1).cpu()
            )
        decided = torch.cat(predictions).numpy()
        shapes = self.val_data.labels
        textures = np.array([CUE_TEXTURES.index(scene.toys[0].pattern) for scene in self.val_data.scenes])
        apart = shapes != textures
        by_shape, by_texture = (decided == shapes)[apart].mean(), (decided == textures)[apart].mean()
        return {
            "shape_accuracy": float((decided == shapes).mean()),
            "texture_accuracy": float((decided == textures).mean()),
            "shape_bias": float(by_shape / max(by_shape + by_texture, 1e-9)),
        }

    def grid(self) -> Image.Image:
        """Training pictures, in rows by label."""
        rows = [to_tensor(np.flatnonzero(self.train_data.labels == k)[:8]) for k in range(len(CUES))]
        return sheets.sheet(torch.cat([data.pictures(self.train_data, row) for row in rows]), 8, scale=2, gap=0)

    def processors(self) -> list[Any]:
        size, half = self.recipe.data.size, [0.5, 0.5, 0.5]
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=half, image_std=half
        )
        return [processor]

    def export(self, folder: Path) -> dict[str, Any]:
        return {**super().export(folder), "cues": [list(cue) for cue in CUES]}
