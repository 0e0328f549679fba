"""Which verbs a system serves: it says so by the methods its class has. Nothing heavy is imported here.

A system is one class with a card (:mod:`sfumato.cards`). The public face asks these protocols, never for a name::

    make      watches or changes a generation: an Intervention           ``--with KEY``
    explain   a picture, a reading, a model's idea of a concept, a net    ``--by KEY``
    edit      opens a picture and changes it                              ``--with KEY``
    segment   learns masks from the name of an object                     ``--by KEY``
    teach     teaches a model that exists

Whatever a method cannot take (a model, a picture, an option) it refuses with an error of :mod:`sfumato.errors`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

__all__ = [
    "VERBS",
    "Edits",
    "ExplainsConcept",
    "ExplainsImage",
    "ExplainsNet",
    "ExplainsReading",
    "Opened",
    "Picture",
    "Segments",
    "TakesPart",
    "Teaches",
    "Work",
    "serves",
]


@runtime_checkable
class TakesPart(Protocol):
    """Watches or changes a generation; the base class is :class:`sfumato.sampling.Intervention`."""

    def start(self, run: Any) -> None: ...
    def finish(self, run: Any) -> None: ...
    def coverage(self) -> dict[str, Any]: ...


@runtime_checkable
class ExplainsImage(Protocol):
    """Explains a picture that exists, with a model that draws."""

    def explain_image(self, model: Any, image: Any, prompt: str, **options: Any) -> Any:
        """``options``: ``size``, ``steps``, ``seed``, ``scheduler``. Returns maps: ``grid(image)`` is them as a
        picture, ``save(path)`` writes the numbers."""


@runtime_checkable
class ExplainsReading(Protocol):
    """Explains what a model that reads (a CLIP, classifier, detector, question answerer) makes of a picture or text."""

    def explain_reading(self, reader: Any, image: Any, prompt: str | None, **options: Any) -> Any:
        """``image`` is None for a model that reads texts. Returns maps as :class:`ExplainsImage` does."""


@runtime_checkable
class ExplainsConcept(Protocol):
    """Explains a model's idea of something: of a text, a picture, or a folder of pictures."""

    def explain_concept(
        self,
        model: Any,
        what: Any,
        prompt: str | None = None,
        on_step: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Any:
        """Returns a finding with ``pictures``, ``picture()`` that sums it up, and ``save(folder, name="")``, the files
        it wrote."""


@runtime_checkable
class ExplainsNet(Protocol):
    """Explains what the layers of a net know."""

    def explain_net(self, net: Any, name: str = "", **options: Any) -> Any:
        """Returns a table with ``lines()`` and ``save(folder, stem, new=False)``, the files it wrote; ``new``:
        FileExistsError where the first of them is there."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture to be edited: ``image`` (PIL), and what is known of it.

    ``prompt`` is what it shows, if anybody says; ``settings`` the arguments of ``generate`` that draw it again, with
    ``parts``, the systems that took part then; None where it has to be taken as it is.
    """

    image: Any
    prompt: str | None = None
    settings: dict[str, Any] | None = None
    parts: Sequence[Any] = field(default_factory=tuple)


class Opened(Protocol):
    """A picture opened for editing, with all that its edits share."""

    def edit(self, prompt: str, *, mask: Any = None, with_: Sequence[Any] = (), on_step: Any = None) -> Any:
        """The picture with ``prompt`` for its own, as a result of ``generate``. ``mask`` (PIL) is white where it may
        change, ``with_`` takes part."""


@runtime_checkable
class Edits(Protocol):
    """Edits pictures that exist. ``OPENING`` names the options of :class:`sfumato.app.editing.EditOptions` that it
    takes. A parameter ``source``, where there is one, says what the picture shows."""

    OPENING: tuple[str, ...]

    def open(self, model: Any, picture: Picture, on_step: Callable[..., Any] | None = None, **opening: Any) -> Opened:
        """Open a picture; the object keeps this system's parameters for its edits."""


@runtime_checkable
class Segments(Protocol):
    """Learns to segment an object from its name."""

    def segment(
        self,
        model: Any,
        concept: str,
        pictures: Sequence[Any] | None = None,
        *,
        remover: Any = None,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> Any:
        """``pictures`` (PIL, all of one size) show the object; None makes some. ``remover`` redraws pictures without
        it. Returns a finding with ``save(folder, names)``, the files it wrote."""

    @staticmethod
    def open_segmenter(path: Path) -> Any:
        """A segmenter written before: ``mask(image)`` (PIL) gives the mask in the picture's size (PIL)."""


@dataclass
class Work:
    """What a run that teaches keeps to be able to go on: checkpoints in ``folder`` (None: none), whether to ``resume``
    those that are there, the ``minutes`` after which to stop, and whom to tell of (step, steps, figures)."""

    folder: Path | None = None
    resume: bool = False
    minutes: float | None = None
    on_progress: Callable[[int, int, dict[str, float]], None] | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the first of those that were launched together, which writes."""
        return os.environ.get("RANK", "0") == "0"

    def remove(self) -> None:
        """Drops the folder, when the result is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


@runtime_checkable
class Teaches(Protocol):
    """Teaches a model that exists. ``RESUMES``: it takes ``work`` (a :class:`Work`) and a loaded model, and its record
    has ``save(path)``, which returns the files, ``step`` and ``interrupted``; otherwise it takes ``on_progress``."""

    RESUMES: ClassVar[bool]

    def teach(self, model: Any, data: Any, **options: Any) -> Any:
        """``model``: a name, a folder or a loaded model, which is not changed; ``data``: a folder, or "toybox".
        Returns a record with ``model`` and ``save(path)``."""


VERBS: dict[str, tuple[tuple[type, str], ...]] = {
    "make": ((TakesPart, "takes part: --with"),),
    "explain": (
        (ExplainsImage, "a picture that exists"),
        (ExplainsReading, "what a model that reads makes of a picture or a text"),
        (ExplainsConcept, "a model's idea of a text, a picture or a folder of pictures"),
        (ExplainsNet, "what the layers of a net know"),
    ),
    "edit": ((Edits, "pictures that exist"),),
    "segment": ((Segments, "the object that is named"),),
    "teach": ((Teaches, "a model that exists"),),
}
"""Verb -> what may be asked of a system, in words."""


def serves(system: type | Any) -> dict[str, tuple[str, ...]]:
    """The verbs that a system (its class, or an object) serves, each with what may be asked of it."""
    cls = system if isinstance(system, type) else type(system)
    found = {verb: tuple(words for way, words in ways if _has(cls, way)) for verb, ways in VERBS.items()}
    return {verb: words for verb, words in found.items() if words}


def _has(cls: type, protocol: type) -> bool:
    members = [name for name in vars(protocol) if not name.startswith("_")]
    return all(hasattr(cls, name) for name in (*members, *getattr(protocol, "__annotations__", {})))
