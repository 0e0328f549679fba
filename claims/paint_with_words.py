"""Paint-with-words (eDiff-I, Balaji et al. 2022, https://arxiv.org/abs/2211.01324): do phrases go where painted?

Two and three toys, in turn, of unseen scenes are asked for by a prompt that says nothing of their places, and painted
as the boxes that they have in their scene. The toy-judge says where each came to lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from claims import common
from claims.bars import Bar
from claims.common import Prompt, percent
from claims.core import Context, Experiment, Part, Row
from sfumato import masks
from sfumato.metrics import segmentation, stats
from sfumato.sampling import generate
from sfumato.steer.paint_with_words import PaintWithWords
from sfumato.toybox import oracle, render
from sfumato.toybox.rendering import COLOR_RGB

SOURCE = "Balaji et al. 2022 (eDiff-I)"
SMALLEST = 4 / 256  # share of the picture: four cells of a 16x16 latent grid
STEPS = 30
N, FEW = 240, 120  # layouts of the comparison and of the ablations
REPORT, TUNE = 15500, 15600
STRENGTHS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
INSIDE, HARM = 0.35, 0.05
SHOWN = 6


class Constant(PaintWithWords):
    """The ablation: as strong at all noise levels, without log(1 + sigma)."""

    def _weight(self, step: Any, scores: Tensor) -> Tensor:
        return (self.strength * scores.amax((1, 2, 3)).clamp_min(0))[:, None, None]


@dataclass(frozen=True)
class Layout:
    """A prompt and the pixel box (x0, y0, x1, y1) of each of its toys, in the order of its phrases."""

    prompt: Prompt
    phrases: tuple[str, ...]
    boxes: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Found:
    """What became of one painted phrase: was the toy drawn, its box's IoU with the painted one, its middle inside."""

    there: bool
    iou: float
    inside: bool


def layouts(split: str, seed: int, n: int, side: int) -> list[Layout]:
    """``n`` layouts of two and of three toys, in turn, of different colours, each large enough to be seen in pictures
    of ``side`` pixels."""
    found: dict[int, list[Layout]] = {2: [], 3: []}
    start = 0
    while min(map(len, found.values())) < n // 2 + n % 2:
        for toys, kept in found.items():
            asked = common.prompts(split, seed + start, n, toys, "short")
            frames = render([prompt.scene for prompt in asked], side)
            for i, prompt in enumerate(asked):
                named = [phrase for phrase in prompt.caption.phrases if phrase.object is not None]
                seen = [float((frames.mask[i] == phrase.object).float().mean()) for phrase in named]
                if min(seen) >= SMALLEST and len({request.color for request in prompt.requests}) == len(named):
                    boxes = tuple(tuple(frames.boxes[i][phrase.object].tolist()) for phrase in named)
                    kept.append(Layout(prompt, tuple(phrase.text for phrase in named), boxes))
        start += 1
    return [found[2 + i % 2][i // 2] for i in range(n)]


def paint(
    context: Context,
    name: str,
    asked: Sequence[Layout],
    seed: int,
    label: str,
    make: Any = PaintWithWords,
    **params: Any,
) -> Tensor:
    """Pictures (n, 3, h, w) of layouts; without ``params`` the prompts alone, from the same noise."""

    def made() -> tuple[Tensor, float]:
        model, pictures = common.load(context, name), []
        for start, (layout,) in context.batches(asked, 1, label):
            systems = [make(phrases=layout.phrases, box=list(layout.boxes), **params)] if params else []
            given = {"seed": seed + start, "steps": STEPS, "interventions": systems}
            pictures.append(generate(model, layout.prompt.text, **given).pixels.clamp(-1, 1))
        return torch.cat(pictures), 0.0

    what = (label, sorted(params.items()), seed, [(each.prompt.text, each.boxes) for each in asked])
    return common.resumed(context, what, made)[0]


def placed(context: Context, asked: Sequence[Layout], pictures: Tensor) -> list[list[Found]]:
    """Per picture, what became of each phrase."""
    size, out = (pictures.shape[-2], pictures.shape[-1]), []
    for layout, reading in zip(asked, common.judge_of(context).read(pictures), strict=True):
        out.append([])
        for request, box in zip(layout.prompt.requests, layout.boxes, strict=True):
            toy = oracle.find(reading, request.only("shape", "color"))
            if toy is None:
                out[-1].append(Found(False, 0.0, False))
                continue
            drawn, wanted = (masks.box_mask(each, size)[None] > 0.5 for each in (toy.box, box))
            x, y = ((toy.box[i] + toy.box[i + 2]) / 2 for i in (0, 1))
            inside = box[0] <= x < box[2] and box[1] <= y < box[3]
            out[-1].append(Found(True, float(segmentation.iou(drawn, wanted)[0]), inside))
    return out


def per_picture(found: Sequence[Sequence[Found]], name: str) -> list[float]:
    """The mean over a picture's phrases: phrases of one picture are not independent."""
    return [sum(float(getattr(one, name)) for one in each) / len(each) for each in found]


def best_strength(context: Context, name: str, make: Any = PaintWithWords) -> tuple[float, dict[float, float]]:
    """The strength with the best layout IoU on other layouts and seeds, and all of them."""

    def chosen() -> tuple[float, dict[float, float]]:
        tuned = layouts("val", TUNE, common.tenth(context, 24), common.side(context, name))
        ious = {}
        for strength in STRENGTHS[:: 3 if context.quick else 1]:
            label = f"{name}, {make.__name__} {strength}"
            pictures = paint(context, name, tuned, TUNE, label, make, strength=strength)
            ious[strength] = sum(per_picture(placed(context, tuned, pictures), "iou")) / len(tuned)
        return max(ious, key=lambda strength: ious[strength]), ious

    return context.once(f"strength {name} {make.__name__}", chosen)


Placed = Sequence[Sequence[Found]]


def rows_of(
    name: str, found: Mapping[str, Placed], against_old: Placed, strength: float, shown: Mapping[str, Any]
) -> list[Row]:
    """The verdicts from the arms plain, painted and swapped (held against the boxes in their new order; ``against_old``
    holds it against the old ones)."""
    more = {
        what: stats.paired_difference(per_picture(found["painted"], what), per_picture(found["plain"], what))
        for what in ("iou", "inside", "there")
    }
    follows = stats.paired_difference(per_picture(found["swapped"], "inside"), per_picture(against_old, "inside"))
    level = {
        arm: {what: stats.bootstrap(per_picture(each, what)) for what in ("iou", "inside", "there")}
        for arm, each in found.items()
    }
    plain, painted = level["plain"], level["painted"]
    about: dict[str, Any] = {
        "n": len(found["plain"]),
        **shown,
        "data": {
            "levels": {arm: {what: each.to_json() for what, each in level[arm].items()} for arm in level},
            "more": {what: each.to_json() for what, each in more.items()},
            "follows": follows.to_json(),
            **shown.get("data", {}),
        },
    }
    return [
        Row(
            claim=f"{name}: painted toys have their middle in their box {100 * INSIDE:.0f} points more often than "
            "without painting, the boxes' IoU rises, and toys are there no less often, within "
            f"{100 * HARM:.0f} points",
            source=f"{SOURCE} (shown there by pictures; the sizes are ours)",
            measured=f"middle inside {percent(painted['inside'])}, {percent(more['inside'])} more; IoU "
            f"{painted['iou'].text()}, {more['iou'].text()} more; there {percent(painted['there'])}, difference "
            f"{percent(more['there'])}; strength {strength} (tuned)",
            baseline=f"plain: middle inside {percent(plain['inside'])}, IoU {plain['iou'].text()}, there "
            f"{percent(plain['there'])}",
            bars=[
                common.lift(more["inside"], plain["inside"].value, INSIDE, "middle inside"),
                common.lift(more["iou"], plain["iou"].value, what="IoU"),
                common.no_harm(more["there"], "toys there", HARM),
            ],
            headline=True,
            **about,
        ),
        Row(
            claim=f"{name}: with the boxes dealt out anew the toys follow (middle in the new box, not the old)",
            source=f"{SOURCE} (shown there by pictures)",
            measured=f"{percent(follows)} more often in the new box; there {percent(level['swapped']['there'])}",
            baseline="no difference: 0",
            bars=[Bar(follows, null=0.0, ideal=1.0, above=0.0)],
            **about,
        ),
    ]


def painting(name: str, context: Context) -> list[Row]:
    """Painted against plain, on held-out layouts, from the same noise."""
    strength, tuned = best_strength(context, name)
    asked = layouts("test", REPORT, common.tenth(context, N), common.side(context, name))
    other = [swapped(each) for each in asked]
    pictures = {
        "plain": paint(context, name, asked, REPORT, f"{name}, plain"),
        "painted": paint(context, name, asked, REPORT, f"{name}, painted", strength=strength),
        "swapped": paint(context, name, other, REPORT, f"{name}, swapped", strength=strength),
    }
    boxes = {"plain": asked, "painted": asked, "swapped": other}
    found = {arm: placed(context, boxes[arm], pictures[arm]) for arm in pictures}
    few = range(min(SHOWN, len(asked)))
    rows = {"painted boxes": [drawn_boxes(asked[i], pictures["plain"][i]) for i in few]}
    rows |= {arm: [pictures[arm][i] for i in few] for arm in ("plain", "painted")}
    rows |= {"other boxes": [drawn_boxes(other[i], pictures["plain"][i]) for i in few]}
    rows |= {"painted so": [pictures["swapped"][i] for i in few]}
    sheet = common.side_by_side(rows, [common.asked_for(asked[i].prompt.requests) for i in few])
    shown = {
        "leans_on": common.trust_text(context, "shape", "color"),
        "picture": context.save(f"paint-with-words-{name}.png", sheet),
        "data": {"tuning": list(tuned.items())},
    }
    return rows_of(name, found, placed(context, asked, pictures["swapped"]), strength, shown)


def ablation_rows(name: str, found: Mapping[float, Placed], steady: Placed, strength: float) -> list[Row]:
    """The verdicts on how much strength does (``found``: by strength, 0 is plain), and what log(1 + sigma) adds at the
    tuned ``strength`` to ``steady``, which goes without."""
    order = sorted(found)
    ious = np.array([per_picture(found[each], "iou") for each in order])  # (strengths, layouts)
    agreement = common.agreement(ious)
    levels = {each: stats.bootstrap(per_picture(found[each], "iou")) for each in order}
    gain = {
        what: stats.paired_difference(per_picture(found[strength], what), per_picture(steady, what))
        for what in ("iou", "there")
    }
    return [
        Row(
            claim=f"{name}: up to the tuned strength, the stronger the painting the better the layout (mean rank "
            "correlation of strength and IoU within a layout)",
            source=f"{SOURCE}: the weight sets how closely the painting is followed",
            measured=agreement.text(),
            baseline="IoU: " + ", ".join(f"{each:g}: {levels[each].value:.3f}" for each in order),
            bars=[Bar(agreement, null=0.0, ideal=1.0, above=0.0)],
            n=ious.shape[1],
            data={str(each): level.to_json() for each, level in levels.items()},
        ),
        Row(
            claim=f"{name}: what log(1 + sigma) adds to a weight that is the same at all noise levels, each at its "
            f"tuned "
            "strength",
            source=f"{SOURCE} (its choice)",
            measured=f"IoU {gain['iou'].text()} more, toys there {percent(gain['there'])} more",
            baseline=f"without: IoU {stats.bootstrap(per_picture(steady, 'iou')).text()}",
            n=ious.shape[1],
            data={what: each.to_json() for what, each in gain.items()},
        ),
    ]


def ablations(name: str, context: Context) -> list[Row]:
    """Fractions of the tuned strength, and the weight without log(1 + sigma)."""
    strength, _ = best_strength(context, name)
    constant, _ = best_strength(context, name, Constant)
    asked = layouts("test", REPORT, common.tenth(context, N), common.side(context, name))
    asked = asked[: common.tenth(context, FEW)]

    def read(label: str, make: Any = PaintWithWords, **params: Any) -> Placed:
        return placed(context, asked, paint(context, name, asked, REPORT, f"{name}, {label}", make, **params))

    found = {0.0: read("plain")}
    for share in (0.25, 0.5, 1.0):
        found[share * strength] = read(f"{share:g} of the strength", strength=share * strength)
    return ablation_rows(name, found, read("constant", Constant, strength=constant), strength)


def drawn_boxes(layout: Layout, like: Tensor) -> Tensor:
    """The painted boxes in the colours that their toys shall have, as a picture (3, h, w)."""
    canvas = torch.zeros_like(like)
    for request, box in zip(layout.prompt.requests, layout.boxes, strict=True):
        region = masks.box_mask(box, (like.shape[-2], like.shape[-1])) > 0.5
        canvas = torch.where(region, torch.tensor(COLOR_RGB[request.color])[:, None, None] * 2 - 1, canvas)
    return canvas


def swapped(layout: Layout) -> Layout:
    """The boxes dealt out anew: each phrase gets the next one's."""
    return Layout(layout.prompt, layout.phrases, (*layout.boxes[1:], layout.boxes[0]))


def parts(name: str) -> tuple[Part, ...]:
    """The parts of one model."""
    models = (name, "toy-judge")
    return (
        Part(f"{name}: layouts", models, lambda context: painting(name, context)),
        Part(f"{name}: ablations", models, lambda context: ablations(name, context)),
    )


EXPERIMENT = Experiment(
    key="paint_with_words",
    title="Paint-with-words: phrases go where they are painted",
    intro=(
        "Prompts name two or three toys (in turn) and no places; each is painted as the box it has in an unseen scene. "
        "The strength was chosen by layout IoU on validation scenes and other seeds, from 0.05 to 3.2. A toy that the "
        "judge does not read counts as IoU 0 and as outside; a layout counts once, by the mean over its toys."
    ),
    file=__file__,
    parts=(*parts("toy-sd"), *parts("toy-sd3")),
)
