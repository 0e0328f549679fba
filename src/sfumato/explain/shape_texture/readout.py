"""Read-outs (section 4): what a frozen layer knows of each pixel, as a small head trained on its maps can say it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.errors import BadInput
from sfumato.training import Draw, Player, fit, shuffled
from sfumato.training.schedules import polynomial


class ReadOut(nn.Module):
    """A head on a frozen layer's maps (b c h w) that names what each pixel shows: (b classes H W) logits.

    ``depth`` 3: 3x3 convolutions to ``widths`` with batch norm and ReLU, then to the classes (section 4); 1: the last
    only. Logits are upsampled bilinearly. Maps are standardised with the training maps' mean and deviation per channel.
    """

    def __init__(self, channels: int, classes: int, depth: int = 3, widths: tuple[int, int] = (256, 128)):
        super().__init__()
        if depth not in (1, 3):
            raise BadInput(f"depth of a read-out is 1 or 3, got {depth}.")
        sizes = [channels, *(widths if depth == 3 else ())]
        inner = [
            part
            for i, o in zip(sizes, sizes[1:], strict=False)
            for part in (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        ]
        self.head = nn.Sequential(*inner, nn.Conv2d(sizes[-1], classes, 3, padding=1))
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("deviation", torch.ones(1, channels, 1, 1))

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        logits = self.head((maps - self.mean) / self.deviation)
        return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def train_readout(
    maps: Tensor,
    truth: Tensor,
    classes: int,
    depth: int = 3,
    widths: tuple[int, int] = (256, 128),
    epochs: int = 20,
    batch: int = 16,
    learning_rate: float = 0.02,
    seed: int = 0,
) -> ReadOut:
    """Trains a head on maps (n c h w) to say the class (n H W) of each pixel; -1 is ignored.

    Optimiser of the authors' code: SGD with momentum 0.9, weight decay 5e-4, cross-entropy, and a learning rate that
    falls as (1 - t)^0.9. The net below has no part in it, so its batch norms stay as they are. Deterministic for a
    seed.

    Raises:
        BadInput: maps and truth that do not fit, or classes out of range.
    """
    if len(maps) != len(truth) or maps.ndim != 4 or truth.ndim != 3:
        raise BadInput(f"maps {tuple(maps.shape)} and truth {tuple(truth.shape)} must be (n c h w) and (n H W).")
    if truth.max() >= classes or truth.min() < -1:
        raise BadInput(
            f"truth has values from {int(truth.min())} to {int(truth.max())}; -1 to {classes - 1} are allowed."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ReadOut(maps.shape[1], classes, depth, widths)
    head.mean.copy_(maps.mean((0, 2, 3), keepdim=True))
    head.deviation.copy_(maps.std((0, 2, 3), keepdim=True).clamp_min(1e-6))
    optimizer = torch.optim.SGD(head.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    batches = shuffled(len(maps), batch, epochs, seed)

    def loss(draw: Draw) -> Tensor:
        rows = batches[draw.step]
        target = truth[rows].long()
        return functional.cross_entropy(head(maps[rows], target.shape[-2:]), target, ignore_index=-1)

    head.train()
    fit(Player(loss, optimizer, head, schedule=polynomial(len(batches))), len(batches), name="read-out")
    return head.eval().requires_grad_(False)


@torch.no_grad()
def mean_iou(head: ReadOut, maps: Tensor, truth: Tensor, classes: int) -> float:
    """Mean over classes of intersection over union, counted over all pixels; -1 is ignored, absent classes left out."""
    table = torch.zeros(classes, classes)
    for part, target in zip(maps.split(50), truth.split(50), strict=True):
        named = head(part, target.shape[-2:]).argmax(1)
        known = target >= 0
        pairs = target[known].long() * classes + named[known]
        table += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    inside, union = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
    return float((inside / union.clamp_min(1))[union > 0].mean())
