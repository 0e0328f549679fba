"""ConceptAttention (Helbling et al. 2025, https://arxiv.org/abs/2502.04320): are maps of concepts, in the prompt or
not, where the concepts are, and are those of attention's outputs sharper than those of attention itself?

On renders the truth is exact: the picture is noised to several levels and the maps are held against the renderer's
masks, DAAM's of the same pictures beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from claims import common
from claims.bars import Bar
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato.explain.concept_attention import explain_images
from sfumato.explain.daam import explain_images as explain_by_daam
from sfumato.metrics import segmentation, stats
from sfumato.toybox import GROUNDS, SHAPES, SKIES, render

SOURCE = "Helbling et al. 2025"
NAME = "toy-sd3"
STEPS, WINDOW = 8, (0.25, 1.0)  # fewer levels than DAAM's claim takes: each costs a second forward here
TUNE, REPORT = 4000, 3000  # seeds of scenes and noise: never the same for choosing and for reporting
NOTHING = "toys"  # a prompt that names no shape
CONCEPTS = sorted(SHAPES)
BACKGROUND = (*GROUNDS, *SKIES)  # as the authors' segmentation has "floor", "grass", "sky"; else it goes to the shapes


@dataclass(frozen=True)
class Found:
    """For every shape that covers at least four latent cells of a picture: its mask bool (h, w), its concept's map
    (h, w), the map of a shape that is not in the picture, and which picture it is."""

    truths: Tensor
    maps: Tensor
    absent: Tensor
    pictures: list[int]
    shown: Tensor


def scenes(context: Context, split: str, seed: int, n: int) -> tuple[list[common.Prompt], Tensor, Tensor]:
    """Captions, pictures and masks."""
    asked = common.prompts(split, seed, n, None, "random")
    frames = context.once(
        f"frames {split} {seed} {n}", lambda: render([prompt.scene for prompt in asked], common.side(context, NAME))
    )
    return asked, frames.image, frames.mask


def heat_maps(
    context: Context, split: str, seed: int, n: int, how: str, layers: Sequence[str], named: bool
) -> list[Any]:
    """Maps of pictures whose prompt names their toys (``named``) or not. ``how``: the space that is compared, or
    "daam"."""
    asked, pictures, _ = scenes(context, split, seed, n)
    model = common.load(context, NAME)
    found: list[Any] = []
    for start, chunk in context.batches(asked, 25, f"{split}, {how}, {'named' if named else 'not named'}"):
        texts = [prompt.text if named else NOTHING for prompt in chunk]
        given = {"steps": STEPS, "window": WINDOW, "seed": list(range(seed + start, seed + start + len(chunk)))}
        shown = pictures[start : start + len(chunk)]
        if how == "daam":
            found += explain_by_daam(model, shown, texts, **given)
        else:
            concepts = [*CONCEPTS, *BACKGROUND]
            options = {"concepts": concepts, "space": how, "normalise": how == "output", "layers": list(layers)}
            found += explain_images(model, shown, texts, **given, **options)
    return found


def looked_up(context: Context, split: str, seed: int, n: int, found: Sequence[Any], layer: str | None = None) -> Found:
    """What maps, of one layer or all, say of every shape that is there."""
    asked, pictures, masks = scenes(context, split, seed, n)
    only = None if layer is None else [layer]
    truths, own, absent, where = [], [], [], []
    for i, prompt in enumerate(asked):
        there = [toy.shape for toy in prompt.scene.toys]
        others = [concept for concept in CONCEPTS if concept not in there]
        for concept in dict.fromkeys(there):
            objects = [p.object for p in prompt.caption.phrases if p.object is not None and p.head.text == concept]
            mask = torch.isin(masks[i], torch.tensor(objects, dtype=masks.dtype))  # all toys of this shape
            if len(objects) < there.count(concept) or int(mask.sum()) < common.least(context, NAME):
                continue
            truths.append(mask)
            own.append(found[i].map(concept, merge=True, layers=only))
            missing = others[len(truths) % len(others)]
            known = missing in found[i].words  # DAAM maps no word that is not in the prompt
            absent.append(found[i].map(missing, layers=only) if known else torch.zeros(mask.shape))
            where.append(i)
    return Found(torch.stack(truths), torch.stack(own), torch.stack(absent), where, pictures)


def best_layer(context: Context, how: str) -> tuple[str, float]:
    """The layer whose maps of validation scenes segment best, or "joint" where the mean of all does, and the
    threshold."""

    def chosen() -> tuple[str, float]:
        where = ("val", TUNE, context.count(30, 6))
        found = heat_maps(context, *where, how, ["joint"], True)
        scored = []
        for block in dict.fromkeys(("joint", *(layer.site.block for layer in found[0].layers))):
            there = looked_up(context, *where, found, block)
            tau, score = segmentation.fit_threshold(there.maps, there.truths)
            scored.append((score, block, tau))
        _, block, tau = max(scored)
        return block, tau

    return context.once(f"layer {how}", chosen)


def scored(context: Context, how: str, named: bool) -> tuple[Found, segmentation.Score, segmentation.Score, str]:
    """Test scenes at the layer and threshold of validation scenes: of the toys' own concepts, and of absent ones."""

    def made() -> tuple[Found, segmentation.Score, segmentation.Score, str]:
        test = ("test", REPORT, context.count(240, 8))
        if how == "daam":
            val = ("val", TUNE, context.count(30, 6))
            fitted = looked_up(context, *val, heat_maps(context, *val, how, [], True))
            layer, tau = None, segmentation.fit_threshold(fitted.maps, fitted.truths)[0]
        else:
            layer, tau = best_layer(context, how)
        found = looked_up(context, *test, heat_maps(context, *test, how, [layer or ""], named))
        ours, others = (segmentation.score(maps, found.truths, tau) for maps in (found.maps, found.absent))
        return found, ours, others, f"layer {layer or 'all'}, tau {tau:g}"

    return context.once(f"scored {how} {named}", made)


def by_picture(found: Found, score: segmentation.Score) -> list[float]:
    """Mean IoU of each picture's concepts: pictures are the independent samples."""
    where = np.array(found.pictures)
    return [float(np.array(score.ious)[where == i].mean()) for i in sorted(set(found.pictures))]


def spaces(context: Context) -> list[Row]:
    """Outputs of attention against attention itself, and against DAAM."""
    out, ours, others, chosen = scored(context, "output", True)
    low, attention, _, low_chosen = scored(context, "attention", True)
    daam, words, _, words_chosen = scored(context, "daam", True)
    against = stats.paired_difference(by_picture(out, ours), by_picture(low, attention))
    beside = stats.paired_difference(by_picture(out, ours), by_picture(daam, words))
    n = len(set(out.pictures))
    note = (
        f"exact masks; toys of {common.least(context, NAME)}+ pixels; {STEPS} levels; layer, threshold chosen elsewhere"
    )
    return [
        Row(
            claim=f"{NAME}, renders: maps of attention's outputs segment toys better than maps of attention itself "
            "(interval above 0)",
            source=f"{SOURCE}, section 5.1",
            measured=f"mIoU {ours.miou.text()} ({chosen}), higher by {against.text()} per picture",
            baseline=f"queries and keys {attention.miou.text()} ({low_chosen}); absent concepts {others.miou.text()}",
            bars=[Bar(against, 0.0, 1 - attention.miou.value, above=0.0)],
            headline=True,
            n=n,
            leans_on=note,
            data={"ours": ours.to_json(), "attention": attention.to_json(), "difference": against.to_json()},
        ),
        Row(
            claim=f"{NAME}, renders: they segment toys that the prompt names better than DAAM's maps of the words do "
            "(interval above 0)",
            source=f"{SOURCE}, table 1 (Flux, against DAAM on SDXL)",
            measured=f"mIoU {ours.miou.text()}, higher by {beside.text()} per picture",
            baseline=f"DAAM {words.miou.text()} ({words_chosen})",
            bars=[Bar(beside, 0.0, 1 - words.miou.value, above=0.0)],
            n=n,
            leans_on=note,
            data={"daam": words.to_json(), "difference": beside.to_json()},
        ),
    ]


def unnamed(context: Context) -> list[Row]:
    """Concepts that no word of the prompt names."""
    found, ours, others, chosen = scored(context, "output", False)
    picks = [i for i, at in enumerate(found.pictures) if found.pictures.index(at) == i][:10]
    levels = segmentation.normalise(found.maps)
    shown = [found.shown[found.pictures[i]] for i in picks]
    rows = [
        shown,
        [common.heat(levels[i], picture) for i, picture in zip(picks, shown, strict=True)],
        [common.heat(found.truths[i].float()) for i in picks],
    ]
    own, absent = (common.by_cluster(each.hits, found.pictures) for each in (ours, others))
    more = stats.paired_difference(own, absent)
    return [
        Row(
            claim=f"{NAME}, renders, prompt {NOTHING!r}: the hottest pixel of a concept that no word names lies on its "
            "toy more often than that of a concept that is not there (interval above 0)",
            source=f"{SOURCE}, section 4 (concepts need not be in the prompt)",
            measured=f"{percent(ours.pointing)}, more by {percent(more)}; mIoU {ours.miou.text()} ({chosen})",
            baseline=f"absent concepts {percent(others.pointing)}, mIoU {others.miou.text()}",
            bars=[Bar(more, 0.0, 1 - others.pointing.value, above=0.0)],
            n=more.n,
            leans_on=f"exact masks; toys of {common.least(context, NAME)}+ pixels; layer, threshold chosen elsewhere",
            picture=context.save(
                f"concept_attention-{NAME}.png", common.sheet(rows, names=("render", "concept", "truth"))
            ),
            data={"ours": ours.to_json(), "absent": others.to_json(), "more": more.to_json()},
        )
    ]


EXPERIMENT = Experiment(
    key="concept_attention",
    title="ConceptAttention: maps of concepts that need not be in the prompt",
    intro=(
        "All shapes, grounds and skies of the toybox are the concepts of every picture, so each place is shared out"
        f" among them. Renders are noised to the levels from {WINDOW[0]:g} of the schedule on. Layer (or all)"
        " and threshold were chosen on validation scenes, for either space and for DAAM; outputs are normalised over"
        " the concepts, as the authors' segmentation does; intervals of segmentation are over pictures."
    ),
    file=__file__,
    parts=(
        Part(f"{NAME}: spaces", (NAME,), spaces),
        Part(f"{NAME}: not in the prompt", (NAME,), unnamed),
    ),
)
