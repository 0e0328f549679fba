"""No Token Left Behind: does CLIP's explanation in the loss help where its score alone is satisfied with less?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from claims import common
from claims.attend_excite import Arm, pictured
from claims.bars import Bar
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from claims.paint_with_words import Found, per_picture, placed
from sfumato import masks
from sfumato.metrics import stats
from sfumato.models.readers import load_clip
from sfumato.relevance.clip import ClipExplainer
from sfumato.sampling import generate
from sfumato.steer.no_token_left_behind import NoTokenLeftBehind, Region, diagnose, learn_prompt, optimise
from sfumato.steer.no_token_left_behind.class_prompts import ClassPrompts, image_embeds
from sfumato.toybox import SHAPES, oracle, render, sample_scene
from sfumato.toybox.scene import COLORS

SOURCE = "Paiss, Chefer, Wolf 2022"
TUNE, REPORT = 14100, 14200
GUIDE: dict[str, Any] = {"cutouts": 2, "augment": 0.3, "window": (0.0, 0.6)}
STEPS = 25
N, BOXES, TUNED = 240, 200, 24  # prompts, boxes, and prompts or boxes to choose by
VECTORS = 4  # of context: 16, as in the paper, are half of what toy-clip's text tower reads
RATES, WEIGHTS = (0.002, 0.02, 0.1), (0.3, 1.0, 3.0)
STRENGTHS = (0.1, 0.2, 0.4)
WINDOWS = ((0.0, 0.3), (0.0, 0.6))
MORE, FOUND, INSIDE = 0.02, 0.8, 0.15
SHOWN = 6


# --- prompts for classification --------------------------------------------------------------------------------------


def shots(seed: int, per: int, side: int) -> tuple[Tensor, list[int]]:
    """``per`` pictures of each shape, ``side`` pixels wide, everything else at random; with their labels."""
    rng, scenes, labels = np.random.default_rng((41, seed)), [], []
    for label, shape in enumerate(SHAPES):
        for _ in range(per):
            scenes.append(sample_scene(rng, 1, "any").replace(object=0, shape=shape))
            labels.append(label)
    return torch.cat([render(scenes[i : i + 64], side).image for i in range(0, len(scenes), 64)]), labels


def accuracy(prompt: Any, images: Tensor, labels: Sequence[int]) -> float:
    """Share of pictures recognised."""
    guesses = prompt.logits(images).argmax(1)
    return float((guesses == torch.tensor(labels)).float().mean())


def relevance(prompt: Any, images: Tensor, labels: Sequence[int], every: int = 20) -> float:
    """The share of relevance that the right class's name has in the prompt, over some of the pictures."""
    explainer = ClipExplainer(load_clip(prompt.clip))
    with torch.no_grad():
        embeds = image_embeds(explainer, images[::every])
    _, shares = ClassPrompts(explainer, prompt.classes, len(prompt.context)).relevance(prompt.context, embeds)
    return float(shares.detach()[torch.arange(len(embeds)), torch.tensor(labels[::every])].mean())


def prompts(context: Context) -> list[Row]:
    """One picture per class; the rate is tuned for CoOp, the weight of the explanation at that rate."""
    epochs, side = context.count(50, 3), common.side(context, "toy-clip")
    test, val = shots(REPORT, context.count(80, 8), side), shots(TUNE, context.count(40, 4), side)

    def learnt(seed: int, **options: Any) -> Any:
        return learn_prompt(*shots(seed, 1, side), SHAPES, epochs=epochs, seed=seed, context=VECTORS, **options)

    def tried(**options: Any) -> float:
        return float(np.mean([accuracy(learnt(seed, **options), *val) for seed in splits]))

    splits = [TUNE + 1 + i for i in range(context.count(4, 1))]
    rates = {r: tried(learning_rate=r, explain=0) for r in RATES}
    rate = max(rates, key=lambda r: rates[r])
    weights = {w: tried(learning_rate=rate, explain=w) for w in WEIGHTS}
    weight = max(weights, key=lambda w: weights[w])
    seeds = [REPORT + 1 + i for i in range(context.count(20, 2))]
    ours, plain = (
        [(accuracy(kept, *test), relevance(kept, *test)) for kept in kepts]
        for kepts in ([learnt(s, learning_rate=rate, explain=w) for s in seeds] for w in (weight, 0.0))
    )
    chosen = {"rate": rate, "weight": weight, "rates": list(rates.items()), "weights": list(weights.items())}
    return prompt_rows(ours, plain, chosen)


def prompt_rows(
    ours: Sequence[tuple[float, float]], plain: Sequence[tuple[float, float]], chosen: Mapping[str, Any]
) -> list[Row]:
    """The verdicts from (accuracy, relevance of the right name) of each split, with the explanation and without."""
    (mine, shares), (coop, others) = (zip(*each, strict=True) for each in (ours, plain))
    more, up = stats.paired_difference(mine, coop), stats.paired_difference(shares, others)
    about = {"n": len(ours), "data": {"ours": mine, "coop": coop, "shares": [shares, others], **chosen}}
    return [
        Row(
            claim="one picture per class: with the explanation in the loss, the learnt prompt recognises "
            f"{100 * MORE:.0f} points more pictures than without it (CoOp)",
            source=f"{SOURCE}, table 1 (the size is ours)",
            measured=f"{100 * np.mean(mine):.1f} %, {percent(more)} more; weight {chosen['weight']:g} (tuned)",
            baseline=f"CoOp {100 * np.mean(coop):.1f} % at its tuned rate {chosen['rate']:g}; chance "
            f"{100 / len(SHAPES):.0f} %",
            bars=[common.lift(more, float(np.mean(coop)), MORE)],
            **about,
        ),
        Row(
            claim="one picture per class: with the explanation in the loss, the score of the right class rests more on "
            "its name than without it",
            source=f"{SOURCE}, section 4.1 (what the loss is for)",
            measured=f"{np.mean(shares):.3f} of the relevance, {up.text()} more",
            baseline=f"CoOp {np.mean(others):.3f}",
            bars=[common.lift(up, float(np.mean(others)))],
            **about,
        ),
    ]


# --- several toys -----------------------------------------------------------------------------------------------------


def checks(context: Context, pixels: Tensor, asked: Sequence[common.Prompt]) -> list[oracle.Check]:
    """The judge's verdict on each picture."""
    readings = common.judge_of(context).read(pixels.clamp(-1, 1))
    return [oracle.check(reading, prompt.requests) for reading, prompt in zip(readings, asked, strict=True)]


def timed(
    context: Context, name: str, asked: Sequence[common.Prompt], seed: int, label: str, steps: int = STEPS, **guide: Any
) -> tuple[Tensor, float]:
    """Pictures (n 3 h w) and CPU seconds per picture."""

    def pictures() -> tuple[Tensor, float]:
        model, out, start = common.load(context, name), [], time.process_time()
        for first, chunk in context.batches(asked, 25, label):
            systems = [NoTokenLeftBehind(**{**GUIDE, **guide})] if guide else []
            seeds = [seed + first + i for i in range(len(chunk))]
            made = generate(model, [p.text for p in chunk], seed=seeds, steps=steps, interventions=systems)
            out.append(made.pixels.detach().clamp(-1, 1))
        return torch.cat(out), (time.process_time() - start) / len(asked)

    what = (label, sorted(guide.items()), steps, seed, [prompt.text for prompt in asked])
    return common.resumed(context, what, pictures)


def premise(context: Context) -> list[Row]:
    """The score's words tell which toy is missing."""
    asked = common.pair_prompts(TUNE + 3, common.tenth(context, N))
    side, hits, missing = common.side(context, "toy-clip"), [], []
    for prompt in asked:
        gone = int(np.random.default_rng(len(hits)).integers(2))
        scene = prompt.scene.replace(object=0, x=-0.8).replace(object=1, x=0.8)
        words = [toy.shape for toy in prompt.scene.toys]
        both, alone = diagnose(render([scene, scene.remove(gone)], side).image, [prompt.text] * 2, words)
        hits.append(alone[words[gone]] < alone[words[1 - gone]])
        missing.append(both[words[gone]] - alone[words[gone]])
    return premise_rows(hits, missing)


def premise_rows(hits: Sequence[bool], missing: Sequence[float]) -> list[Row]:
    """The verdict from whether the missing word was the less relevant one, and how much relevance it lost."""
    right, drop = stats.share(hits), stats.mean(missing)
    return [
        Row(
            claim="when one of two named toys is taken out of the picture, its word is the less relevant one in "
            f"{100 * FOUND:.0f} % of cases",
            source=f"{SOURCE}, section 4.3 (the size is ours)",
            measured=f"{percent(right)}; its relevance falls by {drop.text()}",
            baseline="chance 50 %",
            bars=[Bar(right, null=0.5, ideal=1.0, above=0.5, at_least=FOUND)],
            n=len(hits),
            data={"right": right.to_json(), "drop": drop.to_json()},
        )
    ]


def best_guide(context: Context, name: str, explain: float) -> dict[str, Any]:
    """Strength and window with which most pictures show all toys, for guidance with or without the explanation."""
    tuning = common.steering("three toys", TUNE, common.tenth(context, TUNED))
    scores = []
    for window in WINDOWS[:: 2 if context.quick else 1]:
        for strength in STRENGTHS[:: 2 if context.quick else 1]:
            given = {"strength": strength, "window": window, "explain": explain}
            pixels, _ = timed(context, name, tuning, TUNE, f"{name}, {given}", **given)
            found = checks(context, pixels, tuning)
            scores.append((sum(check.all_present for check in found), sum(sum(c.present) for c in found), given))
    return max(scores, key=lambda score: score[:2])[2]


def several_toys(name: str, context: Context) -> list[Row]:
    """Guided with and without the explanation, each as tuned, and plain with as much time."""
    guides = {"plain": {}, "CLIP": best_guide(context, name, 0.0), "explained": best_guide(context, name, 1.0)}
    asked = common.steering("three toys", REPORT, common.tenth(context, N))
    made, seconds = {}, {}
    for arm, guide in guides.items():
        made[arm], seconds[arm] = timed(context, name, asked, REPORT, f"{name}, {arm}", **guide)
    longer = min(STEPS * 8, max(STEPS, round(STEPS * seconds["explained"] / max(seconds["plain"], 1e-9))))
    made["longer"], seconds["longer"] = timed(context, name, asked, REPORT, f"{name}, longer", steps=longer)
    arms = {arm: Arm(pixels, checks(context, pixels, asked), seconds[arm]) for arm, pixels in made.items()}
    names = {"plain": "plain", "CLIP": "CLIP guidance", "explained": "with its explanation"}
    sheet = pictured({says: arms[arm] for arm, says in names.items()}, asked, f"{name}: no word is left behind")
    shown = {
        "leans_on": common.trust_text(context, "shape", "color"),
        "picture": context.save(f"no-token-left-behind-{name}.png", sheet),
        "data": {"steps": longer, "tuned": {arm: guide for arm, guide in guides.items() if guide}},
    }
    return several_rows(name, arms, longer, shown)


def several_rows(name: str, arms: Mapping[str, Arm], longer: int, shown: Mapping[str, Any]) -> list[Row]:
    """The verdict from the arms plain, CLIP, explained and longer (plain, of so many steps); cost in CPU seconds."""
    there = {arm: stats.share(one.there) for arm, one in arms.items()}
    bound = {arm: stats.share(one.bound) for arm, one in arms.items()}
    more = {over: stats.mcnemar(arms["explained"].there, arms[over].there) for over in ("plain", "CLIP", "longer")}
    return [
        Row(
            claim=f"{name}: all three named toys are there more often than with plain CLIP guidance, and than in plain "
            "sampling that takes as long",
            source=f"{SOURCE} (its loss; guiding diffusion is ours)",
            measured=f"all there {percent(there['explained'])} (with their colours {percent(bound['explained'])}); "
            f"over CLIP guidance {percent(more['CLIP'])}, over as much time {percent(more['longer'])}",
            baseline=f"CLIP guidance {percent(there['CLIP'])}, plain {percent(there['plain'])}, plain with {longer} "
            f"steps {percent(there['longer'])}",
            bars=[
                common.lift(more[over], there[over].value, what=f"over {says}")
                for over, says in (("CLIP", "CLIP guidance"), ("longer", "as much time"))
            ],
            void=common.void(there["plain"]),
            headline=True,
            n=len(arms["plain"].checks),
            **{
                **shown,
                "data": {
                    "there": {arm: each.to_json() for arm, each in there.items()},
                    "bound": {arm: each.to_json() for arm, each in bound.items()},
                    "gains": {over: each.to_json() for over, each in more.items()},
                    "seconds": {arm: one.cost for arm, one in arms.items()},
                    **shown.get("data", {}),
                },
            },
        )
    ]


# --- boxes -----------------------------------------------------------------------------------------------------------


class Layout:
    """A prompt with one toy on a ground, and the box it shall be in, in pictures ``side`` pixels wide."""

    def __init__(self, seed: int, index: int, side: int):
        rng = np.random.default_rng((seed, index, 17))
        shape, color = str(rng.choice(SHAPES)), str(rng.choice(COLORS))
        self.phrase = f"{color} {shape}"
        self.text = f"a {self.phrase} on the grass"
        width, height = rng.uniform(0.32, 0.5) * side, rng.uniform(0.32, 0.5) * side
        x, y = rng.uniform(0, side - width), rng.uniform(0.3, 1.0) * (side - height)  # toys stand on the ground
        self.boxes = [(float(x), float(y), float(x + width), float(y + height))]
        self.share = [each / side for each in self.boxes[0]]
        self.requests = (oracle.RequestedToy(shape=shape, color=color),)

    @property
    def prompt(self) -> Layout:
        """What :func:`claims.paint_with_words.placed` asks for."""
        return self


BOXED: dict[str, dict[str, Any]] = {
    "plain": {},
    "CLIP": {"explain": 0.0},
    "masked": {"explain": 0.0, "spatial": 0.0},
    "explained": {"explain": 0.0, "spatial": 0.5},
}


def in_boxes(
    context: Context, name: str, asked: Sequence[Layout], seed: int, arm: str, **given: Any
) -> tuple[Tensor, list[list[Found]]]:
    """Pictures of one arm, and where the judge finds the toys."""

    def drawn() -> tuple[Tensor, float]:
        model, out = common.load(context, name), []
        for i, (layout,) in context.batches(asked, 1, f"{name}, boxes, {arm}"):
            system = {**GUIDE, "template": "a {}", **BOXED[arm], **given}
            if arm in ("masked", "explained"):
                system |= {"phrases": [layout.phrase], "box": [layout.share]}
            systems = [NoTokenLeftBehind(**system)] if arm != "plain" else []
            made = generate(model, layout.text, seed=seed + i, steps=STEPS, interventions=systems)
            out.append(made.pixels.detach().clamp(-1, 1))
        return torch.cat(out), 0.0

    what = (f"{name}, boxes, {arm}", sorted(given.items()), seed, [(one.text, one.share) for one in asked])
    pixels, _ = common.resumed(context, what, drawn)
    return pixels, placed(context, asked, pixels)  # type: ignore[arg-type]


def boxes(name: str, context: Context) -> list[Row]:
    """Toys in boxes: by relevance, by masked similarity alone, by CLIP alone, each at its tuned strength; and plain."""
    side = common.side(context, name)
    tuning = [Layout(TUNE, i, side) for i in range(common.tenth(context, TUNED))]
    asked = [Layout(REPORT, i, side) for i in range(common.tenth(context, BOXES))]
    strengths: dict[str, float] = {}
    pixels: dict[str, Tensor] = {}
    found: dict[str, list[list[Found]]] = {}
    for arm in BOXED:
        given = {}
        if arm != "plain":
            scores = {
                s: sum(per_picture(in_boxes(context, name, tuning, TUNE, arm, strength=s)[1], "iou"))
                for s in STRENGTHS[:: 2 if context.quick else 1]
            }
            given["strength"] = strengths[arm] = max(scores, key=lambda s: scores[s])
        pixels[arm], found[arm] = in_boxes(context, name, asked, REPORT, arm, **given)
    few = range(min(SHOWN, len(asked)))
    rows: dict[str, list[Any]] = {"the box": []}
    for i in few:
        frame = masks.box_mask(asked[i].boxes[0], (side, side)) * 2 - 1
        rows["the box"].append(frame.expand(3, -1, -1))
    rows |= {arm: [pixels[arm][i] for i in few] for arm in BOXED}
    shown = {
        "leans_on": common.trust_text(context, "shape", "color"),
        "picture": context.save(
            f"no-token-left-behind-boxes-{name}.png", common.side_by_side(rows, [asked[i].phrase for i in few])
        ),
        "data": {"strengths": strengths},
    }
    return box_rows(name, found, shown)


def box_rows(name: str, found: Mapping[str, Sequence[Sequence[Found]]], shown: Mapping[str, Any]) -> list[Row]:
    """The verdict from the arms plain, CLIP, masked and explained."""
    inside = {arm: stats.share([one[0].inside for one in each]) for arm, each in found.items()}
    iou = {arm: stats.bootstrap(per_picture(each, "iou")) for arm, each in found.items()}
    more = {
        over: stats.mcnemar(*([one[0].inside for one in found[arm]] for arm in ("explained", over)))
        for over in ("CLIP", "masked")
    }
    return [
        Row(
            claim=f"{name}: a toy's middle lies in its box {100 * INSIDE:.0f} points more often than with CLIP "
            f"guidance "
            "and than with the similarity of the masked picture",
            source=f"{SOURCE}, section 4.4 (its loss; guiding diffusion and the size are ours)",
            measured=f"inside {percent(inside['explained'])}, box IoU {iou['explained'].text()}; over CLIP "
            f"{percent(more['CLIP'])}, over masked similarity {percent(more['masked'])}",
            baseline=f"inside: CLIP {percent(inside['CLIP'])}, masked {percent(inside['masked'])}, plain "
            f"{percent(inside['plain'])}; IoU {iou['CLIP'].text()}, {iou['masked'].text()}, {iou['plain'].text()}",
            bars=[common.lift(each, inside[over].value, INSIDE, f"over {over}") for over, each in more.items()],
            n=len(found["plain"]),
            **{
                **shown,
                "data": {
                    "inside": {arm: each.to_json() for arm, each in inside.items()},
                    "iou": {arm: each.to_json() for arm, each in iou.items()},
                    **shown.get("data", {}),
                },
            },
        )
    ]


def latents(context: Context) -> list[Row]:
    """Latents optimised without a denoiser: what CLIP alone can draw through the codec."""
    asked = common.pair_prompts(REPORT + 7, context.count(12, 2))
    model, steps = common.load(context, "toy-sd"), context.count(120, 4)
    side = common.side(context, "toy-sd")
    halves = torch.zeros(2, side, side)
    halves[0, :, : side // 2], halves[1, :, side // 2 :] = 1, 1
    arms = {}
    for arm, given in (("CLIP", {"explain": 0.0}), ("explained", {})):
        regions = [
            [
                Region(f"a {request.color} {request.shape}", half)
                for request, half in zip(each.requests, halves, strict=True)
            ]
            for each in asked
        ]
        done = optimise(
            model, [p.text for p in asked], steps=steps, seed=REPORT, cutouts=2, augment=0.5,
            regions=regions if arm == "explained" else (), **given,
        )  # fmt: skip
        arms[arm] = done.pixels.clamp(-1, 1)
    verdicts = {arm: checks(context, pixels, asked) for arm, pixels in arms.items()}
    present = {arm: stats.share([hit for one in found for hit in one.present]) for arm, found in verdicts.items()}
    picture = common.side_by_side(
        {arm: list(pixels[:SHOWN]) for arm, pixels in arms.items()},
        [common.asked_for(p.requests) for p in asked[:SHOWN]],
    )
    return [
        Row(
            claim="toys that the judge finds in latents optimised from noise, without a denoiser (reported)",
            source=f"{SOURCE}, section 4.4, with the toy codec in place of a VQGAN",
            measured=f"explained, a half of the picture for each toy: {percent(present['explained'])} of named toys",
            baseline=f"CLIP alone {percent(present['CLIP'])}",
            n=2 * len(asked),
            leans_on=common.trust_text(context, "shape"),
            picture=context.save("no-token-left-behind-latents.png", picture),
            data={arm: each.to_json() for arm, each in present.items()},
        )
    ]


EXPERIMENT = Experiment(
    key="no_token_left_behind",
    title="No Token Left Behind: CLIP's explanation in the loss",
    intro=(
        "toy-clip guides and explains, the toy-judge judges. Learnt prompts are tested on renders; rates and weights"
        " were chosen on other pictures and splits, strength and window of guidance on other prompts and seeds, for "
        "every arm"
        f" by itself. Learnt prompts have {VECTORS} vectors, as toy-clip reads short texts only."
    ),
    file=__file__,
    parts=(
        Part("prompts", ("toy-clip",), prompts),
        Part("premise", ("toy-clip",), premise),
        Part(
            "toy-sd: three toys", ("toy-sd", "toy-clip", "toy-judge"), lambda context: several_toys("toy-sd", context)
        ),
        Part("toy-sd: boxes", ("toy-sd", "toy-clip", "toy-judge"), lambda context: boxes("toy-sd", context)),
        Part("latents", ("toy-sd", "toy-clip", "toy-judge"), latents),
    ),
)
