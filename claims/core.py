"""What every claim shares: rows of results, resumable parts, seeds and sizes, the table.

An :class:`Experiment` has parts; a part returns rows. Finished parts are written at once and kept as long as the
weights they measured and the code they depend on stay the same, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from claims import sources
from claims.bars import Bar
from sfumato import files, registry
from sfumato.errors import BadInput, UnknownName
from sfumato.writing import write_text

HERE = Path(__file__).parent
RESULTS = HERE / "results"
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

    def kept(self, what: Sequence[Any], make: Callable[[], T]) -> T:
        """``make()``, which an interrupted run of the experiment may have made already: tensors and plain values in
        dicts (keys of text) and lists. ``what`` tells it apart within the experiment: a name, and all that it depends
        on beside code and weights. Outside of a run nothing is kept."""
        if self.halfway is None:
            return make()
        path = self.halfway / f"{hashlib.sha256(repr(what).encode()).hexdigest()[:24]}.safetensors"
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


def run(experiment: Experiment, context: Context, fresh: bool = False, only: str = "") -> dict[str, Any]:
    """Runs an experiment's parts, skipping those whose result is still valid, and returns its record.

    The record is written after every part, and pictures made so far outlive an interruption (:func:`halfway`). A part
    whose model is missing is left out with a line saying so. With ``only``, parts whose name does not contain it stay
    as they are on record; UnknownName if it is in none.
    """
    if not any(only in part.name for part in experiment.parts):
        raise UnknownName(f"part of {experiment.key}", only, [part.name for part in experiment.parts])
    target = results_folder(context.quick) / f"{experiment.key}.json"
    before = read_record(target)
    record: dict[str, Any] = {
        "key": experiment.key,
        "title": experiment.title,
        "intro": experiment.intro,
        "quick": context.quick,
        "machine": before.get("machine") or machine(),
        "parts": {},
    }
    code = code_of(experiment)
    for part in experiment.parts:
        if only not in part.name:
            if part.name in before.get("parts", {}):
                record["parts"][part.name] = before["parts"][part.name]
            continue
        missing = [name for name in part.models if not has(context, name)]
        if missing:
            context.report(f"{experiment.key} / {part.name}: left out, no weights of {', '.join(missing)}")
            continue
        mark = fingerprint(code, part, context)
        kept = before.get("parts", {}).get(part.name)
        if kept and kept["fingerprint"] == mark and not fresh:
            record["parts"][part.name] = kept
            context.report(f"{experiment.key} / {part.name}: kept")
            continue
        context.report(f"{experiment.key} / {part.name}")
        if fresh:
            shutil.rmtree(halfway(experiment, context), ignore_errors=True)
        record["machine"] = machine()  # of the newest figures
        start = time.perf_counter()
        context.halfway = halfway(experiment, context)
        try:
            rows = part.run(context)
        finally:
            context.halfway = None
        seconds = time.perf_counter() - start
        for row in rows:
            row.seconds = row.seconds or round(seconds / len(rows), 1)
            context.report(f"  {verdict(row.to_json())}: {row.claim}: {row.measured}; baseline {row.baseline}")
        record["parts"][part.name] = {
            "fingerprint": mark,
            "seconds": round(seconds, 1),
            "supervision": sources.supervision(context.folder(name) for name in part.models),
            "rows": [row.to_json() for row in rows],
        }
        # parts that come later keep their old result until they are run again
        rest = {name: old for name, old in before.get("parts", {}).items() if name not in record["parts"]}
        write(target, json.dumps(record | {"parts": record["parts"] | rest}, indent=1) + "\n")
    write(target, json.dumps(record, indent=1) + "\n")
    if not stale(experiment, context):
        shutil.rmtree(halfway(experiment, context).parent, ignore_errors=True)
    return record


def halfway(experiment: Experiment, context: Context) -> Path:
    """Where what an experiment has made waits until all its parts are on record, so that an interrupted run
    does not make it twice. Another folder for other code or weights; those of before are removed."""
    names = {name for part in experiment.parts for name in part.models if has(context, name)}
    depends = [code_of(experiment), {name: _weights_hash(str(context.folder(name))) for name in sorted(names)}]
    home = registry.cache_folder() / "claims" / (experiment.key + ("-quick" if context.quick else ""))
    folder = home / hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]
    for other in home.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def results_folder(quick: bool) -> Path:
    """Where records live."""
    return RESULTS / "quick" if quick else RESULTS


def read_record(path: Path) -> dict[str, Any]:
    """A record, or an empty one when the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def write(path: Path, text: str) -> None:
    """Writes beside and renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def has(context: Context, name: str) -> bool:
    """Whether a model's weights are there."""
    try:
        return context.folder(name).is_dir()
    except UnknownName:
        return False


def code_of(experiment: Experiment) -> str:
    """Of all code that an experiment's results depend on."""
    return sources.code_fingerprint(Path(experiment.file).resolve(), experiment.key)


def fingerprint(code: str, part: Part, context: Context) -> dict[str, Any]:
    """What a part's result depends on: changes with the ``code`` that makes it, the weights it measures, the sizes."""
    return {
        "code": code,
        "weights": {name: _weights_hash(str(context.folder(name)))[:16] for name in part.models},
        "quick": context.quick,
    }


def stale(experiment: Experiment, context: Context) -> dict[str, str]:
    """Parts that must run again, and why: part -> reason. Parts whose models are missing are left out."""
    record = read_record(results_folder(context.quick) / f"{experiment.key}.json")
    found, code = {}, code_of(experiment)
    for part in experiment.parts:
        if any(not has(context, name) for name in part.models):
            continue
        kept = record.get("parts", {}).get(part.name)
        reason = (
            "never measured" if kept is None else _difference(kept["fingerprint"], fingerprint(code, part, context))
        )
        if reason:
            found[part.name] = reason
    return found


def _difference(before: Any, now: dict[str, Any]) -> str:
    """Why a kept result with another fingerprint is not valid any more; empty where it is."""
    if before == now:
        return ""
    if not isinstance(before, dict):
        return "measured before the record knew the code it depends on"
    changed = [name for name, found in now["weights"].items() if before["weights"].get(name) != found]
    reasons = [f"other weights of {', '.join(changed)}"] if changed else []
    return "; ".join(reasons + (["other code"] if before["code"] != now["code"] else [])) or "other sizes"


@cache
def _weights_hash(folder: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        # cards and pictures may be rewritten without the model changing
        if path.suffix in (".safetensors", ".json", ".txt") and path.name != "sfumato.json":
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    import diffusers
    import torch
    import transformers

    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def verdict(row: dict[str, Any]) -> str:
    """The verdict of a row of the record in words."""
    if row.get("void"):
        return "void"
    return {True: "holds", False: "does not hold", None: "reported"}[row["holds"]]


def choose(asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """The keys to run: those asked for, or all. Raises UnknownName."""
    for key in asked:
        if key not in known:
            raise UnknownName("claim", key, known)
    return list(asked) or list(known)


def positive(name: str, value: int) -> int:
    """``value`` if it is above 0. Raises BadInput."""
    if value < 1:
        raise BadInput(f"{name} must be at least 1, got {value}.")
    return value
