"""What claims are made of: an :class:`Experiment` has parts; a part is given a :class:`Context` and returns rows."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from claims.bars import Bar
from sfumato import files, registry
from sfumato.errors import UnknownName

HERE = Path(__file__).parent
PICTURES = HERE / "pictures"
T = TypeVar("T")
HALFWAY, TENSOR = "sfumato.claims.halfway-1", "tensor in this file"


@dataclass
class Row:
    """One claim with what was measured.

    Attributes:
        claim: what is claimed, in words, with the bar it must pass.
        source: who claims it.
        measured: our figure with its interval.
        baseline: the figure of a method that should be worse, or of chance.
        bars: what the figures must show; the claim holds where all are met.
        holds: the verdict, where there are no bars; None where a figure is only reported.
        void: why the test says nothing this time (plain sampling succeeds too often ...); empty: it does.
        headline: whether this is what the system promises, and not an ablation or an extra.
        n: how many samples, or clusters of samples, stand behind it.
        leans_on: the accuracy of the judge or oracle that the figure relies on, if any.
        picture: file under ``claims/pictures``.
        data: every number, for programs.
    """

    claim: str
    source: str
    measured: str
    baseline: str
    n: int
    holds: bool | None = None
    bars: Sequence[Bar] = ()
    void: str = ""
    headline: bool = False
    leans_on: str = ""
    picture: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        faults = [fault for bar in self.bars if (fault := bar.fault)]
        if self.bars and not self.void and faults:
            self.void = f"the bar decides nothing: {'; '.join(faults)}"
        if self.bars:
            self.holds = all(bar.met() for bar in self.bars)
        if self.void:
            self.holds = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the record."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        return plain | {"bars": [bar.to_json() for bar in self.bars]}


@dataclass(frozen=True)
class Part:
    """A piece of an experiment that is run and kept as a whole. ``models`` are the zoo models it measures."""

    name: str
    models: tuple[str, ...]
    run: Callable[[Context], list[Row]]


@dataclass(frozen=True)
class Experiment:
    """A claim set under one key."""

    key: str
    title: str
    intro: str
    file: str
    parts: tuple[Part, ...]


class Context:
    """What a part is given: sizes, models, pictures, progress.

    Args:
        quick: small samples, to see that everything runs; results go beside the real ones and prove nothing.
        weights: a folder whose subfolders replace the zoo's models of the same name.
        report: called with one line whenever something happened that a person wants to see.
    """

    def __init__(
        self, quick: bool = False, weights: Path | None = None, report: Callable[[str], None] = lambda _: None
    ):
        self.quick, self.weights, self.report = quick, weights, report
        self.pictures = PICTURES / "quick" if quick else PICTURES
        self.cache: dict[str, Any] = {}
        self.halfway: Path | None = None  # where what is made is kept until its experiment is whole
        self.shared: Callable[[str, Sequence[str]], Path] | None = None  # the same, of a file and models: for all

    def count(self, full: int, quick: int) -> int:
        """How many samples to use."""
        return quick if self.quick else full

    def folder(self, name: str) -> Path:
        """The folder of a model. Raises UnknownName when its weights are not there."""
        if self.weights is not None and (self.weights / name).is_dir():
            return self.weights / name
        found = registry.find(name)
        if found is None:
            raise UnknownName("built-in model", name, registry.names())
        return found

    def once(self, key: str, make: Callable[[], T]) -> T:
        """``make()``, remembered for the rest of this run (models, readings that several parts share)."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def home(self, by: str = "", models: Sequence[str] = ()) -> Path | None:
        """The folder for what is made: of the experiment that runs, or, where only the file ``by`` and these models
        matter, of all experiments that use it. Outside of a run there is none."""
        return self.shared(by, models) if by and self.shared is not None else self.halfway

    def kept(self, what: Sequence[Any], make: Callable[[], T], by: str = "", models: Sequence[str] = ()) -> T:
        """``make()``, which an interrupted run of the experiment may have made already: tensors and plain values in
        dicts (keys of text) and lists. ``what`` tells it apart within its :meth:`home`: a name, and all that it depends
        on beside code and weights. Outside of a run nothing is kept."""
        home = self.home(by, models)
        if home is None:
            return make()
        path = home / f"{hashlib.sha256(repr(what).encode()).hexdigest()[:24]}.safetensors"
        if path.is_file():
            self.report(f"  {what[0]}: made before")
            with files.reading_tensors(path, HALFWAY, "result of a claim") as (file, metadata):
                return _put_back(json.loads(metadata["value"]), file)
        value = make()
        tensors: dict[str, Tensor] = {}
        text = json.dumps(_taken_out(value, tensors))
        path.parent.mkdir(parents=True, exist_ok=True)
        files.save_tensors(path, tensors, {"format": HALFWAY, "value": text})
        return value

    def save(self, name: str, image: Any) -> str:
        """Writes a picture; returns its name for :class:`Row`."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        image.save(self.pictures / name, optimize=True)
        return name

    def batches(self, items: Sequence[T], size: int, label: str) -> Iterator[tuple[int, Sequence[T]]]:
        """(start, chunk) of ``items``, telling :attr:`report` how far it is every few seconds."""
        reported = time.monotonic()
        for start in range(0, len(items), size):
            if time.monotonic() - reported > 5:
                reported = time.monotonic()
                self.report(f"  {label}: {start} of {len(items)}")
            yield start, items[start : start + size]


def _taken_out(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain values, with the name of each tensor in its place. Raises TypeError for anything else."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().clone()  # safetensors refuses storage that is shared
        return {TENSOR: name}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"keys of text only, not {list(value)}")
        return {key: _taken_out(each, tensors) for key, each in value.items()}
    if isinstance(value, list):
        return [_taken_out(each, tensors) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be kept halfway")


def _put_back(value: Any, file: Any) -> Any:
    if isinstance(value, dict):
        if list(value) == [TENSOR]:
            return file.get_tensor(value[TENSOR])
        return {key: _put_back(each, file) for key, each in value.items()}
    return [_put_back(each, file) for each in value] if isinstance(value, list) else value
