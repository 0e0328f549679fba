"""toy-detr: a small ``transformers.DetrForObjectDetection`` (Carion et al. 2020) that finds the toys of a picture.

The loss is DETR's own (Hungarian matching; class, L1 and generalised-IoU terms, after every decoder layer). DETR is
known to learn slowly; an auxiliary loss lets every place of the encoder's output tell which toy it shows and how far
the sides of that toy's box are. It shapes features only: no attention map ever sees a mask or a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor, nn
from transformers import ConvNextConfig, DetrConfig, DetrForObjectDetection, DetrImageProcessorPil

from sfumato.arrays import to_tensor
from sfumato.models.readers.regions import box_overlap
from sfumato.toybox import SHAPES, ToyboxDataset
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.objective import Objective
from sfumato.training.recipe import Section
from sfumato.zoo.objectives import labels

PATCH = 4


class DetrModelOptions(Section):
    """The ``[model]`` section."""

    backbone: tuple[int, ...] = Field((64,), description="widths of the backbone's stages, the first at a quarter")
    blocks: tuple[int, ...] = (3,)
    width: int = 96
    heads: int = 4
    encoder_layers: int = 3
    decoder_layers: int = 3
    queries: int = 8


class DetrLoss(Section):
    """The ``[loss]`` section."""

    places: float = Field(0.5, ge=0, description="weight of reading toys and their boxes off the encoder's output")


class ToyBoxes(Sequence[Tensor]):
    """Boxes (toys, 4) of each scene's visible pixels, x0 y0 x1 y1 in shares of the picture; nan where unseen. Each is
    measured when it is first asked for."""

    def __init__(self, source: ToyboxDataset):
        self.source, self.known = source, dict[int, Tensor]()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: Any) -> Any:
        if i not in self.known:
            mask, places = self.source.masks[i], np.arange(self.source.size)
            boxes = torch.full((len(self.source.scenes[i].toys), 4), float("nan"))
            for toy in range(len(boxes)):
                mine = mask == toy
                columns, rows = places[mine.any(0)], places[mine.any(1)]
                if len(columns):
                    edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                    boxes[toy] = torch.tensor(edges, dtype=torch.float32) / self.source.size
            self.known[i] = boxes
        return self.known[i]


def to_centre(boxes: Tensor) -> Tensor:
    """(x0, y0, x1, y1) as (centre x, centre y, width, height)."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def to_corners(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) as (x0, y0, x1, y1)."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


class DetrObjective(Objective):
    """DETR's set loss over shapes and boxes, and the encoder's auxiliary loss."""

    NAME = "detr"
    EXPORTED = "detr"
    Model: ClassVar[type[Section]] = DetrModelOptions
    Loss: ClassVar[type[Section]] = DetrLoss
    detr: DetrForObjectDetection

    def build(self) -> dict[str, nn.Module]:
        o: DetrModelOptions = self.model_options
        config = DetrConfig(
            # layer norms instead of batch norms: nothing has to be frozen, and no second library is needed
            backbone_config=ConvNextConfig(
                hidden_sizes=list(o.backbone),
                depths=list(o.blocks),
                num_stages=len(o.backbone),
                patch_size=PATCH,
                layer_scale_init_value=0.1,
                out_features=[f"stage{len(o.backbone)}"],
            ),
            d_model=o.width,
            encoder_layers=o.encoder_layers,
            decoder_layers=o.decoder_layers,
            encoder_attention_heads=o.heads,
            decoder_attention_heads=o.heads,
            encoder_ffn_dim=4 * o.width,
            decoder_ffn_dim=4 * o.width,
            num_queries=o.queries,
            dropout=0.0,
            auxiliary_loss=True,
            eos_coefficient=0.4,  # "nothing" is the answer of most of 100 queries, but not of so few
            num_labels=len(SHAPES),
        )
        config.id2label = dict(enumerate(SHAPES))
        config.label2id = {shape: i for i, shape in enumerate(SHAPES)}
        self.detr = DetrForObjectDetection(config)
        return {"detr": self.detr, "readout": nn.Linear(o.width, labels.PLACE_CLASSES + 4)}

    def open_data(self) -> None:
        super().open_data()
        self.boxes = ToyBoxes(self.train_data)
        self.cells = self.recipe.data.size // (PATCH * 2 ** (len(self.model_options.backbone) - 1))

    def takes_muon(self, name: str, parameter: Tensor) -> bool:
        ends = ("dwconv", "class_labels", "bbox_predictor.layers.2", "input_projection")
        return super().takes_muon(name, parameter) and not any(end in name for end in ends)

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        indices = draw.indices(len(self.train_data), self.recipe.train.batch)
        pixels = data.pictures(self.train_data, indices)
        most = max(len(self.boxes[i]) for i in indices.tolist())
        boxes = torch.full((len(indices), most, 4), float("nan"))
        shapes = torch.full((len(indices), most), -1)
        for row, i in enumerate(indices.tolist()):
            boxes[row, : len(self.boxes[i])] = self.boxes[i]
            named = [SHAPES.index(toy.shape) for toy in self.train_data.scenes[i].toys]
            shapes[row, : len(named)] = torch.tensor(named)
        places = labels.place_labels(self.train_data, indices, self.cells)
        masks = to_tensor(self.train_data.masks[indices.numpy()]).long()
        flip = torch.rand(len(indices), generator=draw.generator("flip")) < 0.5
        pixels[flip], masks[flip], places[flip] = pixels[flip].flip(3), masks[flip].flip(2), places[flip].flip(3)
        x0, y0, x1, y1 = boxes[flip].unbind(-1)
        boxes[flip] = torch.stack([1 - x1, y0, 1 - x0, y1], -1)
        stride = self.recipe.data.size // self.cells
        owner = masks[:, stride // 2 :: stride, stride // 2 :: stride]
        return {"pixels": pixels, "boxes": boxes, "shapes": shapes, "places": places, "owner": owner}

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        o: DetrLoss = self.loss_options
        visible = ~batch["boxes"].isnan().any(-1)
        targets = [
            {"class_labels": shapes[shown], "boxes": to_centre(boxes[shown])}
            for shapes, boxes, shown in zip(batch["shapes"], batch["boxes"], visible, strict=True)
        ]
        out = self.detr.model(pixel_values=batch["pixels"])
        with torch.autocast(self.device.type, enabled=False):
            states = out.intermediate_hidden_states.float()
            classes = self.detr.class_labels_classifier(states)
            sides = self.detr.bbox_predictor(states).sigmoid()
            loss, parts, _ = self.detr.loss_function(
                classes[-1], targets, self.device, sides[-1], self.detr.config, classes, sides
            )
        logs = {key: parts[f"loss_{key}"].detach() for key in ("ce", "bbox", "giou")}
        if o.places:
            part = self._place_loss(self.modules["readout"](out.encoder_last_hidden_state).float(), batch)
            loss = loss + o.places * part
            logs["places"] = part.detach()
        return loss, logs

    def _place_loss(self, read: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of what lies at each place, and L1 of the sides of the box of the toy there.

        ``read`` (b, places, PLACE_CLASSES + 4); the last four are distances to the box's sides.
        """
        read = read.transpose(1, 2).unflatten(2, (self.cells, self.cells))
        owner = batch["owner"]
        centre = (torch.arange(self.cells, device=read.device) + 0.5) / self.cells
        x, y = centre.expand(self.cells, -1), centre[:, None].expand(-1, self.cells)
        found = read[:, -4:] + torch.stack([x, y, x, y])
        boxes = batch["boxes"].nan_to_num(0)
        target = boxes[torch.arange(len(boxes))[:, None, None], owner.clamp_min(0)].permute(0, 3, 1, 2)
        inside = (owner >= 0).float()
        sides = ((found - target).abs().sum(1) * inside).sum() / inside.sum().clamp_min(1)
        return labels.place_loss(read[:, :-4], batch["places"]).mean() + 5 * sides

    def detect(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Class probabilities (b, queries, shapes + 1), the last "nothing", and boxes (b, queries, 4) as corners."""
        out = self.detr(pixel_values=pixels)
        return out.logits.float().softmax(-1), to_corners(out.pred_boxes.float())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On held-out scenes: toys found (right shape, overlap above a half), finds that are right, mean overlap."""
        hits = found = total = 0
        overlaps: list[float] = []
        boxes = ToyBoxes(self.val_data)
        for part in torch.arange(len(self.val_data)).split(100):
            probabilities, corners = self.detect(data.pictures(self.val_data, part).to(self.device))
            for row, i in enumerate(part.tolist()):
                visible = ~boxes[i].isnan().any(1)
                shapes = torch.tensor([SHAPES.index(toy.shape) for toy in self.val_data.scenes[i].toys])[visible]
                chosen = probabilities[row, :, :-1].amax(1) > 0.5
                overlap = box_overlap(corners[row, chosen].cpu(), boxes[i][visible])
                same = probabilities[row, chosen, :-1].argmax(1).cpu()[:, None] == shapes
                total, found = total + len(shapes), found + int(chosen.sum())
                if overlap.numel():
                    overlaps += overlap.amax(0).tolist()
                    hits += int(((overlap > 0.5) & same).any(0).sum())  # a toy found twice counts once
                else:
                    overlaps += [0.0] * len(shapes)
        return {
            "recall": hits / max(1, total),
            "precision": hits / max(1, found),
            "box_overlap": float(np.mean(overlaps)),
        }

    @torch.no_grad()
    def grid(self) -> Image.Image:
        """Held-out pictures with the boxes found."""
        pictures = to_tensor(np.array(self.val_data.images[:8]))
        probabilities, corners = self.detect(pictures.permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1)
        sheet = Image.fromarray(torch.cat(list(pictures), 1).numpy())
        size = self.val_data.size
        draw = ImageDraw.Draw(sheet)
        for k in range(len(pictures)):
            for box in corners[k][probabilities[k, :, :-1].amax(1) > 0.5].clamp(0, 1).tolist():
                x0, y0, x1, y1 = (round(value * size) for value in box)
                draw.rectangle((x0 + k * size, y0, max(x0, x1 - 1) + k * size, max(y0, y1 - 1)), outline=(255, 0, 0))
        return sheet

    def processors(self) -> list[Any]:
        size = self.recipe.data.size
        mean = [0.5, 0.5, 0.5]
        return [
            DetrImageProcessorPil(size={"height": size, "width": size}, image_mean=mean, image_std=mean, do_pad=False)
        ]
