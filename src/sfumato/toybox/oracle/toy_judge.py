"""The toy-judge: reads a picture of the toybox back into toys (shape, colour, pattern, size, mask, box) and scenery.

A small U-shaped convolutional network says for every pixel whether it belongs to a toy, how far away the centre of that
toy is, and where middles are (Cheng et al. 2020, Panoptic-DeepLab, https://arxiv.org/abs/1911.10194, in miniature).
Foreground pixels vote for the nearest centre, which gives one mask per toy. A second, smaller network takes a close
look at each toy - its surroundings cut out and enlarged, with its mask - and reads it into words, given also what the
first one saw inside the mask and where the mask lies. Both are trained on renders and their codec round trips, never on
what a generator made, and guide none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from sfumato import valid
from sfumato.errors import BadInput, BadWeights, NotSupported
from sfumato.markup import described
from sfumato.once import once
from sfumato.toybox import COLORS, GROUNDS, PATTERNS, SHAPES, SIZES, SKIES

SIDE = 64
LOOK = 28  # side of the close look
ATTRIBUTES = ("shape", "color", "pattern", "size")
SCENERY = ("ground", "sky")


@dataclass(frozen=True)
class ObjectReading:
    """One toy found in a picture. ``mask`` is bool (h, w), ``box`` (x0, y0, x1, y1) in pixels, ends exclusive.

    ``confidence`` is the probability of the toy's centre times that of its least sure attribute.
    """

    shape: str
    color: str
    pattern: str
    size: str
    mask: Tensor
    box: tuple[float, float, float, float]
    confidence: float

    __repr__ = described

    def has(self, **attributes: str | None) -> bool:
        """Whether every named attribute that is not None reads as given: ``toy.has(shape="cube", color="red")``."""
        return all(value is None or getattr(self, name) == value for name, value in attributes.items())


@dataclass(frozen=True)
class SceneReading:
    """What the judge sees in one picture; toys from the most to the least confident."""

    objects: tuple[ObjectReading, ...]
    ground: str
    sky: str


@dataclass(frozen=True)
class JudgeConfig:
    """Architecture and vocabulary; the words travel with the weights so that a reading never depends on their order."""

    widths: tuple[int, int, int, int] = (16, 32, 64, 96)
    blocks: tuple[int, int, int] = (1, 2, 2)
    embedding: int = 96
    close: tuple[int, int] = (32, 64)
    vocabulary: Mapping[str, tuple[str, ...]] | None = None

    def words(self) -> dict[str, tuple[str, ...]]:
        """The words of every attribute and of the scenery."""
        if self.vocabulary is not None:
            return {name: tuple(words) for name, words in self.vocabulary.items()}
        named = dict(zip(ATTRIBUTES + SCENERY, (SHAPES, COLORS, PATTERNS, SIZES, GROUNDS, SKIES), strict=True))
        return {name: tuple(words) for name, words in named.items()}


@dataclass
class Dense:
    """Per-pixel output for images (b, 3, h, w).

    Attributes:
        foreground: logits (b, h, w).
        offset: (b, 2, h, w), from each pixel to its toy's centre as (dx, dy) in pixels.
        centre: logits (b, h/2, w/2) of being a toy's centre.
        features: (b, c, h/2, w/2), to be pooled over masks.
        images: (b, 3, h, w), what was looked at.
        scenery: logits per scenery name (b, words).
        context: (b, c') the whole picture at a glance.
    """

    foreground: Tensor
    offset: Tensor
    centre: Tensor
    features: Tensor
    images: Tensor
    scenery: dict[str, Tensor]
    context: Tensor

    __repr__ = described


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.relu(self.norm(self.conv(x)))


class _Scale(nn.Module):
    """Changes the width (and the resolution, by ``stride``) and normalises."""

    def __init__(self, inside: int, outside: int, stride: int = 1, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.GroupNorm(8, outside)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))


class JudgeNet(nn.Module):
    """The judge's network: images (b, 3, 64, 64) in [-1, 1] -> :class:`Dense`; toys are read by :meth:`describe`."""

    def __init__(self, config: JudgeConfig | None = None):
        super().__init__()
        self.config = config or JudgeConfig()
        self.words = self.config.words()
        a, b, c, d = self.config.widths
        n1, n2, n3 = self.config.blocks
        self.stem = _Scale(5, a)
        self.down1 = nn.Sequential(_Scale(a, b, stride=2), *[_Block(b) for _ in range(n1)])
        self.down2 = nn.Sequential(_Scale(b, c, stride=2), *[_Block(c) for _ in range(n2)])
        self.down3 = nn.Sequential(_Scale(c, d, stride=2), *[_Block(d) for _ in range(n3)])
        self.lift3, self.up2 = nn.Conv2d(d, c, 1), nn.Sequential(_Block(c))
        self.lift2, self.up1 = nn.Conv2d(c, b, 1), nn.Sequential(_Block(b))
        self.lift1, self.up0 = nn.Conv2d(b, a, 1), nn.Sequential(_Block(a))
        self.pixel = nn.Conv2d(a, 3, 1)
        self.middle = nn.Conv2d(b, 1, 1)  # centres, under the name that the weights have in files
        # what describes a toy: detail and the wider view at half resolution, and the close look
        self.embed = nn.Sequential(nn.Conv2d(b + c, self.config.embedding, 1), nn.ReLU())
        e, f = self.config.close
        self.close = nn.Sequential(
            _Scale(4, e // 2), _Scale(e // 2, e, stride=2), _Block(e), _Scale(e, f, stride=2), _Block(f), _Block(f)
        )
        width = self.config.embedding + 2 * f + d + 6
        self.toy = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(self.words[name])) for name in ATTRIBUTES})
        self.scenery = nn.ModuleDict({name: nn.Linear(a + b + c + d, len(self.words[name])) for name in SCENERY})
        nn.init.constant_(self.middle.bias, -4.0)

    def forward(self, images: Tensor) -> Dense:
        """Dense output for images (b, 3, h, w); h and w multiples of 8."""
        n, _, h, w = images.shape
        rows = torch.linspace(-1, 1, h, dtype=images.dtype, device=images.device)[:, None].expand(h, w)
        columns = torch.linspace(-1, 1, w, dtype=images.dtype, device=images.device)[None].expand(h, w)
        x0 = self.stem(torch.cat([images, torch.stack([columns, rows]).expand(n, 2, h, w)], 1))
        x1 = self.down1(x0)
        x2 = self.down2(x1)
        x3 = self.down3(x2)
        context = x3.mean((2, 3))
        y2 = self.up2(x2 + _double(self.lift3(x3)))
        y1 = self.up1(x1 + _double(self.lift2(y2)))
        y0 = self.up0(x0 + _double(self.lift1(y1)))
        pixel = self.pixel(y0).float()
        features = self.embed(torch.cat([y1, _double(y2)], 1))
        # the top rows are sky, the bottom rows ground: a glance at each level
        glance = torch.cat([x.mean((2, 3)) for x in (x0, x1, x2)] + [context], 1)
        return Dense(
            foreground=pixel[:, 0],
            offset=pixel[:, 1:] * 8.0,
            centre=self.middle(y1)[:, 0].float(),
            features=features,
            images=images,
            scenery={name: head(glance) for name, head in self.scenery.items()},
            context=context,
        )

    def describe(self, dense: Dense, masks: Tensor, rows: Tensor, jitter: Tensor | None = None) -> dict[str, Tensor]:
        """Attribute logits (m, words) of m toys given as masks (m, h, w) in [0, 1] in pictures ``rows`` (m,).

        ``jitter`` (m, 3) moves (x, y) and scales the close look, in shares of its side; for training.
        """
        small = functional.avg_pool2d(masks[:, None].to(dense.features.dtype), 2)[:, 0]
        weights = (small / small.sum((1, 2), keepdim=True).clamp_min(1e-4)).flatten(1)
        pooled = torch.einsum("mn,mcn->mc", weights, dense.features.flatten(2)[rows])
        geometry = _geometry(masks)
        near = self.close(_cut_out(dense.images[rows], masks, geometry, jitter))
        inputs = [pooled, near.mean((2, 3)), near.amax((2, 3)), dense.context[rows], geometry.to(pooled.dtype)]
        toys = self.toy(torch.cat(inputs, 1))
        return {name: head(toys) for name, head in self.heads.items()}

    # -- files --------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes ``config.json`` and ``model.safetensors`` (floating-point weights as ``dtype``)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "_class_name": type(self).__name__,
            "widths": list(self.config.widths),
            "blocks": list(self.config.blocks),
            "embedding": self.config.embedding,
            "close": list(self.config.close),
            "vocabulary": {name: list(words) for name, words in self.words.items()},
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file({k: v.to(dtype).contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> JudgeNet:
        """Inverse of :meth:`save`, in float32 and eval mode. Raises BadWeights on anything else."""
        folder = Path(folder)
        try:
            config = valid.loads((folder / "config.json").read_text(encoding="utf-8"))
            net = cls(
                JudgeConfig(
                    widths=tuple(config["widths"]),
                    blocks=tuple(config["blocks"]),
                    embedding=config["embedding"],
                    close=tuple(config["close"]),
                    vocabulary={name: tuple(words) for name, words in config["vocabulary"].items()},
                )
            )
            tensors = load_file(folder / "model.safetensors")
            net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        except FileNotFoundError as error:
            raise BadWeights(f"{folder} is not a judge: {error.filename} is missing.") from None
        except Exception as error:
            # json, safetensors and torch each have their own complaint about a damaged file
            raise BadWeights(f"{folder} cannot be read as a judge: {valid.first_line(error)}") from None
        return net.eval().requires_grad_(False)


class ToyJudge:
    """Reads pictures with a trained :class:`JudgeNet`.

    Args:
        net: the trained network.
        threshold: smallest probability of a centre that makes a toy.
        area: fewest pixels of the 64x64 picture a toy must cover to be reported.
    """

    def __init__(self, net: JudgeNet, threshold: float = 0.3, area: int = 10):
        self.net, self.threshold, self.area = net.eval(), threshold, area

    @torch.no_grad()
    def read(self, images: Tensor, batch: int = 64) -> list[SceneReading]:
        """Readings of square pictures (b, 3, h, w) in [-1, 1]; other sizes than 64 are resized and masks scaled back.

        Raises BadInput for another layout or range, NotSupported for pictures that are not square.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise BadInput(
                f"read: images must be float (b, 3, h, w) in [-1, 1]; got {images.dtype} {tuple(images.shape)}."
            )
        if images.shape[2] != images.shape[3]:
            raise NotSupported(f"read: the toy-judge reads square pictures; got {images.shape[3]}x{images.shape[2]}.")
        if not torch.isfinite(images).all() or images.abs().max() > 1.5:
            raise BadInput("read: images must be finite and in [-1, 1].")
        side = images.shape[2]
        device = next(self.net.parameters()).device
        readings = []
        for chunk in images.split(batch):
            small = chunk.to(device, torch.float32).clamp(-1, 1)
            if side != SIDE:
                small = functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear", antialias=True)
            readings += self._read(small, side)
        return readings

    def _read(self, images: Tensor, side: int) -> list[SceneReading]:
        dense = self.net(images)
        masks, rows, sure = group(dense, self.threshold, self.area)
        answers = {}
        if len(rows):
            logits = self.net.describe(dense, masks.float(), rows)
            answers = {name: value.float().softmax(1).max(1) for name, value in logits.items()}
        scenery = {name: value.argmax(1).tolist() for name, value in dense.scenery.items()}
        words = self.net.words
        if side != SIDE and len(rows):
            masks = functional.interpolate(masks[:, None].float(), size=(side, side), mode="nearest")[:, 0] > 0.5
        found: list[list[ObjectReading]] = [[] for _ in range(len(images))]
        for i, row in enumerate(rows.tolist()):
            named = {name: words[name][int(answers[name].indices[i])] for name in ATTRIBUTES}
            least = min(float(answers[name].values[i]) for name in ATTRIBUTES)
            mask = masks[i].cpu()
            found[row].append(ObjectReading(**named, mask=mask, box=box_of(mask), confidence=float(sure[i]) * least))
        return [
            SceneReading(
                tuple(sorted(found[i], key=lambda toy: -toy.confidence)),
                **{name: words[name][index[i]] for name, index in scenery.items()},
            )
            for i in range(len(images))
        ]


def group(dense: Dense, threshold: float, area: int) -> tuple[Tensor, Tensor, Tensor]:
    """Turns dense output into toys: masks bool (m, h, w), picture rows (m,), probability of the centre (m,).

    Centres are peaks of the centre map over 5x5 cells; each foreground pixel joins the peak nearest to where it points.
    """
    h, w = dense.foreground.shape[1:]
    heat = dense.centre.sigmoid()
    peak = functional.max_pool2d(heat[:, None], 5, stride=1, padding=2)[:, 0]
    picture, y, x = torch.nonzero((heat >= threshold) & (heat == peak), as_tuple=True)
    device = heat.device
    if not len(picture):
        return torch.zeros(0, h, w, dtype=torch.bool, device=device), picture, heat.new_zeros(0)
    sure = heat[picture, y, x]
    grid_y, grid_x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    pointed_x, pointed_y = grid_x + dense.offset[:, 0], grid_y + dense.offset[:, 1]
    # half-resolution cell (x, y) covers full-resolution pixels 2x and 2x + 1
    distance = (pointed_x[picture] - (2 * x + 0.5)[:, None, None]).square()
    distance = distance + (pointed_y[picture] - (2 * y + 0.5)[:, None, None]).square()
    nearest = torch.full((len(heat), h, w), torch.inf, device=device)
    nearest = nearest.scatter_reduce(0, picture[:, None, None].expand_as(distance), distance, "amin")
    masks = (distance <= nearest[picture]) & (dense.foreground > 0)[picture]
    keep = masks.sum((1, 2)) >= area
    return masks[keep], picture[keep], sure[keep]


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """Smallest box (x0, y0, x1, y1), ends exclusive, around a mask bool (h, w); NaNs when it is empty."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return (float("nan"),) * 4
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


@once(2)
def load_judge(name_or_path: str = "toy-judge") -> ToyJudge:
    """The trained judge of the zoo, or one from a folder with ``config.json`` and ``model.safetensors``.

    Raises UnknownName when it is neither, BadWeights when the folder does not hold a judge.
    """
    from sfumato import registry
    from sfumato.errors import UnknownName

    folder = registry.find(name_or_path) or Path(name_or_path)
    if not Path(folder).is_dir():
        raise UnknownName("judge", name_or_path, [name for name in registry.names() if "judge" in name])
    return ToyJudge(JudgeNet.load(folder))


def read(images: Tensor | Sequence[Tensor], judge: ToyJudge | None = None) -> list[SceneReading]:
    """Reads pictures (b, 3, h, w) in [-1, 1] with ``judge`` (default: the zoo's)."""
    pictures = images if isinstance(images, Tensor) else torch.stack(list(images))
    return (judge or load_judge()).read(pictures)


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def _cut_out(images: Tensor, masks: Tensor, geometry: Tensor, jitter: Tensor | None) -> Tensor:
    """The square around each mask (m, h, w), a quarter larger than its box, with the mask: (m, 4, LOOK, LOOK)."""
    x0, y0, x1, y1 = geometry[:, :4].unbind(1)
    centre = torch.stack([x0 + x1, y0 + y1], 1) - 1  # in [-1, 1]
    half = 1.25 * torch.maximum(x1 - x0, y1 - y0)
    if jitter is not None:
        centre = centre + jitter[:, :2] * half[:, None]
        half = half * (1 + jitter[:, 2])
    place = torch.linspace(-1, 1, LOOK, dtype=half.dtype, device=half.device) * half[:, None]  # (m, LOOK)
    grid_x = (centre[:, :1] + place)[:, None].expand(-1, LOOK, -1)
    grid_y = (centre[:, 1:] + place)[:, :, None].expand(-1, -1, LOOK)
    pictures = torch.cat([images, 2 * masks[:, None].to(images.dtype) - 1], 1)
    grid = torch.stack([grid_x, grid_y], 3).to(images.dtype)
    return functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def _geometry(masks: Tensor) -> Tensor:
    """Box (x0, y0, x1, y1), area and fill of masks (m, h, w), each scaled to about 1: (m, 6)."""
    m, h, w = masks.shape
    inside = masks > 0.5
    rows, columns = inside.any(2).float(), inside.any(1).float()
    y0, y1 = rows.argmax(1) / h, 1 - rows.flip(1).argmax(1) / h
    x0, x1 = columns.argmax(1) / w, 1 - columns.flip(1).argmax(1) / w
    area = inside.flatten(1).float().mean(1)
    fill = area / ((y1 - y0) * (x1 - x0)).clamp_min(1e-4)
    return torch.stack([x0, y0, x1, y1, area.sqrt() * 2, fill], 1)
