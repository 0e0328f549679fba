"""Discriminative tokens: does a classifier's word make a vague prompt draw the class, for other eyes too?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from claims import children, common, subjects
from claims.bars import Bar
from claims.core import Context, Experiment, Part, Row
from claims.textual_inversion import random_word
from sfumato.metrics import stats
from sfumato.models.readers import load_reader
from sfumato.teach.discriminative_tokens import DiscriminativeTokens
from sfumato.text.placeholders import placeholders
from sfumato.toybox import GROUNDS, HOMONYMS, SHAPES, oracle

SOURCE = "Schwartz et al. 2023"
VAGUE = "toy"  # no caption has it: the vaguest word there is
TUNED_ON = (VAGUE, "ring")
REPORT, TUNE = 9100, 9200
SETTINGS: dict[str, Any] = {"draw_steps": 20, "guidance": 3.0, "templates": ["a {}"]}
RATES = (0.02, 0.05, 0.15)
TRIES = 20  # random words, of which the best is a baseline


def cases(context: Context) -> list[tuple[str, str]]:
    """(noun, class): the rarer sense of every homonym, and what the vague word may become, but for the one that the
    rate is chosen on. Of either kind one in a quick run."""
    rare = [(word, each.rare) for word, each in HOMONYMS.items()]
    vague = [(VAGUE, shape) for shape in SHAPES if (VAGUE, shape) != TUNED_ON]
    return rare[: context.count(len(rare), 1)] + vague[: context.count(len(vague), 0)]


def texts(noun: str, n: int) -> list[str]:
    """Prompts on every ground and, every second one, on none."""
    return [f"a {noun}" + ("" if i % 2 else f" on the {GROUNDS[(i // 2) % len(GROUNDS)]}") for i in range(n)]


@dataclass(frozen=True)
class Seen:
    """What pictures show: the share with the class, for the judge and for the guide; the share of grounds that are
    right; of the pictures with the class, those whose prompt names a ground; entropy of their colours in nats."""

    judge: float
    guide: float
    ground: float
    elsewhere: float
    diversity: float


@dataclass(frozen=True)
class Learnt:
    """A word's vectors, the updates it took, and the seconds of the processor."""

    words: dict[str, Any]
    step: int
    seconds: float


def seen(context: Context, model: Any, noun: str, target: str, n: int, label: str, seed: int = REPORT) -> Seen:
    """Pictures of a noun, read by both."""
    asked = texts(noun, n)
    options = {"guidance": SETTINGS["guidance"], **subjects.quickly(context)}
    pictures = common.generate(context, model, asked, seed, label, **options)
    reads = common.judge_of(context).read(pictures)
    hits = [oracle.find(read, oracle.RequestedToy.parse([target])) is not None for read in reads]
    guide = guide_of(context)
    with torch.no_grad():
        said = guide.module(pixel_values=guide.pixels(pictures)).logits.argmax(1).tolist()
    on = [(hit, read.ground == text.rpartition("the ")[2])
          for hit, read, text in zip(hits, reads, asked, strict=True) if " the " in text]  # fmt: skip
    colors = [read.objects[0].color for read in reads if read.objects]
    shares = np.array([colors.count(color) / len(colors) for color in set(colors)])
    return Seen(
        float(np.mean(hits)), float(np.mean([each == guide.label(target) for each in said])),
        float(np.mean([right for _, right in on])), float(np.mean([hit for hit, _ in on])),
        float(-(shares * np.log(shares)).sum()),
    )  # fmt: skip


def guide_of(context: Context) -> Any:
    """The classifier that guides; the judge is another network, trained for another task."""
    return context.once("guide", lambda: load_reader(context.folder("toy-vit")))


def learnt(context: Context, model: Any, noun: str, target: str, rate: float, **more: Any) -> Learnt:
    """The word for a class."""
    what = f"{noun} that is a {target}, rate {rate:g} {more or ''}"

    def made() -> dict[str, Any]:
        context.report(f"  {what}")
        given = {**SETTINGS, "steps": context.count(60, 2), "lr": rate, **more}
        if context.quick:
            given |= {"draw_steps": 3, "noises": 2}
        start = time.process_time()
        taught = DiscriminativeTokens(target=target, class_noun=noun, **given).teach(model, guide_of(context))
        return {"words": taught.words, "step": taught.step, "seconds": time.process_time() - start}

    return Learnt(**context.kept((what, model.name), made))


def rate(context: Context, name: str) -> float:
    """The learning rate that does best on another class than those reported, and other seeds."""
    model, (noun, target) = children.ambiguous(context, name), TUNED_ON

    def score(value: float) -> float:
        with placeholders(model, learnt(context, model, noun, target, value).words):
            found = seen(context, model, f"<c> {noun}", target, context.count(20, 4), "tuning", TUNE)
        return found.judge + found.ground

    return subjects.chosen(context, f"{name}, discriminative: rate", RATES[: context.count(len(RATES), 1)], score)


def best_random(context: Context, model: Any, taught: Learnt, noun: str, target: str) -> dict[str, Any]:
    """Of random words as long as the taught one, the one whose pictures the guide likes best."""
    tries = [random_word(model, taught.words, 100 + i) for i in range(context.count(TRIES, 2))]

    def liked(words: dict[str, Any]) -> float:
        with placeholders(model, words):
            return seen(context, model, f"<c> {noun}", target, context.count(10, 2), "random words", TUNE).guide

    return max(tries, key=liked)


def through(context: Context, name: str, value: float) -> tuple[list[float], float]:
    """Of the homonyms, the judge's share for a word learnt through the last five steps, and its seconds over those of
    one learnt through the last."""
    model, n, found, spent = children.ambiguous(context, name), context.count(60, 4), [], []
    for noun, target in cases(context)[: context.count(len(HOMONYMS), 1)]:
        seconds = []
        for last in (1, 5 if not context.quick else 2):
            taught = learnt(context, model, noun, target, value, through=last)
            seconds.append(taught.seconds / taught.step)
        with placeholders(model, taught.words):
            found.append(seen(context, model, f"<c> {noun}", target, n, "through 5").judge)
        spent.append(seconds[1] / seconds[0])
    return found, float(np.mean(spent))


def without_end(context: Context, name: str, value: float) -> tuple[Seen, Seen]:
    """A homonym's word with the stop rule, and after many updates without one."""
    model, (noun, target), out = children.ambiguous(context, name), cases(context)[0], []
    for more in ({}, {"steps": context.count(400, 3), "enough": 1.0, "patience": 0}):
        with placeholders(model, learnt(context, model, noun, target, value, **more).words):
            out.append(seen(context, model, f"<c> {noun}", target, context.count(60, 4), "no end"))
    return out[0], out[1]


def arms(context: Context, model: Any, taught: Learnt, noun: str, target: str, n: int) -> dict[str, dict[str, float]]:
    """What is seen under the plain word, the taught one and random ones."""
    words = {
        "plain": {}, "word": taught.words, "random": random_word(model, taught.words, 3),
        "best random": best_random(context, model, taught, noun, target),
    }  # fmt: skip
    out = {}
    for arm, each in words.items():
        with placeholders(model, each):
            out[arm] = vars(seen(context, model, f"<c> {noun}" if each else noun, target, n, arm))
    return out


def shown(context: Context, model: Any, asked: Sequence[tuple[str, str]], value: float) -> Image.Image:
    """For some classes a row of the plain word and one of the taught one, on every ground, from the same seeds."""
    options = {"guidance": SETTINGS["guidance"], **subjects.quickly(context)}
    rows, labels = [], []
    for noun, target in asked:
        words = learnt(context, model, noun, target, value).words
        for says, own, called in (("plain", {}, noun), (f"taught {target}", words, f"<c> {noun}")):
            prompts = [f"a {called} on the {ground}" for ground in GROUNDS]
            with placeholders(model, own):
                rows.append(list(common.generate(context, model, prompts, REPORT, f"{noun}, {says}", **options)))
            labels.append(f"{noun}: {says}")
    return common.sheet(rows, names=labels, heads=[f"on the {ground}" for ground in GROUNDS])


def measured(context: Context, name: str) -> list[Row]:
    model, n, value = children.ambiguous(context, name), context.count(60, 4), rate(context, name)
    asked, updates = cases(context), []
    per: dict[str, list[Seen]] = {arm: [] for arm in ("word", "plain", "random", "best random")}
    for noun, target in asked:
        taught = learnt(context, model, noun, target, value)
        updates.append(taught.step)
        what = (f"{noun} that is a {target}", name, value, n)
        for arm, figures in context.kept(what, partial(arms, context, model, taught, noun, target, n)).items():
            per[arm].append(Seen(**figures))

    def mean(arm: str, figure: str) -> stats.Interval:
        return subjects.average([getattr(each, figure) for each in per[arm]])

    word, plain, elsewhere = mean("word", "judge"), mean("plain", "judge"), mean("word", "elsewhere")
    agree = subjects.average([abs(each.guide - each.judge) for each in per["word"]])
    kept = subjects.against([e.ground for e in per["word"]], [e.ground for e in per["plain"]])
    deep, cost = through(context, name, value)
    ratio = subjects.against([each.judge for each in per["word"][: len(deep)]], deep)
    stopped, endless = without_end(context, name, value)
    data = {"cases": asked, "updates": updates, "rate": value, "through 5": deep,
            **{arm: [vars(each) for each in found] for arm, found in per.items()}}  # fmt: skip
    shared: dict[str, Any] = {"source": SOURCE, "n": n * len(asked), "leans_on": common.trust_text(context, "shape"),
                              "data": data}  # fmt: skip
    baselines = ", ".join(f"{arm} {mean(arm, 'judge').value:.2f}" for arm in ("plain", "random", "best random"))
    picture = context.save(f"discriminative-tokens-{name}.png", shown(context, model, asked[:3], value))
    powerless = "" if plain.value <= 0.35 else f"the plain words draw the class in {plain.value:.2f} already"
    return [
        Row(claim=f"{name}: a class that a word draws in at most 35 % of pictures is drawn in 85 %, for a judge that "
            "did not guide", measured=word.text(), baseline=baselines, void=powerless, headline=True, picture=picture,
            bars=[Bar(word, null=plain.value, ideal=1.0, at_least=0.85, what="with the class")], **shared),
        Row(claim=f"{name}: guide and judge agree within 8 points", measured=agree.text(),
            baseline=f"guide {mean('word', 'guide').value:.2f}",
            bars=[Bar(agree, null=0.5, ideal=0.0, at_most=0.08, what="apart")], **shared),
        Row(claim=f"{name}: grounds are obeyed 0.95 times as often as with the plain word, and the class is drawn on "
            "them in 75 %", measured=f"{kept.text()}; {elsewhere.text()}",
            baseline=f"plain {mean('plain', 'ground').value:.2f}",
            bars=[Bar(kept, null=0.2, ideal=1.0, at_least=0.95, what="grounds"),
                  Bar(elsewhere, null=plain.value, ideal=1.0, at_least=0.75, what="the class on grounds")], **shared),
        Row(claim=f"{name}: the gradient of the last step does 0.9 of what that of the last five does",
            measured=ratio.text(), baseline=f"five steps {np.mean(deep):.2f}, {cost:.1f} times the time an update",
            bars=[Bar(ratio, null=plain.value / max(np.mean(deep), 1e-9), ideal=1.0, at_least=0.9, what="of five")],
            **shared),
        Row(claim=f"{name}: the stop rule ends before the word fools the guide: without it judge or colours are lost",
            measured=f"stopped: guide {stopped.guide:.2f}, judge {stopped.judge:.2f}, colours {stopped.diversity:.2f}",
            baseline=f"no end: guide {endless.guide:.2f}, judge {endless.judge:.2f}, colours {endless.diversity:.2f}",
            **shared),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    key="discriminative_tokens",
    title="Discriminative tokens",
    intro="Three words that captions use for two shapes, three times as often for the one as for the other, and 'toy', "
    "which is in no caption. The generators have first read the homonyms; toy-vit guides a word to the rarer sense or "
    "to one of five shapes, the toy-judge reads the result. The rate is chosen on a sixth shape; intervals are over "
    "words and shapes.",
    file=__file__,
    parts=(
        Part("toy-sd", ("toy-sd", "toy-vit", "toy-judge"), lambda context: measured(context, "toy-sd")),
        Part("toy-sd3", ("toy-sd3", "toy-vit", "toy-judge"), lambda context: measured(context, "toy-sd3")),
    ),
)
