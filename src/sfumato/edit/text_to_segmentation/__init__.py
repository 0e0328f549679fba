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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sfumato import cards, files, writing
from sfumato.cards import Card, Field, Template, register
from sfumato.edit.text_to_segmentation.segmenter import Segmenter, SegmenterConfig, train_segmenter
from sfumato.edit.text_to_segmentation.stages import (
    Report,
    Threshold,
    grown,
    make_pictures,
    refined_masks,
    remove,
    rough_masks,
    weak_maps,
)
from sfumato.errors import BadInput
from sfumato.markup import described
from sfumato.models import Model
from sfumato.sampling.pixels import as_pictures, as_pixels
from sfumato.windows import Window

__all__ = [
    "Report",
    "Segmented",
    "Segmenter",
    "SegmenterConfig",
    "TextToSegmentation",
    "refined_masks",
    "remove",
    "rough_masks",
    "train_segmenter",
    "weak_maps",
]

BACKGROUND = "a photo of a background"


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
        prompt: Template = Field(default="a {}", description="what pictures of the object show; {} stands for its name")
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
        threshold: Threshold = Field(
            default="mixture",
            description="what a map must reach to count as the object: the middle of two Gaussians fitted to it, or of "
            "its range (half), which keeps closer to the object where maps are sharp",
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

    def segment(
        self,
        model: Model,
        concept: str,
        pictures: Sequence[Image.Image] | None = None,
        *,
        remover: Model | None = None,
        on_progress: Report | None = None,
    ) -> Segmented:
        """:meth:`run` with pictures (PIL, all of one size) that show the concept; ``remover``: ``model`` if None."""
        shown = None if pictures is None else as_pixels(list(pictures), None)
        return self.run(model, remover or model, concept, shown, on_progress)

    @staticmethod
    def open_segmenter(path: Path) -> Segmenter:
        """A segmenter that was written before."""
        return Segmenter.load(path)

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
            report: called after each piece of work.

        Raises:
            BadInput: no name, too few pictures. NoMatch: no picture gave a mask to learn from.
        """
        p, tell = self.params, report or (lambda *_: None)
        if not concept.strip():
            raise BadInput("concept is empty; name the object, such as ball.")
        shown = self.named(concept)
        if pictures is None:
            pictures = make_pictures(model, shown, p.n, p.seed, p.steps, tell)
        if pictures.dim() != 4 or len(pictures) < 2:
            raise BadInput(f"pictures have shape {tuple(pictures.shape)}; give two or more, as (n, 3, H, W).")
        maps = weak_maps(model, pictures, shown, concept, p.levels, p.window, p.seed, tell)
        rough = rough_masks(maps, p.threshold)
        hole = grown(rough, round(p.grow * min(pictures.shape[-2:])))
        removed = self.removed(remover, pictures, hole, concept, tell)
        refined = refined_masks(pictures, removed, hole, p.tidy)
        learn: dict[str, Any] = {"width": p.width, "iterations": p.iterations, "negatives": p.negatives, "seed": p.seed}
        segmenter = train_segmenter(pictures, refined, removed, report=tell, **learn)
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

    __repr__ = described

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
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        writing.write_text(folder / "metadata.jsonl", "".join(lines))
        weights = self.segmenter.save(folder / "segmenter.safetensors", self.concept)
        return [*(folder / "masks" / f"{name}.png" for name in names), weights]


def as_masks(found: Tensor) -> list[Image.Image]:
    """Masks (n H W) bool as black and white pictures."""
    return [Image.fromarray(each.numpy()) for each in found.cpu().byte() * 255]
