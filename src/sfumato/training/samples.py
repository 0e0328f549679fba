"""Pictures and clips to learn from, out of folders and tar shards: with captions, masks, targets and further facts.

    >>> data = open_samples("my-pictures", size=(512, 512))
    >>> batch = draw_batch(data, Draw(seed=0, step=17), 8, flip=True)    # the same whenever and wherever it is drawn
    >>> batch.pixels, batch.captions, batch.masks

What is understood:

- an *imagefolder* with ``metadata.jsonl`` or ``metadata.csv``: one row a picture, ``file_name`` and, where there are
  any, ``text`` (or ``caption``, ``prompt``), ``mask``, ``target`` (or ``edited_image``: the second picture of a pair)
  and whatever else;
- a folder of pictures, each with its caption in a ``.txt`` of the same name; ``name.mask.png`` and ``name.target.png``
  belong to ``name.png``;
- *WebDataset* shards (``data-{000..031}.tar``, or a folder of tars): members of one name are one sample, ``.txt`` and
  ``.json`` its caption and facts. They are read where they lie, nothing is unpacked;
- clips, where ``frames`` are asked for: video files, GIFs, or folders of numbered frames, in any of the above.

Pictures are turned as their EXIF says, transparent parts become white, greys RGB; they are scaled until they cover the
size and cut at equal parts from both sides, masks and targets like their picture.
"""

from __future__ import annotations

import csv
import io
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato import clips, files, valid
from sfumato.arrays import to_tensor
from sfumato.errors import BadInput
from sfumato.markup import described
from sfumato.training.draw import Draw

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")
CAPTIONS = ("text", "caption", "prompt")
TARGETS = ("target", "edited_image")


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample. ``pixels``: (3 h w), of a clip (3 f h w), in [-1, 1]. ``mask``: (h w), 1 where it counts. ``target``:
    the second picture of a pair, like ``pixels``. ``facts``: the row of its metadata."""

    name: str
    pixels: Tensor
    caption: str = ""
    mask: Tensor | None = None
    target: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    __repr__ = described


class SampleSource(Protocol):
    """Anything that samples can be drawn from."""

    def __len__(self) -> int: ...

    def sample(self, i: int, generator: torch.Generator | None = None) -> Sample:
        """Sample ``i``; what is random about it (where a clip begins) comes from ``generator``."""
        ...


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one step: ``pixels`` (b 3 [f] h w); ``masks`` (b 1 h w) and ``targets`` where all samples have one."""

    pixels: Tensor
    captions: list[str]
    masks: Tensor | None
    targets: Tensor | None
    names: list[str]

    __repr__ = described


def draw_batch(source: SampleSource, draw: Draw, n: int, flip: bool = False) -> Batch:
    """This process's share of a step's ``n`` samples, a pure function of the draw; ``flip`` mirrors every second."""
    rows = draw.indices(len(source), n).tolist()
    found = [source.sample(i, torch.Generator().manual_seed(draw.number("sample", i))) for i in rows]
    mirrored = torch.rand(len(rows), generator=draw.generator("flip")) < (0.5 if flip else 0.0)

    def stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
        if any(part is None for part in parts):
            return None
        return torch.stack([p.flip(-1) if m else p for p, m in zip(parts, mirrored.tolist(), strict=True)])  # type: ignore[union-attr]

    pixels, masks = stacked([each.pixels for each in found]), stacked([each.mask for each in found])
    assert pixels is not None
    targets = stacked([each.target for each in found])
    captions, names = [each.caption for each in found], [each.name for each in found]
    return Batch(pixels, captions, None if masks is None else masks[:, None], targets, names)


# files and members of tars --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilePart:
    """A file, a folder of frames, or a member of a tar: ``length`` bytes from ``offset`` of ``path``."""

    path: Path
    name: str
    offset: int = 0
    length: int | None = None

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.length is None else self.length)

    def picture(self) -> Image.Image:
        """RGB and upright. Raises BadInput with its name where it is no picture or damaged."""
        return files.read_picture(self.path if self.length is None else _named(self.read(), self.name))

    def damage(self) -> str:
        """Why it is no picture that can be read, in one sentence; empty where it is one. Checksums are checked where
        the format has them; other files are decoded only where their end is missing."""
        try:
            files.regular(self.path)
            content = self.read()
            with files.opened_picture(_named(content, self.name)) as image:
                if image.format == "PNG":
                    image.verify()
                    return ""
            if image.format != "JPEG" or b"\xff\xd9" not in content[-4096:]:
                self.picture()
        except (BadInput, OSError) as error:
            return str(error)
        return ""

    def frames(self) -> list[Image.Image]:
        """All frames of a clip."""
        if self.path.is_dir():
            return [files.read_picture(path) for path in sorted(_in(self.path, PICTURES), key=_by_number)]
        if self.length is None:
            return [Image.fromarray(frame) for frame in clips.read_clip(self.path)[0]]
        with tempfile.TemporaryDirectory() as folder:  # FFmpeg wants files
            beside = Path(folder) / f"clip{Path(self.name).suffix}"
            beside.write_bytes(self.read())
            try:
                return [Image.fromarray(frame) for frame in clips.read_clip(beside)[0]]
            except BadInput as error:
                raise BadInput(str(error).replace(str(beside), self.name)) from None


def _named(content: bytes, name: str) -> io.BytesIO:
    stream = io.BytesIO(content)
    stream.name = name  # for messages
    return stream


def _in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes and path.is_file()]


def _by_number(path: Path) -> list[Any]:
    """frame2 before frame10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


@dataclass(frozen=True)
class Entry:
    """Where the parts of a sample are."""

    shown: FilePart
    caption: str | FilePart = ""
    mask: FilePart | None = None
    target: FilePart | None = None
    facts: dict[str, Any] = field(default_factory=dict)


# the source -----------------------------------------------------------------------------------------------------------


class Samples:
    """Samples at one size, read when they are asked for.

    Args:
        entries: see :func:`open_samples`.
        size: (width, height).
        frames: how many consecutive frames a sample is, ``stride`` apart; None for pictures.
        soft_masks: grey masks are weights in [0, 1]; otherwise all that is not black is 1.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        size: tuple[int, int],
        frames: int | None = None,
        stride: int = 1,
        soft_masks: bool = False,
    ):
        self.entries, self.size, self.frames, self.stride, self.soft = list(entries), size, frames, stride, soft_masks

    def __len__(self) -> int:
        return len(self.entries)

    def caption(self, i: int) -> str:
        caption = self.entries[i].caption
        if isinstance(caption, str):
            return valid.text(caption, f"the caption of {self.entries[i].shown.name}")
        try:
            return valid.text(caption.read().decode("utf-8-sig").strip(), f"the caption in {caption.name}")
        except UnicodeDecodeError:
            raise BadInput(f"{caption.name} is not UTF-8 text.") from None

    def mask(self, i: int) -> Tensor | None:
        """The mask (h w) of sample ``i``, if it has one."""
        part = self.entries[i].mask
        if part is None:
            return None
        drawn = to_tensor(np.array(files.fitted(part.picture().convert("L"), self.size, smooth=self.soft)))
        return drawn.float() / 255 if self.soft else (drawn > 0).float()

    def sample(self, i: int, generator: torch.Generator | None = None) -> Sample:
        entry = self.entries[i]
        start: list[int] = []
        pixels = self._pixels(entry.shown, generator, start)
        target = None if entry.target is None else self._pixels(entry.target, generator, start)
        return Sample(entry.shown.name, pixels, self.caption(i), self.mask(i), target, entry.facts)

    def _pixels(self, part: FilePart, generator: torch.Generator | None, start: list[int]) -> Tensor:
        """A picture or clip; ``start`` remembers where the first clip of a pair began."""
        if self.frames is None:
            return picture_tensor(files.fitted(part.picture(), self.size))
        found = part.frames()
        spare = len(found) - ((self.frames - 1) * self.stride + 1)
        if spare < 0:
            raise BadInput(f"{part.name} has {len(found)} frames; {self.frames} of stride {self.stride} are wanted.")
        if not start:
            start.append(0 if generator is None else int(torch.randint(spare + 1, (), generator=generator)))
        first = min(start[0], spare)
        chosen = found[first :: self.stride][: self.frames]
        return torch.stack([picture_tensor(files.fitted(frame, self.size)) for frame in chosen], 1)


def picture_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as (3 h w) in [-1, 1]."""
    return to_tensor(np.array(image)).permute(2, 0, 1).float() / 255 * 2 - 1


def open_samples(
    where: Path | str,
    size: tuple[int, int],
    frames: int | None = None,
    stride: int = 1,
    soft_masks: bool = False,
) -> Samples:
    """The samples of a folder or of shards; see the top of this page for what is understood.

    Args:
        where: a folder, a tar, or several as ``name-{000..031}.tar``.
        size, frames, stride, soft_masks: see :class:`Samples`.

    Raises:
        BadInput: nothing there, a row that cannot be read or names what is not there. Files that are damaged are named
        when they are read.
    """
    if frames is not None and (frames < 1 or stride < 1):
        raise BadInput(f"frames and stride must be at least 1, got {frames} and {stride}.")
    shards = _shards(str(where))
    entries = _of_shards(shards, frames is not None) if shards else _of_folder(Path(where), frames is not None)
    if not entries:
        raise BadInput(f"{where} holds no {'clip' if frames else 'picture'}.")
    return Samples(entries, size, frames, stride, soft_masks)


# folders --------------------------------------------------------------------------------------------------------------


def _of_folder(folder: Path, moving: bool) -> list[Entry]:
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder of pictures.")
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return [_of_row(folder, name, *row) for row in _rows(folder / name)]
    suffixes = VIDEOS if moving else PICTURES
    inside = sorted(folder.rglob("*"))
    found = [(path, path.with_suffix(".txt")) for path in inside if path.suffix.lower() in suffixes and path.is_file()]
    if moving:  # folders of frames
        found += [(at, at.with_name(f"{at.name}.txt")) for at in inside if at.is_dir() and _in(at, PICTURES)]
    belonging: dict[tuple[Path, str, str], FilePart] = {}  # sought once: a search for every picture would be quadratic
    for path in inside:
        for kind in ("mask", "target"):
            stem, dot, _ = path.name.rpartition(f".{kind}.")
            if dot:
                belonging.setdefault((path.parent, stem, kind), FilePart(path, str(path)))
    entries = []
    for path, text in found:
        if Path(path.stem).suffix in (".mask", ".target"):
            continue
        mask, target = (belonging.get((path.parent, path.stem, kind)) for kind in ("mask", "target"))
        caption = FilePart(text, str(text)) if text.is_file() else ""
        facts = {"file_name": str(path.relative_to(folder))}
        entries.append(Entry(FilePart(path, str(path)), caption, mask, target, facts))
    return entries


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a table of metadata."""
    text = files.read_text(table)
    if table.suffix == ".csv":
        try:
            yield from enumerate(csv.DictReader(io.StringIO(text)), 2)
        except csv.Error as error:
            raise BadInput(f"{table} cannot be read as a table: {error}.") from None
        return
    for number, line in enumerate(text.split("\n"), 1):  # other ends of lines may stand within a caption
        if not line.strip():
            continue
        try:
            row = valid.parsed_json(line)
        except ValueError as error:
            raise BadInput(f"line {number} of {table} is not JSON: {error}.") from None
        if not isinstance(row, dict):
            raise BadInput(f"line {number} of {table} is no row; it needs file_name and may have text, mask, target.")
        yield number, row


def _of_row(folder: Path, table: str, number: int, row: dict[str, Any]) -> Entry:
    def part(*keys: str) -> FilePart | None:
        name = next((row[key] for key in keys if row.get(key)), None)
        if name is None:
            return None
        path = folder / str(name)
        if not files.inside(str(name)):
            raise BadInput(f"line {number} of {folder / table} names {name}, which lies outside the folder.")
        if not path.exists():
            raise BadInput(f"line {number} of {folder / table} names {name}, which is not there.")
        return FilePart(path, str(path))

    shown = part("file_name", "input_image", "image")
    if shown is None:
        raise BadInput(f"line {number} of {folder / table} has no file_name.")
    caption = next((str(row[key]) for key in CAPTIONS if row.get(key)), "")
    return Entry(shown, caption, part("mask"), part(*TARGETS), row)


# shards ---------------------------------------------------------------------------------------------------------------


def _shards(where: str) -> list[Path]:
    """The tars that ``where`` names."""
    if (braces := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", where)) is not None:
        head, low, high, tail = braces.groups()
        if max(len(low), len(high)) > 6:
            raise BadInput(f"{valid.brief(where)} names more shards than are read; the most is a million.")
        return [Path(f"{head}{i:0{len(low)}}{tail}") for i in range(int(low), int(high) + 1)]
    path = Path(where)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return [path] if path.suffix == ".tar" else []


def _of_shards(shards: list[Path], moving: bool) -> list[Entry]:
    entries = []
    for shard in shards:
        groups: dict[str, dict[str, FilePart]] = {}
        try:
            with tarfile.open(shard, "r:") as tar:  # the headers alone are read
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # which would keep every header
                    folder, _, name = member.name.rpartition("/")
                    key, _, kind = name.partition(".")
                    if member.isfile() and key:
                        part = FilePart(shard, f"{shard}/{member.name}", member.offset_data, member.size)
                        groups.setdefault(f"{folder}/{key}", {})[f".{kind.lower()}"] = part
        except (tarfile.TarError, OSError) as error:
            raise BadInput(f"{shard} cannot be read as a tar: {error}.") from None
        entries += [entry for parts in groups.values() if (entry := _of_group(parts, moving)) is not None]
    return entries


def _of_group(parts: dict[str, FilePart], moving: bool) -> Entry | None:
    def first(head: str, suffixes: Sequence[str]) -> FilePart | None:
        return next((parts[head + suffix] for suffix in suffixes if head + suffix in parts), None)

    shown = first("", VIDEOS if moving else PICTURES)
    if shown is None:
        return None
    facts: dict[str, Any] = {}
    if ".json" in parts:
        try:
            facts = dict(valid.parsed_json(parts[".json"].read()))
        except (ValueError, TypeError) as error:
            raise BadInput(f"{parts['.json'].name} is not a JSON object: {error}.") from None
    caption: str | FilePart = parts.get(".txt") or next((str(facts[key]) for key in CAPTIONS if facts.get(key)), "")
    kinds = (*PICTURES, *VIDEOS)
    return Entry(shown, caption, first(".mask", PICTURES), first(".target", kinds), facts)
