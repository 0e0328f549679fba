"""A folder of pictures with captions, read one by one: nothing but the names is held in memory.

Which files count: those that ``metadata.jsonl`` names (an imagefolder), else every picture file directly in the folder
except what was drawn beside a picture (``x.daam.png`` and ``x-grid.png`` beside ``x.png``). Captions come from a
prompts file, from ``metadata.jsonl``, or from the recipe that the PNG carries, in this order.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import files, valid, writing
from sfumato.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = "metadata.jsonl"
MOST_SUBFOLDERS = 1000  # looked through for pictures that are left out
_TEXTS = ("text", "prompt", "caption")


class Folder:
    """Pictures of a folder in a fixed order.

    Attributes:
        path: the folder. names: file names relative to it.
        others: how many files are no pictures; drawn: how many were left out as drawn beside a picture;
        skipped: what could not be looked at, and why. subfolders: those that hold pictures, which are left out.

    Args:
        prompts: a file with one JSON object per line; with ``file_name`` it is matched by name, otherwise line i
            belongs to the i-th picture by name. Or captions by file name.

    Raises:
        BadInput: no such folder, no picture in it, a damaged or ambiguous caption file.
    """

    def __init__(self, path: Path | str, prompts: Path | str | Mapping[str, str] | None = None):
        self.path = Path(path)
        if not self.path.is_dir():
            what = "is a file" if self.path.exists() else "does not exist"
            raise BadInput(f"{str(self.path)!r} {what}; name a folder of pictures.")
        self.others = self.drawn = 0
        self.skipped: list[str] = []
        self._rows: dict[str, tuple[Path, int]] = {}  # name -> where its line begins
        self._given = dict(prompts) if isinstance(prompts, Mapping) else {}
        own = self.path / METADATA
        described = self._index(own) if own.is_file() else []
        self.names = described or self._listed()
        if not self.names:
            inside = [str(self.path / name) for name in self.subfolders]
            way = f"its subfolders do: name {' or '.join(inside[:5])}" if inside else "name another folder"
            raise BadInput(f"{str(self.path)!r} holds no picture ({', '.join(SUFFIXES[:4])}, ...); {way}.")
        if isinstance(prompts, Path | str):
            self._match(writing.rereadable(Path(prompts), self))

    @functools.cached_property
    def subfolders(self) -> list[str]:
        paths = [name.replace(os.sep, "/") for name in self.names]
        listed = {path.split("/")[0] for path in paths if "/" in path}
        return [name for name in _with_pictures(self.path) if name not in listed]

    def __len__(self) -> int:
        return len(self.names)

    def _listed(self) -> list[str]:
        found = set()
        with os.scandir(self.path) as entries:
            for entry in entries:
                try:
                    if entry.is_file() and not entry.name.startswith("."):
                        found.add(entry.name)
                except OSError as error:  # a link that leads in a circle
                    self.skipped.append(f"{valid.shown(entry.name)}: {error.strerror}")
        names = {name for name in found if name.lower().endswith(SUFFIXES)}
        self.others = len(found) - len(names)
        beside = {name for name in names if _original(name) in names}
        self.drawn = len(beside)
        return sorted(names - beside)

    def _index(self, path: Path) -> list[str]:
        """Names in ``path`` in its order; where each line begins is kept."""
        names = []
        for number, start, row in _lines(path):
            name = row.get("file_name")
            if not isinstance(name, str):
                raise BadInput(f"{path}, line {number}: no file_name.")
            try:
                os.fsencode(name)
            except UnicodeEncodeError:
                raise BadInput(f"{path}, line {number}: {name[:60]!r} is no name of a file.") from None
            if name in self._rows and self._rows[name][0] == path:
                raise BadInput(f"{path}, line {number}: {name!r} is named twice; each picture has one line.")
            if not files.inside(name):
                raise BadInput(f"{path}, line {number}: {name!r} lies outside the folder.")
            self._rows[name] = (path, start)
            names.append(name)
        return names

    def _match(self, path: Path) -> None:
        rows = [(start, row.get("file_name")) for _, start, row in _lines(path)]
        if any(name is not None for _, name in rows):
            self._index(path)
        elif len(rows) != len(self.names):
            raise BadInput(
                f"{path} has {len(rows)} prompts for {len(self.names)} pictures in {self.path}; name each picture with"
                ' "file_name", or give one line per picture in the order of the names.'
            )
        else:
            for name, (start, _) in zip(sorted(self.names), rows, strict=True):
                self._rows[name] = (path, start)

    def picture(self, name: str) -> Image:
        """The picture in RGB, upright. Raises BadInput when it is damaged, OSError when it is not there."""
        return files.read_picture(self.path / name)

    def about(self, name: str) -> dict[str, Any]:
        """What is known of a picture: ``text`` (None when nothing says what it shows), and whatever its line holds."""
        if name in self._given:
            return {"text": self._given[name]}
        if name in self._rows:
            path, start = self._rows[name]
            with path.open("rb") as file:
                file.seek(start)
                row = json.loads(file.readline())
            return {**row, "text": _text(row)}
        try:
            recipe, _ = files.read_recipe(self.path / name)
        except (BadInput, OSError):
            return {"text": None}
        return {**recipe, "text": _text(recipe)}

    def fingerprint(self) -> str:
        """Changes when a picture or a caption file is added, removed or rewritten."""
        digest = hashlib.sha256()
        for path in dict.fromkeys(path for path, _ in self._rows.values()):
            digest.update(path.read_bytes())
        digest.update(json.dumps(sorted(self._given.items())).encode())
        for name in self.names:
            try:
                facts = os.stat(self.path / name)
                digest.update(f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode(errors="replace"))
            except OSError:
                digest.update(f"{name}\0missing\n".encode(errors="replace"))
        return digest.hexdigest()[:16]


def _with_pictures(folder: Path) -> list[str]:
    """Names of the subfolders that hold pictures, at any depth; what cannot be read is passed over."""
    with os.scandir(folder) as entries:
        inside = sorted(
            entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        )
    held: list[str] = []
    for name in inside[:MOST_SUBFOLDERS]:
        walked = itertools.islice(os.walk(folder / name), MOST_SUBFOLDERS)
        if any(file.lower().endswith(SUFFIXES) for _, _, files in walked for file in files):
            held.append(name)
    return held


def _original(name: str) -> str:
    """The picture that ``name`` may have been drawn beside, '' when its name does not look so."""
    stem, suffix = os.path.splitext(name)
    grid = re.fullmatch(r"(.+)-grid(-of-\d+)?", stem)
    if grid:
        return grid[1] + suffix
    base, dot, _ = stem.rpartition(".")
    return base + suffix if dot else ""


def _lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(number, byte offset, object) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, start=1):
                mark = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
                line, start = line[mark:], start + mark
                if line.strip():
                    try:
                        row = valid.parsed_json(line, names=True)
                    except ValueError as error:
                        raise BadInput(f"{path}, line {number}: not a JSON object ({valid.shown(error)}).") from None
                    if not isinstance(row, dict):
                        raise BadInput(f"{path}, line {number}: not a JSON object.")
                    for key in _TEXTS:
                        if why := valid.wrong(row.get(key), valid.LONGEST):
                            raise BadInput(f"{path}, line {number}: {key} is no caption: {why}.")
                    yield number, start, row
                start += len(line)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _text(row: Mapping[str, Any]) -> str | None:
    texts = (row[key] for key in _TEXTS if isinstance(row.get(key), str) and not valid.wrong(row[key]))
    return next((text for text in texts if text.strip()), None)
