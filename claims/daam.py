"""DAAM (Tang et al. 2022, https://arxiv.org/abs/2210.04885): do a word's cross-attention maps show where the word went?

On renders the truth is exact: the picture is noised to every step, the model predicts once per step, and the maps are
held against the renderer's masks. On generated pictures the masks are the toy-judge's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from claims import common
from claims.bars import Bar
from claims.common import Prompt, percent
from claims.core import Context, Experiment, Part, Row
from sfumato.attention.call import Call
from sfumato.attention.tap import Tap
from sfumato.explain.daam import DAAM, explain_images
from sfumato.metrics import segmentation, stats
from sfumato.sampling import Intervention, Run, generate
from sfumato.toybox import COLORS, Scene, Toy, caption, oracle, render

SOURCE = "Tang et al. 2022"
STEPS = 20
FEWEST = 3  # toys below which nothing is measured
TAUS = (0.3, 0.4, 0.5)
REPORT, TUNE = 3000, 4000  # seeds of scenes and noise: never the same for choosing and for reporting
FAMILIES = (("ball", "ring"), ("cylinder", "cone"), ("cube", "cross"))  # round, tapering or upright, square-cut


@dataclass(frozen=True)
class Traced:
    """A picture (3, h, w) of a prompt with one raw map (h, w) per word, by the word's first character."""

    prompt: Prompt
    picture: Tensor
    maps: dict[int, Tensor]


@dataclass
class Pairs:
    """Noun maps with the masks they should show, and a map of some other word of the same prompt."""

    maps: list[Tensor]
    truths: list[Tensor]
    others: list[Tensor | None]
    colors: list[Tensor]  # of the noun's colour word
    pictures: list[Tensor]
    words: list[str]
    where: list[int]  # which picture: maps of one picture are no independent samples

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Maps and truths as (n, h, w)."""
        return torch.stack(self.maps), torch.stack(self.truths)


def trace(
    context: Context, name: str, asked: Sequence[Prompt], seed: int, label: str, pictures: Tensor | None = None
) -> list[Traced]:
    """Every prompt generated, or with ``pictures`` (n, 3, h, w) explained, with DAAM watching all its words."""
    model = common.load(context, name)
    traced = []
    for start, chunk in context.batches(asked, 25, label):
        texts = [prompt.text for prompt in chunk]
        seeds = list(range(seed + start, seed + start + len(chunk)))
        if pictures is None:
            daam = DAAM()
            shown = generate(model, texts, seed=seeds, steps=STEPS, interventions=daam).pixels.clamp(-1, 1)
            found = daam.maps
        else:
            shown = pictures[start : start + len(chunk)]
            found = explain_images(model, shown, texts, seed=seeds, steps=STEPS)
        for prompt, picture, heat in zip(chunk, shown, found, strict=True):
            traced.append(Traced(prompt, picture, {span.start: heat.map(span) for span in heat.reading.all()}))
    return traced


def on_renders(context: Context, name: str, split: str, seed: int, n: int) -> tuple[list[Traced], list[Tensor]]:
    """Renders of unseen scenes explained by DAAM, with their exact masks (h, w), once per run."""

    def made() -> tuple[list[Traced], list[Tensor]]:
        asked = common.prompts(split, seed, n, None, "random")
        frames = render([prompt.scene for prompt in asked], common.side(context, name))
        return trace(context, name, asked, seed, f"{name}, renders", frames.image), list(frames.mask)

    return context.once(f"renders {name} {split} {seed} {n}", made)


def generated(context: Context, name: str, split: str, seed: int, n: int) -> list[Traced]:
    """Generated pictures of unseen captions with DAAM watching, once per run."""
    asked = common.prompts(split, seed, n, None, "random")
    return context.once(
        f"generated {name} {split} {seed} {n}", lambda: trace(context, name, asked, seed, f"{name}, generating")
    )


def pairs_of(traced: Sequence[Traced], least: int, truth: Any) -> Pairs:
    """Pairs for every toy of at least ``least`` pixels; ``truth(i, phrase)`` gives its mask bool (h, w), or None."""
    out = Pairs([], [], [], [], [], [], [])
    for i, one in enumerate(traced):
        phrases = one.prompt.caption.phrases
        for phrase in phrases:
            mask = truth(i, phrase) if phrase.object is not None else None
            if mask is None or int(mask.sum()) < least:
                continue
            rest = [other for other in phrases if other is not phrase]
            out.maps.append(one.maps[phrase.head.start])
            out.truths.append(mask)
            out.others.append(one.maps[rest[i % len(rest)].head.start] if rest else None)
            color = next(word for word in phrase.modifiers if word.text in COLORS)
            out.colors.append(one.maps[color.start])
            out.pictures.append(one.picture)
            out.words.append(phrase.head.text)
            out.where.append(i)
    return out


def exact_pairs(context: Context, name: str, split: str, seed: int, n: int) -> Pairs:
    """Pairs on renders, truth from the renderer."""
    traced, masks = on_renders(context, name, split, seed, n)
    return pairs_of(traced, common.least(context, name), lambda i, phrase: masks[i] == phrase.object)


def judged_pairs(context: Context, name: str, split: str, seed: int, n: int) -> Pairs:
    """Pairs on generated pictures, truth from the judge where it reads the wanted shape and colour."""
    traced = generated(context, name, split, seed, n)
    readings = common.judge_of(context).read(torch.stack([one.picture for one in traced]))

    def truth(i: int, phrase: Any) -> Tensor | None:
        request = oracle.RequestedToy.parse([word.text for word in (*phrase.modifiers, phrase.head)])
        toy = oracle.find(readings[i], request.only("shape", "color"))
        return None if toy is None else toy.mask

    return pairs_of(traced, common.least(context, name), truth)


def segment(
    context: Context, name: str, fitted: Pairs, pairs: Pairs, where: str, leans: str, picture: str
) -> list[Row]:
    """The rows of one set of pairs, thresholds fitted on another."""
    if len(fitted.maps) < FEWEST or len(pairs.maps) < FEWEST:
        return [too_few(f"{name}, {where}: noun masks reach mIoU 0.50", len(pairs.maps))]
    maps, truths = pairs.stacked()
    tau, _ = segmentation.fit_threshold(*fitted.stacked())
    ours = segmentation.score(maps, truths, tau)

    def baseline(make: Any) -> segmentation.MapScore:
        level, _ = segmentation.fit_threshold(make(len(fitted.maps), 1), torch.stack(fitted.truths))
        return segmentation.score(make(len(maps), 0), truths, level)

    size = tuple(maps.shape[-2:])
    trivial = {
        "whole image": baseline(lambda n, seed: segmentation.whole_image(n, size)),
        "centred": baseline(lambda n, seed: segmentation.centred_gaussian(n, size)),
        "random": baseline(lambda n, seed: segmentation.random_blobs(n, size, seed=seed)),
    }
    # another word's map, where the prompt has another noun
    held = [i for i, other in enumerate(pairs.others) if other is not None]
    other = segmentation.score(torch.stack([pairs.others[i] for i in held]), truths[held], tau)  # type: ignore[misc]
    best = max(trivial.values(), key=lambda score: score.miou.value)

    def by_picture(values: Sequence[float], which: Sequence[int] | None = None) -> list[float]:
        return common.by_cluster(values, [pairs.where[i] for i in (which or range(len(maps)))])

    own = stats.bootstrap(by_picture(ours.ious))
    over = stats.paired_difference(by_picture(ours.ious), by_picture(best.ious))
    apart = stats.paired_difference(by_picture([ours.ious[i] for i in held], held), by_picture(other.ious, held))
    hottest = stats.bootstrap(by_picture(ours.hits))
    blind = max(score.pointing.value for score in trivial.values())
    printed = ", ".join(f"{label} {score.miou.value:.3f}" for label, score in trivial.items())
    chosen = list(range(0, len(maps), max(1, len(maps) // 10)))[:10]
    levels = segmentation.normalise(maps)
    shown = [
        [pairs.pictures[i] for i in chosen],
        [common.heat(levels[i], pairs.pictures[i]) for i in chosen],
        [common.heat((levels[i] >= tau).float()) for i in chosen],
        [common.heat(truths[i].float()) for i in chosen],
    ]
    heads = [pairs.words[i] for i in chosen]
    names = ("picture", "map", f"above {tau:g}", "truth")
    saved = context.save(
        picture, common.sheet(shown, names=names, heads=heads, title=f"{name}, {where}: maps of nouns")
    )
    data = {
        "ours": ours.to_json(),
        "shuffled": other.to_json(),
        "baselines": {label: score.to_json() for label, score in trivial.items()},
    }
    return [
        Row(
            claim=(
                f"{name}, {where}: noun masks reach mIoU 0.50, 0.20 above the best trivial baseline and above another "
                "noun's map (paper: 0.588 to 0.648 on real words, SD 2)"
            ),
            source=SOURCE,
            measured=f"mIoU {own.text()} at tau {tau:g}; {over.text()} above the baseline, {apart.text()} above "
            "another noun's",
            baseline=f"{printed}, another noun's map {other.miou.text()}",
            bars=[
                Bar(own, best.miou.value, 1.0, at_least=0.5, what="mIoU"),
                Bar(over, 0.0, 1 - best.miou.value, at_least=0.2, what="above the best trivial baseline"),
                Bar(apart, 0.0, 1 - other.miou.value, at_least=0.2, what="above another noun's map"),
            ],
            headline=where == "renders",
            n=own.n,
            leans_on=leans,
            picture=saved,
            data=data,
        ),
        Row(
            claim=f"{name}, {where}: a noun's hottest pixel lies on its toy nine times in ten or more",
            source="pointing game, Zhang et al. 2016",
            measured=percent(hottest),
            baseline=", ".join(f"{label} {100 * score.pointing.value:.1f} %" for label, score in trivial.items())
            + f", another noun's map {100 * other.pointing.value:.1f} %",
            bars=[Bar(hottest, blind, 1.0, at_least=0.9)],
            n=hottest.n,
            leans_on=leans,
            picture=saved,
            data=data,
        ),
    ]


def too_few(claim: str, n: int) -> Row:
    """The row of a model that draws too few toys as asked for anything to be measured."""
    return Row(claim, SOURCE, measured="", baseline="", n=n, void="too few toys are drawn as asked")


def exact(name: str, context: Context) -> list[Row]:
    """Segmentation on renders."""
    fitted = exact_pairs(context, name, "val", TUNE, context.count(50, 12))
    pairs = exact_pairs(context, name, "test", REPORT, context.count(200, 16))
    note = f"exact masks; toys of {common.least(context, name)}+ pixels; fresh noise at each of {STEPS} steps"
    return segment(context, name, fitted, pairs, "renders", note, f"daam-{name}-renders.png")


def judged(name: str, context: Context) -> list[Row]:
    """Segmentation on generated pictures."""
    fitted = judged_pairs(context, name, "val", TUNE, context.count(50, 12))
    pairs = judged_pairs(context, name, "test", REPORT, context.count(200, 16))
    trust = common.trust(context)
    leans = f"{common.trust_text(context, 'shape', 'color')}, mask IoU {trust.miou:.3f}; toys it reads as asked for"
    return segment(context, name, fitted, pairs, "generated", leans, f"daam-{name}-generated.png")


def syntax(name: str, context: Context) -> list[Row]:
    """Overlap of a head's and its dependent's map, by relation."""
    traced = generated(context, name, "test", REPORT, context.count(200, 16))
    edges: dict[str, list[tuple[int, int, int]]] = {}  # relation -> (picture, head, dependent)
    for i, one in enumerate(traced):
        described = one.prompt.caption
        for edge in described.dependencies:
            edges.setdefault(edge.relation, []).append((i, edge.head.start, edge.dependent.start))
        for first in described.phrases:  # the floor: an adjective with the noun of another phrase
            for second in described.phrases:
                if first is not second:
                    edges.setdefault("unrelated", []).extend((i, second.head.start, m.start) for m in first.modifiers)
    levels = [{at: segmentation.normalise(level[None])[0] for at, level in one.maps.items()} for one in traced]
    rows = []
    for tau in TAUS:
        means: dict[str, tuple[float, float, float]] = {}
        single: dict[str, dict[int, list[float]]] = {}  # relation -> picture -> IoUs
        for relation, found in edges.items():
            heads = torch.stack([levels[i][head] >= tau for i, head, _ in found])
            dependents = torch.stack([levels[i][dependent] >= tau for i, _, dependent in found])
            iou, iod, ioh = segmentation.overlap(heads, dependents)
            means[relation] = (float(iou.mean()), float(iod.mean()), float(ioh.mean()))
            for (i, _, _), value in zip(found, iou.tolist(), strict=True):
                single.setdefault(relation, {}).setdefault(i, []).append(value)
        # pairs of one picture are not independent: compare pictures
        both = sorted(set(single["amod"]) & set(single["unrelated"]))
        amod = [float(np.mean(single["amod"][i])) for i in both]
        floor = [float(np.mean(single["unrelated"][i])) for i in both]
        p = stats.permutation(amod, floor, paired=True)
        factor = stats.bootstrap(
            amod, floor, statistic=lambda a, b: a.mean(-1) / np.maximum(b.mean(-1), 1e-12), paired=True
        )
        with_conj = sorted(set(single["amod"]) & set(single.get("conj", {})))
        apart = stats.paired_difference(
            *([float(np.mean(single[relation][i])) for i in with_conj] for relation in ("amod", "conj"))
        )
        listed = "; ".join(
            f"{relation} {iou:.3f} / {iod:.3f} / {ioh:.3f} (n {len(edges[relation])})"
            for relation, (iou, iod, ioh) in sorted(means.items(), key=lambda item: -item[1][0])
        )
        rows.append(
            Row(
                claim=(
                    f"{name}, tau {tau}: an adjective's map overlaps its noun's 1.5 times as much as an unrelated "
                    "noun's, and more than joined nouns overlap"
                ),
                source=f"{SOURCE}, section 4",
                measured=f"{factor.text(digits=2)} times (p {p:.2g}), {apart.text()} more than joined nouns; "
                f"mIoU / mIoD / mIoH: {listed}",
                baseline=f"unrelated mIoU {means['unrelated'][0]:.3f}",
                bars=[
                    Bar(factor, 1.0, 1 / max(means["unrelated"][0], 0.05), at_least=1.5, above=1.0, what="ratio"),
                    Bar(apart, 0.0, 1.0, above=0.0, what="over joined nouns"),
                ],
                n=len(both),
                data={"means": means, "p": p, "factor": factor.to_json(), "n": {k: len(v) for k, v in edges.items()}},
            )
        )
    return rows


def cohyponyms(name: str, context: Context) -> list[Row]:
    """Two toys of one family of shapes against two of different families."""
    n = context.count(600, 12)
    eye = common.judge_of(context)
    arms: dict[str, tuple[list[bool], list[float]]] = {}
    shown = []
    for arm, within in (("one family", True), ("two families", False)):
        asked = [cohyponym_prompt(np.random.default_rng((REPORT, int(within), i)), within) for i in range(n)]
        traced = trace(context, name, asked, REPORT, f"{name}, {arm}")
        pictures = torch.stack([one.picture for one in traced])
        checks = [oracle.check(r, p.requests) for r, p in zip(eye.read(pictures), asked, strict=True)]
        first, second = (
            segmentation.normalise(torch.stack([one.maps[one.prompt.caption.phrases[k].head.start] for one in traced]))
            >= 0.4
            for k in (0, 1)
        )
        arms[arm] = ([check.all_present for check in checks], segmentation.iou(first, second).tolist())
        shown.append(list(pictures[:10]))
    (near_there, near_iou), (far_there, far_iou) = arms["one family"], arms["two families"]
    there = stats.newcombe(stats.share(far_there), stats.share(near_there))
    overlap = stats.difference(near_iou, far_iou)
    return [
        Row(
            claim=(
                f"{name}: two toys of one family of shapes are both drawn less often, and their words' maps overlap "
                "more, than two toys of different families (both intervals exclude 0)"
            ),
            source=f"{SOURCE}, section 5",
            measured=(
                f"both there {percent(stats.share(near_there))} against {percent(stats.share(far_there))}, difference "
                f"{percent(there)}; map IoU higher by {overlap.text()}"
            ),
            baseline="no difference: 0",
            bars=[
                Bar(there, 0.0, 0.09, above=0.0, what="both there (ideal: the paper's 9 points)"),
                Bar(overlap, 0.0, 0.1, above=0.0, what="overlap of maps"),
            ],
            n=2 * n,
            leans_on=common.trust_text(context, "shape"),
            picture=context.save(f"daam-{name}-cohyponyms.png", common.sheet(shown, names=list(arms))),
            data={"there": there.to_json(), "overlap": overlap.to_json()},
        )
    ]


def cohyponym_prompt(rng: np.random.Generator, within: bool) -> Prompt:
    """Such as "a red ball and a blue ring": two shapes of one family or of two, different colours."""
    first, second = rng.permutation(len(FAMILIES))[:2]
    shapes = list(FAMILIES[first]) if within else [FAMILIES[k][rng.integers(2)] for k in (first, second)]
    rng.shuffle(shapes)
    colors = rng.permutation(len(COLORS))[:2]
    scene = Scene(tuple(Toy(shape, COLORS[color]) for shape, color in zip(shapes, colors, strict=True)))
    described = caption(scene, None, "short")
    return Prompt(described.text, described, scene, oracle.requested_toys(described))


def adjectives(name: str, context: Context) -> list[Row]:
    """How far a colour word's map spreads beyond its toy, compared with the noun's."""
    pairs = exact_pairs(context, name, "test", REPORT, context.count(200, 16))
    truths = torch.stack(pairs.truths)
    outside = {
        word: (1 - segmentation.inside_share(torch.stack(maps), truths)).tolist()
        for word, maps in (("color", pairs.colors), ("noun", pairs.maps))
    }
    spread = stats.paired_difference(*(common.by_cluster(outside[word], pairs.where) for word in ("color", "noun")))
    chance = float(1 - truths.float().mean((1, 2)).mean())
    means = {word: float(np.mean(values)) for word, values in outside.items()}
    return [
        Row(
            claim=f"{name}, renders: a colour word's map lies outside its toy more than the noun's does",
            source=f"{SOURCE}, section 5 (descriptive adjectives attend too broadly)",
            measured=f"{spread.text()} more, p {spread.p:.2g}: {means['color']:.3f} and {means['noun']:.3f} of the map",
            baseline=f"no difference: 0; a flat map has {chance:.3f} outside",
            bars=[Bar(spread, 0.0, chance - means["noun"], above=0.0)],
            n=spread.n,
            leans_on="exact masks",
            data={"spread": spread.to_json(), "outside": means, "flat": chance},
        )
    ]


class Frozen(Intervention):
    """Records every probability of the text-reading attention in one run and puts it back in the next ones.

    The layout stays that of the first run, whatever the prompts of the others say (the original's saved heads).
    """

    role = "editor"

    def __init__(self) -> None:
        self.kept: dict[tuple[int, str], Tensor] = {}
        self.recorded = False

    def taps(self) -> Sequence[Tap]:
        def record(call: Call) -> None:
            self.kept[call.step.i, call.site.path] = call.probs()
            self.mark(call.step, sites=[call.site.path])

        def replay(call: Call) -> Tensor:
            self.mark(call.step, sites=[call.site.path])
            return self.kept[call.step.i, call.site.path]

        chosen = {"where": lambda site: site.kind in ("cross", "joint"), "name": "frozen"}
        return [Tap(edit_probs=replay, **chosen) if self.recorded else Tap(observe=record, **chosen)]

    def finish(self, run: Run) -> None:
        self.recorded = True


def frozen_swap(name: str, context: Context) -> list[Row]:
    """One colour word changed while all attention is held as it was: does anything but the toy change?"""
    model, eye = common.load(context, name), common.judge_of(context)
    asked = common.prompts("test", REPORT + 5, context.count(120, 10), 1, "short")
    changes: dict[str, list[float]] = {key: [] for key in ("again", "frozen", "frozen inside", "free", "free inside")}
    recolored: list[bool] = []
    shown: list[list[Tensor]] = []
    for start, chunk in context.batches(asked, 10, f"{name}, frozen"):
        colors = [prompt.requests[0].color or "" for prompt in chunk]
        other = [COLORS[(COLORS.index(color) + 3) % len(COLORS)] for color in colors]
        texts = [prompt.text for prompt in chunk]
        swapped = [text.replace(old, new) for text, old, new in zip(texts, colors, other, strict=True)]
        seeds = list(range(REPORT + start, REPORT + start + len(chunk)))

        def made(words: list[str], *frozen: Frozen, seeds: list[int] = seeds) -> Tensor:
            return generate(model, words, seed=seeds, steps=STEPS, interventions=frozen).pixels.clamp(-1, 1)

        frozen = Frozen()
        pictures = {"base": made(texts, frozen), "again": made(texts, frozen), "frozen": made(swapped, frozen)}
        pictures["free"] = made(swapped)
        readings = eye.read(pictures["base"])
        for i, reading in enumerate(readings):
            toy = oracle.find(reading, chunk[i].requests[0].only("shape", "color"))
            if toy is None:
                continue
            near = functional.max_pool2d(toy.mask[None].float(), 9, 1, 4)[0] > 0
            for key in ("again", "frozen", "free"):
                changed = (pictures[key][i] - pictures["base"][i]).abs().mean(0) * 127.5
                changes[key].append(float(changed[~near].mean()))
                if key != "again":
                    changes[f"{key} inside"].append(float(changed[toy.mask].mean()))
            recolored.append(
                any(found.has(color=other[i]) for found in eye.read(pictures["frozen"][i : i + 1])[0].objects)
            )
            if len(shown) < 10:
                shown.append([pictures[key][i] for key in ("base", "frozen", "free")])
    if len(shown) < FEWEST:
        return [
            too_few(f"{name}: with all attention held, another colour word still changes the background", len(shown))
        ]
    kept = stats.bootstrap(
        changes["frozen"],
        changes["free"],
        statistic=lambda a, b: a.mean(-1) / np.maximum(b.mean(-1), 1e-9),
        paired=True,
    )
    means = {key: float(np.mean(values)) for key, values in changes.items()}
    return [
        Row(
            claim=(
                f"{name}: with all attention held, another colour word still changes the background, by a quarter or "
                "more of what it changes there when attention is free"
            ),
            source=f"{SOURCE}, section 5 (descriptive adjectives attend too broadly)",
            measured=(
                f"{kept.text(digits=2)} of it: {means['frozen']:.1f} of 255 grey levels outside the toy, inside "
                f"{means['frozen inside']:.1f}; the toy takes the new colour in {percent(stats.share(recolored))}"
            ),
            baseline=(
                f"same prompt again {means['again']:.3f}; attention not held {means['free']:.1f} outside, "
                f"{means['free inside']:.1f} inside"
            ),
            bars=[Bar(kept, 0.0, 1.0, at_least=0.25)],
            n=kept.n,
            leans_on=common.trust_text(context, "shape", "color"),
            picture=context.save(
                f"daam-{name}-frozen.png",
                common.sheet(
                    [list(row) for row in zip(*shown, strict=True)],
                    names=("prompt", "other colour, attention held", "other colour, free"),
                ),
            ),
            data={"kept": kept.to_json(), "means": means, "recolored": stats.share(recolored).to_json()},
        )
    ]


def parts(name: str) -> tuple[Part, ...]:
    """The parts of one model."""
    judge_too = (name, "toy-judge")
    return (
        Part(f"{name}: renders", (name,), lambda context: exact(name, context)),
        Part(f"{name}: generated", judge_too, lambda context: judged(name, context)),
        Part(f"{name}: syntax", (name,), lambda context: syntax(name, context)),
        Part(f"{name}: cohyponyms", judge_too, lambda context: cohyponyms(name, context)),
        Part(f"{name}: adjectives", (name,), lambda context: adjectives(name, context)),
        Part(f"{name}: frozen attention", judge_too, lambda context: frozen_swap(name, context)),
    )


EXPERIMENT = Experiment(
    key="daam",
    title="What the DAAM: word maps from cross-attention",
    intro=(
        "Maps are means over text-reading sites, heads and steps of the conditional branch, raised to picture size."
        " Thresholds on the min-max normalised maps were fitted on validation scenes; the baselines got their own."
        " Words are scored where their toy covers at least four latent cells."
    ),
    file=__file__,
    parts=(*parts("toy-sd"), *parts("toy-sd3")),
)
