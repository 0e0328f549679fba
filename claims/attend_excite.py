"""Attend-and-Excite (Chefer et al. 2023, https://arxiv.org/abs/2301.13826): is everything drawn, and drawn right?

Every arm gets the same prompts and seeds, one picture a prompt. The step size, and from which attention on no step is
taken, are chosen on other prompts and seeds; the toy-judge, which guides none of them, says what was drawn; best-of-n
gets at least as much compute and is chosen by toy-clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from claims import common
from claims.bars import Bar
from claims.common import Prompt, percent
from claims.core import Context, Experiment, Part, Row
from sfumato.metrics import stats
from sfumato.sampling import Run, Step, generate
from sfumato.steer.attend_excite import AttendExcite
from sfumato.toybox import oracle

SOURCE = "Chefer et al. 2023, section 4"
REPORT, TUNE = 5000, 6000  # seeds of prompts and noise: never the same for choosing and for reporting
ATTRIBUTES = ("shape", "color", "pattern")  # what a prompt leaves free counts for nothing
N = 240  # prompts
LIFT = 0.12
STEPS: tuple[dict[str, Any], ...] = (
    {"strength": 20.0},  # the paper's
    {"strength": 20.0, "sharpness": 10.0},
    {"step": "relative", "strength": 0.03, "sharpness": 10.0},
    {"step": "relative", "strength": 0.03, "sharpness": 10.0, "tries": 5},
)
ENOUGH = (1.0, 0.2, 0.1)  # 1: never stops, as in the paper; less where words share attention less sharply
SHOWN = 6  # pictures of each arm


class RandomDirection(AttendExcite):
    """The control: every step as long as the gradient's, in a random direction."""

    def start(self, run: Run) -> None:
        super().start(run)
        self._dice = torch.Generator().manual_seed(run.seeds[0])

    def _shift(self, step: Step, x: Tensor, gradient: Tensor) -> Tensor:
        shift = super()._shift(step, x, gradient)
        noise = torch.randn(shift.shape, generator=self._dice).to(shift)
        return noise * shift.flatten(1).norm(dim=1).view(-1, 1, 1, 1) / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


@dataclass
class Arm:
    """Pictures (n, 3, h, w) of one way of making them, what the judge says, forward-equivalents per picture."""

    pixels: Tensor
    checks: list[oracle.Check]
    cost: float

    @property
    def there(self) -> list[bool]:
        """Per picture, whether every shape is there."""
        return [check.all_present for check in self.checks]

    @property
    def bound(self) -> list[bool]:
        """Per picture, whether every shape is there in its colour."""
        return [check.all_bound for check in self.checks]


def drawn(
    context: Context, name: str, asked: Sequence[Prompt], seed: int, label: str, make: Any = None, shift: int = 0
) -> Arm:
    """Every prompt drawn from the seed of its place plus ``shift``; ``make()`` gives the system that takes part."""

    def made() -> tuple[Tensor, float]:
        model, pixels, cost = common.load(context, name), [], 0.0
        for start, chunk in context.batches(asked, common.BATCH, f"{name}, {label}"):
            seeds = list(range(seed + shift + start, seed + shift + start + len(chunk)))
            systems = [] if make is None else [make()]
            with torch.no_grad():
                result = generate(model, [prompt.text for prompt in chunk], seed=seeds, interventions=systems)
            pixels.append(result.pixels.detach().clamp(-1, 1))
            cost += result.cost * len(chunk) / len(asked)
        return torch.cat(pixels), cost

    what = (f"{name}, {label}", seed, shift, [prompt.text for prompt in asked])
    pictures, cost = common.resumed(context, what, made)
    eye = common.judge_of(context)
    checks = [oracle.check(r, p.requests, ATTRIBUTES) for r, p in zip(eye.read(pictures), asked, strict=True)]
    return Arm(pictures, checks, cost)


def chosen(context: Context, name: str) -> dict[str, Any]:
    """The step size, then how much attention is enough, with which most pictures of three toys and of one toy are
    right, on prompts and seeds that are not reported on."""

    def choose() -> dict[str, Any]:
        several = common.steering("three toys", TUNE, common.tenth(context, 40))
        one = common.prompts("test", TUNE + 1, common.tenth(context, 40), 1, "short")

        def score(params: dict[str, Any]) -> tuple[float, float]:
            arms = [
                drawn(context, name, asked, TUNE, f"tuning {params}", lambda: AttendExcite(**params))
                for asked in (several, one)
            ]
            right = sum(stats.share(arm.bound).value for arm in arms)
            context.report(f"  {name}: {params}: right in {50 * right:.1f} %")
            return right, sum(stats.share(arm.there).value for arm in arms)

        step = max(STEPS[:: 3 if context.quick else 1], key=score)
        return max(({**step, "enough": enough} for enough in ENOUGH[:: 2 if context.quick else 1]), key=score)

    return context.once(f"attend_excite {name}", choose)


def best_of(context: Context, arms: Sequence[Arm], texts: Sequence[str]) -> Arm:
    """Per prompt, the picture that toy-clip likes best."""
    scores = torch.tensor([common.clip_scores(context, arm.pixels, texts) for arm in arms])  # (n arms, pictures)
    best = scores.argmax(0).tolist()
    pixels = torch.stack([arms[k].pixels[i] for i, k in enumerate(best)])
    return Arm(pixels, [arms[k].checks[i] for i, k in enumerate(best)], sum(arm.cost for arm in arms))


def in_words(interval: stats.Interval) -> str:
    """A lift in words."""
    return f"{percent(interval)} (McNemar p {interval.p:.2g})"


def pictured(arms: Mapping[str, Arm], asked: Sequence[Prompt], title: str) -> Image.Image:
    """The first prompts, what each arm made of it side by side, with what the judge misses."""
    rows = {
        label: [
            (common.failing(arm.checks[i], asked[i].requests), arm.pixels[i]) for i in range(min(SHOWN, len(asked)))
        ]
        for label, arm in arms.items()
    }
    return common.side_by_side(rows, [common.asked_for(prompt.requests) for prompt in asked[:SHOWN]], title)


def rows_of(name: str, arms: Mapping[str, Arm], tries: int, shown: Mapping[str, Any]) -> list[Row]:
    """The verdicts on three toys, from the arms plain, ours, once, random and best (of ``tries``)."""
    plain, ours = arms["plain"], arms["ours"]
    lifts = {
        label: (stats.mcnemar(ours.there, arm.there), stats.mcnemar(ours.bound, arm.bound))
        for label, arm in arms.items()
    }
    shares = {label: (stats.share(arm.there), stats.share(arm.bound)) for label, arm in arms.items()}
    random = stats.mcnemar(arms["random"].there, plain.there)
    there, bound = lifts["plain"]
    about: dict[str, Any] = {
        "n": len(plain.checks),
        "void": common.void(shares["plain"][0]),
        **shown,
        "data": {
            "cost": {label: arm.cost for label, arm in arms.items()},
            "shares": {label: [each.to_json() for each in both] for label, both in shares.items()},
            "lifts": {label: [each.to_json() for each in both] for label, both in lifts.items()},
            "random lift": random.to_json(),
            **shown.get("data", {}),
        },
    }

    def both(label: str) -> str:
        there, bound = shares[label]
        return f"{percent(there)} there, {percent(bound)} bound"

    return [
        Row(
            claim=f"{name}, three toys: all are there {100 * LIFT:.0f} points more often than in plain sampling",
            source=f"{SOURCE} (best of four methods in all its figures; the size is ours)",
            measured=f"{percent(shares['ours'][0])}, {in_words(there)} more; {ours.cost:.0f} forward-equivalents",
            baseline=f"plain {percent(shares['plain'][0])}; {plain.cost:.0f} forward-equivalents",
            bars=[common.lift(there, shares["plain"][0].value, LIFT)],
            headline=True,
            **about,
        ),
        Row(
            claim=f"{name}, three toys: all are there in their own colours more often than in plain sampling",
            source=SOURCE,
            measured=f"{percent(shares['ours'][1])}, {in_words(bound)} more",
            baseline=f"plain {percent(shares['plain'][1])}",
            bars=[common.lift(bound, shares["plain"][1].value)],
            **about,
        ),
        Row(
            claim=f"{name}, three toys: all are there more often than after random steps of the same length",
            source="this repository",
            measured=f"ours {both('ours')}; {in_words(lifts['random'][0])} more there",
            baseline=f"random {both('random')}; over plain {in_words(random)} there",
            bars=[common.lift(lifts["random"][0], shares["random"][0].value)],
            **about,
        ),
        Row(
            claim=f"{name}, three toys: more often all there than in the best of {tries} plain pictures, which cost at "
            "least as much",
            source="this repository",
            measured=f"ours {both('ours')}; {in_words(lifts['best'][0])} there, {in_words(lifts['best'][1])} bound",
            baseline=f"best of {tries} by toy-clip {both('best')}; {arms['best'].cost:.0f} forward-equivalents",
            bars=[common.lift(lifts["best"][0], shares["best"][0].value)],
            **about,
        ),
        Row(
            claim=f"{name}, three toys: what iterative refinement adds to one step at a time",
            source=f"{SOURCE} (ablation)",
            measured=f"ours {both('ours')}; {in_words(lifts['once'][0])} more there",
            baseline=f"without refinement {both('once')}; {arms['once'].cost:.0f} forward-equivalents",
            **about,
        ),
    ]


def three_toys(name: str, context: Context) -> list[Row]:
    """Three different toys, all arms on the same prompts and seeds."""
    params = chosen(context, name)
    asked = common.steering("three toys", REPORT, common.tenth(context, N))
    makers = {
        "plain": None,
        "ours": lambda: AttendExcite(**params),
        "once": lambda: AttendExcite(**params, thresholds=[]),
        "random": lambda: RandomDirection(**params),
    }
    arms = {label: drawn(context, name, asked, REPORT, label, make) for label, make in makers.items()}
    n = max(2, math.ceil(arms["ours"].cost / arms["plain"].cost))
    tries = [arms["plain"]]
    tries += [drawn(context, name, asked, REPORT, f"try {k + 1}", shift=k * 100_000) for k in range(1, n)]
    arms["best"] = best_of(context, tries, [prompt.text for prompt in asked])
    names = {"plain": "plain", "ours": "Attend-and-Excite", "random": "random steps", "best": f"best of {n} plain"}
    sheet = pictured({says: arms[label] for label, says in names.items()}, asked, f"{name}: all that is named is drawn")
    shown = {
        "leans_on": common.trust_text(context, "shape", "color"),
        "picture": context.save(f"attend_excite-{name}.png", sheet),
        "data": {"params": params},
    }
    return rows_of(name, arms, n, shown)


def harder_row(name: str, kind: str, plain: Arm, ours: Arm, shown: Mapping[str, Any]) -> Row:
    """The verdict on prompts in which more than shape and colour must be told apart."""
    there, bound = stats.mcnemar(ours.there, plain.there), stats.mcnemar(ours.bound, plain.bound)
    before = stats.share(plain.bound)
    return Row(
        claim=f"{name}, {kind}: all are there as told more often than in plain sampling",
        source="this repository (the paper names two different things)",
        measured=f"{percent(stats.share(ours.bound))}, {in_words(bound)} more; shapes there {in_words(there)} more",
        baseline=f"plain {percent(before)}, shapes there {percent(stats.share(plain.there))}",
        bars=[common.lift(bound, before.value)],
        void=common.void(before, bounds=(0.1, 0.85)),
        n=len(plain.checks),
        **{**shown, "data": {"there": there.to_json(), "bound": bound.to_json(), **shown.get("data", {})}},
    )


def harder(name: str, kind: str, context: Context) -> list[Row]:
    """Equal shapes in different colours, or patterns."""
    params = chosen(context, name)
    asked = common.steering(kind, REPORT, common.tenth(context, N))
    plain = drawn(context, name, asked, REPORT, f"{kind}, plain")
    ours = drawn(context, name, asked, REPORT, f"{kind}, ours", lambda: AttendExcite(**params))
    sheet = pictured({"plain": plain, "Attend-and-Excite": ours}, asked, f"{name}: {kind}")
    shown = {
        "leans_on": common.trust_text(context, *ATTRIBUTES),
        "picture": context.save(f"attend_excite-{name}-{kind.replace(' ', '-')}.png", sheet),
        "data": {"params": params},
    }
    return [harder_row(name, kind, plain, ours, shown)]


def one_row(name: str, plain: Arm, ours: Arm, shown: Mapping[str, Any]) -> Row:
    """The verdict on one toy: an equivalence test, so that a small n cannot pass it."""
    difference, bound = stats.mcnemar(ours.there, plain.there), stats.mcnemar(ours.bound, plain.bound)
    margin = common.MARGIN
    return Row(
        claim=f"{name}, one toy: it is there as often as in plain sampling, within {100 * margin:.0f} points (the "
        "whole 95 % interval)",
        source="this repository",
        measured=f"{percent(stats.share(ours.there))}; difference {in_words(difference)}, "
        f"in its colour {in_words(bound)}",
        baseline=f"plain {percent(stats.share(plain.there))}",
        bars=[Bar(difference, null=-margin, ideal=0.0, above=-margin, below=margin)],
        n=len(plain.checks),
        **{**shown, "data": {"there": difference.to_json(), "bound": bound.to_json(), **shown.get("data", {})}},
    )


def one_toy(name: str, context: Context) -> list[Row]:
    """Prompts that name one toy, where nothing is to be repaired."""
    params = chosen(context, name)
    asked = common.prompts("test", REPORT + 1, common.tenth(context, N), 1, "short")
    plain = drawn(context, name, asked, REPORT, "one toy, plain")
    ours = drawn(context, name, asked, REPORT, "one toy, ours", lambda: AttendExcite(**params))
    shown = {"leans_on": common.trust_text(context, "shape", "color"), "data": {"params": params}}
    return [one_row(name, plain, ours, shown)]


def parts(name: str) -> tuple[Part, ...]:
    """The parts of one model."""
    models = (name, "toy-judge", "toy-clip")
    return (
        Part(f"{name}: three toys", models, lambda context: three_toys(name, context)),
        *(
            Part(f"{name}: {kind}", models[:2], lambda context, kind=kind: harder(name, kind, context))
            for kind in common.KINDS[1:]
        ),
        Part(f"{name}: one toy", models[:2], lambda context: one_toy(name, context)),
    )


EXPERIMENT = Experiment(
    key="attend_excite",
    title="Attend-and-Excite: nothing named is left out",
    intro=(
        "Prompts name three toys, all different; in the harder sets two of the three have the same shape, or two toys"
        " have a pattern each. Arms have the same prompts and seeds, one picture a prompt; words are the prompt's"
        " nouns."
        " Step size, sharpness and the attention that is enough were chosen on other prompts and seeds, of three toys"
        " and of one."
        " Compute is counted in forward-equivalents: a row through the denoiser is 1, so is its backward pass. The test"
        " is void where plain sampling already succeeds, or fails, too often."
    ),
    file=__file__,
    parts=(*parts("toy-sd"), *parts("toy-sd3")),
)
