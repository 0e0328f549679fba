"""Judging folders of pictures, and two models or settings against each other."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import cards, protocol, valid, writing
from sfumato.app.batch import JobBatch
from sfumato.app.jobs import DEFAULT_MODEL, JobOptions, build_all, load
from sfumato.app.prompts_file import BadPrompts, PromptLine, make_prompts, read_prompts
from sfumato.bench.arguments import CompareArguments, JudgeArguments
from sfumato.bench.options import CompareOptions, JudgeOptions
from sfumato.cards.signatures import with_signature
from sfumato.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Unpack

    from sfumato.bench.report import Report
    from sfumato.models import Model


@with_signature(JudgeArguments, cards.parameters_of(JudgeOptions))
def judge(
    folder: str | Path | Sequence[str | Path],
    reference: str | Path | None = None,
    *,
    prompts: str | Path | Mapping[str, str] | None = None,
    out: str | Path | None = None,
    by: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Unpack[JudgeArguments],
) -> Report | protocol.SetsReport:
    """Measures a folder of pictures, against its captions and against a reference folder; or compares sets of pictures
    by a system that does (``folder`` then names them all, or two stand in both arguments).

    Returns a :class:`sfumato.bench.report.Report`, or the system's own report.

    Args:
        by: the system that compares attributes, as for ``--with``; by default the one whose card says so.

    All other arguments and options, and the errors, are those of :func:`sfumato.bench.judge.judge_folder`.
    """
    if by is not None and judges_sets(by):
        given = {"prompts": prompts, **options}
        return _judge_sets(by, [*_as_list(folder), *_as_list(reference or [])], out, on_progress, given)
    if not isinstance(folder, str | Path):
        raise BadInput("several sets of pictures are compared by a system that does (by=); name one folder.")
    from sfumato.bench.judge import judge_folder

    return judge_folder(folder, reference, prompts=prompts, out=out, by=by, on_progress=on_progress, **options)


def judges_sets(by: str) -> bool:
    """Whether the system compares whole sets of pictures, rather than by attributes that are named."""
    return hasattr(cards.method(cards.parse_with(by)[0]), "judge_sets")


def _judge_sets(by: str, sets: list[Any], out: Any, on_progress: Any, given: dict[str, Any]) -> protocol.SetsReport:
    key, params = cards.parse_with(by)
    system: Any = cards.method(key)(**params)
    if wrong := sorted(name for name, value in given.items() if value is not None):
        raise BadInput(f"{', '.join(wrong)} cannot be given with {key}; it has parameters of its own.")
    found = system.judge_sets(sets, on_progress=on_progress)
    if out is not None:
        found.save(Path(out))
    return found


@dataclass
class Side:
    """One side of a comparison: a folder of pictures, or a model with settings to make them with."""

    name: str
    folder: Path | None = None
    model: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    with_: list[Any] = field(default_factory=list)


def side(given: Any) -> Side:
    """A side from a folder, a loaded model, ``dict(model=..., with_=[...], steps=...)``, or text as on the command
    line: a folder of pictures, or ``MODEL`` or ``MODEL:steps=10,guidance=3,with='KEY:name=value'``.

    Raises BadInput for anything else.
    """
    if isinstance(given, Side):
        return given
    if isinstance(given, dict):
        options = dict(given)
        model, with_ = options.pop("model", DEFAULT_MODEL), options.pop("with_", [])
        name = model if isinstance(model, str | Path) else getattr(model, "name", "model")
        settings = ",".join(f"{key}={value}" for key, value in options.items())
        named = valid.shown(f"{name}:{settings}" if settings else name)
        return Side(named, None, model, options, _as_list(with_))
    if not isinstance(given, str | Path):
        return Side(getattr(given, "name", "model"), None, given)
    path = Path(given)
    if path.is_dir() and not (path / "model_index.json").is_file():
        return Side(valid.shown(path.name or path), path)
    if path.exists() or ":" not in str(given):
        return Side(path.name, None, str(given))
    model, options = cards.parse_with(str(given))
    with_ = _as_list(options.pop("with", []))
    if isinstance(options.get("size"), str):
        options["size"] = options["size"].lower().split("x")
    return Side(str(given), None, model, options, with_)


def _joined(one: Side, with_: Any) -> Side:
    """A side with systems of both sides before its own."""
    return one if one.folder else replace(one, with_=[*_as_list(with_), *one.with_])


def beside(out: Path, inside: str, behind: str) -> Path:
    """A place in the folder ``out`` or, where it names a picture, beside that, with its name."""
    return out.with_name(f"{out.stem}-{behind}") if writing.is_file_name(out) else out / inside


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


@with_signature(CompareArguments, cards.parameters_of(CompareOptions))
def compare(
    first: str | Path | Model | dict[str, Any] | Side,
    second: str | Path | Model | dict[str, Any] | Side,
    *,
    prompts: str | Path | Sequence[str] | Mapping[str, str] | None = None,
    reference: str | Path | None = None,
    n: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    on_progress: Callable[[int, int, float, str], None] | None = None,
    options: dict[str, Any] | None = None,
    with_: Any = (),
    **measuring: Unpack[CompareArguments],
) -> Report:
    """Compares two models, two settings of one model, or two folders, on the same prompts and seeds.

    Args:
        first, second: see :func:`side`. Both folders, or both models.
        prompts: for models: a JSONL file as for ``make --prompts``, or texts. For folders: what the pictures show.
        n, seed: pictures of each prompt and the first one's seed, over what the file says.
        out: folder for the report and, for models, the pictures (``pictures-a``, ``pictures-b``); what is there of them
            is not made again. For models it is needed. ``x.png``: the pairs, with ``x.html``, ``x.json`` and, for
            models, ``x-a`` and ``x-b`` beside it.
        options: settings for both models, as for :func:`make`; those of a side win.
        with_: systems that take part on both sides, beside those of each.
        on_progress: called with (done, of how many, share of the next, note).
        reference: real pictures; each side's distance to them is measured too.
        measuring: see :class:`sfumato.bench.options.CompareOptions`.

    Raises:
        BadInput: one folder and one model, models without prompts or ``out``, two equal sides, or as
        :func:`sfumato.bench.compare.compare_folders`. Everything that :func:`make` raises.
    """
    from sfumato.bench.compare import compare_folders

    one, two = (_joined(side(each), with_) for each in (first, second))
    names = (one.name, two.name) if one.name != two.name else (f"{one.name} (A)", f"{two.name} (B)")
    compared: dict[str, Any] = {"names": names, "reference": reference, **measuring}

    def measured(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(done, total, 0.0, f"{done}/{total} pairs measured")

    if one.folder and two.folder:
        if n is not None or seed is not None or options or with_:
            raise BadInput("two folders are compared as they are: n, seed and settings of models cannot be given.")
        return compare_folders(one.folder, two.folder, prompts=prompts, out=out, on_progress=measured, **compared)  # type: ignore[arg-type]
    if one.folder or two.folder:
        raise BadInput(f"{one.name!r} and {two.name!r}: one is a folder and one a model; compare two of a kind.")
    if prompts is None or isinstance(prompts, Mapping):
        raise BadInput("comparing models needs prompts: a JSONL file, or texts. `sfumato toybox prompts` writes some.")
    if out is None:
        raise BadInput("comparing models needs out, a folder for their pictures.")
    if (str(one.model), one.options, one.with_) == (str(two.model), two.options, two.with_):
        raise BadInput(f"both sides are {one.name!r} with the same settings; change one.")
    sources = [beside(Path(out), f"pictures-{each}", each) for each in "ab"]
    _make_sides([one, two], sources, prompts, {"n": n, "seed": seed, **(options or {})}, dtype, device, on_progress)
    return compare_folders(*sources, out=out, on_progress=measured, **compared)


def _make_sides(
    sides: list[Side],
    folders: list[Path],
    prompts: str | Path | Sequence[str],
    options: dict[str, Any],
    dtype: str | None,
    device: str,
    on_progress: Callable[[int, int, float, str], None] | None,
) -> None:
    """The pictures of both sides, in turns, so that whatever else the machine does slows both alike."""
    shared = {name: value for name, value in options.items() if value is not None}
    source = writing.rereadable(Path(prompts), sides[0]) if isinstance(prompts, str | Path) else None
    texts = [] if isinstance(prompts, str | Path) else list(prompts)
    if not source and not texts:
        raise BadInput("prompts is empty; give at least one.")
    total = sum(1 for line in source.open("rb") if line.strip()) if source else len(texts)
    loaded: dict[str, Any] = {}
    runs = []
    for one, folder in zip(sides, folders, strict=True):
        overrides = {**shared, **one.options}
        if source:
            lines: Iterable[PromptLine] = read_prompts(source, overrides)
        else:
            lines = [
                PromptLine(i, JobOptions(**{"prompt": text, **overrides})) for i, text in enumerate(texts, start=1)
            ]
        build_all(one.with_)
        key = str(one.model)
        if key not in loaded:
            named = isinstance(one.model, str | Path)
            loaded[key] = load(one.model, dtype=dtype, device=device) if named else one.model
        batch = JobBatch([], str(one.model), one.with_, dtype, device)
        runs.append(make_prompts(lines, batch, folder, None, total, loaded[key]))
    wrong: BadPrompts | None = None
    for done in itertools.count():
        left = len(runs)
        for run in runs if done % 2 == 0 else runs[::-1]:
            try:
                next(run)
            except StopIteration:
                left -= 1
            except BadPrompts as error:
                wrong, left = error, left - 1
        if not left:
            break
        if on_progress is not None:
            on_progress(done + 1, max(total, done + 1), 0.0, f"{done + 1} pairs made")
    if wrong is not None and not all((folder / "metadata.jsonl").is_file() for folder in folders):
        raise wrong
    if wrong is not None:
        warnings.warn(PromptsSkipped(str(wrong)), stacklevel=3)


class PromptsSkipped(UserWarning):
    """Some lines of a prompts file could not be followed; the comparison goes on with the others."""
