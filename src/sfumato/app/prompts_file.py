"""Many jobs from a file of prompts: streamed, resumed after a kill, spread over workers."""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sfumato import cards, valid, writing
from sfumato.app.batch import JobBatch, ending, write
from sfumato.app.jobs import JobOptions
from sfumato.app.pictures import InputPictures
from sfumato.errors import BadInput, SfumatoError, WorkInterrupted

if TYPE_CHECKING:
    from collections.abc import Callable

    from sfumato.models import Model
    from sfumato.sampling import Result


ANNOTATIONS = ("task", "tag", "include", "exclude", "id")  # what a prompt set says besides how to make the picture
LONGEST_LINE = 1_000_000  # bytes


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompts file: its number, what to make, and what else it says; or what is wrong with it."""

    number: int
    job: JobOptions | None
    about: dict[str, Any] = field(default_factory=dict)
    wrong: str = ""


def read_prompts(path: Path, overrides: dict[str, Any]) -> Iterator[PromptLine]:
    """The lines of a JSONL file or pipe (``-``: standard input), one by one: a JSON object each with the keys of
    :class:`JobOptions` (and :data:`ANNOTATIONS`); ``overrides`` win.

    Raises:
        BadInput: the file is UTF-16, or has no line. OSError: it cannot be read.
    """
    any_line = False
    with contextlib.nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
        for number, line in enumerate(_raw_lines(file), start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise BadInput(f"{path} is not UTF-8 text but UTF-16; save it as UTF-8.")
            if line.strip():
                any_line = True
                yield _line(number, line, overrides)
    if not any_line:
        raise BadInput(f"{path} holds no prompts.")


def _raw_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, of those that are too long the beginning."""
    while line := file.readline(LONGEST_LINE + 1):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(LONGEST_LINE)):
            pass
        yield line


def _line(number: int, text: bytes, overrides: dict[str, Any]) -> PromptLine:
    if len(text) > LONGEST_LINE:
        return PromptLine(number, None, wrong=f"it is longer than {LONGEST_LINE} bytes.")
    try:
        given = valid.parsed_json(text)
    except ValueError as error:
        why = f": {error}" if isinstance(error, valid.BadJson) else ""
        example = '{"prompt": "a red cube", "seed": 1}'
        return PromptLine(number, None, wrong=f"not a JSON object{why}; write lines such as {example}.")
    if not isinstance(given, dict):
        return PromptLine(number, None, wrong=f"not a JSON object but {valid.brief(given)}.")
    about = {name: given.pop(name) for name in ANNOTATIONS if name in given}
    try:
        return PromptLine(number, JobOptions(**{**given, **overrides}), about)
    except SfumatoError as error:
        return PromptLine(number, None, wrong=str(error))


@dataclass(frozen=True)
class MadeFiles:
    """A picture of a long list: its files, and whether it was there already. ``seconds`` and ``cost`` when made now."""

    paths: list[Path]
    there: bool = False
    seconds: float = 0.0
    cost: float = 0.0


class BadPrompts(BadInput):
    """Some lines of a prompts file could not be followed; all others were."""


def make_prompts(
    lines: Iterable[PromptLine],
    batch: JobBatch,
    out: Path,
    on_step: Callable[[int, int, float], None] | None = None,
    total: int = 0,
    model: Model | None = None,
    ray: bool = False,
    workers: int | None = None,
) -> Iterator[MadeFiles]:
    """Make the pictures of a prompts file one by one in folder ``out``, which keeps ``metadata.jsonl`` of them.

    What that file says is done is not made again; so the same call goes on after a kill. Lines that cannot be followed
    are reported at the end, when all others are done. ``ray``: pictures are made on so many ``workers``
    (:mod:`sfumato.scale`); files, their order and their content are the same.

    Raises:
        BadPrompts: some could not be followed. Everything that :func:`make_files` raises that concerns all lines.
    """
    batch.systems()
    inputs = batch.inputs()
    wrong: list[str] = []
    tally = {"lines": 0, "done": 0}

    def jobs() -> Iterator[tuple[int, PromptLine, JobOptions]]:
        """(index, line, one picture of it), for every line that can be followed."""
        for index, line in enumerate(lines):
            tally["lines"] += 1
            if line.job is None:
                wrong.append(f"line {line.number}: {line.wrong}")
                continue
            for i in range(line.job.n):
                yield index, line, line.job.model_copy(update={"n": 1, "seed": line.job.seed + i})

    writing.only_folder(out, "the pictures of a prompts file and their metadata.jsonl")
    with writing.output_folder(out), writing.reserved(out, "a run of prompts"), contextlib.ExitStack() as stack:
        made = (
            _spread_lines(jobs(), batch, inputs, out, workers, stack)
            if ray
            else _make_lines(jobs(), batch, inputs, out, model, on_step, total)
        )
        failed = -1
        for index, line, answer in made:
            if isinstance(answer, str):
                if line.number != failed:
                    wrong.append(f"line {line.number}: {answer}")
                failed = line.number
            elif line.number != failed:
                tally["done"] += 1
                if ray and on_step is not None:
                    on_step(index, max(total, index + 1), 1.0)
                yield answer() if callable(answer) else answer
    count, done = tally["lines"], tally["done"]
    if wrong:
        named = " ".join(wrong[:3]) + (f" And {len(wrong) - 3} more." if len(wrong) > 3 else "")
        finished = f" The {done} pictures of the others are in {out}." if done else ""
        raise BadPrompts(f"{len(wrong)} of {count} lines could not be followed: {named}{finished}")


Answer = tuple[int, PromptLine, Any]


def _make_lines(
    jobs: Iterator[tuple[int, PromptLine, JobOptions]],
    batch: JobBatch,
    inputs: InputPictures,
    out: Path,
    model: Model | None,
    on_step: Callable[[int, int, float], None] | None,
    total: int,
) -> Iterator[Answer]:
    """Pictures one after the other, in this process."""
    from sfumato.bench.journal import Journal

    journal: Journal | None = None
    failed = -1
    for index, line, options in jobs:
        if line.number == failed:
            continue
        if model is None:  # only now: a file of nothing but damage needs none
            model = batch.load()
        journal = journal or Journal(out)

        def on_progress(step: Any, index: int = index) -> None:
            if on_step is not None:
                on_step(index, max(total, index + 1), (step.i + 1) / step.total)

        try:
            key = _job_key(options, batch, inputs, model.weight_hash, str(model.dtype))
            there = journal.take(key)
            if there is not None:
                yield index, line, MadeFiles([there], there=True)
                continue
            result, seconds = _timed(model, options, batch, inputs, on_progress)
            row = _row(options, line.about, seconds, result.cost)

            def save(at: Path, result: Result = result) -> list[Path]:
                return write(result, out, batch.maps, at, new=True)

            paths = journal.put(key, _stem(options), row, ending(result), save)
            made = MadeFiles(paths, False, seconds, result.cost)
        except SfumatoError as error:
            if isinstance(error, WorkInterrupted):
                raise
            failed = line.number
            yield index, line, str(error)
            continue
        yield index, line, made


def _spread_lines(
    jobs: Iterator[tuple[int, PromptLine, JobOptions]],
    batch: JobBatch,
    inputs: InputPictures,
    out: Path,
    workers: int | None,
    stack: contextlib.ExitStack,
) -> Iterator[Answer]:
    """The same on Ray workers. They make pictures; names, journal and files are this process's alone."""
    from sfumato.bench.journal import Journal
    from sfumato.scale import Workers

    first = next(jobs, None)
    if first is None:
        return
    journal = Journal(out)
    pool = stack.enter_context(Workers(functools.partial(_Maker, batch, inputs), workers))
    weight_hash, dtype = pool.ask(None)

    def items() -> Iterator[tuple[Any, Any]]:
        for index, line, options in itertools.chain([first], jobs):
            key = _job_key(options, batch, inputs, weight_hash, dtype)
            there = journal.take(key)
            yield (index, line, options, key, there), None if there is not None else options

    for (index, line, options, key, there), answer in pool.map(items()):
        if there is not None or isinstance(answer, str):
            yield index, line, MadeFiles([there], there=True) if there is not None else answer
            continue

        def put(
            options: JobOptions = options, line: PromptLine = line, key: str = key, answer: Any = answer
        ) -> MadeFiles:
            parts, seconds, cost = answer

            def save(path: Path) -> list[Path]:
                written = [path.with_name(path.stem + suffix) for suffix, _ in parts]
                for at, (_, content) in zip(written, parts, strict=True):  # what is drawn beside it carries its name
                    with writing.atomic_write(at, new=at == path) as file:
                        file.write(content)
                return written

            row = _row(options, line.about, seconds, cost)
            return MadeFiles(journal.put(key, _stem(options), row, parts[0][0], save), False, seconds, cost)

        yield index, line, put


class _Maker:
    """On a worker: options of one picture -> its files as (end of the name, bytes), seconds, cost; or what is wrong."""

    def __init__(self, batch: JobBatch, inputs: InputPictures):
        self.batch, self.inputs = batch, inputs
        self.model = batch.load()

    def __call__(self, options: JobOptions | None) -> Any:
        import tempfile

        if options is None:
            return self.model.weight_hash, str(self.model.dtype)
        try:
            result, seconds = _timed(self.model, options, self.batch, self.inputs, None)
        except SfumatoError as error:
            return str(error)
        with tempfile.TemporaryDirectory() as folder:
            paths = write(result, Path(folder), self.batch.maps, Path(folder) / f"picture{ending(result)}")
            return [(path.name[len("picture") :], path.read_bytes()) for path in paths], seconds, result.cost


def _timed(
    model: Model, options: JobOptions, batch: JobBatch, inputs: InputPictures, on_progress: Callable[[Any], None] | None
) -> tuple[Result, float]:
    """One picture, decoded within the seconds that are measured."""
    from sfumato.sampling import generate

    start = time.perf_counter()
    given = options.arguments() | inputs.arguments(model, options.size)
    result = generate(model, **given, interventions=batch.systems(), on_step=on_progress)
    result.images  # noqa: B018
    return result, time.perf_counter() - start


def _job_key(options: JobOptions, batch: JobBatch, inputs: InputPictures, weight_hash: str, dtype: str) -> str:
    """By what a picture that is there already is known."""
    what: list[Any] = [options.model_dump(mode="json"), [cards.to_recipe(each) for each in batch.systems()]]
    what += [weight_hash, dtype, *inputs.digests()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _stem(options: JobOptions) -> str:
    return f"{writing.slug(options.prompt)}-{options.seed}"


def _row(options: JobOptions, about: dict[str, Any], seconds: float, cost: float) -> dict[str, Any]:
    return {"text": options.prompt, "seed": options.seed, "seconds": round(seconds, 4), "cost": cost, **about}
