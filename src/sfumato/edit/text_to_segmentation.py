"""From the name of an object to a network that segments it, with no mask drawn by anybody.

Dombrowski et al. 2023 (arXiv 2212.14306): the attention of a text-to-image model says roughly where the named thing is;
redrawing that place without it says exactly, for what changed was the thing; and a plain U-Net trained on the masks so
found is faster and better than they are, because errors that differ from picture to picture average out. What falls off
on the way is a data set of pictures with and without the object.

    >>> found = TextToSegmentation().run(model, remover, "ball", pictures)
    >>> found.segmenter.masks(more_pictures)

The stages are functions of their own: :func:`weak_maps`, :func:`rough_masks`, :func:`remove`, :func:`refined_masks`,
:func:`train_segmenter`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sfumato import cards, files, masks
from sfumato.cards import Card, Field, register
from sfumato.edit.blend import Blend
from sfumato.edit.inpaint import Inpaint
from sfumato.errors import BadInput, NoMatch
from sfumato.explain.daam import explain_images
from sfumato.models import Model
from sfumato.models.precision import fast_bf16
from sfumato.sampling import Intervention, generate
from sfumato.sampling.request import as_pictures
from sfumato.windows import Window

__all__ = [
    "Segmented",
    "Segmenter",
    "TextToSegmentation",
    "refined_masks",
    "remove",
    "rough_masks",
    "train_segmenter",
    "weak_maps",
]

FORMAT = "sfumato.segmenter.1"
BATCH = 32
BACKGROUND = "a photo of a background"

#: told after each piece of work: (stage, done, of how many)
Report = Callable[[str, int, int], None]


@register
class TextToSegmentation:
    """The whole way: weak maps, rough masks, removal, refined masks, a segmenter."""

    CARD = Card(
        key="text_to_segmentation",
        title="Foreground-Background Separation through Concept Distillation from Generative Image Foundation Models",
        authors="Dombrowski, Reynaud, Baugh, Kainz",
        year=2023,
        arxiv="2212.14306",
        verb="edit",
        needs=("pictures", "noise_path", "text_attention"),
        defaults_from="the released code (noise levels, threshold, filter, Adam 2e-3); 20 noise levels instead of 50",
        cost="per picture 16 forwards for its map and two per step for the removal; then the training of a small U-Net",
        not_reproduced="the fine-tune on background rectangles: an inpainting model removes the object instead",
        default_for=("segment",),
        summary="a segmentation network from the name of an object, with no mask drawn",
    )

    class Params(cards.Params):
        prompt: str = Field(default="a {}", description="what pictures of the object show; {} stands for its name")
        background: list[str] = Field(
            default=[],
            description="what is to be seen without the object, of several one for each picture in turn; none: what "
            "the remover's card says, or a photo of a background",
        )
        opposite: bool = Field(
            default=False, description="guide away from the object's prompt when removing it, as the released code does"
        )
        n: int = Field(default=200, ge=2, le=100_000, description="pictures to make where none are given")
        levels: int = Field(default=20, ge=1, le=1000, description="noise levels of the schedule that maps are read at")
        window: Window = Field(
            default=(0.2, 1.0),
            description="share of the schedule whose levels are read",
            json_schema_extra={"unit": "progress"},
        )
        grow: float = Field(
            default=0.06,
            ge=0,
            le=0.5,
            description="rough masks are grown by so much before the object is removed",
            json_schema_extra={"unit": "share of the picture's shorter side"},
        )
        steps: int | None = Field(
            default=None, ge=1, le=1000, description="denoising steps; the model's own if not said"
        )
        guidance: float | None = Field(
            default=None, ge=0, description="guidance of the removal; the model's own if not said"
        )
        tidy: bool = Field(default=True, description="close small gaps and fill holes of the refined masks")
        width: int = Field(default=8, ge=1, le=256, description="channels of the segmenter's finest level")
        iterations: int = Field(default=400, ge=1, le=1_000_000, description="training steps of the segmenter")
        negatives: float = Field(
            default=0.0, ge=0, lt=1, description="share of its samples that are pictures without the object"
        )
        seed: int = Field(default=0, ge=0, description="where all noise comes from")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        if "{}" not in self.params.prompt:
            raise BadInput(f"prompt of text_to_segmentation is {self.params.prompt!r}; it must hold {{}} for the name.")

    def named(self, concept: str) -> str:
        """The prompt for this concept, with the article that its first letter asks for."""
        text = self.params.prompt.replace("{}", concept.strip())
        return text.replace(f"a {concept.strip()}", f"an {concept.strip()}") if concept.strip()[:1] in "aeiou" else text

    def run(
        self, model: Model, remover: Model, concept: str, pictures: Tensor | None = None, report: Report | None = None
    ) -> Segmented:
        """From ``concept`` to a segmenter.

        Args:
            model: reads where the concept is, and makes the pictures where none are given.
            remover: redraws the place without it; an inpainting model, else its trajectory is blended.
            pictures: (n 3 H W) in [-1, 1], pictures that show the concept.
            report: told after each piece of work.

        Raises:
            BadInput: no name, too few pictures. NoMatch: no picture gave a mask to learn from.
        """
        p, told = self.params, report or (lambda *_: None)
        if not concept.strip():
            raise BadInput("concept is empty; name the object, such as ball.")
        shown = self.named(concept)
        if pictures is None:
            pictures = _made(model, shown, p.n, p.seed, p.steps, told)
        if pictures.dim() != 4 or len(pictures) < 2:
            raise BadInput(f"pictures have shape {tuple(pictures.shape)}; give two or more, as (n, 3, H, W).")
        maps = weak_maps(model, pictures, shown, concept, p.levels, p.window, p.seed, told)
        rough = rough_masks(maps)
        hole = _grown(rough, round(p.grow * min(pictures.shape[-2:])))
        removed = self.removed(remover, pictures, hole, concept, told)
        refined = refined_masks(pictures, removed, hole, p.tidy)
        learn: dict[str, Any] = {"width": p.width, "iterations": p.iterations, "negatives": p.negatives, "seed": p.seed}
        segmenter = train_segmenter(pictures, refined, removed, report=told, **learn)
        return Segmented(concept, pictures, maps, rough, removed, refined, segmenter)

    def removed(
        self, remover: Model, pictures: Tensor, hole: Tensor, concept: str, report: Report | None = None, seed: int = 0
    ) -> Tensor:
        """:func:`remove` with these parameters."""
        p = self.params
        background = p.background or remover.card.get("background") or [BACKGROUND]
        negative = self.named(concept) if p.opposite else None
        return remove(remover, pictures, hole, background, negative, p.steps, p.guidance, p.seed + seed, report)


@dataclass(eq=False)
class Segmented:
    """What came of it: ``pictures`` (n 3 H W), ``maps`` (n H W) raw attention, ``rough`` (n H W) bool, ``removed``
    (n 3 H W) the pictures without the object, ``refined`` (n H W) bool (empty where the removal changed nothing), and
    the ``segmenter``."""

    concept: str
    pictures: Tensor
    maps: Tensor
    rough: Tensor
    removed: Tensor
    refined: Tensor
    segmenter: Segmenter

    def final(self) -> Tensor:
        """The segmenter's masks (n H W) bool of the pictures."""
        return self.segmenter.masks(self.pictures)

    def save(self, folder: Path | str, names: Sequence[str] | None = None) -> list[Path]:
        """Writes the data set and the segmenter: ``masks/`` (the segmenter's), ``foreground/``, ``background/`` (the
        object removed), ``refined/``, ``metadata.jsonl`` and ``segmenter.safetensors``. Returns masks and segmenter.

        Raises OSError.
        """
        folder = Path(folder)
        names = list(names) if names else [f"{i:05d}" for i in range(len(self.pictures))]
        kinds = {
            "foreground": as_pictures(self.pictures),
            "background": as_pictures(self.removed),
            "refined": as_masks(self.refined),
            "masks": as_masks(self.final()),
        }
        about = {"concept": self.concept}
        for kind, pictures in kinds.items():
            (folder / kind).mkdir(parents=True, exist_ok=True)
            for name, picture in zip(names, pictures, strict=True):
                files.save_png(folder / kind / f"{name}.png", picture, about)
        rows = []
        for i, name in enumerate(names):
            row = {"file_name": f"foreground/{name}.png", "text": self.concept, "mask": f"masks/{name}.png"}
            rows.append({**row, "refined": f"refined/{name}.png", "learnt_from": bool(self.refined[i].any())})
            rows.append({"file_name": f"background/{name}.png", "text": "", "mask": None})
        with files.replacing(folder / "metadata.jsonl") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        weights = self.segmenter.save(folder / "segmenter.safetensors", self.concept)
        return [*(folder / "masks" / f"{name}.png" for name in names), weights]


def as_masks(found: Tensor) -> list[Image.Image]:
    """Masks (n H W) bool as black and white pictures."""
    return [Image.fromarray(each.numpy()) for each in found.cpu().byte() * 255]


# --- the stages ------------------------------------------------------------------------------------------------------


def weak_maps(
    model: Model,
    pictures: Tensor,
    prompt: str,
    concept: str,
    levels: int = 20,
    window: tuple[float, float] = (0.2, 1.0),
    seed: int = 0,
    report: Report | None = None,
) -> Tensor:
    """Where the concept acts in pictures (n 3 H W), as raw attention (n H W): each is noised afresh to every level of
    the schedule within ``window`` and shown once to the denoiser with ``prompt`` (the paper's section 3.1).

    Raises NoMatch where the concept is not in the prompt.
    """
    out = []
    for start in range(0, len(pictures), BATCH):
        part = pictures[start : start + BATCH]
        seeds = list(range(seed + start, seed + start + len(part)))
        found = explain_images(model, part, prompt, [concept], steps=levels, seed=seeds, window=window)
        out += [each.map(concept, merge=True) for each in found]
        if report:
            report("maps", start + len(part), len(pictures))
    return torch.stack(out)


def rough_masks(maps: Tensor) -> Tensor:
    """Masks (n H W) bool from maps: the middle between the means of two Gaussians fitted to each map's values, then the
    majority of each 3x3 neighbourhood. A map that is the same everywhere gives an empty mask."""
    return torch.stack([_majority(_above(each)) for each in maps])


def remove(
    remover: Model,
    pictures: Tensor,
    holes: Tensor,
    background: Sequence[str],
    negative: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    report: Report | None = None,
) -> Tensor:
    """Pictures (n 3 H W) with the ``holes`` (n H W) redrawn as ``background``; those with an empty hole stay as they
    are.

    The released code takes the opposite caption for ``negative``. On our models that is much worse than none: two
    prompts that both are far from the picture pull it out of what the model knows.
    """
    out = pictures.clone()
    todo = holes.flatten(1).any(1).nonzero()[:, 0]
    size = BATCH if remover.family.takes_mask else 1  # blending lays one region over all samples
    for part in todo.split(size):
        given = [each.float() for each in holes[part]]
        system: Intervention = (
            Inpaint(mask=given, each=True) if remover.family.takes_mask else Blend(mask=given, paste=0.0)
        )
        result = generate(
            remover,
            [background[int(i) % len(background)] for i in part],
            negative=negative,
            image=pictures[part],
            strength=1.0,
            seed=[seed + int(i) for i in part],
            steps=steps,
            guidance=guidance,
            interventions=system,
        )
        assert result.pixels is not None
        out[part] = result.pixels.clamp(-1, 1).to(out)
        if report:
            report("removals", int((todo <= part[-1]).sum()), len(todo))
    return out


def refined_masks(pictures: Tensor, removed: Tensor, holes: Tensor, tidy: bool = True) -> Tensor:
    """Masks (n H W) bool of what changed when the object was removed: the difference, mean over channels, thresholded
    like the maps, within the hole. ``tidy``: gaps closed and holes filled."""
    out = []
    for difference, hole in zip((pictures - removed).abs().mean(1), holes, strict=True):
        mask = _majority(_above(difference)) & hole
        out.append(masks.fill_holes(masks.close(mask.float())).bool() & hole if tidy else mask)
    return torch.stack(out)


def train_segmenter(
    pictures: Tensor,
    found: Tensor,
    without: Tensor | None = None,
    width: int = 8,
    iterations: int = 400,
    negatives: float = 0.0,
    batch: int = 32,
    rate: float = 2e-3,
    crop: int | None = None,
    seed: int = 0,
    report: Report | None = None,
) -> Segmenter:
    """A segmenter trained on pictures (n 3 H W) and masks (n H W): binary cross-entropy, Adam, random flips and crops
    (of side ``crop``: 128, or four fifths of smaller pictures).

    Pictures whose mask is empty are left out. ``negatives``: share of the samples that are pictures ``without`` the
    object, with an empty mask.

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
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        half = fast_bf16(images.device.type)
        for step in range(iterations):
            chosen = torch.randint(len(images), (batch,), generator=generator)
            x, y = images[chosen], truths[chosen]
            if empty is not None and negatives:
                negative = torch.rand(batch, generator=generator) < negatives
                x[negative], y[negative] = empty[chosen[negative]], 0.0
            x, y = _cropped(x, y, side, generator)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
                logits = net(x.contiguous(memory_format=torch.channels_last))
            loss = F.binary_cross_entropy_with_logits(logits.float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if report:
                report("training steps", step + 1, iterations)
    return net.eval().requires_grad_(False)


# --- the network -----------------------------------------------------------------------------------------------------


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
        kept = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if i else x)
            kept.append(x)
        for block, skip in zip(reversed(self.up), reversed(kept[:-1]), strict=True):
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
        return torch.stack([masks.fill_holes(masks.close(each.float())).bool() for each in found])

    def save(self, path: Path | str, concept: str = "") -> Path:
        """Write the weights as safetensors, whole or not at all."""
        metadata = {"format": FORMAT, "config": json.dumps(asdict(self.config)), "concept": concept}
        return files.save_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: Path | str) -> Segmenter:
        """What :meth:`save` wrote, ready for :meth:`masks`. Raises BadInput for any other file, OSError."""
        with files.reading_tensors(path, FORMAT, "segmenter") as (file, told):
            net = cls(SegmenterConfig(**json.loads(told["config"])))
            net.load_state_dict({key: file.get_tensor(key) for key in file.keys()})
        return net.eval().requires_grad_(False)


def _block(inside: int, outside: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in ((inside, outside), (outside, outside)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


# --- small parts -----------------------------------------------------------------------------------------------------


def _made(model: Model, prompt: str, n: int, seed: int, steps: int | None, report: Report) -> Tensor:
    out = []
    for start in range(0, n, BATCH):
        count = min(BATCH, n - start)
        result = generate(model, prompt, n=count, seed=seed + start, steps=steps)
        assert result.pixels is not None
        out.append(result.pixels.clamp(-1, 1).float())
        report("pictures", start + count, n)
    return torch.cat(out)


def _above(values: Tensor) -> Tensor:
    """Where a map (H W) is above the threshold of its two-part mixture; nowhere if it is flat."""
    try:
        return values > masks.mixture_threshold(values)
    except NoMatch:
        return torch.zeros_like(values, dtype=torch.bool)


def _majority(mask: Tensor) -> Tensor:
    """A mask (H W) of what at least half of each pixel's 3x3 neighbourhood says."""
    return F.avg_pool2d(mask.float()[None], 3, 1, 1, count_include_pad=False)[0] >= 0.5


def _grown(found: Tensor, pixels: int) -> Tensor:
    return torch.stack([masks.dilate(each.float(), pixels).bool() for each in found])


def _cropped(x: Tensor, y: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random crops of at most ``side``, mirrored at random: pictures (b 3 h w) and masks (b h w)."""
    h, w = (min(side, n) for n in x.shape[-2:])
    top, left = (
        int(torch.randint(n - m + 1, (), generator=generator)) for n, m in zip(x.shape[-2:], (h, w), strict=True)
    )
    x, y = x[..., top : top + h, left : left + w], y[..., top : top + h, left : left + w]
    flip = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x), torch.where(flip.view(-1, 1, 1), y.flip(-1), y)
