"""CLIP guidance against classifier-free guidance (Nichol et al. 2021, https://arxiv.org/abs/2112.10741, section 5).

Both turn one knob from no guidance upwards. How often a picture shows what was asked for is read by the toy-judge, and
how far the pictures are from renders is measured in the toy-judge's features: the CLIP that guides judges nothing. The
score of toy-clip, whose towers the guide was trained from, is shown beside them: it is what CLIP guidance exploits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from claims import common
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
REPORT, TUNE = 6100, 6200
FREE = (1.0, 2.0, 4.0, 8.0)  # classifier-free scales; 1 is no guidance
CLIP = (1.0, 3.0, 10.0, 30.0)  # strengths of CLIP guidance; the paper has 3


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
    """Half with one toy, half with two."""
    half = n // 2
    return common.prompts("test", seed, half, 1, "plain") + common.prompts("test", seed + 1, n - half, 2, "plain")


def renders(context: Context) -> np.ndarray:
    """Features of renders of other scenes with as many toys."""

    def made() -> np.ndarray:
        data = ToyboxDataset("val", context.count(1000, 100), 64)
        few = [i for i, scene in enumerate(data.scenes) if len(scene.toys) <= 2]
        return common.judge_features(context, common.pictures_of(data)[few])

    return context.once("features of renders", made)


def arm(
    context: Context, name: str, asked: Sequence[common.Prompt], seed: int, guidance: float, system: Any = ()
) -> Arm:
    """One setting on all prompts."""
    model = common.load(context, name)
    texts = [prompt.text for prompt in asked]
    label = f"{name}, guidance {guidance:g}{f', CLIP {system.params.strength:g}' if system else ''}"
    start, made = time.process_time(), []
    for at, chunk in context.batches(texts, common.BATCH, label):
        seeds = list(range(seed + at, seed + at + len(chunk)))
        made.append(
            sampling.generate(
                model, list(chunk), seed=seeds, guidance=guidance, steps=STEPS, interventions=system
            ).pixels.clamp(-1, 1)
        )
    seconds = (time.process_time() - start) / len(texts)
    return read(context, torch.cat(made), asked, seconds)


def read(context: Context, pictures: Tensor, asked: Sequence[common.Prompt], seconds: float) -> Arm:
    """Pictures held against what was asked for."""
    readings = common.judge_of(context).read(pictures)
    return Arm(
        pictures,
        [oracle.check(r, p.wishes).all_bound for r, p in zip(readings, asked, strict=True)],
        common.clip_scores(context, pictures, [prompt.text for prompt in asked]),
        kernel_distance(common.judge_features(context, pictures), renders(context)),
        seconds,
    )


def curves(name: str, context: Context) -> list[Row]:
    """Both knobs on one model."""
    n = context.count(32, 6)
    asked = prompts(context, REPORT, n)
    scales, strengths = (FREE, CLIP) if not context.quick else (FREE[::3], CLIP[1:2])
    free = {scale: arm(context, name, asked, REPORT, scale) for scale in scales}
    clip = {s: arm(context, name, asked, REPORT, 1.0, ClipGuidance(strength=s)) for s in strengths}
    plain = free[1.0]
    tuning = prompts(context, TUNE, context.count(16, 4))
    best_free = max((s for s in scales if s > 1), key=lambda s: np.mean(arm(context, name, tuning, TUNE, s).right))
    best_clip = max(
        strengths,
        key=lambda s: np.mean(arm(context, name, tuning, TUNE, 1.0, ClipGuidance(strength=s)).right),
    )
    ours, other = free[best_free], clip[best_clip]
    both = arm(context, name, asked, REPORT, best_free, ClipGuidance(strength=min(strengths)))
    gain = stats.mcnemar(ours.right, plain.right)
    more = stats.mcnemar(ours.right, other.right)
    beaten = [s for s, one in clip.items() if any(dominates(f, one) for f in free.values())]
    alike = min(free.values(), key=lambda f: abs(f.score - other.score))
    gap = stats.mcnemar(alike.right, other.right)
    added = stats.mcnemar(both.right, ours.right)
    picture = context.save(f"clip-guidance-{name}.png", plot(name, free, clip))
    shown = context.save(f"clip-guidance-{name}-pictures.png", sheet(plain, ours, other))
    leans = common.trust_text(context, "shape", "color")
    data = {
        "classifier-free": {str(s): as_data(one) for s, one in free.items()},
        "clip": {str(s): as_data(one) for s, one in clip.items()},
        "both": as_data(both),
        "chosen": {"classifier-free": best_free, "clip": best_clip},
    }
    cost = (
        f"CPU seconds a picture: none {plain.seconds:.2f}, classifier-free {ours.seconds:.2f}, CLIP {other.seconds:.2f}"
    )
    return [
        Row(
            claim=f"{name}: classifier-free guidance draws what was asked for 8 points more often than no guidance",
            source=SOURCE,
            measured=f"{percent(ours.share)} at scale {best_free:g}, {percent(gain)} more",
            baseline=f"no guidance {percent(plain.share)}",
            holds=gain.value >= 0.08 and gain.low > 0,
            n=n,
            leans_on=leans,
            picture=shown,
            data=data,
        ),
        Row(
            claim=f"{name}: classifier-free guidance beats CLIP guidance, each at its best setting, at about equal "
            "compute",
            source=f"{SOURCE} (there by human preference)",
            measured=f"{percent(more)} more often right; {cost}",
            baseline=f"CLIP guidance at strength {best_clip:g} {percent(other.share)}",
            holds=more.low > 0,
            n=n,
            leans_on=leans,
            picture=shown,
            data=data,
        ),
        Row(
            claim=f"{name}: for 4 in 5 strengths of CLIP guidance or more, some classifier-free scale is as often "
            "right and as close to renders",
            source=SOURCE,
            measured=f"{len(beaten)} of {len(clip)} strengths",
            baseline="kernel distance to renders x 1000: none "
            f"{1000 * plain.distance.value:.0f}, classifier-free {1000 * ours.distance.value:.0f}, CLIP "
            f"{1000 * other.distance.value:.0f}",
            holds=len(beaten) >= 0.8 * len(clip),
            n=n,
            leans_on=f"{leans}; its features",
            picture=picture,
            data=data,
        ),
        Row(
            claim=f"{name}: at about the same toy-clip score, CLIP guidance is right less often "
            "(it exploits the scorer)",
            source=SOURCE,
            measured=f"classifier-free {percent(gap)} more often right, at toy-clip score {alike.score:.3f} against "
            f"{other.score:.3f}",
            baseline="no difference: 0",
            holds=gap.low > 0,
            n=n,
            leans_on=leans,
            picture=picture,
            data=data,
        ),
        Row(
            claim=f"{name}: CLIP guidance added to classifier-free guidance",
            source="this library",
            measured=f"{percent(both.share)}, {percent(added)} more; toy-clip score {both.score:.3f}",
            baseline=f"classifier-free alone {percent(ours.share)}, score {ours.score:.3f}",
            holds=None,
            n=n,
            leans_on=leans,
            data=data,
        ),
    ]


def scorers(name: str, context: Context) -> list[Row]:
    """A CLIP that knows noise against one that does not."""
    n = context.count(24, 4)
    asked, tuning = prompts(context, REPORT + 10, n), prompts(context, TUNE + 10, context.count(12, 2))
    made = {"clip": None, "through": "denoiser"}, {"clip": "toy-clip", "through": "denoiser"}
    found = []
    for given in made:
        systems = [ClipGuidance(strength=s, **given) for s in (CLIP[1:3] if not context.quick else CLIP[1:2])]
        tried = [np.mean(arm(context, name, tuning, TUNE + 10, 1.0, each).right) for each in systems]
        found.append((systems[int(np.argmax(tried))], given))
    aware, unaware = (arm(context, name, asked, REPORT + 10, 1.0, system) for system, _ in found)
    plain = arm(context, name, asked, REPORT + 10, 1.0)
    more = stats.mcnemar(aware.right, unaware.right)
    return [
        Row(
            claim=f"{name}: a noise-aware CLIP guides to the right picture more often than an ordinary one that looks "
            "at the predicted picture",
            source=f"{SOURCE}, section 2.4",
            measured=f"{percent(aware.share)}, {percent(more)} more; {aware.seconds:.2f} CPU seconds a picture",
            baseline=f"ordinary {percent(unaware.share)}, {unaware.seconds:.2f} seconds; no guidance "
            f"{percent(plain.share)}",
            holds=more.low > 0,
            n=n,
            leans_on=common.trust_text(context, "shape", "color"),
            picture=context.save(f"clip-guidance-{name}-scorers.png", sheet(plain, aware, unaware)),
            data={"aware": as_data(aware), "ordinary": as_data(unaware), "plain": as_data(plain)},
        )
    ]


def dominates(one: Arm, other: Arm) -> bool:
    """Whether one is right as often as the other, and as close to renders."""
    return one.share.value >= other.share.value and one.distance.value <= other.distance.value


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


def plot(name: str, free: dict[float, Arm], clip: dict[float, Arm]) -> Image.Image:
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


def sheet(*arms: Arm) -> Image.Image:
    """The same prompts, one setting to a row."""
    most = min(8, len(arms[0].pictures))
    chosen = np.linspace(0, len(arms[0].pictures) - 1, most).astype(int)
    return common.sheet([[one.pictures[i] for i in chosen] for one in arms])


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
        f"Plain captions of unseen scenes with one or two toys, {STEPS} steps for every setting; a picture is right "
        "when all its toys have the shape and colour asked for. Scale and strength were chosen on other scenes and "
        "seeds. Compute is told in CPU seconds, since CLIP's passes are no passes of the denoiser."
    ),
    file=__file__,
    parts=(*parts("toy-sd"), parts("toy-sd3")[0]),
)
