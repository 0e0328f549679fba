"""Which verbs a system serves: it says so by the methods its class has. Nothing heavy is imported here.

A system is one class with a card (:mod:`sfumato.cards`). The public face asks these protocols, never for a name::

    make      watches or changes a generation: an Intervention           ``--with KEY``
    explain   a picture, a reading, a model's idea of a concept, a net    ``--by KEY``
    edit      opens a picture and changes it                              ``--with KEY``
    segment   learns masks from the name of an object                     ``--by KEY``
    teach     teaches a model that exists                                 ``--by KEY``
    judge     compares sets of pictures, by attributes or as a whole      ``--by KEY``
    train     trains a model from a recipe                                ``objective = "KEY"``

Whatever a method cannot take (a model, a picture, an option) it refuses with an error of :mod:`sfumato.errors`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from sfumato import writing
from sfumato.markup import described

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "VERBS",
    "Comparison",
    "Edits",
    "ExplainsConcept",
    "ExplainsImage",
    "ExplainsNet",
    "ExplainsReading",
    "Judges",
    "JudgesSets",
    "Opened",
    "Picture",
    "Segmentation",
    "Segments",
    "NetTable",
    "TakesPart",
    "TeachingResult",
    "Teaches",
    "Trains",
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


class NetTable(Protocol):
    """What is found in a net."""

    def lines(self) -> list[str]:
        """It as lines of text."""

    def save(self, folder: Path, stem: str, new: bool = False) -> list[Path]:
        """Writes it; returns the files. ``new``: FileExistsError where the first of them is there."""


@runtime_checkable
class ExplainsNet(Protocol):
    """Explains what the layers of a net know."""

    def explain_net(self, net: Any, name: str = "", **options: Any) -> NetTable: ...


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
    takes. A parameter ``source``, where there is one, says what the picture shows. A system that edits with models of
    another kind than text-to-image models has ``load_model(name or None)``, which loads one."""

    OPENING: tuple[str, ...]

    def open(self, model: Any, picture: Picture, on_step: Callable[..., Any] | None = None, **opening: Any) -> Opened:
        """Open a picture; the object keeps this system's parameters for its edits."""


class Segmentation(Protocol):
    """Masks, and what has learnt to make them."""

    @property
    def segmenter(self) -> Any:
        """``mask(image)`` (PIL) gives the mask in the picture's size (PIL)."""

    def save(self, folder: Path, names: Sequence[str] | None = None) -> list[Path]:
        """Writes masks and segmenter; returns the files."""


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
    ) -> Segmentation:
        """``pictures`` (PIL, all of one size) show the object; None makes some. ``remover`` redraws pictures without
        it."""

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
    _held: bool = field(default=False, init=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this process is the first of those that were launched together, which writes."""
        return os.environ.get("RANK", "0") == "0"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within: the folder is there, and this run's alone; of several processes the first one asks for it. It nests.
        Afterwards the folder is gone if nothing is in it. Raises Conflict where another run is at work in it."""
        if self.folder is None or self._held or not self.first:
            yield
            return
        try:
            with writing.reserved(self.folder, "teaching", make=True):
                self._held = True
                yield
        finally:
            self._held = False
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def remove(self) -> None:
        """Drops the folder, when the result is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class TeachingResult(Protocol):
    """What teaching leaves."""

    @property
    def model(self) -> Any:
        """The taught copy."""

    def save(self, path: Path | str) -> Any:
        """Writes it: an adapter's file, or a new folder; returns the files or the folder."""


@runtime_checkable
class Teaches(Protocol):
    """Teaches a model that exists. ``RESUMES``: it takes ``work`` (a :class:`Work`) and a loaded model, and its record
    has ``save(path)``, which returns the files, ``step`` and ``interrupted``; otherwise it takes ``on_progress``."""

    RESUMES: ClassVar[bool]

    def teach(self, model: Any, data: Any, **options: Any) -> TeachingResult:
        """``model``: a name, a folder or a loaded model, which is not changed; ``data``: a folder, or "toybox"."""


@dataclass
class Comparison:
    """What differs between two sets of pictures, as a report shows it: ``figures`` (name, value, what it is),
    ``tables`` (title, heads, rows), ``notes``, ``plots`` by name, and everything as plain values in ``data``."""

    figures: list[tuple[str, float, str]] = field(default_factory=list)
    tables: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plots: dict[str, Image] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    __repr__ = described


@runtime_checkable
class Judges(Protocol):
    """Compares two sets of pictures by attributes that are named."""

    def find_attributes(self, captions: Iterable[str], most: int = 20) -> list[str]:
        """Attributes worth comparing, from captions. Raises NoMatch where there is none."""

    def scores(self, clip: Any, attributes: Sequence[str], real: Any, fake: Any) -> Any:
        """How much of each attribute each picture shows, (n m) and (n' m), from embeddings (n d) and (n' d)."""

    def compare_attributes(
        self, attributes: Sequence[str], real: Any, fake: Any, mentions: Any = None, scored_by: str = ""
    ) -> Comparison:
        """The two sets by such scores; ``mentions`` (n m): whether captions of the real ones name an attribute."""


@runtime_checkable
class Trains(Protocol):
    """Trains a model from a recipe whose ``objective`` is the system's key."""

    @staticmethod
    def objective(recipe: Any) -> Any:
        """The :class:`sfumato.training.objective.Objective` that a recipe describes, its modules built."""


class SetsReport(Protocol):
    """What is said of several sets of pictures."""

    def lines(self) -> list[str]:
        """In words."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""

    def save(self, folder: Path) -> list[Path]:
        """Writes it; returns the files."""


@runtime_checkable
class JudgesSets(Protocol):
    """Compares sets of pictures."""

    def judge_sets(self, sets: Sequence[Any], *, on_progress: Callable[..., Any] | None = None) -> SetsReport:
        """``sets``: folders, or what else the system knows by name."""


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
    "judge": (
        (Judges, "two sets of pictures, by attributes"),
        (JudgesSets, "sets of pictures, each as another has them"),
    ),
    "train": ((Trains, "a model from a recipe that names it as its objective"),),
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
