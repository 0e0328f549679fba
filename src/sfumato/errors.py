"""Errors a user can act on: one line naming the argument, what was given, what is allowed, and the nearest name.

Every error raised on purpose derives from :class:`SfumatoError`; the command line prints its message and leaves with
exit code 2, a traceback appears only with ``--debug``.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Up to ``n`` of ``candidates`` that look most like ``name``, best first."""
    pool = {candidate.lower(): candidate for candidate in candidates}
    return [pool[hit] for hit in difflib.get_close_matches(name.lower(), pool, n=n, cutoff=0.5)]


class SfumatoError(Exception):
    """Base of all deliberate errors. ``exit_code`` is what the command line returns; ``result``, where there is one,
    holds what was finished before."""

    exit_code = 2
    result: object = None


class BadInput(SfumatoError, ValueError):
    """An argument is out of its allowed range or of the wrong kind."""


class UnknownName(SfumatoError, LookupError):
    """A name (of a model, method, parameter, word ...) is not known; the message lists the candidates, or says what
    another library's name is called ``here``."""

    def __init__(self, kind: str, given: str, candidates: Iterable[str], here: str = ""):
        known = list(candidates)
        close = nearest(given[:200], known)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        hint = f" Here it is {here}." if here else hint
        most = 12 if close else 40  # of many names only the nearest help
        listing = ", ".join(known[:most]) + (", ..." if len(known) > most else "")
        quoted = repr(given) if len(given) <= 120 else f"{given[:120]!r}..."
        super().__init__(f"unknown {kind} {quoted}.{hint} Known: {listing or 'none'}.")
        self.kind, self.given, self.candidates, self.close = kind, given, known, close


class NoMatch(SfumatoError, LookupError):
    """Something that was asked to act matched nothing: no site, no word, no step. The message lists the candidates."""


class Conflict(SfumatoError):
    """Two requests that cannot hold together, such as two interventions that both replace the trajectory."""


class NotSupported(SfumatoError):
    """The request is well formed, but this model, backend or family cannot serve it; the message says which can."""


class BadWeights(SfumatoError):
    """A weight file is a pickle, is corrupt or truncated, or does not fit the architecture."""


class WorkInterrupted(SfumatoError):
    """Work was stopped from outside; finished parts are kept and the message says where and how to go on."""

    exit_code = 130


class NotFinite(SfumatoError):
    """Numbers overflowed on the way; the message says at which step."""


class NotAllowed(BadInput):
    """An untrusted recipe names files of this computer that its reader has not allowed it to open."""


class OutOfMemory(SfumatoError, MemoryError):
    """The work did not fit into memory; the message says what to make smaller."""


#: what torch says, in errors of no type of their own, when memory runs out
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cannot allocate memory",
    "unable to mmap",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, whatever library it comes from."""
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's, which is not imported here
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


@contextlib.contextmanager
def within_memory(what: str, remedy: str) -> Iterator[None]:
    """Within: running out of memory is raised as :class:`OutOfMemory`, which says what to do about it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, SfumatoError) or not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the memory
        raise OutOfMemory(f"{what} does not fit into memory: {remedy}.") from None
