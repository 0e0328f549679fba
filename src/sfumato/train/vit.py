"""toy-vit: a small ``transformers.ViTForImageClassification`` (Dosovitskiy et al. 2021) that names what stands there.

Two kinds, told apart by ``loss.scenery``:

- 0: the ordinary scenes with one to three toys. Labels are all shapes and all colours; a picture has several
  (``problem_type = "multi_label_classification"``), so that each toy of a picture can be asked for.
- above 0: one toy on a backdrop that gives its shape away in that share of the scenes
  (:class:`~sfumato.toybox.BiasedDataset`). Labels are the shapes. Its accuracy is measured on every biased split: a
  model that took the shortcut fails where the backdrop changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from sfumato.toybox import BIASED_SPLITS, COLORS, SHAPES, BiasedDataset, ToyboxDataset
from sfumato.train import data
from sfumato.train.objective import Draw, Objective
from sfumato.train.recipe import Options


class VitModel(Options):
    """The ``[model]`` section."""

    width: int = 96
    layers: int = 6
    heads: int = 4
    patch: int = 8


class VitLoss(Options):
    """The ``[loss]`` section."""

    scenery: float = Field(
        0.0, ge=0, le=1, description="share of scenes whose backdrop is the shape's own; 0: several toys"
    )
    shift: int = Field(4, ge=0, description="pictures are moved by up to so many pixels")


class VitObjective(Objective):
    """Cross-entropy of one label (biased scenes), or of each label by itself (ordinary scenes)."""

    Model: ClassVar[type[Options]] = VitModel
    Loss: ClassVar[type[Options]] = VitLoss
    vit: ViTForImageClassification

    def build(self) -> dict[str, nn.Module]:
        o: VitModel = self.model_options
        self.biased = self.loss_options.scenery > 0
        self.labels = SHAPES if self.biased else SHAPES + COLORS
        config = ViTConfig(
            hidden_size=o.width,
            intermediate_size=4 * o.width,
            num_hidden_layers=o.layers,
            num_attention_heads=o.heads,
            image_size=self.recipe.data.size,
            patch_size=o.patch,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(self.labels)),
            label2id={label: i for i, label in enumerate(self.labels)},
            problem_type="single_label_classification" if self.biased else "multi_label_classification",
        )
        self.vit = ViTForImageClassification(config)
        return {"vit": self.vit}

    def setup(self, device: torch.device) -> None:
        super().setup(device)
        o = self.recipe.data
        if self.biased:
            bias = {"size": o.size, "seed": o.seed, "scenery": self.loss_options.scenery}
            self.train_data: ToyboxDataset = BiasedDataset("train", o.train, **bias)
            self.val_data = {split: BiasedDataset(split, o.val, **bias) for split in BIASED_SPLITS if split != "train"}
        else:
            self.train_data = data.dataset("train", o)
            self.val_data = {
                "val": data.dataset("val", o),
                "heldout": ToyboxDataset("heldout", max(1, o.val // 2), o.size, o.seed),
            }
        self.wanted = self._wanted(self.train_data)

    def _wanted(self, source: ToyboxDataset) -> Tensor:
        """1 for what stands in each scene, 0 for all else, (n, labels) float."""
        out = torch.zeros(len(source), len(self.labels))
        for row, scene in zip(out, source.scenes, strict=True):
            for toy in scene.toys:
                for word in (toy.shape, toy.color):
                    if word in self.labels:
                        row[self.labels.index(word)] = 1
        return out

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        indices = draw.indices(len(self.train_data), self.recipe.train.batch)
        pixels = data.pictures(self.train_data, indices)
        return {"pixels": self._moved(pixels, draw.generator("move")), "wanted": self.wanted[indices]}

    def _moved(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Mirrored at random and shifted by up to ``shift`` pixels, the border repeated."""
        b, _, h, w = pixels.shape
        most = self.loss_options.shift
        flip = torch.rand(b, generator=generator) < 0.5
        pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
        wide = F.pad(pixels, (most,) * 4, mode="replicate") if most else pixels
        corners = torch.randint(0, 2 * most + 1, (b, 2), generator=generator).tolist()
        return torch.stack([one[:, y : y + h, x : x + w] for one, (y, x) in zip(wide, corners, strict=True)])

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.vit(pixel_values=batch["pixels"]).logits.float()
        wanted = batch["wanted"]
        if self.biased:
            right = (logits.detach().argmax(1) == wanted.argmax(1)).float().mean()
            return F.cross_entropy(logits, wanted.argmax(1)), {"right": right}
        right = ((logits.detach() > 0) == (wanted > 0)).float()
        shapes = len(SHAPES)
        logs = {"shapes_right": right[:, :shapes].mean(), "colors_right": right[:, shapes:].mean()}
        # one sum over labels: a picture's loss does not shrink as labels are added
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1).mean(), logs

    def hidden(self, name: str, parameter: Tensor) -> bool:
        return super().hidden(name, parameter) and parameter.ndim == 2 and "classifier" not in name

    def _logits(self, source: ToyboxDataset) -> Tensor:
        parts = torch.arange(len(source)).split(128)
        return torch.cat([self.vit(pixel_values=data.pictures(source, p).to(self.device)).logits.cpu() for p in parts])

    def evaluate(self) -> dict[str, float]:
        """Accuracy on each split; in scenes of several toys, whether all that is there comes before all that is not."""
        figures: dict[str, float] = {}
        for split, source in self.val_data.items():
            logits, wanted = self._logits(source), self._wanted(source)
            if self.biased:
                figures[split] = float((logits.argmax(1) == wanted.argmax(1)).float().mean())
                continue
            single = torch.tensor(np.array([len(scene.toys) == 1 for scene in source.scenes]))
            for name, part in (("shape", slice(len(SHAPES))), ("color", slice(len(SHAPES), None))):
                scores, truth = logits[:, part], wanted[:, part] > 0
                least = scores.masked_fill(~truth, torch.inf).amin(1)
                right = least > scores.masked_fill(truth, -torch.inf).amax(1)
                figures[f"{split}_{name}_of_one"] = float(right[single].float().mean())
                figures[f"{split}_{name}s_of_several"] = float(right[~single].float().mean())
        return figures

    def export(self, folder: Path) -> dict[str, Any]:
        half = ViTForImageClassification(self.vit.config).half()
        half.load_state_dict(self.vit.state_dict())
        half.save_pretrained(folder)
        side, middle = self.recipe.data.size, [0.5, 0.5, 0.5]
        processor = ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=middle, image_std=middle)
        processor.save_pretrained(folder)
        return {}

    def load(self, folder: Path) -> None:
        self.vit.load_state_dict(ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).state_dict())
