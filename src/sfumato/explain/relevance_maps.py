"""What relevance says about one picture: per thing asked, a map of the picture and a value per word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from sfumato import files, sheets
from sfumato.errors import BadInput, UnknownName
from sfumato.explain import heat_overlays
from sfumato.markup import described
from sfumato.metrics.segmentation import normalise

__all__ = ["Answer", "RelevanceMaps", "paint_regions"]

FORMAT = "sfumato.relevance.1"


@dataclass(frozen=True, eq=False)
class Answer:
    """One thing asked: its ``label``, the model's ``score`` of it, and what led to that score.

    ``cells`` (h w) is the picture's relevance at the model's own resolution, None where it reads no picture;
    ``regions`` (n 4) are the boxes x0 y0 x1 y1, in shares of the picture, of a model that sees regions, with
    ``region_values`` (n); ``words`` and ``word_values`` the tokens of the text with their relevance.
    """

    label: str
    score: float
    cells: Tensor | None = None
    words: tuple[str, ...] = ()
    word_values: tuple[float, ...] = ()
    regions: Tensor | None = None
    region_values: Tensor | None = None
    box: tuple[float, float, float, float] | None = None

    __repr__ = described


@dataclass(frozen=True, eq=False)
class RelevanceMaps:
    """Everything asked about one picture of ``size`` (H, W), by ``method``; ``facts`` are plain JSON values."""

    answers: tuple[Answer, ...]
    size: tuple[int, int]
    method: str
    facts: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"RelevanceMaps({self.method}: {', '.join(answer.label for answer in self.answers)})"

    def answer(self, which: str | int = 0) -> Answer:
        """An answer by label or number. Raises UnknownName."""
        if isinstance(which, int):
            if not -len(self.answers) <= which < len(self.answers):
                raise BadInput(f"answer {which} was asked for, but there are {len(self.answers)}.")
            return self.answers[which]
        for answer in self.answers:
            if answer.label == which:
                return answer
        raise UnknownName("answer", which, [answer.label for answer in self.answers])

    def map(self, which: str | int = 0, size: tuple[int, int] | None = None) -> Tensor:
        """(H W) float32 >= 0: relevance of each pixel, interpolated from the model's cells. BadInput if it has none."""
        answer = self.answer(which)
        if answer.cells is None:
            raise BadInput(f"the answer {answer.label!r} has no picture map; it is about words only.")
        size = size or self.size
        if tuple(answer.cells.shape) == tuple(size):
            return answer.cells.clone()
        return F.interpolate(answer.cells[None, None], size, mode="bilinear", align_corners=False)[0, 0]

    def words(self, which: str | int = 0) -> list[tuple[str, float]]:
        """The words of the text with their relevance, in their order."""
        answer = self.answer(which)
        return list(zip(answer.words, answer.word_values, strict=True))

    # -- drawing -------------------------------------------------------------------------------------------------------

    def overlay(self, image: Image.Image, which: str | int = 0) -> Image.Image:
        """The picture with one map over it, and the found box if there is one."""
        size = heat_overlays.enlarged_size(self.size)
        out = heat_overlays.overlay(image, normalise(self.map(which, size)))
        box = self.answer(which).box
        if box is not None:
            h, w = size
            x0, y0, x1, y1 = (min(max(v, 0.0), 1.0) for v in box)
            edge = (x0 * w, y0 * h, max(x0 * w, x1 * w - 1), max(y0 * h, y1 * h - 1))
            ImageDraw.Draw(out).rectangle(edge, outline="white", width=max(1, w // 128))
        return out

    def grid(self, image: Image.Image | None) -> Image.Image:
        """All answers as one labelled sheet: the picture, if there is one, then per answer its map and its words."""
        size = heat_overlays.enlarged_size(self.size)
        cells: list[tuple[str, Image.Image]] = []
        if image is not None:
            cells.append(("picture", image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)))
        for i, answer in enumerate(self.answers):
            if answer.cells is not None and image is not None:
                cells.append((answer.label, self.overlay(image, i)))
            if answer.words:
                cells.append((f"{answer.label}: words", draw_words(self.words(i), (size[1], size[0]))))
        return sheets.sheet(cells, title=f"{self.method}: {self.facts.get('query', '')}")

    # -- keeping -------------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> Path:
        """Writes numbers (safetensors) with everything else as JSON in the header."""
        tensors, records = {}, []
        for i, answer in enumerate(self.answers):
            for name in ("cells", "regions", "region_values"):
                value = getattr(answer, name)
                if value is not None:
                    tensors[f"{i}.{name}"] = value
            records.append({k: v for k, v in asdict(answer).items() if not isinstance(v, Tensor) and v is not None})
        if not tensors:
            tensors["empty"] = torch.zeros(0)
        record = {"answers": records, "size": list(self.size), "method": self.method, "facts": self.facts}
        return files.save_tensors(path, tensors, {"format": FORMAT, "record": json.dumps(record)})

    @classmethod
    def load(cls, path: Path | str) -> RelevanceMaps:
        """Reads what :meth:`save` wrote. Raises BadInput for any other file, OSError when it cannot be read."""
        with files.reading_tensors(path, FORMAT, "relevance maps") as (file, head):
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            record = json.loads(head["record"])
            answers = []
            for i, one in enumerate(record["answers"]):
                found = {n: tensors[f"{i}.{n}"] for n in ("cells", "regions", "region_values") if f"{i}.{n}" in tensors}
                for name in ("words", "word_values", "box"):
                    if name in one:
                        one[name] = tuple(one[name])
                answers.append(Answer(**one, **found))
            h, w = record["size"]
            return cls(tuple(answers), (h, w), record["method"], record["facts"])


def paint_regions(boxes: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Values (n) of boxes (n 4) as a map (H W): each pixel the highest value of the boxes over it, 0 outside."""
    h, w = size
    x, y = (torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h
    out = torch.zeros(h, w)
    for box, value in zip(boxes, values, strict=True):
        inside = ((y >= box[1]) & (y < box[3]))[:, None] & ((x >= box[0]) & (x < box[2]))[None]
        out = torch.where(inside, torch.maximum(out, value.to(out)), out)
    return out


def draw_words(words: Sequence[tuple[str, float]], size: tuple[int, int]) -> Image.Image:
    """Words on a white picture of ``size`` (w, h), each on a ground as red as it is relevant."""
    w, h = size
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    most = max((value for _, value in words), default=0.0) or 1.0
    font = sheets.lettering(max(12, h // 14))
    line, gap = sum(font.getmetrics()) + 6, 6
    x, y = gap, gap
    for word, value in words:
        wide = int(font.getlength(word)) + 8
        if x + wide > w - gap and x > gap:
            x, y = gap, y + line + 2
        share = min(max(value / most, 0.0), 1.0)
        ground = tuple(round(255 + (c - 255) * share) for c in (232, 92, 60))
        draw.rectangle((x, y, x + wide, y + line), fill=ground)
        draw.text((x + 4, y + 3), word, fill="black", font=font)
        x += wide + 4
    return canvas
