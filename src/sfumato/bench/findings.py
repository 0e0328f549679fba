"""The report of ``sfumato judge``: figures, tables, notes and pictures from what was seen in two folders."""

from __future__ import annotations

from typing import Any

import numpy as np

from sfumato.bench.folder import Folder
from sfumato.bench.options import JudgeOptions
from sfumato.bench.report import Figure, Report, Table
from sfumato.bench.survey import EXAMPLES, Evaluators, SurveyTotals
from sfumato.errors import BadInput, NoMatch
from sfumato.metrics import stats
from sfumato.metrics.frechet import frechet
from sfumato.metrics.kernel import kernel_distance
from sfumato.metrics.manifold import manifold
from sfumato.protocol import Comparison

RATES = {
    "present": "of the toys asked for, the shape is there",
    "all_present": "of the pictures, every shape is there",
    "bound": "of the toys asked for, there in the right colour",
    "all_bound": "of the pictures, every toy in its colour",
    "leaked": "of the toys asked for, wrong, and its shape wears another one's colour",
    "counted": "of the pictures, the right number of toys",
    "related": "of the relations asked for, it holds",
    "all_right": "of the pictures, everything asked for, and nothing more",
}


def report_of(
    options: JudgeOptions,
    system: Any,
    fake: Folder,
    totals: SurveyTotals,
    real: Folder | None,
    truth: SurveyTotals | None,
    wanted: set[str],
    attributes: list[str],
    evaluators: Evaluators,
) -> Report:
    title = f"{fake.path.name or fake.path}" + (f" against {real.path.name or real.path}" if real else "")
    report = Report(title=title)
    report.notes += _notes(fake, totals, evaluators, "")
    if real is not None and truth is not None:
        report.notes += _notes(real, truth, evaluators, "reference: ")
    if "presence" in wanted:
        _presence(report, totals, bool(options.metrics))
    if totals.scores is not None and "clip_score" in wanted:
        spread = float(totals.scores.scatter[0, 0]) / max(totals.scores.n - 1, 1)
        value = stats.mean_of(totals.scores.n, float(totals.scores.mean[0]), spread)
        report.figures.append(Figure(f"CLIPScore({options.clip})", value, "100 max(cos, 0) of picture and caption"))
    if truth is not None and totals.moments is not None:
        _distances(report, options, totals, truth, wanted, evaluators)
    if "attributes" in wanted and truth is not None:
        found = _comparison(options, system, totals, truth, attributes, evaluators, fake, real)
        report.figures += [Figure(*figure) for figure in found.figures]
        report.tables += [Table(*table) for table in found.tables]
        report.notes += found.notes
        report.plots |= found.plots
        report.data[system.CARD.key] = found.data
    if "presence" in wanted:
        _gallery(report, fake, totals)
    report.data |= {
        "options": options.model_dump(mode="json", exclude={"ray", "workers"}),  # they change no figure
        "folder": str(fake.path),
        "reference": str(real.path) if real else None,
        "pictures": {"seen": totals.seen, "failed": totals.failed, "named": totals.named, "no_text": totals.no_text,
                     "no_toys": totals.no_toys, "resized": totals.resized, "others": fake.others, "drawn": fake.drawn,
                     "subfolders": fake.subfolders},
        "seconds": round(totals.seconds + (truth.seconds if truth else 0.0), 2),
        "nets": {each.name: each.hash for each in (evaluators.net, evaluators.clip) if each is not None},
    }  # fmt: skip
    return report


def _notes(folder: Folder, totals: SurveyTotals, evaluators: Evaluators, side: str) -> list[str]:
    notes = [f"{side}{totals.seen} pictures of {folder.path}"]
    if totals.failed:
        named = "; ".join(f"{name} ({reason})" for name, reason in totals.named[:5])
        more = f"; and {totals.failed - 5} more, see the JSON" if totals.failed > 5 else ""
        notes.append(f"{side}{totals.failed} files could not be read and were left out: {named}{more}")
    if totals.no_text and (evaluators.judge or evaluators.clip) and not side:
        notes.append(f"{totals.no_text} pictures have no caption and count for distances only")
    if totals.no_toys:
        notes.append(f"{totals.no_toys} captions name no toy and do not count for presence")
    if totals.resized:
        rule = next(
            (net.rule for net in (evaluators.net, evaluators.clip) if net is not None),
            "middle square, bicubic to 64x64",
        )
        notes.append(f"{side}{totals.resized} pictures were resized: {rule}; the judge sees the middle square at 64x64")
    left = [f"{folder.others} other files"] if folder.others else []
    left += [f"what cannot be looked at: {'; '.join(folder.skipped[:5])}"] if folder.skipped else []
    left += [f"{folder.drawn} pictures drawn beside others"] if folder.drawn else []
    if folder.subfolders:
        more = f" and {len(folder.subfolders) - 5} more" if len(folder.subfolders) > 5 else ""
        left.append(f"pictures in the subfolders {', '.join(folder.subfolders[:5])}{more}")
    return notes + ([f"{side}passed over: {' and '.join(left)}"] if left else [])


def _presence(report: Report, totals: SurveyTotals, requested: bool) -> None:
    if "present" not in totals.counts:
        missing = "presence: no caption names a toy of the toybox (ball, cube, cylinder, cone, ring, cross)"
        if requested:
            raise NoMatch(f"{missing}.")
        report.notes.append(f"{missing}; it is left out")
        return
    for name, about in RATES.items():
        if name in totals.counts:
            report.figures.append(Figure(name, totals.rate(name), about, percent=True))
    if totals.tasks:
        rows = [(task, stats.wilson(*counts)) for task, counts in sorted(totals.tasks.items())]
        for task, share in rows:
            report.figures.append(Figure(f"task {task}", share, "of its pictures, solved", percent=True))
        mean = sum(share.value for _, share in rows) / len(rows)
        report.figures.append(Figure("tasks", mean, "mean of the tasks"))


def _distances(
    report: Report,
    options: JudgeOptions,
    totals: SurveyTotals,
    truth: SurveyTotals,
    wanted: set[str],
    evaluators: Evaluators,
) -> None:
    assert evaluators.net is not None and totals.moments and truth.moments and totals.sample and truth.sample
    name, d = options.net, len(totals.moments.mean)
    n, m = totals.moments.n, truth.moments.n
    if min(n, m) < 2 and not options.metrics:
        report.notes.append("distances need at least 2 pictures on each side; they are left out")
        return
    if "frechet" in wanted:
        value = frechet(truth.moments, totals.moments)
        report.figures.append(
            Figure(evaluators.net.distance, value, f"Frechet distance of {n} and {m} features of {d} numbers")
        )
        if min(n, m) < 2 * d:
            report.notes.append(
                f"{evaluators.net.distance} of fewer than {2 * d} pictures is biased upward; compare equally many only"
            )
    sampled = max(n, m) > options.cap
    if sampled and wanted & {"kernel", "manifold"}:
        report.notes.append(
            f"kernel distance and manifolds use {options.cap} pictures a side, drawn with seed {options.seed}"
        )
    if "kernel" in wanted:
        if min(n, m) < 2:
            raise BadInput(f"a kernel distance needs at least 2 pictures on each side; got {n} and {m}.")
        apart = kernel_distance(truth.sample.rows, totals.sample.rows)
        report.figures.append(Figure(f"KD({name})", apart, "squared MMD, cubic kernel, unbiased"))
    if "manifold" in wanted:
        if min(n, m) <= max(options.k, options.k_density):
            if options.metrics:
                raise BadInput(f"manifold: {options.k_density} neighbours need more pictures than {n} and {m}.")
            report.notes.append(
                f"manifold figures need more than {max(options.k, options.k_density)} pictures on each side"
            )
            return
        got = manifold(truth.sample.rows, totals.sample.rows, options.k, options.k_density)
        for key, about in (
            ("precision", f"share of the pictures among the reference, k = {options.k}"),
            ("recall", f"share of the reference among the pictures, k = {options.k}"),
            ("coverage", f"share of the reference with a picture near, k = {options.k_density}"),
        ):
            report.figures.append(Figure(f"{key}({name})", getattr(got, key), about, percent=True))
        report.figures.append(
            Figure(f"density({name})", got.density, f"k = {options.k_density}; about 1 for equal sets")
        )


def _comparison(
    options: JudgeOptions,
    system: Any,
    totals: SurveyTotals,
    truth: SurveyTotals,
    attributes: list[str],
    evaluators: Evaluators,
    fake: Folder,
    real: Folder | None,
) -> Comparison:
    assert totals.clip_sample and truth.clip_sample and evaluators.clip and real
    mentions = None
    if totals.mentions is not None and truth.mentions is not None:
        mentioned = np.concatenate([truth.mentions.rows, totals.mentions.rows])
        if not np.isnan(mentioned).all():
            absent = [name for name, hits in zip(attributes, np.nansum(mentioned, 0), strict=True) if not hits]
            if absent:
                texts = (real.about(name)["text"] for name in real.names[:500])
                try:
                    near = "; frequent there: " + ", ".join(
                        system.find_attributes([text for text in texts if text], 12)
                    )
                except NoMatch:
                    near = ""
                raise NoMatch(
                    f"attribute {absent[0]!r} occurs in no caption of either folder{near}. captions=False"
                    " (--no-captions) does without them."
                )
            if not np.isnan(truth.mentions.rows).all():
                mentions = truth.mentions.rows
    if evaluators.requests:
        assert totals.shown and truth.shown
        shown = truth.shown.rows.sum(0) + totals.shown.rows.sum(0)
        never = [name for name, hits in zip(attributes, shown, strict=True) if not hits]
        if never:
            there = [name for name, hits in zip(attributes, shown, strict=True) if hits]
            others = f"; seen are {', '.join(there)}" if there else ""
            raise NoMatch(f"attribute {never[0]!r}: {options.reader} sees it in no picture of either folder{others}.")
        # zeros and ones have no density: a little noise gives them one, the same noise in every run
        rng = np.random.default_rng(options.seed)
        rows = [each.rows + 0.1 * rng.normal(size=each.rows.shape) for each in (truth.shown, totals.shown)]
        return system.compare_attributes(attributes, *rows, scored_by=f"{options.reader} (0 or 1)")
    rows = system.scores(evaluators.clip, attributes, truth.clip_sample.rows, totals.clip_sample.rows)
    return system.compare_attributes(attributes, *rows, mentions, scored_by=f"HCS of {options.clip}")


def _gallery(report: Report, folder: Folder, totals: SurveyTotals) -> None:
    for heading, names in (("Not as asked (the first of them)", totals.wrong), ("As asked (the first)", totals.right)):
        if names:
            shown = [(folder.about(name)["text"] or name, folder.picture(name)) for name in names[:EXAMPLES]]
            report.gallery.append((heading, shown))
