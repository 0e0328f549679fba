"""Locks of files and folders between processes, which a kill frees.

Where there is ``flock``, the file or folder itself is locked. Windows has no locks of folders: there a file
``PATH.lock`` (in a folder that is in use: ``.sfumato.lock``) is created, which only one process can, and which the
system removes when that process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Lock", "lock"]

#: Windows removes such a file when it is closed, also by the end of a process that was killed
_TEMPORARY = getattr(os, "O_TEMPORARY", 0)


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds; ``beside`` is the file that stands for it, where there is one. ``sure`` is False
    on file systems without locks: another process may believe that it holds the same."""

    handle: int
    beside: Path | None = None
    sure: bool = True

    def release(self) -> None:
        os.close(self.handle)
        if self.beside is not None:
            with contextlib.suppress(OSError):
                self.beside.unlink()


def lock(path: Path, inside: bool = False) -> Lock | None:
    """Locks ``path``, a file or folder that is there, for this process; None where another one holds it.

    ``inside``: a file that stands for the lock lies in the folder, not beside it. Raises FileNotFoundError where there
    is nothing, or it was taken away at this moment, OSError where nothing can be written.
    """
    if fcntl is None:
        beside = path / ".sfumato.lock" if inside else path.with_name(f"{path.name}.lock")
        try:
            return Lock(os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | _TEMPORARY), beside)
        except FileExistsError:
            return None
        except PermissionError:  # there, and being removed at this moment
            if beside.exists():
                return None
            raise
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system without locks
        return Lock(handle, sure=False)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            return Lock(handle)
    os.close(handle)  # whoever held it has taken it away, and perhaps another one is there by now
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
