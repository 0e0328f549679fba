"""Two folders of pictures of the same prompts, picture by picture: paired differences with tests, and one page.

What is yes or no per picture is tested by McNemar's exact test, everything else by a paired bootstrap. Where a prompt
has several pictures, their means per prompt are what is compared: pictures of one prompt are no independent evidence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sfumato import cards, files, sheets, writing
from sfumato.bench.arguments import CompareArguments
from sfumato.bench.folder import Folder
from sfumato.bench.options import CompareOptions, refuse_idle_net
from sfumato.bench.report import Figure, Report, Table
from sfumato.bench.reservoir import Reservoir
from sfumato.bench.survey import Evaluators, survey
from sfumato.cards.signatures import with_signature
from sfumato.errors import BadInput, SfumatoError
from sfumato.metrics import stats
from sfumato.metrics.clip_score import clip_scores
from sfumato.metrics.frechet import Moments, frechet
from sfumato.metrics.kernel import kernel_distance
from sfumato.metrics.stats import Interval
from sfumato.models.features import feature_net
from sfumato.models.perceptual import load_perceptual
from sfumato.models.readers import load_clip
from sfumato.models.readers.preprocessing import as_tensor, square
from sfumato.toybox.oracle.caption_check import CaptionCheck, check_caption, requested
from sfumato.toybox.oracle.toy_judge import SIDE, load_judge

if TYPE_CHECKING:
    from typing_extensions import Unpack

BINARY = ("all_present", "all_bound", "counted", "related", "all_right")
PARTIAL = ("present", "bound")
SMALL, LARGE = 128, 1024  # longer side of a picture on the page, and in a file of its own
MOST_DRAWS = 40_000_000  # resampled numbers at a time


class Pairs:
    """Values per pair, side by side: ``values[name]`` lists (prompt, first, second)."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[str, float, float]]] = defaultdict(list)

    def add(self, name: str, prompt: str, first: float, second: float) -> None:
        """One pair's values."""
        self.values[name].append((prompt, float(first), float(second)))

    def columns(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Both sides of a value, one entry per prompt (means over its pictures)."""
        grouped: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for prompt, first, second in self.values[name]:
            grouped[prompt].append((first, second))
        means = np.array([np.mean(rows, 0) for rows in grouped.values()])
        return means[:, 0], means[:, 1]

    def difference(self, name: str, seed: int = 0) -> tuple[Interval, str]:
        """(mean of first - second with its interval and p-value, the test it comes from)."""
        rows = self.values[name]
        first, second = self.columns(name)
        if _is_binary(name) and len(first) == len(rows):
            return stats.mcnemar(first > 0.5, second > 0.5), "McNemar"
        if len(first) < 2:
            return Interval(float((first - second).mean()), -np.inf, np.inf, len(first)), "one prompt only"
        draws = max(200, min(4000, MOST_DRAWS // len(first)))
        return stats.paired_difference(first, second, draws=draws, seed=seed), "paired bootstrap"  # type: ignore[arg-type]


def _is_binary(name: str) -> bool:
    return name in BINARY or name.startswith("task ")


@with_signature(CompareArguments, cards.parameters_of(CompareOptions))
def compare_folders(
    first: Path | str,
    second: Path | str,
    *,
    prompts: Path | str | Mapping[str, str] | None = None,
    reference: Path | str | None = None,
    out: Path | str | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Unpack[CompareArguments],
) -> Report:
    """Compares two folders pair by pair.

    Pictures of the same file name make a pair; where no name occurs in both, pictures of the same prompt and seed do.

    Args:
        prompts: what the pictures show, for both, as for :class:`sfumato.bench.folder.Folder`.
        reference: real pictures; each side's distance to them is measured too.
        out: folder for ``report.json`` and ``report.html``; or ``x.png``, the pairs that the page shows, numbered where
            there are several, with ``x.json`` and ``x.html`` beside them. None: nothing is written.
        seed: of bootstrap and samples.
        options: see :class:`sfumato.bench.options.CompareOptions`.

    Raises:
        BadInput: a folder, an option, or no pair. UnknownName, BadWeights, NotSupported: nets.
    """
    given: dict[str, Any] = {"seed": seed, **options}
    chosen = CompareOptions(**given)
    refuse_idle_net(chosen, reference)
    named = _picture_of(out, chosen.shown)
    one, two = Folder(first, prompts), Folder(second, prompts)
    if one.path.resolve() == two.path.resolve():
        raise BadInput(f"{str(first)!r} is compared with itself; name two folders.")
    matched = matching(one, two)
    left = len(one) + len(two) - 2 * len(matched)
    reader, clip, eye = load_judge(chosen.reader), load_clip(chosen.clip), load_perceptual(chosen.encoder)
    net = None if reference is None else feature_net(chosen.net)
    pairs, gallery, failed, no_text = Pairs(), _Gallery(chosen.shown, LARGE if named else SMALL), [], 0
    moments: list[Moments | None] = [None, None]
    samples: list[Reservoir | None] = [None, None]
    for start in range(0, len(matched), chosen.batch):
        opened: list[Any] = []
        for a, b in matched[start : start + chosen.batch]:
            try:
                opened.append(((a, one.picture(a)), (b, two.picture(b)), one.about(a), two.about(b)))
            except (SfumatoError, OSError) as error:
                failed.append(f"{a}: {' '.join(str(error).split())[:160]}")
        if opened:
            sides = [[row[side][1] for row in opened] for side in (0, 1)]
            texts = [row[2]["text"] or row[3]["text"] for row in opened]
            no_text += texts.count(None)
            answers = [_answers(reader, side, texts) for side in sides]
            scores = [_scores(clip, side, texts) for side in sides]
            gaps = eye.between(*sides)
            for i, row in enumerate(opened):
                key = texts[i] or row[0][0]
                solved = _note(pairs, key, row[2:], [side[i] for side in answers], [side[i] for side in scores])
                pairs.add(eye.name, key, float(gaps[i]), 0.0)
                gallery.offer(key, row[0][1], row[1][1], solved, float(gaps[i]), chosen.names)
            if net is not None:
                for side, pictures in enumerate(sides):
                    features = net.features(pictures)
                    moments[side] = (moments[side] or Moments(features.shape[1])).add(features)
                    samples[side] = samples[side] or Reservoir(features.shape[1], chosen.cap, chosen.seed)
                    samples[side].add(range(start, start + len(features)), features)  # type: ignore[union-attr]
        if on_progress is not None:
            on_progress(min(start + chosen.batch, len(matched)), len(matched))
    if not pairs.values:
        raise BadInput(f"none of the {len(matched)} pairs can be read; {failed[0]}")
    report = Report(title=f"{chosen.names[0]} and {chosen.names[1]}")
    _figures(report, pairs, chosen, eye.name)
    if net is not None and reference is not None:
        truth = survey(Folder(reference), Evaluators(net=net, captions=False), cap=chosen.cap, seed=chosen.seed)
        for side, name in enumerate(chosen.names):
            assert truth.moments and truth.sample and moments[side] and samples[side]
            value = frechet(truth.moments, moments[side])  # type: ignore[arg-type]
            report.figures.append(Figure(f"{net.distance} {name}", value, f"to {reference}"))
            distance = kernel_distance(truth.sample.rows, samples[side].rows)  # type: ignore[union-attr]
            report.figures.append(Figure(f"KD({chosen.net}) {name}", distance, f"to {reference}"))
    n = len(matched) - len(failed)
    report.notes.append(f"{n} pairs: {chosen.names[0]} is {one.path}, {chosen.names[1]} is {two.path}")
    prompts_seen = len({prompt for prompt, _, _ in pairs.values[eye.name]})
    if prompts_seen < n:
        report.notes.append(f"{n} pictures of {prompts_seen} prompts: means per prompt are compared")
    if left:
        report.notes.append(f"{left} pictures have no partner and were left out")
    if failed:
        report.notes.append(f"{len(failed)} pairs could not be read: {'; '.join(failed[:5])}")
    if no_text:
        report.notes.append(f"{no_text} pairs have no caption: only their perceptual distance counts")
    if gallery.pairs:
        report.gallery.append((f"Pairs, {chosen.names[0]} left; where they differ first", gallery.pictures()))
    report.data |= {"options": chosen.model_dump(mode="json"), "folders": [str(one.path), str(two.path)], "pairs": n}
    if named is not None:
        named.parent.mkdir(parents=True, exist_ok=True)
        shown = gallery.pictures()
        for i, (text, image) in enumerate(shown):
            at = writing.numbered(named, i, len(shown))
            report.pictures.append(files.save_png(at or named, image, {"prompt": text, "compare": chosen.names}))
        report.save(named.parent, named.stem)
    elif out is not None:
        report.save(Path(out))
    return report


def _picture_of(out: Path | str | None, shown: int) -> Path | None:
    """The file that ``out`` names, if it names one. Raises BadInput for one that no pairs can be written to."""
    if out is None or not writing.is_file_name(Path(out)):
        return None
    if Path(out).suffix.lower() != ".png" or not shown:
        raise BadInput(f"-o is {Path(out).name!r}, but pairs are written as .png, and shown must be above 0.")
    return Path(out)


def matching(one: Folder, two: Folder) -> list[tuple[str, str]]:
    """Pairs of names. Raises BadInput when there is none, or when prompt and seed occur twice."""
    names = set(two.names)
    same = [(name, name) for name in one.names if name in names]
    if same:
        return same

    def by_recipe(folder: Folder) -> dict[tuple[str, Any], str]:
        found: dict[tuple[str, Any], str] = {}
        for name in folder.names:
            about = folder.about(name)
            if about["text"] is None or not isinstance(about.get("seed"), int | str):
                continue
            key = (about["text"], about["seed"])
            if key in found:
                raise BadInput(
                    f"{folder.path}: {found[key]} and {name} have the same prompt and seed, so pairs are ambiguous;"
                    " give pairs the same file name."
                )
            found[key] = name
        return found

    first, second = by_recipe(one), by_recipe(two)
    pairs = [(name, second[key]) for key, name in first.items() if key in second]
    if not pairs:
        raise BadInput(f"{one.path} and {two.path} share no file name and no prompt with its seed: there is no pair.")
    return pairs


def _answers(reader: Any, pictures: list[Image.Image], texts: list[str | None]) -> list[CaptionCheck | None]:
    readings = reader.read(as_tensor([square(picture, SIDE) for picture in pictures]))
    wants = [requested(text) if text else None for text in texts]
    return [
        check_caption(reading, want) if want is not None and want.requests else None
        for reading, want in zip(readings, wants, strict=True)
    ]


def _scores(clip: Any, pictures: list[Image.Image], texts: list[str | None]) -> list[float | None]:
    captioned = [i for i, text in enumerate(texts) if text]
    out: list[float | None] = [None] * len(texts)
    if captioned:
        values = clip_scores(
            clip.features([pictures[i] for i in captioned]), clip.text_features([texts[i] for i in captioned])
        )
        for i, value in zip(captioned, values, strict=True):
            out[i] = float(value)
    return out


def _note(
    pairs: Pairs, key: str, about: tuple[Any, ...], answers: list[CaptionCheck | None], scores: list[float | None]
) -> tuple[bool, bool] | None:
    """Adds what is known of one pair; returns whether each side is all right, None where that is not known."""
    first, second = answers
    if scores[0] is not None and scores[1] is not None:
        pairs.add("clip_score", key, scores[0], scores[1])
    for name in ("seconds", "cost"):
        values = [each.get(name) for each in about]
        if all(isinstance(value, int | float) and value >= 0 for value in values):
            pairs.add(name, key, *values)
    if first is None or second is None:
        return None
    for name in PARTIAL:
        pairs.add(name, key, *(float(np.mean(getattr(each.toys, name))) for each in (first, second)))
    for name in ("all_present", "all_bound", "counted"):
        pairs.add(name, key, getattr(first.toys, name), getattr(second.toys, name))
    if first.related:
        pairs.add("related", key, all(first.related), all(second.related))
    task = next((each[name] for each in about for name in ("task", "tag") if isinstance(each.get(name), str)), None)
    if task is not None:
        pairs.add(f"task {task}", key, first.solved(task), second.solved(task))
    pairs.add("all_right", key, first.solved(None), second.solved(None))
    return first.solved(None), second.solved(None)


ABOUT = {
    "present": "of the toys asked for, the shape is there",
    "bound": "of the toys asked for, there in the right colour",
    "all_present": "every shape is there",
    "all_bound": "every toy in its colour",
    "counted": "the right number of toys",
    "related": "the relation holds",
    "all_right": "everything asked for, and nothing more",
    "clip_score": "CLIPScore",
    "seconds": "a picture",
    "cost": "forward-equivalents a picture",
}


def _figures(report: Report, pairs: Pairs, chosen: CompareOptions, distance: str) -> None:
    rows = []
    order = [*ABOUT, *sorted(name for name in pairs.values if name.startswith("task "))]
    for name in order:
        if name not in pairs.values:
            continue
        difference, test = pairs.difference(name, chosen.seed)
        first, second = pairs.columns(name)
        percent = _is_binary(name) or name in PARTIAL
        shown = f"CLIPScore({chosen.clip})" if name == "clip_score" else name
        about = ABOUT.get(name, "solved")
        figure = Figure(f"{shown}: {chosen.names[0]} - {chosen.names[1]}", difference, "their difference", percent)
        for side, values in zip(chosen.names, (first, second), strict=True):
            report.figures.append(Figure(f"{shown}: {side}", stats.mean(values), about, percent))
        report.figures.append(figure)
        scale, unit = (100, " %") if percent else (1, "")
        p = "" if difference.p is None else f"{difference.p:.2g}"
        means = (f"{scale * float(side.mean()):.4g}{unit}" for side in (first, second))
        rows.append((shown, *means, figure.text(), p, test, about))
        report.data.setdefault("sides", {})[shown] = [float(first.mean()), float(second.mean())]
    heads = ("", chosen.names[0], chosen.names[1], "difference [95 %]", "p", "test", "")
    report.tables.append(Table("Side by side", heads, rows))
    gap, _ = pairs.columns(distance)
    report.figures.append(Figure(distance, stats.mean(gap), "between the two pictures of a pair; 0 for equal ones"))
    if {"seconds", "cost"} & set(pairs.values):
        report.notes.append("seconds are of this machine, taken in turns; forward-equivalents are those of the loop")


class _Gallery:
    """The pairs worth showing: those that only one side gets right, then those that differ most to the eye."""

    def __init__(self, most: int, largest: int):
        self.most, self.largest = most, largest
        self.pairs: list[tuple[bool, float, str, Image.Image]] = []

    def offer(
        self,
        text: str,
        first: Image.Image,
        second: Image.Image,
        solved: tuple[bool, bool] | None,
        gap: float,
        names: tuple[str, str],
    ) -> None:
        """Keeps the pair if it is among the ``most`` worth showing."""
        if not self.most:
            return
        differ = solved is not None and solved[0] != solved[1]
        if len(self.pairs) == self.most and (differ, gap) <= min(each[:2] for each in self.pairs):
            return
        caption = (
            ""
            if solved is None
            else " - "
            + ", ".join(f"{name} {'right' if good else 'wrong'}" for name, good in zip(names, solved, strict=True))
        )
        self.pairs.append((differ, gap, text + caption, _side_by_side(first, second, self.largest)))
        self.pairs.sort(key=lambda each: each[:2], reverse=True)
        del self.pairs[self.most :]

    def pictures(self) -> list[tuple[str, Image.Image]]:
        """(caption, pair), the most telling first."""
        return [(text, image) for _, _, text, image in self.pairs]


def _side_by_side(first: Image.Image, second: Image.Image, largest: int) -> Image.Image:
    tiles = []
    for picture in (first, second):
        tile = picture.convert("RGB").copy()
        tile.thumbnail((largest, largest))
        tiles.append(tile)
    return sheets.sheet(tiles, 2)
