"""Training of the toy-judge: masks, centres and attributes from renders, roughened as generators roughen pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import AliasChoices, Field
from torch import Tensor, nn
from torch.nn import functional

from sfumato import registry
from sfumato.arrays import to_tensor
from sfumato.markup import described
from sfumato.toybox import Scene, ToyboxDataset
from sfumato.toybox.oracle.accuracy import measure
from sfumato.toybox.oracle.toy_judge import ATTRIBUTES, SCENERY, Dense, JudgeConfig, JudgeNet, ToyJudge
from sfumato.toybox.rendering import COLOR_RGB
from sfumato.training.draw import Draw
from sfumato.training.objective import Objective
from sfumato.training.recipe import Recipe, Section

MOST_TOYS = 4


class JudgeModel(Section):
    """Architecture (:class:`sfumato.toybox.oracle.toy_judge.JudgeConfig`)."""

    widths: tuple[int, int, int, int] = JudgeConfig.widths
    blocks: tuple[int, int, int] = JudgeConfig.blocks
    embedding: int = JudgeConfig.embedding
    close: tuple[int, int] = JudgeConfig.close


class JudgeLoss(Section):
    """Weights of the losses, strength of the augmentations, and what is read."""

    heldout: int = Field(4000, ge=0, description="training scenes with the combinations no generator was trained on")
    roundtrip: str = Field("", description="zoo name or folder of an autoencoder whose round trips are trained on too")
    roundtrips: int = Field(4000, ge=1, description="how many training pictures make the round trip")
    min_pixels: int = Field(12, ge=1, description="toys with fewer visible pixels do not count")
    foreground: float = Field(8.0, gt=0)
    offset: float = Field(0.2, gt=0)
    centre: float = Field(1.0, gt=0, validation_alias=AliasChoices("centre", "middle"))  # older recipes: middle
    attribute: float = Field(1.0, gt=0)
    scenery: float = Field(0.5, gt=0)
    blur: float = Field(0.7, ge=0, le=1, description="largest weight of the blurred picture")
    noise: float = Field(0.08, ge=0, description="largest standard deviation of added noise")
    gain: float = Field(0.08, ge=0, description="largest relative change of contrast and of each channel")
    shift: float = Field(0.06, ge=0, description="largest change of brightness")
    quantise: float = Field(0.25, ge=0, description="largest step of the compressed picture's cosine coefficients")


@dataclass
class Targets:
    """What the network should answer, from masks (b, h, w): see :func:`targets_of`."""

    toys: Tensor  # (b, k, h, w) float, one mask per toy
    valid: Tensor  # (b, k) bool, large enough to count
    offset: Tensor  # (b, 2, h, w)
    centre: Tensor  # (b, h/2, w/2) in [0, 1], 1 at centres

    __repr__ = described


def targets_of(masks: Tensor, min_pixels: int) -> Targets:
    """Targets for integer masks (b, h, w) with -1 for background and toy indices below ``MOST_TOYS``."""
    b, h, w = masks.shape
    toys = (masks[:, None] == torch.arange(MOST_TOYS, device=masks.device)[:, None, None]).float()
    rows = torch.arange(h, device=masks.device, dtype=torch.float32)
    columns = torch.arange(w, device=masks.device, dtype=torch.float32)
    area = toys.sum((2, 3))
    y = (toys.sum(3) @ rows) / area.clamp_min(1)
    x = (toys.sum(2) @ columns) / area.clamp_min(1)
    valid = area >= min_pixels
    offset = torch.stack(
        [
            (toys * (x[..., None, None] - columns)).sum(1),
            (toys * (y[..., None, None] - rows[:, None])).sum(1),
        ],
        1,
    )
    # a centre is a cell of the half-resolution map; cell i covers pixels 2i and 2i + 1
    cell_x, cell_y = ((x - 0.5) / 2).round(), ((y - 0.5) / 2).round()
    off_x = torch.arange(w // 2, device=masks.device) - cell_x[..., None]
    off_y = torch.arange(h // 2, device=masks.device) - cell_y[..., None]
    bell = torch.exp(-(off_x[:, :, None].square() + off_y[..., None].square()) / (2 * 1.2**2))
    return Targets(toys, valid, offset, (bell * valid[..., None, None]).amax(1))


def centre_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Penalty-reduced focal loss (Law & Deng 2018, CornerNet, eq. 1) per centre, alpha 2, beta 4."""
    p = logits.sigmoid()
    hit = target == 1
    gain = torch.where(
        hit,
        (1 - p).square() * functional.logsigmoid(logits),
        (1 - target) ** 4 * p.square() * functional.logsigmoid(-logits),
    )
    return -gain.sum() / hit.sum().clamp_min(1)


def cosine_basis(size: int = 8) -> Tensor:
    """Orthonormal cosine transform (size, size), rows are frequencies."""
    place = torch.arange(size, dtype=torch.float32)
    basis = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def compress(images: Tensor, step: Tensor) -> Tensor:
    """Images (b, 3, h, w) with the cosine coefficients of their 8x8 blocks rounded to multiples of ``step`` (b,).

    Coarser for high frequencies, as JPEG is. A step of 0 changes nothing.
    """
    b, c, h, w = images.shape
    basis = cosine_basis().to(images)
    blocks = images.reshape(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    coefficients = basis @ blocks @ basis.T
    frequency = torch.arange(8, device=images.device)
    coarse = step.view(b, 1, 1, 1, 1, 1) * (1 + frequency + frequency[:, None]) / 4
    rounded = (coefficients / coarse.clamp_min(1e-3)).round() * coarse.clamp_min(1e-3)
    blocks = basis.T @ torch.where(coarse > 1e-3, rounded, coefficients) @ basis
    return blocks.transpose(3, 4).reshape(b, c, h, w)


def augment(images: Tensor, options: JudgeLoss, generator: torch.Generator) -> Tensor:
    """What generators do to pictures (b, 3, h, w) in [-1, 1]: blur, tint, compression, noise, each sometimes."""
    b = len(images)

    def some(share: float, low: float = 0.0, high: float = 1.0, *shape: int) -> Tensor:
        drawn = low + (high - low) * torch.rand(b, *shape or (1, 1, 1), generator=generator)
        chosen = torch.rand(b, *[1] * (drawn.ndim - 1), generator=generator) < share
        return torch.where(chosen, drawn, torch.zeros(())).to(images.device)

    kernel = torch.tensor([0.25, 0.5, 0.25], device=images.device)
    soft = functional.conv2d(
        functional.pad(images, (1, 1, 1, 1), mode="replicate"), (kernel[:, None] * kernel).expand(3, 1, 3, 3), groups=3
    )
    images = torch.lerp(images, soft, some(0.5, 0, options.blur))
    images = (
        images * (1 + some(0.5, -options.gain, options.gain)) * (1 + some(0.5, -options.gain, options.gain, 3, 1, 1))
    )
    images = images + some(0.5, -options.shift, options.shift)
    images = compress(images, some(0.3, 0, options.quantise).flatten())
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return (images + some(0.5, 0, options.noise) * noise).clamp(-1, 1)


class JudgeObjective(Objective):
    """Masks, centres and attributes of toys, ground and sky. Trained on renders only (and their codec round trips)."""

    NAME = "judge"
    Model, Loss = JudgeModel, JudgeLoss

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.net: JudgeNet = self.modules["judge"]  # type: ignore[assignment]

    def build(self) -> dict[str, nn.Module]:
        return {"judge": JudgeNet(JudgeConfig(**self.model_options.model_dump()))}

    def open_data(self) -> None:
        data = self.recipe.data
        self.sets = [ToyboxDataset("train", data.train, data.size, data.seed, lazy=True)]
        if self.loss_options.heldout:
            # the judge must read every combination equally well; the pictures it is measured on have other seeds
            self.sets.append(ToyboxDataset("heldout", self.loss_options.heldout, data.size, data.seed + 1, lazy=True))
        self.val = [
            ToyboxDataset("val", data.val, data.size, data.seed),
            ToyboxDataset("heldout", max(1, data.val // 2), data.size, data.seed),
        ]
        self.labels = [labels(self.net, dataset.scenes) for dataset in self.sets]
        self.decoded = self._round_trips() if self.loss_options.roundtrip else None

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        sizes = [len(dataset) for dataset in self.sets]
        chosen = draw.indices(sum(sizes), self.recipe.train.batch).numpy()
        images, masks, rows = [], [], []
        decoded = torch.rand(len(chosen), generator=draw.generator("trip")).numpy() < 0.5
        for index, use_decoded in zip(chosen.tolist(), decoded.tolist(), strict=True):
            which = 0 if index < sizes[0] else 1
            index -= which * sizes[0]
            source = self.sets[which].images
            if use_decoded and self.decoded is not None and which == 0:
                index %= len(self.decoded)
                source = self.decoded
            images.append(source[index])
            masks.append(self.sets[which].masks[index])
            rows.append(self.labels[which][index])
        pictures = to_tensor(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        generator = draw.generator("augment")
        flip = torch.rand(len(chosen), generator=generator) < 0.5
        targets = to_tensor(np.stack(masks)).long()
        pictures[flip], targets[flip] = pictures[flip].flip(3), targets[flip].flip(2)
        pictures = augment(pictures, self.loss_options, generator)
        out = {"images": pictures, "masks": targets, "labels": torch.stack(rows)}
        return {name: tensor.to(self.device) for name, tensor in out.items()}

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        options = self.loss_options
        targets = targets_of(batch["masks"], options.min_pixels)
        dense = self.net(batch["images"])
        inside = targets.toys.sum(1)
        parts = {
            "foreground": functional.binary_cross_entropy_with_logits(dense.foreground, inside),
            "offset": (functional.smooth_l1_loss(dense.offset, targets.offset, reduction="none").sum(1) * inside).sum()
            / inside.sum().clamp_min(1),
            "centre": centre_loss(dense.centre, targets.centre),
        }
        rows, which = targets.valid.nonzero(as_tuple=True)
        masks = self._imperfect(targets.toys[rows, which], dense, rows, draw)
        jitter = 0.2 * torch.rand(len(rows), 3, generator=draw.generator("jitter")) - 0.1
        logits = self.net.describe(dense, masks, rows, jitter.to(self.device))
        labels = batch["labels"]
        single = [
            functional.cross_entropy(logits[name].float(), labels[rows, 2 + 4 * which + i])
            for i, name in enumerate(ATTRIBUTES)
        ]
        parts["attribute"] = torch.stack(single).sum()
        parts["scenery"] = torch.stack(
            [functional.cross_entropy(dense.scenery[name].float(), labels[:, i]) for i, name in enumerate(SCENERY)]
        ).sum()
        total = sum(
            (getattr(options, name) * value for name, value in parts.items()), torch.zeros((), device=self.device)
        )
        return total, {name: value.detach() for name, value in parts.items()}

    @torch.no_grad()
    def _imperfect(self, masks: Tensor, dense: Dense, rows: Tensor, draw: Draw) -> Tensor:
        """True masks (m, h, w), made as imperfect as those at reading time: cut by the foreground, grown or shrunk."""
        choice = torch.rand(len(masks), 1, 1, generator=draw.generator("masks")).to(masks.device)
        grown = functional.max_pool2d(masks[:, None], 3, 1, 1)[:, 0]
        shrunk = -functional.max_pool2d(-masks[:, None], 3, 1, 1)[:, 0]
        cut = masks * (dense.foreground[rows] > 0)
        out = torch.where(choice < 0.2, grown, torch.where(choice < 0.4, shrunk, torch.where(choice < 0.7, cut, masks)))
        return torch.where(out.sum((1, 2), keepdim=True) >= 4, out, masks)

    def takes_muon(self, name: str, parameter: Tensor) -> bool:
        return parameter.ndim == 4 and parameter.shape[-1] == 3 and "stem" not in name

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy of whole readings on scenes of other seeds: seen and held-out combinations, and round trips."""
        judge = ToyJudge(self.net)
        figures: dict[str, float] = {}
        for name, dataset in zip(("val", "heldout"), self.val, strict=True):
            pictures = to_tensor(np.array(dataset.images)).permute(0, 3, 1, 2).float() / 127.5 - 1
            got = measure(judge.read(pictures), dataset.scenes, to_tensor(np.array(dataset.masks)).long())
            figures[f"{name}_attributes"] = got.attributes.value
            figures |= {f"{name}_{key}": interval.value for key, interval in got.single.items()}
            figures |= {
                f"{name}_found": got.found.value,
                f"{name}_counted": got.counted.value,
                f"{name}_miou": got.miou,
            }
        return figures

    @torch.no_grad()
    def grid(self) -> Image.Image:
        """Held-out pictures above what is read in them: every mask painted in the colour read."""
        pictures = to_tensor(np.array(self.val[0].images[:12]))
        read = torch.full_like(pictures, 128)
        readings = ToyJudge(self.net).read(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
        for canvas, reading in zip(read, readings, strict=True):
            for toy in reading.objects:
                canvas[toy.mask] = torch.tensor([round(255 * part) for part in COLOR_RGB[toy.color]], dtype=torch.uint8)
        sheet = torch.cat([torch.cat(list(pictures), 1), torch.cat(list(read), 1)]).numpy()
        return Image.fromarray(sheet)

    def export(self, folder: Path) -> dict[str, Any]:
        self.net.save(folder, dtype=torch.float16)
        return {}

    def load(self, folder: Path) -> None:
        self.net.load_state_dict(JudgeNet.load(folder).state_dict())

    @torch.no_grad()
    def _round_trips(self) -> np.ndarray:
        """The first ``roundtrips`` training pictures after encoding and decoding, uint8 (n, h, w, 3)."""
        from diffusers import AutoencoderKL

        name = self.loss_options.roundtrip
        codec = AutoencoderKL.from_pretrained(registry.find(name) or name).to(self.device).eval()
        source = self.sets[0].images[: self.loss_options.roundtrips]
        out = np.empty_like(source)
        for start in range(0, len(source), 32):
            pictures = to_tensor(np.array(source[start : start + 32])).permute(0, 3, 1, 2).float() / 127.5 - 1
            decoded = codec(pictures.to(self.device)).sample.clamp(-1, 1)
            out[start : start + 32] = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return out


def labels(net: JudgeNet, scenes: list[Scene]) -> Tensor:
    """Word indices (n, 2 + 4 * MOST_TOYS): ground, sky, then shape, colour, pattern, size of each toy (0: none)."""
    place = {name: {word: i for i, word in enumerate(words)} for name, words in net.words.items()}
    out = torch.zeros(len(scenes), len(SCENERY) + len(ATTRIBUTES) * MOST_TOYS, dtype=torch.long)
    for row, scene in zip(out, scenes, strict=True):
        named = [place[name][getattr(scene, name)] for name in SCENERY]
        named += [place[name][getattr(toy, name)] for toy in scene.toys for name in ATTRIBUTES]
        row[: len(named)] = torch.tensor(named)
    return out
