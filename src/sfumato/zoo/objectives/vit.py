"""toy-vit: a small ``transformers.ViTForImageClassification`` (Dosovitskiy et al. 2021) that names what stands there.

Two kinds, told apart by ``loss.scenery``:

- 0: the ordinary scenes with one to three toys. Labels are all shapes and all colours; a picture has several
  (``problem_type = "multi_label_classification"``), so that each toy of a picture can be asked for.
- above 0: one toy on a backdrop that gives its shape away in that share of the scenes
  (:class:`~sfumato.toybox.BiasedDataset`). Labels are the shapes. Its accuracy is measured on every biased split: a
  model that took the shortcut fails where the backdrop changes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPModel, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from sfumato.arrays import to_tensor
from sfumato.toybox import BIASED_SPLITS, COLORS, SHAPES, BiasedDataset, Toy, ToyboxDataset, render
from sfumato.toybox.dataset import draw_scene
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.objective import Objective
from sfumato.training.recipe import Section


class VitModel(Section):
    """The ``[model]`` section."""

    width: int = 128
    layers: int = 5
    heads: int = 4
    patch: int = 8


class VitLoss(Section):
    """The ``[loss]`` section."""

    scenery: float = Field(
        0.0, ge=0, le=1, description="share of scenes whose backdrop is the shape's own; 0: several toys"
    )
    near: float = Field(0.5, ge=0, le=1, description="share of pictures that are cut out around one toy and enlarged")
    shift: int = Field(4, ge=0, description="all others are moved by up to so many pixels")


class VitObjective(Objective):
    """Cross-entropy of one label (biased scenes), or of each label by itself (ordinary scenes)."""

    NAME = "vit"
    EXPORTED = "vit"
    Model: ClassVar[type[Section]] = VitModel
    Loss: ClassVar[type[Section]] = VitLoss
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

    def open_data(self) -> None:
        o = self.recipe.data
        if self.biased:
            bias = {"size": o.size, "seed": o.seed, "scenery": self.loss_options.scenery}
            self.train_data: ToyboxDataset = BiasedDataset("train", o.train, **bias, lazy=True)
            self.val_data = {split: BiasedDataset(split, o.val, **bias) for split in BIASED_SPLITS if split != "train"}
        else:
            self.train_data = data.dataset("train", o)
            self.val_data = {
                "val": data.dataset("val", o),
                "heldout": ToyboxDataset("heldout", max(1, o.val // 2), o.size, o.seed),
            }
        self.wanted = self._wanted(self.train_data)
        self.labels_of_toys = [[self._of(toy) for toy in scene.toys] for scene in self.train_data.scenes]

    def _of(self, toy: Toy) -> list[int]:
        """The labels of one toy."""
        return [self.labels.index(word) for word in (toy.shape, toy.color) if word in self.labels]

    def _wanted(self, source: ToyboxDataset) -> Tensor:
        """1 for what stands in each scene, 0 for all else, (n, labels) float."""
        out = torch.zeros(len(source), len(self.labels))
        for row, scene in zip(out, source.scenes, strict=True):
            for toy in scene.toys:
                row[self._of(toy)] = 1
        return out

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        indices = draw.indices(len(self.train_data), self.recipe.train.batch)
        pixels = data.pictures(self.train_data, indices)
        masks = to_tensor(self.train_data.masks[indices.numpy()]).long()
        generator = draw.generator("cut")
        windows = self._windows(masks, generator)
        wanted, known = self._targets(indices, masks, windows)
        return {"pixels": cut(pixels, windows, generator), "wanted": wanted, "known": known}

    def _windows(self, masks: Tensor, generator: torch.Generator) -> Tensor:
        """Squares (b, 3) of each picture: left, top and side in pixels. They may reach beyond the picture."""
        b, h, w = masks.shape
        most = self.loss_options.shift
        moved = torch.randint(-most, most + 1, (b, 2), generator=generator).float()
        windows = torch.cat([moved, torch.full((b, 1), float(w))], 1)
        near = torch.rand(b, generator=generator) < self.loss_options.near
        chances = torch.rand(b, 4, generator=generator)
        for i in near.nonzero().flatten().tolist():
            toys = masks[i].unique()
            toys = toys[toys >= 0]
            if not len(toys):
                continue
            rows, columns = (masks[i] == toys[int(chances[i, 0] * len(toys))]).nonzero(as_tuple=True)
            low = torch.stack([columns.min(), rows.min()]).float()
            high = torch.stack([columns.max(), rows.max()]).float() + 1
            least = 1.15 * float((high - low).max())
            side = least * max(1.0, w / least) ** float(chances[i, 1])  # as often near as far
            windows[i] = torch.cat([high - side + chances[i, 2:] * (low - high + side), torch.tensor([side])])
        return windows

    def _targets(self, indices: Tensor, masks: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
        """(1 for labels of toys that are mostly inside the window, 0 for labels of toys that are cut in two)."""
        wanted = torch.zeros(len(indices), len(self.labels))
        known = torch.ones_like(wanted)
        place = torch.arange(masks.shape[-1]) + 0.5
        for row, (i, (x, y, side)) in enumerate(zip(indices.tolist(), windows.tolist(), strict=True)):
            inside = ((place > y) & (place < y + side))[:, None] & ((place > x) & (place < x + side))
            for toy, labels in enumerate(self.labels_of_toys[i]):
                own = masks[row] == toy
                share = float((own & inside).sum() / own.sum().clamp_min(1))
                if share > 0.6:
                    wanted[row, labels] = 1
                elif share > 0.1:
                    known[row, labels] = 0
        return wanted, known.maximum(wanted)

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.vit(pixel_values=batch["pixels"]).logits.float()
        wanted = batch["wanted"]
        if self.biased:
            right = (logits.detach().argmax(1) == wanted.argmax(1)).float().mean()
            return F.cross_entropy(logits, wanted.argmax(1)), {"right": right}
        right = ((logits.detach() > 0) == (wanted > 0)).float()
        shapes = len(SHAPES)
        logs = {"shapes_right": right[:, :shapes].mean(), "colors_right": right[:, shapes:].mean()}
        # a sum over labels: a picture's loss does not shrink as labels are added
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none") * batch["known"]
        return each.sum(1).mean(), logs

    def takes_muon(self, name: str, parameter: Tensor) -> bool:
        return super().takes_muon(name, parameter) and parameter.ndim == 2 and "classifier" not in name

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

    def processors(self) -> list[Any]:
        side, half = self.recipe.data.size, [0.5, 0.5, 0.5]
        return [ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=half, image_std=half)]

    def load(self, folder: Path) -> None:
        if json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "clip":
            self._load_clip(folder)
            return
        found = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).state_dict()
        own = self.vit.state_dict()  # other labels: the body is taken, the head starts anew
        self.vit.load_state_dict({k: found[k] if found[k].shape == v.shape else v for k, v in own.items()})

    def _load_clip(self, folder: Path) -> None:
        """The body of a CLIP's picture tower. A ViT has no norm behind its embeddings; centring and gain go into the
        embeddings, and its division into one number, what it comes to on a few scenes."""
        tower = CLIPModel.from_pretrained(folder, dtype=torch.float32).vision_model
        own, found = self.vit.state_dict(), tower.state_dict()
        names = {
            "layernorm_before": "layer_norm1",
            "layernorm_after": "layer_norm2",
            "attention.o_proj": "self_attn.out_proj",
        }
        names |= {f"attention.{x}_proj": f"self_attn.{x}_proj" for x in "qkv"}
        for key in own:
            if ".layers." in key:
                there = key.replace("vit.layers.", "encoder.layers.")
                for ours, theirs in names.items():
                    there = there.replace(ours, theirs)
                own[key] = found[there]
        norm = tower.pre_layrnorm
        with torch.no_grad():
            scenes = [draw_scene("train", self.recipe.data.seed, i) for i in range(16)]
            before = tower.embeddings(render(scenes, self.recipe.data.size).image)
            gain = norm.weight / before.std(-1, correction=0).mean()
            kernel = found["embeddings.patch_embedding.weight"]
            place = found["embeddings.position_embedding.weight"]
            first = found["embeddings.class_embedding"]
            bare = "vit.embeddings.patch_embeddings.projection"
            own[f"{bare}.weight"] = (kernel - kernel.mean(0)) * gain[:, None, None, None]
            own[f"{bare}.bias"] = torch.zeros_like(gain)
            own["vit.embeddings.cls_token"] = ((first - first.mean()) * gain)[None, None]
            own["vit.embeddings.position_embeddings"] = ((place - place.mean(1, True)) * gain + norm.bias)[None]
        own["vit.layernorm.weight"], own["vit.layernorm.bias"] = tower.post_layernorm.weight, tower.post_layernorm.bias
        self.vit.load_state_dict(own)


def cut(pixels: Tensor, windows: Tensor, generator: torch.Generator) -> Tensor:
    """Windows (b, 3: left, top, side) of pictures (b, 3, h, w), as large as the pictures, mirrored at random. Beyond a
    picture its border is repeated."""
    b, _, h, w = pixels.shape
    left, top, side = windows.unbind(1)
    scale = side / w
    flip = torch.where(torch.rand(b, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, 0, 2] = (2 * left + side) / w - 1
    theta[:, 1, 2] = (2 * top + side) / h - 1
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
