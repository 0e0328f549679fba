"""The bench: one pass over a folder of any size in constant memory, resumable, then every figure that applies.

What grows with a folder is the list of its names. Frechet distances use running moments; what needs pairs of pictures
(kernel distance, precision and recall, attribute densities) uses a seeded sample of at most ``cap``. The state is kept
beside the report and goes on after a kill, with the figures of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from sfumato import valid, writing
from sfumato.bench.folder import Folder
from sfumato.bench.options import CAP
from sfumato.bench.reservoir import Reservoir
from sfumato.errors import BadInput, SfumatoError
from sfumato.metrics import stats
from sfumato.metrics.clip_score import clip_scores
from sfumato.metrics.frechet import Moments
from sfumato.models.features import FeatureNet
from sfumato.models.readers import Clip
from sfumato.models.readers.preprocessing import as_tensor, square
from sfumato.toybox.oracle.caption_check import check_caption, requested
from sfumato.toybox.oracle.presence import RequestedToy
from sfumato.toybox.oracle.toy_judge import SIDE, ToyJudge

VERSION = 1  # of the state on disk
NAMED = 50  # files that could not be read are counted all, and named up to here
EXAMPLES = 12


@dataclass
class Evaluators:
    """What looks at each picture: any of a judge, a net for distances, a CLIP for scores, and attributes to look for.

    ``attributes`` makes ``clip`` keep picture features for the attribute densities; with ``requests`` the judge says
    which of them each picture shows, as ground truth in the toybox.
    """

    judge: ToyJudge | None = None
    net: FeatureNet | None = None
    clip: Clip | None = None
    attributes: tuple[str, ...] = ()
    requests: tuple[RequestedToy, ...] = ()
    captions: bool = True

    def key(self) -> list[Any]:
        """What the state on disk depends on."""
        nets = [each and f"{each.name} {each.hash} {each.__class__.__name__}" for each in (self.net, self.clip)]
        judge = None
        if self.judge is not None:
            weights = self.judge.net.state_dict()
            judge = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights.values())).hexdigest()[:16]
        return [nets, judge, list(self.attributes), bool(self.requests), self.captions]


@dataclass
class SurveyTotals:
    """What one pass found out. Everything in it has a size that does not grow with the folder.

    Attributes:
        done: pictures passed, readable or not. seen: those that were read.
        counts: name -> [hits, of how many], for shares.
        tasks: task of a prompt set -> [hits, of how many].
        failed: how many could not be read; the first of them by name, each with the reason.
        no_text, no_toys: pictures without a caption, and with one that names no toy.
        resized: pictures that were not the judge's or the net's size.
        right, wrong: a few names of pictures with everything asked for, and without.
        scores: moments of the CLIPScore. moments: of the net's features. sample: of them. clip_sample: of the CLIP's.
        shown: which attributes the judge saw, as 0 or 1, of the sample.
    """

    done: int = 0
    seen: int = 0
    counts: dict[str, list[int]] = field(default_factory=dict)
    tasks: dict[str, list[int]] = field(default_factory=dict)
    failed: int = 0
    named: list[list[str]] = field(default_factory=list)
    no_text: int = 0
    no_toys: int = 0
    resized: int = 0
    seconds: float = 0.0
    right: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    rows_end: int = 0
    scores: Moments | None = None
    moments: Moments | None = None
    sample: Reservoir | None = None
    clip_sample: Reservoir | None = None
    shown: Reservoir | None = None
    mentions: Reservoir | None = None

    def rate(self, name: str) -> stats.Interval:
        """The share under ``name`` with its Wilson interval."""
        return stats.wilson(*self.counts[name])

    def take(self, part: SurveyTotals, of: int) -> None:
        """Takes in the tally of the next ``of`` pictures. Batch after batch this is what one worker alone would
        count."""
        self.done += of
        for name in ("seen", "failed", "no_text", "no_toys", "resized"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        for mine, theirs in ((self.counts, part.counts), (self.tasks, part.tasks)):
            for name, (hits, total) in theirs.items():
                before = mine.get(name, [0, 0])
                mine[name] = [before[0] + hits, before[1] + total]
        self.named = [*self.named, *part.named][:NAMED]
        self.right, self.wrong = [*self.right, *part.right][:EXAMPLES], [*self.wrong, *part.wrong][:EXAMPLES]
        for name in self._MOMENTS:
            theirs = getattr(part, name)
            if theirs is not None:
                setattr(self, name, (getattr(self, name) or Moments(len(theirs.mean))).merge(theirs))
        for name in self._SAMPLES:
            sample = getattr(part, name)
            if sample is not None:
                whole = getattr(self, name) or Reservoir(sample.rows.shape[1], sample.cap, sample.seed)
                whole.add(sample.indices, sample.rows)
                setattr(self, name, whole)

    # -- on disk ------------------------------------------------------------------------------------------------------
    _PLAIN = "done seen counts tasks failed named no_text no_toys resized seconds right wrong rows_end".split()
    _MOMENTS = ("scores", "moments")
    _SAMPLES = ("sample", "clip_sample", "shown", "mentions")

    def save(self, path: Path, key: str) -> None:
        """Writes everything, whole or not at all."""
        tensors: dict[str, np.ndarray] = {}
        for name in self._MOMENTS:
            moments = getattr(self, name)
            if moments is not None:
                tensors |= {f"{name}.{part}": np.ascontiguousarray(value) for part, value in moments.state().items()}
        for name in self._SAMPLES:
            sample = getattr(self, name)
            if sample is not None:
                tensors |= {f"{name}.indices": sample.indices, f"{name}.rows": np.ascontiguousarray(sample.rows)}
        plain = {name: getattr(self, name) for name in self._PLAIN}
        with writing.atomic_write(path) as file:
            file.write(save_tensors(tensors, {"key": key, "plain": json.dumps(plain)}))

    @classmethod
    def load(cls, path: Path, key: str, cap: int, seed: int) -> SurveyTotals | None:
        """What :meth:`save` wrote, or None when there is nothing, or something of another folder or other settings."""
        from safetensors import safe_open

        try:
            with safe_open(str(path), "numpy") as file:
                about = file.metadata() or {}
            if about.get("key") != key:
                return None
            tensors = load_tensors(path.read_bytes())
            made = cls(**valid.loads(about["plain"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        for name in cls._MOMENTS:
            parts = {part: tensors.get(f"{name}.{part}") for part in ("n", "mean", "scatter")}
            if parts["n"] is not None:
                setattr(made, name, Moments.restore(parts))  # type: ignore[arg-type]
        for name in cls._SAMPLES:
            if f"{name}.rows" in tensors:
                sample = Reservoir(tensors[f"{name}.rows"].shape[1], cap, seed)
                sample.indices, sample.rows = tensors[f"{name}.indices"], tensors[f"{name}.rows"]
                setattr(made, name, sample)
        return made


def survey(
    folder: Folder,
    evaluators: Evaluators,
    *,
    cap: int = CAP,
    seed: int = 0,
    batch: int = 32,
    journal: Path | None = None,
    rows: Path | None = None,
    every: float = 20.0,
    on_progress: Callable[[int, int], None] | None = None,
    over: Spread | None = None,
) -> SurveyTotals:
    """Looks at every picture of a folder once.

    Args:
        cap, seed: size and seed of the samples.
        journal: where the state is kept, about every ``every`` seconds and at the end; what is there is gone on with.
        rows: a JSONL file that gets one line per picture.
        on_progress: called with (pictures passed, of how many) after every batch.
        over: looks at batches elsewhere, such as on several workers, and answers in order; by default they are looked
            at here. What comes out is the same.

    Raises:
        BadInput: the first pictures are all unreadable, or the features are not finite.
    """
    key = hashlib.sha256(
        json.dumps([VERSION, folder.fingerprint(), evaluators.key(), cap, seed, batch, rows is not None]).encode()
    ).hexdigest()
    totals = (SurveyTotals.load(journal, key, cap, seed) if journal else None) or SurveyTotals()
    lines_file = _RowsFile(rows, totals.rows_end) if rows else None
    saved, start = time.monotonic(), time.monotonic() - totals.seconds
    starts = range(totals.done, len(folder), batch)
    batches = ((start, folder.names[start : start + batch]) for start in starts)
    try:
        for names, (part, lines) in (over or evaluate_locally(folder, evaluators, cap, seed))(batches):
            totals.take(part, len(names))
            totals.seconds = time.monotonic() - start
            if lines_file:
                totals.rows_end = lines_file.write(lines)
            if journal and (time.monotonic() - saved > every or totals.done == len(folder)):
                if lines_file:
                    lines_file.flush()
                totals.save(journal, key)
                saved = time.monotonic()
            if on_progress is not None:
                on_progress(totals.done, len(folder))
    finally:
        if lines_file:
            lines_file.close()
    if not totals.seen:
        first = totals.named[0]
        raise BadInput(f"none of the {totals.done} pictures in {folder.path} can be read; {first[0]}: {first[1]}")
    return totals


Batch = tuple[int, list[str]]
"""Index of the first picture, and the names."""
Surveyed = tuple[SurveyTotals, list[dict[str, Any]]]
"""What a batch adds to the tally, and a row per picture."""
Spread = Callable[[Iterable[Batch]], Iterator[tuple[list[str], Surveyed]]]


def evaluate_batch(folder: Folder, evaluators: Evaluators, cap: int, seed: int, batch: Batch) -> Surveyed:
    """Looks at one batch of a folder, whatever came before it."""
    start, names = batch
    part = SurveyTotals(done=start)
    return part, _look(folder, names, evaluators, part, cap, seed)


def evaluate_locally(folder: Folder, evaluators: Evaluators, cap: int, seed: int) -> Spread:
    """Batches one after the other, in this process."""
    return lambda batches: ((batch[1], evaluate_batch(folder, evaluators, cap, seed, batch)) for batch in batches)


class _RowsFile:
    """A JSONL file that is gone on with behind its first ``end`` bytes; what a kill left behind them is dropped."""

    def __init__(self, path: Path, end: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.file = path.open("r+b")
        self.file.truncate(end)
        self.file.seek(end)

    def write(self, rows: list[dict[str, Any]]) -> int:
        """Appends rows; returns the length of the file."""
        self.file.write(b"".join(map(valid.json_line, rows)))
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _opened(folder: Folder, names: Sequence[str], totals: SurveyTotals) -> Iterator[tuple[int, str, Image]]:
    """(index, name, picture) of those that can be read; the others are counted and named."""
    for offset, name in enumerate(names):
        try:
            yield totals.done + offset, name, folder.picture(name)
        except (SfumatoError, OSError) as error:
            totals.failed += 1
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            if len(totals.named) < NAMED:
                totals.named.append([name, " ".join(reason.split())[:200]])


def _look(
    folder: Folder, names: Sequence[str], evaluators: Evaluators, totals: SurveyTotals, cap: int, seed: int
) -> list[dict[str, Any]]:
    """One batch: adds to the tally, returns a row per picture."""
    opened = list(_opened(folder, names, totals))
    if not opened:
        return []
    indices, readable, pictures = (list(column) for column in zip(*opened, strict=True))
    totals.seen += len(readable)
    sizes = {SIDE} if evaluators.judge else set()
    sizes |= {net.side for net in (evaluators.net, evaluators.clip) if isinstance(net, Clip)}
    totals.resized += sum(any(picture.size != (side, side) for side in sizes) for picture in pictures)
    about = [folder.about(name) if evaluators.captions else {"text": None} for name in readable]
    texts = [each["text"] for each in about]
    rows: list[dict[str, Any]] = [{"file_name": name, "text": text} for name, text in zip(readable, texts, strict=True)]
    totals.no_text += texts.count(None)
    clip_features = evaluators.clip.features(pictures) if evaluators.clip else None
    if evaluators.net is not None:
        shared = clip_features if evaluators.net is evaluators.clip else None
        found = evaluators.net.features(pictures) if shared is None else shared
        totals.moments = (totals.moments or Moments(found.shape[1])).add(found)
        totals.sample = totals.sample or Reservoir(found.shape[1], cap, seed)
        totals.sample.add(indices, found)
    if clip_features is not None:
        _score(evaluators, totals, clip_features, texts, rows)
        if evaluators.attributes:
            totals.clip_sample = totals.clip_sample or Reservoir(clip_features.shape[1], cap, seed)
            totals.clip_sample.add(indices, clip_features)
            if evaluators.captions:
                totals.mentions = totals.mentions or Reservoir(len(evaluators.attributes), cap, seed)
                totals.mentions.add(
                    indices, np.array([_mentioned(evaluators.attributes, text) for text in texts], np.float32)
                )
    if evaluators.judge is not None:
        _read(evaluators, totals, indices, pictures, about, rows, cap, seed)
    return rows


def _score(
    evaluators: Evaluators, totals: SurveyTotals, features: np.ndarray, texts: list[str | None], rows: list[Any]
) -> None:
    """CLIPScore of the pictures that have a caption."""
    captioned = [i for i, text in enumerate(texts) if text is not None]
    if not captioned or evaluators.clip is None:
        return
    scores = clip_scores(features[captioned], evaluators.clip.text_features([texts[i] for i in captioned]))  # type: ignore[misc]
    totals.scores = (totals.scores or Moments(1)).add(scores[:, None])
    for i, score in zip(captioned, scores, strict=True):
        rows[i]["clip_score"] = round(float(score), 4)


def _read(
    evaluators: Evaluators,
    totals: SurveyTotals,
    indices: list[int],
    pictures: list[Image],
    about: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    cap: int,
    seed: int,
) -> None:
    """The judge's readings against the captions."""
    assert evaluators.judge is not None
    readings = evaluators.judge.read(as_tensor([square(picture, SIDE) for picture in pictures]))
    for row, each, reading in zip(rows, about, readings, strict=True):
        row["toys"] = [f"{toy.size} {toy.color} {toy.pattern} {toy.shape}" for toy in reading.objects]
        want = requested(each["text"]) if each["text"] else None
        if want is None:
            continue
        if not want.requests:
            totals.no_toys += 1
            continue
        found = check_caption(reading, want)
        task = each.get("task", each.get("tag"))
        solved = found.solved(None)
        for name, hits in (
            ("present", found.toys.present),
            ("all_present", [found.toys.all_present]),
            ("bound", found.toys.bound),
            ("all_bound", [found.toys.all_bound]),
            ("leaked", found.toys.leaked),
            ("counted", [found.toys.counted]),
            ("related", found.related),
            ("all_right", [solved]),
        ):
            _count(totals.counts, name, hits)
        if isinstance(task, str):
            _count(totals.tasks, task, [found.solved(task)])
            row["task"] = task
        examples = totals.right if solved else totals.wrong
        if len(examples) < EXAMPLES:
            examples.append(row["file_name"])
        row |= {
            "present": list(found.toys.present),
            "bound": list(found.toys.bound),
            "counted": found.toys.counted,
            "related": list(found.related),
            "all_right": solved,
        }
    if evaluators.requests:
        shown = [
            [any(request.fits(toy) for toy in reading.objects) for request in evaluators.requests]
            for reading in readings
        ]
        totals.shown = totals.shown or Reservoir(len(evaluators.requests), cap, seed)
        totals.shown.add(indices, np.array(shown, np.float32))


def _count(counts: dict[str, list[int]], name: str, hits: Sequence[bool]) -> None:
    if hits:
        before = counts.get(name, [0, 0])
        counts[name] = [before[0] + sum(hits), before[1] + len(hits)]


def _mentioned(attributes: Sequence[str], text: str | None) -> list[float]:
    """1 for every attribute whose words all occur in the caption, 0 for the others; NaN without a caption."""
    if text is None:
        return [float("nan")] * len(attributes)
    words = {word.strip(".,;:!?'\"()") for word in text.lower().split()}
    return [float(set(attribute.lower().split()) <= words) for attribute in attributes]
