"""CLIP guidance against classifier-free guidance (Nichol et al. 2021, https://arxiv.org/abs/2112.10741, section 5).

Both turn one knob from no guidance upwards. How often a picture shows what was asked for is read by the toy-judge, and
how far the pictures are from renders is measured in the toy-judge's features: the CLIP that guides judges nothing. The
score of toy-clip, whose towers the guide was trained from, is shown beside them: it is what CLIP guidance exploits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from claims import common
from claims.bars import Bar
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato import sampling
from sfumato.metrics import stats
from sfumato.metrics.kernel import kernel_distance
from sfumato.metrics.stats import Interval
from sfumato.steer.clip_guidance import ClipGuidance
from sfumato.toybox import ToyboxDataset, oracle

SOURCE = "Nichol et al. 2021"
STEPS = 25
N, TUNED = 200, 40  # prompts to report on and to choose by
REPORT, TUNE = 16300, 16400
FREE = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)  # classifier-free scales; 1 is no guidance
CLIP = (0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 100.0)  # strengths of CLIP guidance; the paper has 3
SCORED = CLIP[1::2]  # strengths between which each scorer may choose
MORE, AHEAD = 0.08, 0.5
ALIKE = 0.02  # cosine: further apart, two scores are not the same
SHOWN = 6


@dataclass(frozen=True)
class Arm:
    """One setting: its pictures (n, 3, h, w), whether each shows what was asked, toy-clip's cosines, the distance to
    renders, CPU seconds a picture."""

    pictures: Tensor
    right: list[bool]
    scores: list[float]
    distance: Interval
    seconds: float

    @property
    def share(self) -> Interval:
        return stats.share(self.right)

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))


def prompts(context: Context, seed: int, n: int) -> list[common.Prompt]:
    """One, two and three toys in turn."""
    by_toys = [common.prompts("test", seed + k, n, k + 1, "plain") for k in range(3)]
    return [by_toys[i % 3][i] for i in range(n)]


def renders(context: Context, side: int) -> np.ndarray:
    """Features of renders of other scenes with as many toys, ``side`` pixels wide."""

    def made() -> np.ndarray:
        data = ToyboxDataset("val", context.count(1000, 100), side)
        few = [i for i, scene in enumerate(data.scenes) if 1 <= len(scene.toys) <= 3]
        return common.judge_features(context, common.pictures_of(data)[few])

    return context.once(f"features of renders {side}", made)


def arm(
    context: Context, name: str, asked: Sequence[common.Prompt], seed: int, guidance: float, system: Any = ()
) -> Arm:
    """One setting on all prompts."""
    texts = [prompt.text for prompt in asked]
    label = f"{name}, guidance {guidance:g}{f', CLIP {system.params.strength:g}' if system else ''}"

    def pictures() -> tuple[Tensor, float]:
        model, start, made = common.load(context, name), time.process_time(), []
        for at, chunk in context.batches(texts, common.BATCH, label):
            seeds = list(range(seed + at, seed + at + len(chunk)))
            given = {"seed": seeds, "guidance": guidance, "steps": STEPS, "interventions": system}
            made.append(sampling.generate(model, list(chunk), **given).pixels.clamp(-1, 1))
        return torch.cat(made), (time.process_time() - start) / len(texts)

    which = str(system.params) if system else ""
    return read(context, *common.resumed(context, (label, which, seed, texts), pictures), asked)


def read(context: Context, pictures: Tensor, seconds: float, asked: Sequence[common.Prompt]) -> Arm:
    """Pictures held against what was asked for."""
    readings = common.judge_of(context).read(pictures)
    return Arm(
        pictures,
        [oracle.check(r, p.requests).all_bound for r, p in zip(readings, asked, strict=True)],
        common.clip_scores(context, pictures, [prompt.text for prompt in asked]),
        kernel_distance(common.judge_features(context, pictures), renders(context, pictures.shape[-1])),
        seconds,
    )


def curves(name: str, context: Context) -> list[Row]:
    """Both knobs on one model."""
    asked = prompts(context, REPORT, common.tenth(context, N))
    tuning = prompts(context, TUNE, common.tenth(context, TUNED))
    scales, strengths = (FREE, CLIP) if not context.quick else (FREE[::3], CLIP[2:4])

    def chosen(settings: Sequence[float], free: bool) -> float:
        def score(each: float) -> float:
            given = (each, ()) if free else (1.0, ClipGuidance(strength=each))
            return float(np.mean(arm(context, name, tuning, TUNE, *given).right))

        return max(settings, key=score)

    best = chosen([scale for scale in scales if scale > 1], True), chosen(strengths, False)
    free = {scale: arm(context, name, asked, REPORT, scale) for scale in scales}
    clip = {s: arm(context, name, asked, REPORT, 1.0, ClipGuidance(strength=s)) for s in strengths}
    both = arm(context, name, asked, REPORT, best[0], ClipGuidance(strength=min(strengths)))
    shown = {
        "leans_on": common.trust_text(context, "shape", "color"),
        "picture": context.save(
            f"clip-guidance-{name}-pictures.png",
            sheet(asked, {"no guidance": free[1.0], "classifier-free": free[best[0]], "CLIP": clip[best[1]]}),
        ),
    }
    return curve_rows(
        name, free, clip, both, best, context.save(f"clip-guidance-{name}.png", plot(name, free, clip)), shown
    )


def curve_rows(
    name: str,
    free: Mapping[float, Arm],
    clip: Mapping[float, Arm],
    both: Arm,
    best: tuple[float, float],
    chart: str | None,
    shown: Mapping[str, Any],
) -> list[Row]:
    """The verdicts from the arms by scale (1: no guidance) and by strength; ``best``: those chosen on other prompts;
    ``both`` at once."""
    plain, ours, other = free[1.0], free[best[0]], clip[best[1]]
    gain, more = stats.mcnemar(ours.right, plain.right), stats.mcnemar(ours.right, other.right)
    ahead = beaten(clip, free) - beaten({s: one for s, one in free.items() if s > 1}, clip)
    alike = min(free.values(), key=lambda one: abs(one.score - other.score))
    gap, added = stats.mcnemar(alike.right, other.right), stats.mcnemar(both.right, ours.right)
    apart = abs(alike.score - other.score)
    cost = (
        f"CPU seconds a picture: none {plain.seconds:.2f}, classifier-free {ours.seconds:.2f}, CLIP {other.seconds:.2f}"
    )
    about: dict[str, Any] = {
        "n": len(plain.right),
        **shown,
        "data": {
            "classifier-free": {str(s): as_data(one) for s, one in free.items()},
            "clip": {str(s): as_data(one) for s, one in clip.items()},
            "both": as_data(both),
            "chosen": {"classifier-free": best[0], "clip": best[1]},
        },
    }
    return [
        Row(
            claim=f"{name}: classifier-free guidance draws what was asked for {100 * MORE:.0f} points more often than "
            f"no "
            "guidance",
            source=f"{SOURCE} (the size is ours)",
            measured=f"{percent(ours.share)} at scale {best[0]:g}, {percent(gain)} more",
            baseline=f"no guidance {percent(plain.share)}",
            bars=[common.lift(gain, plain.share.value, MORE)],
            **about,
        ),
        Row(
            claim=f"{name}: classifier-free guidance beats CLIP guidance, each at its best setting",
            source=f"{SOURCE}, section 5 (there by human preference)",
            measured=f"{percent(more)} more often right; {cost}",
            baseline=f"CLIP guidance at strength {best[1]:g} {percent(other.share)}",
            bars=[common.lift(more, other.share.value)],
            headline=True,
            **about,
        ),
        Row(
            claim=f"{name}: settings of CLIP guidance for which some classifier-free scale is as often right and as "
            f"close "
            f"to renders, less those the other way round: {100 * AHEAD:.0f} % or more",
            source=f"{SOURCE}, section 5 (its frontier of fidelity and diversity; the size is ours)",
            measured=f"{100 * beaten(clip, free):.0f} % of {len(clip)} strengths, {100 * ahead:.0f} points ahead",
            baseline="kernel distance to renders x 1000: none "
            f"{1000 * plain.distance.value:.0f}, classifier-free {1000 * ours.distance.value:.0f}, CLIP "
            f"{1000 * other.distance.value:.0f}",
            bars=[Bar(Interval(ahead, ahead, ahead, len(clip)), null=0.0, ideal=1.0, at_least=AHEAD)],
            **about | {"picture": chart, "leans_on": f"{about.get('leans_on', '')}; its features"},
        ),
        Row(
            claim=f"{name}: at about the same toy-clip score, CLIP guidance is right less often (it exploits the "
            f"scorer)",
            source=f"{SOURCE}, section 5",
            measured=f"classifier-free {percent(gap)} more often right, at toy-clip score {alike.score:.3f} against "
            f"{other.score:.3f}",
            baseline=f"CLIP guidance {percent(other.share)}",
            bars=[common.lift(gap, other.share.value)],
            void="" if apart <= ALIKE else f"the nearest scores are {apart:.3f} apart",
            **about | {"picture": chart},
        ),
        Row(
            claim=f"{name}: CLIP guidance added to classifier-free guidance",
            source="this library",
            measured=f"{percent(both.share)}, {percent(added)} more; toy-clip score {both.score:.3f}",
            baseline=f"classifier-free alone {percent(ours.share)}, score {ours.score:.3f}",
            **about,
        ),
    ]


SCORERS: dict[str, dict[str, Any]] = {
    "noise-aware": {"clip": None, "through": "denoiser"},
    "ordinary": {"clip": "toy-clip", "through": "denoiser"},
}


def scorers(name: str, context: Context) -> list[Row]:
    """A CLIP that knows noise against one that does not."""
    asked = prompts(context, REPORT + 10, common.tenth(context, N))
    tuning = prompts(context, TUNE + 10, common.tenth(context, TUNED))
    found = {"plain": arm(context, name, asked, REPORT + 10, 1.0)}
    for label, given in SCORERS.items():
        systems = [ClipGuidance(strength=s, **given) for s in (SCORED if not context.quick else SCORED[:1])]
        tried = [np.mean(arm(context, name, tuning, TUNE + 10, 1.0, each).right) for each in systems]
        found[label] = arm(context, name, asked, REPORT + 10, 1.0, systems[int(np.argmax(tried))])
    names = {"no guidance": "plain", "noise-aware CLIP": "noise-aware", "ordinary CLIP": "ordinary"}
    picture = sheet(asked, {says: found[label] for says, label in names.items()})
    shown = {
        "leans_on": common.trust_text(context, "shape", "color"),
        "picture": context.save(f"clip-guidance-{name}-scorers.png", picture),
    }
    return scorer_rows(name, found, shown)


def scorer_rows(name: str, found: Mapping[str, Arm], shown: Mapping[str, Any]) -> list[Row]:
    """The verdict from the arms noise-aware, ordinary and plain."""
    aware, unaware, plain = (found[label] for label in ("noise-aware", "ordinary", "plain"))
    more = stats.mcnemar(aware.right, unaware.right)
    return [
        Row(
            claim=f"{name}: a noise-aware CLIP guides to the right picture more often than an ordinary one that looks "
            "at the predicted picture",
            source=f"{SOURCE}, section 2.4",
            measured=f"{percent(aware.share)}, {percent(more)} more; {aware.seconds:.2f} CPU seconds a picture",
            baseline=f"ordinary {percent(unaware.share)}, {unaware.seconds:.2f} seconds; no guidance "
            f"{percent(plain.share)}",
            bars=[common.lift(more, unaware.share.value)],
            n=len(plain.right),
            **shown,
            data={label: as_data(one) for label, one in found.items()},
        )
    ]


def beaten(losers: Mapping[float, Arm], winners: Mapping[float, Arm]) -> float:
    """The share of settings that some setting of the other knob dominates."""
    return float(np.mean([any(dominates(one, each) for one in winners.values()) for each in losers.values()]))


def dominates(one: Arm, other: Arm) -> bool:
    """Whether one is right as often as the other and as close to renders, and better in one of the two."""
    ours, theirs = (one.share.value, -one.distance.value), (other.share.value, -other.distance.value)
    return ours != theirs and all(a >= b for a, b in zip(ours, theirs, strict=True))


def as_data(one: Arm) -> dict[str, Any]:
    """The numbers of a setting."""
    return {
        "right": one.share.value,
        "interval": [one.share.low, one.share.high],
        "toy_clip": one.score,
        "kernel_distance": one.distance.value,
        "kernel_interval": [one.distance.low, one.distance.high],
        "cpu_seconds": one.seconds,
    }


def plot(name: str, free: Mapping[float, Arm], clip: Mapping[float, Arm]) -> Image.Image:
    """Left: distance to renders over how often right. Right: toy-clip's score over how often right."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    none = free[1.0]
    series = (
        ("classifier-free", "tab:blue", "o", free),
        ("CLIP", "tab:orange", "s", {0.0: none, **clip}),
    )
    for label, color, marker, arms in series:
        x = [100 * one.share.value for one in arms.values()]
        for axes, y in (
            (left, [1000 * one.distance.value for one in arms.values()]),
            (right, [one.score for one in arms.values()]),
        ):
            axes.plot(x, y, color=color, marker=marker, label=label)
            for at, value, knob in zip(x, y, arms, strict=True):
                axes.annotate(f"{knob:g}", (at, value), xytext=(4, 4), textcoords="offset points", fontsize=8)
    left.set_ylabel("distance to renders (kernel, x 1000)")
    right.set_ylabel("toy-clip score (cosine)")
    for axes in (left, right):
        axes.set_xlabel("right according to the toy-judge (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{name}: guidance turned up", fontsize=10)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return Image.open(written).convert("RGB")


def sheet(asked: Sequence[common.Prompt], arms: Mapping[str, Arm]) -> Image.Image:
    """The same prompts, the settings side by side, with a mark where the judge finds all that was asked for."""
    rows = {
        label: [("right" if one.right[i] else "not right", one.pictures[i]) for i in range(min(SHOWN, len(asked)))]
        for label, one in arms.items()
    }
    return common.side_by_side(rows, [common.asked_for(prompt.requests) for prompt in asked[:SHOWN]])


def parts(name: str) -> tuple[Part, ...]:
    """The parts of one model."""
    models = (name, "toy-judge", "toy-clip", "toy-clip-noisy")
    return (
        Part(f"{name}: curves", models, lambda context: curves(name, context)),
        Part(f"{name}: scorers", models, lambda context: scorers(name, context)),
    )


EXPERIMENT = Experiment(
    key="clip_guidance",
    title="GLIDE: CLIP guidance and classifier-free guidance",
    intro=(
        f"Plain captions of unseen scenes with one to three toys, {STEPS} steps for every setting; a picture is right "
        "when all its toys have the shape and colour asked for. Scale and strength were chosen on other scenes and "
        "seeds. Compute is told in CPU seconds, since CLIP's passes are no passes of the denoiser."
    ),
    file=__file__,
    parts=(*parts("toy-sd"), parts("toy-sd3")[0]),
)
