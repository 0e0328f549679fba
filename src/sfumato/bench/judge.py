"""One call for ``sfumato judge``: chooses what applies to a folder, runs the bench, and writes the report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import cards, files, protocol, writing
from sfumato.bench.arguments import JudgeArguments
from sfumato.bench.findings import report_of
from sfumato.bench.folder import Folder
from sfumato.bench.options import JudgeOptions, refuse_idle_net
from sfumato.bench.report import Report
from sfumato.bench.survey import Evaluators, evaluate_batch, survey
from sfumato.cards.signatures import with_signature
from sfumato.errors import BadInput, NotSupported, SfumatoError
from sfumato.models.features import feature_net
from sfumato.models.readers import load_clip
from sfumato.protocol import Judges
from sfumato.scale import Workers, check
from sfumato.toybox.oracle.presence import RequestedToy
from sfumato.toybox.oracle.toy_judge import load_judge

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_signature(JudgeArguments, cards.parameters_of(JudgeOptions))
def judge_folder(
    folder: Path | str,
    reference: Path | str | None = None,
    *,
    prompts: Path | str | Mapping[str, str] | None = None,
    out: Path | str | None = None,
    by: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Unpack[JudgeArguments],
) -> Report:
    """Measures a folder of pictures, against its captions and against another folder.

    Args:
        folder: the pictures to judge.
        reference: real pictures to compare with.
        prompts: what the pictures show, as for :class:`sfumato.bench.folder.Folder`.
        out: folder for ``report.json``, ``report.html``, ``pictures.jsonl`` (a line per picture) and the state that an
            interrupted run goes on from. None: nothing is written, nothing can be resumed.
        by: the system that compares attributes, as for ``--with``; by default the one whose card says so.
        on_progress: called with (pictures passed, of how many) over both folders.
        options: see :class:`JudgeOptions`.

    Raises:
        BadInput: a folder, a caption file or an option; nothing that applies. NoMatch: an attribute that no caption
        names. UnknownName, BadWeights, NotSupported: nets.
    """
    given: dict[str, Any] = {**options}
    chosen = JudgeOptions(**given)
    if out is not None:
        writing.only_folder(out, "a report and its state")
    if chosen.ray:
        check(chosen.workers)
    elif chosen.workers is not None:
        raise BadInput("workers are Ray's: give --ray too.")
    refuse_idle_net(chosen, reference)
    system = _system(by, chosen)
    fake = Folder(folder, prompts)
    real = None if reference is None else Folder(reference)
    if real is not None and real.path.resolve() == fake.path.resolve():
        raise BadInput(f"{str(folder)!r} is both the folder and its reference; name two folders.")
    attributes = _attributes(chosen, real, fake, system)
    wanted = _applicable(chosen, fake, real, attributes)
    looked = _instruments(chosen, wanted, attributes)
    total = len(fake) + (len(real) if real else 0)
    folder_out = None if out is None else Path(out)
    shared: dict[str, Any] = {"cap": chosen.cap, "seed": chosen.seed, "batch": chosen.batch}

    def progress_after(before: int) -> Callable[[int, int], None] | None:
        return None if on_progress is None else lambda done, _: on_progress(before + done, total)

    places = fake.path.resolve(), None if real is None else real.path.resolve()  # workers may stand elsewhere
    captions_at = Path(prompts).resolve() if isinstance(prompts, str | Path) else prompts

    def make() -> Callable[[Any], Any]:  # on each worker, which opens folders and loads nets for itself
        sides: dict[bool, tuple[Folder, Evaluators]] = {}

        def work(item: tuple[bool, Any]) -> Any:
            reference, batch = item
            if reference not in sides:
                own = Folder(places[1]) if reference and places[1] else Folder(places[0], captions_at)
                sides[reference] = own, _instruments(chosen, wanted, attributes, reference)
            return evaluate_batch(*sides[reference], chosen.cap, chosen.seed, batch)

        return work

    def run(pool: Workers | None = None) -> Report:
        def over(reference: bool) -> dict[str, Any]:
            """How batches of one side reach the workers, if there are some."""
            if pool is None:
                return {}
            return {"over": lambda batches: pool.map((each[1], (reference, each)) for each in batches)}

        truth = None
        if real is not None:
            part = _instruments(chosen, wanted, attributes, reference=True)
            truth = survey(
                real,
                part,
                journal=_at(folder_out, "reference.state"),
                on_progress=progress_after(0),
                **shared,
                **over(True),
            )
        totals = survey(
            fake, looked, journal=_at(folder_out, "pictures.state"), rows=_at(folder_out, "pictures.jsonl"),
            on_progress=progress_after(len(real) if real else 0), **shared, **over(False),
        )  # fmt: skip
        return report_of(chosen, system, fake, totals, real, truth, wanted, attributes, looked)

    def everywhere() -> Report:
        if not chosen.ray:
            return run()
        with Workers(make, chosen.workers) as pool:
            return run(pool)

    if folder_out is None:
        return everywhere()
    with writing.output_folder(folder_out), writing.reserved(folder_out, "judging"), _nothing_left(folder_out):
        report = everywhere()
        report.save(folder_out)
        return report


def _system(by: str | None, chosen: JudgeOptions) -> Any:
    """The system that compares attributes, with its parameters; those that ``chosen`` holds too are taken from there.

    Raises NotSupported for a system that does not judge."""
    key, given = cards.parse_with(by or cards.default("judge"))
    cls: Any = cards.method(key)
    if not issubclass(cls, protocol.Judges):
        raise NotSupported(f"{key} judges no pictures; by default {cards.default('judge')} does.")
    shared = {name: getattr(chosen, name) for name in cls.Params.model_fields if name in JudgeOptions.model_fields}
    return cls(**{**shared, **given})


@contextlib.contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """A refused request leaves no state behind; an interrupted one does, to be gone on with."""
    names = ("reference.state", "pictures.state", "pictures.jsonl")
    before = {name for name in names if (folder / name).exists()}
    try:
        yield
    except SfumatoError:
        for name in names:
            if name not in before:
                (folder / name).unlink(missing_ok=True)
        raise


def _instruments(
    chosen: JudgeOptions, wanted: set[str], attributes: Sequence[str], reference: bool = False
) -> Evaluators:
    """What looks at the pictures to judge, or at those of the reference."""
    requests = tuple(RequestedToy.parse(name) for name in attributes) if chosen.oracle else ()
    # nets are loaded once per process: the same name is the same object
    clip = load_clip(chosen.clip, chosen.dtype, chosen.device) if wanted & {"clip_score", "attributes"} else None
    net = feature_net(chosen.net, chosen.dtype, chosen.device) if wanted & {"frechet", "kernel", "manifold"} else None
    if not reference:
        reader = load_judge(chosen.reader) if "presence" in wanted or requests else None
        return Evaluators(reader, net, clip, tuple(attributes), requests, chosen.captions)
    reader = load_judge(chosen.reader) if requests else None
    return Evaluators(
        reader, net, clip if attributes else None, tuple(attributes), requests, chosen.captions and bool(attributes)
    )


def _at(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


def _attributes(chosen: JudgeOptions, real: Folder | None, fake: Folder, system: Judges) -> list[str]:
    names = [name.strip() for name in chosen.attributes if name.strip()]
    if names == ["captions"]:
        source = real or fake
        step = max(1, len(source) // 5000)
        texts = (source.about(name)["text"] for name in source.names[::step])
        return system.find_attributes(text for text in texts if text)
    if "captions" in names:
        raise BadInput("attributes are 'captions' and others; 'captions' stands alone.")
    if chosen.attributes and not names:
        raise BadInput("attributes are empty; name some: --attribute, which also takes a file.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"attributes: {twice!r} is given twice.")
    return names


def _applicable(chosen: JudgeOptions, fake: Folder, real: Folder | None, attributes: list[str]) -> set[str]:
    """The metrics to measure: those asked for, if they can be, else all that can."""
    captioned = chosen.captions and any(fake.about(name)["text"] for name in fake.names[:: max(1, len(fake) // 200)])
    folder = "a folder of real pictures (--real)"
    lacking = {
        "presence": None if captioned else f"captions, and {fake.path} has none (--prompts gives them)",
        "clip_score": None if captioned else f"captions, and {fake.path} has none (--prompts gives them)",
        "frechet": None if real else folder,
        "kernel": None if real else folder,
        "manifold": None if real else folder,
        "attributes": (None if attributes else "attributes (--attribute)") if real else folder,
    }
    for name in (*chosen.metrics, *(["attributes"] if attributes else [])):
        if lacking[name]:
            raise BadInput(f"{name} needs {lacking[name]}.")
    if chosen.metrics:
        return set(chosen.metrics) | ({"attributes"} if attributes else set())
    able = {name for name, lack in lacking.items() if lack is None}
    if not able:
        raise BadInput(
            f"{fake.path} has no captions and there are no real pictures to compare with: give --prompts or --real."
        )
    return able


def read_attributes(path: Path) -> list[str]:
    """Attributes from a text file, one per line; blank lines and lines that begin with ``#`` are passed over.

    Raises BadInput when there is none, OSError when the file cannot be read.
    """
    lines = [line.strip() for line in files.read_text(path).splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise BadInput(f"{path} names no attribute; write one per line.")
    return found
