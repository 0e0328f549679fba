"""Regions of a picture as a region-based model (LXMERT, VisualBERT) sees them: boxes, and the pixels inside each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import registry
from sfumato.errors import BadInput, NotSupported
from sfumato.models.readers.reader import Reader, load_reader
from sfumato.once import once

#: what boxes are filled up with where too few things were found: (x0, y0, x1, y1) in shares of the picture
BACKGROUND = tuple(
    (x, y, x + side, y + side) for side, places in ((0.25, (0.0, 0.25, 0.5, 0.75)), (0.4, (0.0, 0.3, 0.6)))
    for y in places for x in places
)  # fmt: skip


def region_features(images: Tensor, boxes: Tensor, cells: int) -> Tensor:
    """The pixels inside boxes, resampled to ``cells`` x ``cells`` and flattened: (b, n, 3 cells cells).

    Args:
        images: (b, 3, h, w).
        boxes: (b, n, 4), x0 y0 x1 y1 in shares of the picture's width and height.

    Raises BadInput if the shapes do not fit.
    """
    b, n = boxes.shape[:2]
    if boxes.dim() != 3 or boxes.shape[2] != 4 or len(images) != b:
        raise BadInput(f"boxes must be (b, n, 4) for {len(images)} pictures, got {tuple(boxes.shape)}.")
    centre = (torch.arange(cells, device=images.device, dtype=images.dtype) + 0.5) / cells
    x = boxes[..., 0, None] + (boxes[..., 2] - boxes[..., 0])[..., None] * centre  # b n cells
    y = boxes[..., 1, None] + (boxes[..., 3] - boxes[..., 1])[..., None] * centre
    grid = torch.stack([x[:, :, None].expand(-1, -1, cells, -1), y[..., None].expand(-1, -1, -1, cells)], -1)
    grid = (2 * grid - 1).reshape(b, n * cells, cells, 2)
    inside = F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)
    return inside.view(b, 3, n, cells * cells).transpose(1, 2).reshape(b, n, 3 * cells * cells)


def box_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union (..., n, m) of boxes (..., n, 4) and (..., m, 4), x0 y0 x1 y1."""
    low = torch.maximum(first[..., :, None, :2], second[..., None, :, :2])
    high = torch.minimum(first[..., :, None, 2:], second[..., None, :, 2:])
    inner = (high - low).clamp_min(0).prod(-1)
    area = [(box[..., 2:] - box[..., :2]).clamp_min(0).prod(-1) for box in (first, second)]
    return inner / (area[0][..., :, None] + area[1][..., None, :] - inner).clamp_min(1e-9)


def fill_regions(boxes: Tensor, count: int, apart: float = 0.3) -> Tensor:
    """``boxes`` (n, 4) first, then boxes of the background that overlap none of them by ``apart``: (count, 4).

    Raises BadInput when there are more boxes than ``count``.
    """
    if len(boxes) > count:
        raise BadInput(f"{len(boxes)} regions were found, but the model looks at {count} at most.")
    others = torch.tensor(BACKGROUND, dtype=boxes.dtype)
    nearest = box_overlap(others, boxes).amax(1) if len(boxes) else torch.zeros(len(others))
    order = torch.argsort((nearest >= apart).float(), stable=True)  # those apart first, in their own order
    return torch.cat([boxes, others[order][: count - len(boxes)]])


def corners_of(boxes: Tensor) -> Tensor:
    """Boxes (... 4) of centre, width and height, as detectors of the DETR family give them, as x0 y0 x1 y1."""
    from transformers.image_transforms import center_to_corners_format

    return center_to_corners_format(boxes.float())


def find_regions(images: Tensor, count: int, detector: str = "toy-detr") -> Tensor:
    """Boxes (b, count, 4) of pictures (b 3 h w): what a detector finds, filled up with boxes of the background.

    Raises NotSupported where the detector is not there.
    """
    if registry.find(detector) is None:
        raise NotSupported(f"finding regions needs the detector {detector}, whose weights are not here; give regions=.")
    reader = _detector(detector)
    with torch.no_grad():
        out = reader.module(pixel_values=reader.pixels(images))
    odds = out.logits.float().softmax(-1)[..., :-1].amax(-1)
    corners = corners_of(out.pred_boxes).clamp(0, 1)
    return torch.stack([fill_regions(box[odd > 0.5][:count], count) for box, odd in zip(corners, odds, strict=True)])


@once(2)
def _detector(name: str) -> Reader:
    return load_reader(name)
