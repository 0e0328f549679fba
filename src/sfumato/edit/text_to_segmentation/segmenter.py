"""The segmenter: a plain U-Net, its file, and its training on masks that nobody drew."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sfumato import files, mask_ops
from sfumato.errors import NoMatch
from sfumato.models.precision import fast_bf16
from sfumato.sampling.pixels import as_pixels
from sfumato.training import Draw, Player, fit

FORMAT = "sfumato.segmenter.1"
BATCH = 32


@dataclass(frozen=True)
class SegmenterConfig:
    """Channels double from level to level, beginning with ``width``; ``levels`` of them, each half the size. ``size``
    (width, height): of the pictures it was trained on."""

    width: int = 8
    levels: int = 4
    size: tuple[int, int] | None = None


class Segmenter(nn.Module):
    """A plain U-Net with batch normalisation (Ronneberger et al. 2015): pictures in, one logit per pixel out."""

    def __init__(self, config: SegmenterConfig | None = None):
        super().__init__()
        self.config = config or SegmenterConfig()
        widths = [self.config.width * 2**i for i in range(self.config.levels)]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(_block(a + b, a) for a, b in zip(widths, widths[1:], strict=False))
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n H W) of pictures (n 3 H W) in [-1, 1]; sides need not be even."""
        skips = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if i else x)
            skips.append(x)
        for block, skip in zip(reversed(self.up), reversed(skips[:-1]), strict=True):
            larger = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = block(torch.cat([skip, larger], 1))
        return self.head(x)[:, 0]

    @torch.no_grad()
    def masks(self, pictures: Tensor, tidy: bool = True) -> Tensor:
        """Masks (n H W) bool of pictures (n 3 H W) in [-1, 1]: probability above one half; ``tidy`` closes gaps and
        fills holes."""
        found = torch.cat([self(part.float()) > 0 for part in pictures.split(BATCH)])
        if not tidy:
            return found
        return torch.stack([mask_ops.fill_holes(mask_ops.close(each.float())).bool() for each in found])

    def mask(self, image: Image.Image) -> Image.Image:
        """The mask of a picture, in the picture's size; it is looked at in the area the segmenter was trained in."""
        width, height = self.config.size or image.size
        scale = math.sqrt(width * height / (image.width * image.height))
        pixels = as_pixels(image, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        mask = Image.fromarray(self.masks(pixels)[0].cpu().byte().numpy() * 255)
        return mask.resize(image.size, Image.Resampling.NEAREST)

    def save(self, path: Path | str, concept: str = "") -> Path:
        """Write the weights as safetensors, whole or not at all."""
        metadata = {"format": FORMAT, "config": json.dumps(asdict(self.config)), "concept": concept}
        return files.save_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: Path | str) -> Segmenter:
        """What :meth:`save` wrote, ready for :meth:`masks`. Raises BadInput for any other file, OSError."""
        with files.reading_tensors(path, FORMAT, "segmenter") as (file, metadata):
            net = cls(SegmenterConfig(**json.loads(metadata["config"])))
            net.load_state_dict({key: file.get_tensor(key) for key in file.keys()})
        return net.eval().requires_grad_(False)


def _block(inside: int, outside: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in ((inside, outside), (outside, outside)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


def train_segmenter(
    pictures: Tensor,
    found: Tensor,
    without: Tensor | None = None,
    width: int = 8,
    iterations: int = 400,
    negatives: float = 0.0,
    batch: int = 32,
    learning_rate: float = 2e-3,
    crop: int | None = None,
    seed: int = 0,
    report: Callable[[str, int, int], None] | None = None,
) -> Segmenter:
    """A segmenter trained on pictures (n 3 H W) and masks (n H W): binary cross-entropy, Adam, random flips and crops
    (of side ``crop``: 128, or four fifths of smaller pictures).

    Pictures whose mask is empty are left out. ``negatives``: share of the samples that are pictures ``without`` the
    object, with an empty mask. Ctrl-C ends it with what was learnt until then.

    Raises NoMatch where every mask is empty.
    """
    usable = found.flatten(1).any(1)
    if not usable.any():
        raise NoMatch(
            "no picture gave a mask to learn from; does the model know the object, and do the pictures show it?"
        )
    side = min(128, round(0.8 * min(pictures.shape[-2:]))) if crop is None else crop
    images, truths = pictures[usable].float(), found[usable].float()
    empty = None if without is None else without[usable].float()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = Segmenter(SegmenterConfig(width=width, size=(pictures.shape[-1], pictures.shape[-2]))).train()
    net.to(memory_format=torch.channels_last)
    half = fast_bf16(images.device.type)

    def loss(_: Draw) -> Tensor:
        chosen = torch.randint(len(images), (batch,), generator=generator)
        x, y = images[chosen], truths[chosen]
        if empty is not None and negatives:
            negative = torch.rand(batch, generator=generator) < negatives
            x[negative], y[negative] = empty[chosen[negative]], 0.0
        x, y = cropped(x, y, side, generator)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            logits = net(x.contiguous(memory_format=torch.channels_last))
        return F.binary_cross_entropy_with_logits(logits.float(), y)

    fit(
        Player(loss, torch.optim.Adam(net.parameters(), lr=learning_rate), net),
        iterations,
        on_progress=(lambda now: report("training steps", now.step, now.steps)) if report else None,
        name="the segmenter",
    )
    return net.eval().requires_grad_(False)


def cropped(x: Tensor, y: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random crops of at most ``side``, mirrored at random: pictures (b 3 h w) and masks (b h w)."""
    h, w = (min(side, n) for n in x.shape[-2:])
    top, left = (
        int(torch.randint(n - m + 1, (), generator=generator)) for n, m in zip(x.shape[-2:], (h, w), strict=True)
    )
    x, y = x[..., top : top + h, left : left + w], y[..., top : top + h, left : left + w]
    flip = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x), torch.where(flip.view(-1, 1, 1), y.flip(-1), y)
