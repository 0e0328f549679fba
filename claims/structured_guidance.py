"""Structured Diffusion Guidance (Feng et al. 2022, https://arxiv.org/abs/2212.05032): do colours land on their toys?

Every arm gets the same prompts and seeds, one picture a prompt, and costs the same; nothing is tuned. The toy-judge
says what was drawn. The controls put other stretches of the prompt, of the same lengths, where the phrases go, and turn
the prompt around.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from claims import common
from claims.attend_excite import ATTRIBUTES, Arm, N, drawn, in_words, pictured
from claims.bars import Bar
from claims.common import Prompt, percent
from claims.core import Context, Experiment, Part, Row
from sfumato.metrics import stats
from sfumato.sampling import Intervention, Run, generate
from sfumato.steer.structured_guidance import StructuredGuidance
from sfumato.text.words import Reading, WordSpan

SOURCE = "Feng et al. 2022, section 4"
REPORT = 7000
FALL = 0.15  # of the leaks
HEADLINE = "equal shapes"
RARE = 0.1  # where plain sampling leaks less often, there is nothing to mend


class RandomSpans(StructuredGuidance):
    """The control: stretches of as many words as the phrases have, anywhere in the prompt but where these are."""

    def _parsed(self, reading: Reading) -> list[WordSpan]:
        phrases, words = super()._parsed(reading), reading.all()
        taken = {(phrase.start, phrase.end) for phrase in phrases}
        dice = np.random.default_rng(zlib.crc32(reading.prompt.encode()))
        spans = []
        for phrase in phrases:
            n = sum(phrase.start <= word.start < phrase.end for word in words)
            places = [(words[i].start, words[i + n - 1].end) for i in range(len(words) - n + 1)]
            free = [place for place in places if place not in taken and place != (words[0].start, words[-1].end)]
            spans.append(reading.span(*free[dice.integers(len(free))]) if free else phrase)
        return spans


class Contamination(Intervention):
    """How far each phrase's embeddings within the prompt are from those it has by itself, relative to their length."""

    def __init__(self, system: StructuredGuidance):
        self.system = system
        self.distances: list[list[float]] = []

    def before_predict(self, step: Any) -> None:
        self.mark(step)
        if step.i:
            return
        own, full = self.system._keys, step.condition.cond["embeds"]
        for row in range(len(step.run)):
            found = []
            for sequence in own[1:, row]:
                moved = (sequence - full[row]).norm(dim=-1)
                at = moved > 0
                found.append(float((moved[at] / full[row][at].norm(dim=-1)).mean()) if at.any() else 0.0)
            self.distances.append(found)

    def start(self, run: Run) -> None:
        if run.samples.start == 0:
            self.distances = []


def turned(prompt: Prompt) -> Prompt:
    """The same requests with the phrases in the opposite order."""
    *most, last = [phrase.text for phrase in prompt.caption.phrases if phrase.object is not None][::-1]
    return replace(prompt, text=f"{', '.join(most)} and {last}")


def leaks(arm: Arm) -> list[bool]:
    """Per picture, whether a toy of a wanted shape wears another one's colour. A shape that is missing leaks nothing:
    of two equal shapes both must be there."""
    return [any(a and b for a, b in zip(check.present, check.leaked, strict=True)) for check in arm.checks]


def fewer(ours: Sequence[bool], plain: Sequence[bool]) -> stats.Interval:
    """By what share of plain ones there are fewer, pictures resampled in pairs."""

    def fall(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return 1 - one.sum(-1) / np.maximum(other.sum(-1), 1)

    return stats.bootstrap([float(each) for each in ours], [float(each) for each in plain], statistic=fall, paired=True)


def rows_of(name: str, kind: str, arms: Mapping[str, Arm], shown: Mapping[str, Any]) -> list[Row]:
    """The verdicts on one kind of prompt, from the arms plain and ours; with random, turned and conjunction too, those
    on what the phrases themselves do."""
    plain, ours = arms["plain"], arms["ours"]
    leak = {label: stats.share(leaks(arm)) for label, arm in arms.items()}
    bound = {label: stats.share(arm.bound) for label, arm in arms.items()}
    less = {label: stats.mcnemar(leaks(arm), leaks(plain)) for label, arm in arms.items() if label != "plain"}
    more = {label: stats.mcnemar(arm.bound, plain.bound) for label, arm in arms.items() if label != "plain"}
    over = {label: stats.mcnemar(ours.bound, arms[label].bound) for label in ("random", "turned") if label in arms}
    present, fall = stats.mcnemar(ours.there, plain.there), fewer(leaks(ours), leaks(plain))
    about: dict[str, Any] = {
        "n": len(plain.checks),
        **shown,
        "data": {
            "leak": {label: each.to_json() for label, each in leak.items()},
            "bound": {label: each.to_json() for label, each in bound.items()},
            "less": {label: each.to_json() for label, each in less.items()},
            "more": {label: each.to_json() for label, each in more.items()},
            "cost": {label: arm.cost for label, arm in arms.items()},
        },
    }
    controls = [label for label in ("plain", "random", "turned") if label in arms]
    void = common.void(bound["plain"], bounds=(0.1, 0.85))
    rare = f"plain sampling leaks in {100 * leak['plain'].value:.0f} % only" if leak["plain"].value < RARE else ""

    def listed(shares: Mapping[str, stats.Interval]) -> str:
        return ", ".join(f"{label} {percent(shares[label])}" for label in controls)

    rows = [
        Row(
            claim=f"{name}, {kind}: all are there in their own colours more often than in plain sampling",
            source=f"{SOURCE} (5 to 8 points in the users' preference; asked here: the direction)",
            measured=f"{percent(bound['ours'])}, {in_words(more['ours'])} more",
            baseline=listed(bound),
            bars=[common.lift(more["ours"], bound["plain"].value)],
            void=void,
            headline=kind == HEADLINE,
            **about,
        ),
        Row(
            claim=f"{name}, {kind}: {100 * FALL:.0f} % fewer pictures than in plain sampling have a toy in another "
            "one's colour",
            source=f"{SOURCE} (the size is ours)",
            measured=f"{percent(leak['ours'])}, {percent(fall)} fewer",
            baseline=listed(leak),
            bars=[Bar(fall, null=0.0, ideal=1.0, above=0.0, at_least=FALL)],
            void=rare,
            **about,
        ),
        Row(
            claim=f"{name}, {kind}: all shapes are there no less often than in plain sampling, within "
            f"{100 * common.MARGIN:.0f} points",
            source=SOURCE,
            measured=f"{percent(stats.share(ours.there))}, {in_words(present)} more",
            baseline=f"plain {percent(stats.share(plain.there))}",
            bars=[common.no_harm(present, "all there")],
            **about,
        ),
    ]
    if over:
        rows.append(
            Row(
                claim=f"{name}, {kind}: all are right more often than with other stretches of the prompt in the "
                "phrases' places, and than with the prompt turned around",
                source="this repository",
                measured="; ".join(f"over {label} {in_words(each)}" for label, each in over.items()),
                baseline=listed(bound),
                bars=[common.lift(each, bound[label].value, what=f"over {label}") for label, each in over.items()],
                void=void,
                **about,
            )
        )
    if "conjunction" in arms:
        rows.append(
            Row(
                claim=f"{name}, {kind}: the mode for conjunctions",
                source=f"{SOURCE}, many keys and one value",
                measured=f"leaks {in_words(less['conjunction'])}, all right {in_words(more['conjunction'])} more than "
                "plain",
                baseline=f"values: leaks {in_words(less['ours'])}, all right {in_words(more['ours'])} more than plain",
                **about,
            )
        )
    return rows


def binding(name: str, kind: str, context: Context) -> list[Row]:
    """All arms on the same prompts and seeds; the controls on the headline's kind of prompt alone."""
    asked = common.steering(kind, REPORT, common.tenth(context, N))
    makers: dict[str, Any] = {"plain": None, "ours": StructuredGuidance}
    if kind == HEADLINE:
        makers |= {"random": RandomSpans, "conjunction": lambda: StructuredGuidance(mode="conjunction")}
    arms = {label: drawn(context, name, asked, REPORT, f"{kind}, {label}", make) for label, make in makers.items()}
    if kind == HEADLINE:
        arms["turned"] = drawn(context, name, [turned(prompt) for prompt in asked], REPORT, f"{kind}, turned")
    names = {"plain": "plain", "ours": "structured", "random": "other stretches"}
    sheet = pictured(
        {says: arms[label] for label, says in names.items() if label in arms}, asked, f"{name}: colours on their toys"
    )
    shown = {
        "leans_on": common.trust_text(context, *ATTRIBUTES),
        "picture": context.save(f"structured_guidance-{name}-{kind.replace(' ', '-')}.png", sheet),
    }
    return rows_of(name, kind, arms, shown)


def contamination(name: str, context: Context) -> list[Row]:
    """What there is to repair: the text encoder is causal, so only the second phrase has seen the first."""
    asked = common.pair_prompts(REPORT, common.tenth(context, N))
    model = common.load(context, name)
    first, second = [], []
    for _, chunk in context.batches(asked, common.BATCH, f"{name}, encoding"):
        system = StructuredGuidance()
        watch = Contamination(system)
        with torch.no_grad():
            generate(model, [prompt.text for prompt in chunk], steps=1, interventions=[system, watch], decode=False)
        first += [distances[0] for distances in watch.distances]
        second += [distances[1] for distances in watch.distances]
    return contamination_rows(name, first, second)


def contamination_rows(name: str, first: Sequence[float], second: Sequence[float]) -> list[Row]:
    """The verdict on how far either phrase's embeddings are from those it has by itself."""
    gap = stats.paired_difference(second, first)
    return [
        Row(
            claim=f"{name}: the second phrase's embeddings have taken up the first's words, by a tenth of their length "
            "or more, which the first's have not of the second",
            source=f"{SOURCE.replace('section 4', 'section 3.2')} (why it is needed; the size is ours)",
            measured=f"second {np.mean(second):.3f} of their length, {gap.text()} more",
            baseline=f"first {np.mean(first):.3f}",
            bars=[Bar(gap, null=0.0, ideal=1.0, above=0.0, at_least=0.1)],
            n=len(first),
            data={"gap": gap.to_json(), "first": float(np.mean(first)), "second": float(np.mean(second))},
        )
    ]


EXPERIMENT = Experiment(
    key="structured_guidance",
    title="Structured guidance: colours land on the right toy",
    intro=(
        "Prompts name three toys of which two have the same shape and all differ in colour, three different toys, or"
        " two toys with patterns; every arm has the same prompts and seeds, one picture a prompt, and as many denoiser"
        " passes. A colour leaks when a toy of a wanted shape, all of that shape being there, wears another toy's"
        " colour. A part is void where plain sampling is right too often or too rarely, or hardly leaks. SD3 and Flux"
        " are left out: in joint attention the method is not defined."
    ),
    file=__file__,
    parts=(
        *(
            Part(
                f"toy-sd: {kind}", ("toy-sd", "toy-judge"), lambda context, kind=kind: binding("toy-sd", kind, context)
            )
            for kind in (HEADLINE, "three toys", "patterns")
        ),
        Part("toy-sd: contamination", ("toy-sd",), lambda context: contamination("toy-sd", context)),
    ),
)
