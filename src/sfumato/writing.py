"""Files and folders that are whole or absent, by one process at a time.

What is written lies beside its place under a name of its own (``.NAME.XXXXXXXX.partial``) until it is whole, and is
locked while somebody writes it: whatever a killed process left behind is known from what is being written by its
lock alone, and is taken away by the next one that writes there.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from sfumato.errors import BadInput, Conflict
from sfumato.locks import Lock, lock

__all__ = [
    "PICTURES",
    "VIDEOS",
    "copy_tree",
    "create",
    "free_name",
    "is_file_name",
    "atomic_folder",
    "numbered",
    "only_folder",
    "output",
    "output_folder",
    "atomic_write",
    "refuse_filled",
    "rereadable",
    "reserved",
    "slug",
    "remove_partial",
    "write_text",
]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
#: what else nobody calls a folder
_OTHERS = (
    ".avif", ".heic", ".heif", ".jxl", ".psd", ".svg", ".pdf", ".html", ".json", ".jsonl", ".csv", ".txt", ".md",
    ".toml", ".yaml", ".zip", ".tar", ".npy", ".npz", ".safetensors", ".ckpt", ".pt", ".pth", ".bin",
)  # fmt: skip
_PARTIAL = re.compile(r"\..*\.[0-9a-f]{8}\.partial")
LONGEST_WRITE = 24 * 3600  # seconds; where nothing can be locked, what is older is nobody's any more


@contextlib.contextmanager
def _beside(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Where to write what becomes ``path``: made by ``make`` and locked until the end, when whatever is still there is
    removed."""
    while True:
        beside = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.partial")
        make(beside)
        try:
            held = lock(beside)
        except FileNotFoundError:  # somebody swept here at this moment
            continue
        if held and beside.exists():
            break
        if held:
            held.release()
    try:
        yield beside
    finally:
        held.release()
        _remove(beside)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _made_file(path: Path) -> None:
    path.open("xb").close()


def remove_partial(folder: Path) -> None:
    """Takes away what killed processes have left half-written in ``folder``."""
    if not folder.is_dir():
        return
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            mode = path.lstat().st_mode
            if not _PARTIAL.fullmatch(path.name) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                continue
            if held := lock(path):  # or else somebody is writing it
                try:
                    if held.sure or time.time() - path.lstat().st_mtime > LONGEST_WRITE:
                        _remove(path)
                finally:
                    held.release()


@functools.cache
def _swept(folder: Path) -> None:
    """:func:`remove_partial`, once in the life of this process: a folder may hold very many files."""
    remove_partial(folder)


@contextlib.contextmanager
def atomic_write(path: Path | str, new: bool = False) -> Iterator[IO[bytes]]:
    """A binary file written beside ``path`` and renamed onto it at the end; after any failure nothing is left.

    ``new``: never in the place of a file that is there, also if another process has put it there in the meantime.

    Raises:
        FileExistsError: with ``new``. OSError: the folder cannot be written or the disk is full; an older file at
        ``path`` is untouched.
    """
    path = Path(path)
    _swept(path.absolute().parent)
    try:
        with _beside(path, _made_file) as beside:
            with beside.open("r+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _put_new(beside, path) if new else os.replace(beside, path)
    except OSError as error:  # tell the name the caller knows
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_text(path: Path | str, text: str, new: bool = False) -> None:
    """A whole file of ``text`` in UTF-8; see :func:`atomic_write`."""
    with atomic_write(path, new) as file:
        file.write(text.encode())


def _put_new(beside: Path, path: Path) -> None:
    """``beside`` renamed to ``path``. Raises FileExistsError if that is there."""
    try:
        os.link(beside, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: two steps, which a kill in between leaves as an empty file
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(beside, path)
    else:
        os.unlink(beside)


@contextlib.contextmanager
def atomic_folder(target: Path | str, replace: bool = False) -> Iterator[Path]:
    """A folder filled beside ``target`` and renamed to it at the end; after any failure nothing is left. ``target`` may
    be an empty folder, or with ``replace`` any.

    Raises:
        BadInput: ``target`` is a file, or not empty. OSError: it cannot be written.
    """
    target = Path(target)
    if not replace:
        refuse_filled(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(target.parent)
    with _beside(target, Path.mkdir) as beside:
        yield beside
        if not replace:
            refuse_filled(target)
            with contextlib.suppress(FileNotFoundError):
                target.rmdir()
        with _set_aside(target) if os.path.lexists(target) else contextlib.nullcontext():
            beside.rename(target)


@contextlib.contextmanager
def _set_aside(target: Path) -> Iterator[None]:
    """Within: nothing is at ``target``. What was there is back if that fails or is interrupted, and removed else."""
    old = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.partial")
    try:
        target.rename(old)
        yield
    except BaseException:
        if old.exists() and not os.path.lexists(target):
            old.rename(target)
        raise
    _remove(old)


def copy_tree(source: Path, target: Path) -> None:
    """Copies what is in folder ``source`` into ``target``, made if it is missing. Raises OSError at the first file that
    cannot be written, with its number: shutil's own collects such errors and loses these."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        at = target / path.relative_to(source)
        if path.is_dir():
            at.mkdir(exist_ok=True)
        else:
            shutil.copyfile(path, at)


def rereadable(path: Path, owner: object) -> Path:
    """``path``, or a copy of what a pipe holds, which can be read but once; it is there as long as ``owner``."""
    if path.is_file() or not path.exists():
        return path
    with path.open("rb") as file, tempfile.NamedTemporaryFile(suffix=path.suffix, delete=False) as copy:
        weakref.finalize(owner, os.unlink, copy.name)
        shutil.copyfileobj(file, copy)
    return Path(copy.name)


def refuse_filled(folder: Path) -> None:
    """Raises BadInput for what is no new or empty folder."""
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"output folder {str(folder)!r} exists and is not empty; name a new one.")


@contextlib.contextmanager
def reserved(folder: Path | str, doing: str, make: bool = False) -> Iterator[None]:
    """Within, no other process that asks may work in ``folder``; a kill frees it. ``make``: it is made if it is
    missing, also where whoever was at work in it takes it away at this moment.

    Raises:
        Conflict: another one does; ``doing`` says what this one wanted.
    """
    held = _held(Path(folder), make)
    if held is None:
        raise Conflict(
            f"another process is at work in {str(folder)!r}, so {doing} there would mix with it; "
            f"wait until it is done, or name another folder."
        )
    try:
        yield
    finally:
        held.release()


def _held(folder: Path, make: bool) -> Lock | None:
    while make:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return lock(folder, inside=True)
    return lock(folder, inside=True)


@contextlib.contextmanager
def output_folder(path: Path | str) -> Iterator[Path]:
    """``path`` as a folder that can be written, made if it is missing; if nothing came into it, it is taken away again.

    Raises:
        BadInput: the path is a file. OSError: the folder cannot be made or written.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise BadInput(f"output folder {str(path)!r} is a file; name a folder.")
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        remove_partial(path)
        yield path
    finally:
        with contextlib.suppress(OSError):  # not empty, or never made
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def output(out: Path, endings: tuple[str, ...] = (".png",)) -> Iterator[tuple[Path, Path | None]]:
    """Where to write: (the folder ``out``, None) or, where its name is that of a file and no folder is there, (the
    folder that the file ``out`` lies in, ``out``).

    Raises BadInput for the name of a file that has none of the ``endings``; otherwise as :func:`output_folder`.
    """
    named = is_file_name(out)
    if named and out.suffix.lower() not in endings:
        raise BadInput(f"-o is {out.name!r}, but what is made here ends in {' or '.join(endings)}; name such a file.")
    with output_folder(out.parent if named else out) as folder:
        yield folder, out if named else None


def is_file_name(out: Path) -> bool:
    """Whether a path is meant as the name of a file: it ends like a picture, a clip or another kind of file, and there
    is no such folder."""
    return out.suffix.lower() in (*PICTURES, *VIDEOS, *_OTHERS) and not out.is_dir()


def only_folder(out: Path | str, what: str) -> Path:
    """``out`` where only a folder will do. Raises BadInput for the name of a file: ``what`` is written."""
    if is_file_name(Path(out)):
        raise BadInput(f"-o is {Path(out).name!r}, the name of a file, but {what} fill a folder; name one.")
    return Path(out)


def numbered(path: Path | None, index: int, total: int) -> Path | None:
    """``x.png`` for the only file of a name that was given, ``x-1.png``, ``x-2.png``, ... for the first of several."""
    return path if path is None or total == 1 else path.with_stem(f"{path.stem}-{index + 1}")


def free_name(folder: Path, stem: str, suffix: str = ".png") -> Path:
    """The first of ``stem.png``, ``stem-2.png``, ... that does not exist: pictures are never overwritten."""
    path, count = folder / f"{stem}{suffix}", 1
    while os.path.lexists(path):
        count += 1
        path = folder / f"{stem}-{count}{suffix}"
    return path


def create(folder: Path, stem: str, suffix: str, write: Callable[[Path, bool], Path], at: Path | None = None) -> Path:
    """A file at the name that was given, ``at``, or else a new one under the first free name. ``write(path, new)``
    writes it, and raises FileExistsError where with ``new`` another process has taken that name in the meantime
    (:func:`atomic_write`); the next one is tried then."""
    if at is not None:
        return write(at, False)
    while True:
        try:
            return write(free_name(folder, stem, suffix), True)
        except FileExistsError:
            continue


def slug(text: str, longest: int = 60) -> str:
    """A file name made from a prompt: lower case letters and digits of any script, joined by ``-``."""
    words = re.findall(r"\w+", text.encode(errors="ignore").decode().lower())
    name = ""
    for word in words:
        if len(f"{name}-{word}") > longest:
            break
        name += ("-" if name else "") + word
    name = name or (words[0][:longest] if words else "picture")
    return name.encode()[:180].decode(errors="ignore")  # file systems count bytes
