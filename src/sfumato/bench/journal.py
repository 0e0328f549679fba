"""Which pictures of a long list are made already: ``metadata.jsonl`` beside them, which any imagefolder reader reads.

A line is written before its picture, and counts only when the picture is there: files are whole or absent, so a kill at
any moment leaves neither a picture without its line nor a line that is believed without its picture.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sfumato import valid, writing
from sfumato.bench.folder import METADATA
from sfumato.errors import BadInput

T = TypeVar("T")


class Journal:
    """The lines of ``folder/metadata.jsonl`` that carry a ``key``; others are left alone.

    Equal jobs may be wanted several times: each line serves one of them. A last line that a kill cut short is dropped.
    Raises BadInput when another line is damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / METADATA
        self._made: dict[str, list[str]] = defaultdict(list)
        self._lost: dict[str, list[str]] = defaultdict(list)
        self._names: set[str] = set()
        end = 0
        if self.path.exists():
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        break
                    try:
                        row = valid.loads(line) if line.strip() else {}
                        name, key = row.get("file_name"), row.get("key")
                    except (ValueError, AttributeError):
                        raise BadInput(f"{self.path}, line {number} is damaged; move the file away.") from None
                    end += len(line)
                    if isinstance(name, str) and isinstance(key, str) and Path(name).name == name:  # else none of ours
                        there = (folder / name).is_file()
                        (self._made if there else self._lost)[key].append(name)
                        self._names.add(name)
            if end < self.path.stat().st_size:
                with self.path.open("r+b") as file:
                    file.truncate(end)

    def take(self, key: str) -> Path | None:
        """A finished picture of this job that has not been taken yet, or None."""
        return self.folder / self._made[key].pop(0) if self._made[key] else None

    def put(self, key: str, stem: str, row: dict[str, Any], suffix: str, save: Callable[[Path], T]) -> T:
        """Writes the next picture or clip of this job by ``save``, which raises FileExistsError where another process
        has put a file of that name there in the meantime: then it gets another name."""
        while True:
            path = self.begin(key, stem, row, suffix)
            try:
                return save(path)
            except FileExistsError:
                self._take_back(path.name)

    def begin(self, key: str, stem: str, row: dict[str, Any], suffix: str = ".png") -> Path:
        """Where to write the next picture or clip of this job; says so in the file first, with ``row``."""
        while self._lost[key]:  # its line is there, the picture is not
            name = self._lost[key].pop(0)
            if not os.path.lexists(self.folder / name):
                return self.folder / name
        path, count = self.folder / f"{stem}{suffix}", 1
        while os.path.lexists(path) or path.name in self._names:  # there, or promised to a job that was stopped
            count += 1
            path = self.folder / f"{stem}-{count}{suffix}"
        with self.path.open("ab") as file:
            file.write(valid.json_line({"file_name": path.name, **row, "key": key}))
            file.flush()
            os.fsync(file.fileno())
        self._names.add(path.name)
        return path

    def _take_back(self, name: str) -> None:
        """Removes the line of a picture that is another one's."""
        with self.path.open("rb") as source, writing.atomic_write(self.path) as file:
            file.writelines(line for line in source if not line.strip() or valid.loads(line).get("file_name") != name)
