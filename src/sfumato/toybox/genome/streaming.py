"""JSON arrays of any length, item by item, from plain and zipped files, in bounded memory.

The files of Visual Genome are single arrays of up to a gigabyte. Python's own scanner decodes one item after the other
from a window of the text; the window grows only while an item does not fit into it.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ... import files
from ...errors import BadInput

WINDOW = 1 << 20  # bytes read at once
LARGEST_ITEM = 64 << 20  # characters of one item; the largest of Visual Genome has under a million
_SPACE = re.compile(r"[ \t\n\r]*")
_TORN = 64  # characters: nearer to the window's end than this, an error may be a token cut in two


def items(file: IO[bytes], name: str) -> Iterator[Any]:
    """The items of the JSON array in an open file; ``name`` is what errors call it.

    Raises BadInput, with the position in characters, for what is no array, is damaged, ends too early, or holds an item
    of more than 64 million characters.
    """
    scan = _Scanner(file, name)
    if scan.next_character() != "[":
        raise BadInput(f"{name} is no JSON array: it begins with {scan.window[scan.at : scan.at + 12]!r}.")
    scan.at += 1
    if scan.next_character() == "]":
        scan.at += 1
    else:
        while True:
            yield scan.value()
            mark = scan.next_character()
            scan.at += 1
            if mark == "]":
                break
            if mark != ",":
                scan.fail(f"expected ',' or ']', found {mark!r}" if mark else "it ends in the middle of the array")
            if not scan.next_character():
                scan.fail("it ends in the middle of the array")
    if scan.next_character():
        scan.fail(f"something follows the array: {scan.window[scan.at : scan.at + 12]!r}")


class _Scanner:
    """A window on the text of a file, from which values are decoded."""

    def __init__(self, file: IO[bytes], name: str):
        self.file, self.name = file, name
        self.window, self.at, self.before, self.ended = "", 0, 0, False
        self.text = codecs.getincrementaldecoder("utf-8-sig")()
        self.decoder = json.JSONDecoder(parse_constant=self._constant)

    def fail(self, why: str, at: int | None = None) -> None:
        raise BadInput(f"{self.name} is damaged at character {self.before + (self.at if at is None else at)}: {why}.")

    def _constant(self, word: str) -> None:
        raise BadInput(f"{self.name} holds {word} near character {self.before + self.at}, which is no JSON number.")

    def more(self) -> None:
        """Forgets what is behind and reads on, at least as much again as is there: long items cost linear time."""
        self.before += self.at
        rest = self.window[self.at :]
        try:
            with readable(self.name):
                raw = self.file.read(max(WINDOW, len(rest)))
            self.ended = not raw
            self.window, self.at = rest + self.text.decode(raw, final=self.ended), 0
        except UnicodeDecodeError:
            raise BadInput(f"{self.name} is not UTF-8 text; save it as that.") from None

    def next_character(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            match = _SPACE.match(self.window, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.window):
                return self.window[self.at]
            if self.ended:
                return ""
            self.more()

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                found, end = self.decoder.raw_decode(self.window, self.at)
                if len(self.window) - end > 2 or self.ended:  # or else a number may go on: 1 may become 1e+5
                    self.at = end
                    return found
            except RecursionError:
                self.fail("it is nested too deep")
            except json.JSONDecodeError as error:
                torn = error.msg.startswith("Unterminated string") or error.pos > len(self.window) - _TORN
                if self.ended or not torn:
                    ends = error.pos >= len(self.window.rstrip()) or error.msg.startswith("Unterminated string")
                    self.fail("it ends in the middle of an item" if ends else error.msg.lower(), error.pos)
            if len(self.window) - self.at > LARGEST_ITEM:
                self.fail(f"one item has more than {LARGEST_ITEM >> 20} million characters")
            self.more()


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Within: what goes wrong when compressed data are read is said in one line."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BadInput(f"{name} is damaged or cut off: {str(error)[:120] or type(error).__name__}.") from None
    except (RuntimeError, NotImplementedError) as error:  # a password is asked for; a compression that Python lacks
        raise BadInput(f"{name} cannot be unpacked: {str(error)[:120]}.") from None


class JsonFiles:
    """Named files of a folder, plain or each in a zip of its own (``objects.json.zip``, as they are published), or of
    one zip that holds them all.

    Raises BadInput where ``path`` is neither; OSError where it cannot be read.
    """

    def __init__(self, path: Path | str):
        self.path = files.regular(path)
        if not self.path.is_dir():
            with self._archive(self.path):
                pass

    @contextlib.contextmanager
    def _archive(self, path: Path) -> Iterator[zipfile.ZipFile]:
        try:
            archive = zipfile.ZipFile(files.regular(path))
        except zipfile.BadZipFile:
            raise BadInput(f"{path} is no zip file, or it is cut off; give a folder, or a whole zip.") from None
        with archive:
            yield archive

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        if self.path.is_dir():
            return (self.path / name).is_file() or (self.path / f"{name}.zip").is_file()
        with self._archive(self.path) as archive:
            return bool(_members(archive, name))

    def names(self) -> list[str]:
        """What is there, for messages."""
        if self.path.is_dir():
            return sorted(each.name for each in self.path.iterdir())
        with self._archive(self.path) as archive:
            return sorted(archive.namelist())

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[tuple[IO[bytes], str]]:
        """A file, open for reading, and what errors call it.

        Raises BadInput where it is not there (the message lists what is), where a zip holds it twice, or is damaged.
        """
        plain = self.path / name if self.path.is_dir() else None
        if plain is not None and plain.is_file():
            with files.regular(plain).open("rb") as file:
                yield file, str(plain)
            return
        zipped = self.path if plain is None else self.path / f"{name}.zip"
        if not zipped.is_file():
            raise BadInput(f"{self.path} holds no {name} and no {name}.zip; it has {_listed(self.names())}.")
        with self._archive(zipped) as archive:
            members = _members(archive, name)
            if len(members) != 1:
                label = f"{len(members)} files of the name {name}" if members else f"no {name}"
                raise BadInput(f"{zipped} holds {label}; it has {_listed(members or archive.namelist())}.")
            label = f"{name} in {zipped}"
            with readable(label):
                member = archive.open(members[0])
            with member:
                yield member, label


def _members(archive: zipfile.ZipFile, name: str) -> list[str]:
    """Members of this base name, in whatever folder, of these the outermost: a folder that was zipped as a whole may
    hold other releases in folders of their own. macOS adds shadows of files in a folder of its own."""
    found = [each for each in archive.namelist() if each.split("/")[-1] == name and not each.startswith("__MACOSX/")]
    outermost = min((each.count("/") for each in found), default=0)
    return [each for each in found if each.count("/") == outermost]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"
