"""Errors a user can act on: one line naming the argument, what was given, what is allowed, and the nearest name.

Every error raised on purpose derives from :class:`SfumatoError`; the command line prints its message and leaves with
exit code 2, a traceback appears only with ``--debug``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Up to ``n`` of ``candidates`` that look most like ``name``, best first."""
    pool = {candidate.lower(): candidate for candidate in candidates}
    return [pool[hit] for hit in difflib.get_close_matches(name.lower(), pool, n=n, cutoff=0.5)]


class SfumatoError(Exception):
    """Base of all deliberate errors. ``exit_code`` is what the command line returns."""

    exit_code = 2


class BadInput(SfumatoError, ValueError):
    """An argument is out of its allowed range or of the wrong kind."""


class UnknownName(SfumatoError, LookupError):
    """A name (of a model, method, parameter, word ...) is not known; the message lists the candidates."""

    def __init__(self, kind: str, given: str, candidates: Iterable[str]):
        known = list(candidates)
        close = nearest(given, known)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        listing = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
        super().__init__(f"unknown {kind} {given!r}.{hint} Known: {listing or 'none'}.")
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
    result: object = None  # the finished parts, where the caller can use them
