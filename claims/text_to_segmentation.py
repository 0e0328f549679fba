"""Text to segmentation (Dombrowski et al. 2023, https://arxiv.org/abs/2212.14306): from a shape's name to a segmenter.

Rendered scenes hold one toy of the shape, alone on varied grounds (the paper's setting) or among others. Masks are
known exactly and used for scoring only, and to train the upper bound: the same segmenter on the same pictures with true
masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from claims import common
from claims.bars import Bar
from claims.core import Context, Experiment, Part, Row
from sfumato import mask_ops
from sfumato.edit import text_to_segmentation as t2s
from sfumato.metrics import segmentation, stats
from sfumato.toybox import render
from sfumato.toybox.dataset import draw_scene

SOURCE = "Dombrowski et al. 2023"
CONCEPTS = ("ball", "cube", "cone", "ring")
SHARE = 0.024  # of the picture: toys that show less are not asked for
LEARN, REPORT = 7100, 7900  # seeds of the scenes to learn from and to report on
STEPS = 15
ITERATIONS = 300
THRESHOLD: t2s.stages.Threshold = "half"  # the maps of these models are sharp: a mixture's masks are twice too large
STAGES = ("fixed", "otsu", "rough", "refined", "final", "supervised")


@dataclass(frozen=True)
class Scored:
    """One concept: IoU of every held-out picture by stage, mean IoU of object and background, and the maps' AUROC."""

    iou: dict[str, Tensor]
    miou: dict[str, Tensor]
    auroc: float
    shown: list[list[Tensor]]


def pictures(concept: str, split: str, seed: int, n: int, toys: int | None, side: int) -> tuple[Tensor, Tensor]:
    """Pictures (n 3 h w) of scenes of so many ``toys`` (None: one to three), one of which has the shape, and its masks
    (n h w) bool."""
    images, truths = [], []
    index = 0
    while len(images) < n:
        scene = draw_scene(split, seed, index, toys)
        index += 1
        which = [i for i, toy in enumerate(scene.toys) if toy.shape == concept]
        if len(which) != 1:
            continue
        frames = render([scene], side)
        mask = frames.mask[0] == which[0]
        if float(mask.float().mean()) >= SHARE:
            images.append(frames.image[0])
            truths.append(mask)
    return torch.stack(images), torch.stack(truths)


def auroc(maps: Tensor, truths: Tensor) -> float:
    """Area under the ROC curve of maps (n h w), mean over pictures: how often a pixel of the object is above one
    that is not."""
    areas = []
    for level, truth in zip(maps, truths, strict=True):
        rank = torch.empty(level.numel(), dtype=torch.float64)
        rank[level.flatten().argsort()] = torch.arange(1, level.numel() + 1, dtype=torch.float64)
        inside = truth.flatten()
        k, m = int(inside.sum()), int((~inside).sum())
        areas.append((float(rank[inside].sum()) - k * (k + 1) / 2) / (k * m))
    return float(np.mean(areas))


def scored(context: Context, concept: str, toys: int | None) -> Scored:
    """Every stage on held-out pictures of one concept."""
    reader, inpainting = common.load(context, "toy-sd"), common.load(context, "toy-sd-inpaint")
    remover = inpainting if inpainting.default_size == reader.default_size else reader  # as ``sfumato segment`` does
    side = common.side(context, "toy-sd")
    learn, learn_truth = pictures(concept, "val", LEARN, context.count(96, 4), toys, side)
    test, truth = pictures(concept, "test", REPORT, context.count(48, 3), toys, side)
    system = t2s.TextToSegmentation(
        threshold=THRESHOLD, iterations=context.count(ITERATIONS, 3), steps=context.count(STEPS, 2)
    )
    p, shown = system.params, system.named(concept)
    found = system.run(reader, remover, concept, learn, report(context, concept))
    bound = t2s.train_segmenter(learn, learn_truth, width=p.width, iterations=p.iterations)

    maps = t2s.weak_maps(reader, test, shown, concept, p.levels, p.window, seed=REPORT)
    rough = t2s.rough_masks(maps, THRESHOLD)
    hole = torch.stack([mask_ops.dilate(each.float(), round(p.grow * side)) > 0.5 for each in rough])
    removed = system.removed(remover, test, hole, concept, seed=REPORT)
    level = segmentation.normalise(maps)
    got = {
        "fixed": level >= 0.5,
        "otsu": torch.stack([each > mask_ops.otsu_threshold(each) for each in level]),
        "rough": rough,
        "refined": t2s.refined_masks(test, removed, hole),
        "final": found.segmenter.masks(test),
        "supervised": bound.masks(test),
    }
    iou = {name: segmentation.iou(each, truth) for name, each in got.items()}
    miou = {name: (iou[name] + segmentation.iou(~each, ~truth)) / 2 for name, each in got.items()}
    few = 6
    rows = [[*test[:few]], [common.heat(each) for each in level[:few]], [*removed[:few]]]
    rows += [[_white(each) for each in got[name][:few]] for name in ("rough", "refined", "final", "supervised")]
    return Scored(iou, miou, auroc(maps, truth), [*rows, [_white(each) for each in truth[:few]]])


def report(context: Context, concept: str) -> t2s.Report:
    def on_progress(stage: str, done: int, total: int) -> None:
        if done == total:
            context.report(f"  {concept}: {total} {stage}")

    return on_progress


def _white(mask: Tensor) -> Tensor:
    return (mask.float() * 2 - 1).expand(3, -1, -1)


def stages(context: Context, toys: int | None) -> list[Row]:
    """Concepts, pooled and one by one."""
    concepts = CONCEPTS if toys == 1 else CONCEPTS[:2]
    done = {concept: scored(context, concept, toys) for concept in concepts[: context.count(len(concepts), 1)]}
    where = "alone" if toys == 1 else "among other toys"
    pooled = {name: torch.cat([one.iou[name] for one in done.values()]).tolist() for name in STAGES}
    means = {name: stats.bootstrap(pooled[name]) for name in STAGES}
    wide = {name: stats.bootstrap(torch.cat([one.miou[name] for one in done.values()]).tolist()) for name in STAGES}
    single = {concept: {name: float(one.iou[name].mean()) for name in STAGES} for concept, one in done.items()}
    ordered = stats.share([one["rough"] < one["refined"] < one["final"] for one in single.values()])
    raw = max(("fixed", "otsu", "rough"), key=lambda name: means[name].value)
    closed = (means["final"].value - means[raw].value) / (means["supervised"].value - means[raw].value)
    refining = stats.paired_difference(pooled["refined"], pooled["rough"])
    distilling = stats.paired_difference(pooled["final"], pooled["refined"])
    beside = stats.paired_difference(pooled["final"], [0.85 * x for x in pooled["supervised"]])
    rough, bound = means["rough"].value, means["supervised"].value
    picture = context.save(
        f"text-to-segmentation-{where.split()[0]}.png",
        common.sheet(
            [sum((one.shown[i] for one in done.values()), []) for i in range(8)],
            names=("picture", "map", "removed", "rough", "refined", "segmenter", "supervised", "truth"),
        ),
    )
    n = len(pooled["final"])
    each = "; ".join(
        f"{concept} {one['rough']:.2f}, {one['refined']:.2f}, {one['final']:.2f}, supervised {one['supervised']:.2f}"
        for concept, one in single.items()
    )
    data = {
        "iou": {name: interval.to_json() for name, interval in means.items()},
        "miou": {name: interval.to_json() for name, interval in wide.items()},
        "single": single,
        "auroc": {concept: one.auroc for concept, one in done.items()},
        "gap_closed": closed,
        "refining": refining.to_json(),
        "distilling": distilling.to_json(),
    }
    return [
        Row(
            claim=(
                f"the object {where}: every stage is better than the one before: IoU of attention masks < masks "
                "refined by removal < the segmenter trained on these, for three quarters of the shapes, and pooled "
                "(95 % intervals above 0)"
            ),
            source=SOURCE,
            measured=f"attention {means['rough'].text()}, refined {means['refined'].text()}, segmenter "
            f"{means['final'].text()}; gains {refining.text()} and {distilling.text()}",
            baseline=f"attention at half its range {means['fixed'].text()}, at Otsu's threshold "
            f"{means['otsu'].text()}; AUROC of the maps {np.mean([one.auroc for one in done.values()]):.3f}",
            bars=[
                Bar(refining, 0.0, 1 - rough, above=0.0, what="refined over rough"),
                Bar(distilling, 0.0, 1 - means["refined"].value, above=0.0, what="segmenter over refined"),
                Bar(ordered, 1 / 6, 1.0, at_least=0.75, what="shapes in this order"),
            ],
            n=n,
            leans_on="exact masks",
            picture=picture,
            data=data,
        ),
        Row(
            claim=f"the object {where}: the segmenter reaches 85 % of one trained on true masks, and an IoU of 0.75 "
            "(of the object alone: with the background's, the attention mask itself would pass)",
            source=SOURCE,
            measured=f"IoU {means['final'].text()}, with background {wide['final'].text()}; "
            f"{100 * means['final'].value / means['supervised'].value:.0f} % of the bound, {100 * closed:.0f} % of the "
            f"gap from the best attention mask; rough, refined, segmenter by shape: {each}",
            baseline=f"supervised, same pictures and network {means['supervised'].text()}; best attention mask "
            f"({raw}) {means[raw].text()}",
            bars=[
                Bar(means["final"], rough, 1.0, at_least=0.75, what="IoU of the object"),
                Bar(beside, rough - 0.85 * bound, 0.15 * bound, at_least=0.0, what="over 0.85 of the bound"),
            ],
            headline=toys == 1,
            n=n,
            leans_on="exact masks",
            picture=picture,
            data=data,
        ),
    ]


EXPERIMENT = Experiment(
    key="text_to_segmentation",
    title="From a name to a segmenter, with no mask drawn",
    intro=(
        "For each shape: 96 rendered pictures that show it, without masks, give attention maps, removals and a small "
        "U-Net; everything is scored on 48 others. No mask enters the method; but the built-in generators themselves "
        "were trained with the loss weighted by the toys' masks, and toy-sd-inpaint with holes of their shape."
    ),
    file=__file__,
    parts=(
        Part("alone", ("toy-sd", "toy-sd-inpaint"), lambda context: stages(context, 1)),
        Part("among others", ("toy-sd", "toy-sd-inpaint"), lambda context: stages(context, None)),
    ),
)
