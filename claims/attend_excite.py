"""Attend-and-Excite (Chefer et al. 2023, https://arxiv.org/abs/2301.13826): is everything drawn, and drawn right?

Every arm gets the same prompts and seeds. The step size is chosen on other prompts and seeds; the toy-judge, which
guides none of them, says what was drawn; best-of-n gets at least as much compute and is chosen by toy-clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from claims import common
from claims.common import Prompt, percent
from claims.core import Context, Experiment, Part, Row
from sfumato.metrics import stats
from sfumato.sampling import Run, Step, generate
from sfumato.steer.attend_excite import AttendExcite
from sfumato.toybox import oracle

SOURCE = "Chefer et al. 2023, section 4"
REPORT, TUNE = 5000, 6000  # seeds of prompts and noise: never the same for choosing and for reporting
SEEDS = 2  # pictures of each prompt
CANDIDATES: tuple[dict[str, Any], ...] = (
    {"strength": 20.0},
    {"step": "relative", "strength": 0.03},
    {"step": "relative", "strength": 0.06},
    {"step": "relative", "strength": 0.12},
)


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
    model, eye = common.load(context, name), common.judge_of(context)
    pixels, cost = [], 0.0
    for start, chunk in context.batches(asked, common.BATCH, f"{name}, {label}"):
        seeds = list(range(seed + shift + start, seed + shift + start + len(chunk)))
        systems = [] if make is None else [make()]
        with torch.no_grad():
            result = generate(model, [prompt.text for prompt in chunk], seed=seeds, interventions=systems)
        pixels.append(result.pixels.detach().clamp(-1, 1))
        cost += result.cost * len(chunk) / len(asked)
    pictures = torch.cat(pixels)
    checks = [oracle.check(r, p.wishes) for r, p in zip(eye.read(pictures), asked, strict=True)]
    return Arm(pictures, checks, cost)


def repeated(asked: Sequence[Prompt], times: int) -> list[Prompt]:
    """Each prompt so many times in a row."""
    return [prompt for prompt in asked for _ in range(times)]


def chosen(context: Context, name: str) -> dict[str, Any]:
    """The step size that binds most on prompts and seeds that are not reported on; presence breaks ties."""

    def choose() -> dict[str, Any]:
        asked = common.mixed_prompts(TUNE, context.count(16, 8))
        scores = []
        for params in CANDIDATES[:: 1 if not context.quick else 2]:
            arm = drawn(context, name, asked, TUNE, f"tuning {params}", lambda params=params: AttendExcite(**params))
            scores.append((sum(arm.bound), sum(arm.there), params))
            context.report(f"  {name}: {params}: {scores[-1][0]} bound, {scores[-1][1]} there, of {len(asked)}")
        return max(scores, key=lambda score: score[:2])[2]

    return context.once(f"attend_excite {name}", choose)


def best_of(context: Context, arms: Sequence[Arm], texts: Sequence[str]) -> Arm:
    """Per prompt, the picture that toy-clip likes best."""
    scores = torch.tensor([common.clip_scores(context, arm.pixels, texts) for arm in arms])  # (n arms, pictures)
    best = scores.argmax(0).tolist()
    pixels = torch.stack([arms[k].pixels[i] for i, k in enumerate(best)])
    return Arm(pixels, [arms[k].checks[i] for i, k in enumerate(best)], sum(arm.cost for arm in arms))


def told(interval: stats.Interval) -> str:
    """A lift in words."""
    return f"{percent(interval)} (McNemar p {interval.p:.2g})"


def several_toys(name: str, context: Context) -> list[Row]:
    """Two and three toys, all arms on the same prompts and seeds."""
    params = chosen(context, name)
    asked = repeated(common.mixed_prompts(REPORT, context.count(40, 3)), context.count(SEEDS, 2))
    texts = [prompt.text for prompt in asked]
    makers = {
        "plain": None,
        "ours": lambda: AttendExcite(**params),
        "once": lambda: AttendExcite(**params, thresholds=[]),
        "random": lambda: RandomDirection(**params),
    }
    arms = {label: drawn(context, name, asked, REPORT, label, make) for label, make in makers.items()}
    plain, ours = arms["plain"], arms["ours"]
    n = math.ceil(ours.cost / plain.cost)
    tries = [plain] + [drawn(context, name, asked, REPORT, f"try {k + 1}", shift=k * 100_000) for k in range(1, n)]
    arms["best"] = best_of(context, tries, texts)
    lifts = {
        label: (stats.mcnemar(ours.there, arm.there), stats.mcnemar(ours.bound, arm.bound))
        for label, arm in arms.items()
    }
    random = stats.mcnemar(arms["random"].there, plain.there)
    shares = {label: (stats.share(arm.there), stats.share(arm.bound)) for label, arm in arms.items()}
    void = not 0.35 <= shares["plain"][0].value <= 0.85
    rows = [list(arms[label].pixels[:: max(1, len(asked) // 10)][:10]) for label in ("plain", "ours", "random", "best")]
    shown: dict[str, Any] = {
        "n": len(asked),
        "leans_on": common.trust_text(context, "shape", "color"),
        "picture": context.save(f"attend_excite-{name}.png", common.sheet(rows)),
        "data": {
            "params": params,
            "cost": {label: arm.cost for label, arm in arms.items()},
            "shares": {label: [each.to_json() for each in both] for label, both in shares.items()},
            "lifts": {label: [each.to_json() for each in both] for label, both in lifts.items()},
            "random lift": random.to_json(),
        },
    }

    def both(label: str) -> str:
        there, bound = shares[label]
        return f"{percent(there)} there, {percent(bound)} bound"

    def gained(label: str, index: int) -> bool:
        return lifts[label][index].value > 0 and (lifts[label][index].p or 0) < 0.01

    void_note = "; void: plain sampling is not between 35 and 85 %" if void else ""
    there, bound = lifts["plain"]
    return [
        Row(
            claim=f"{name}, 2-3 toys: all are there 12 points more often than in plain sampling (p < 0.01)",
            source=SOURCE,
            measured=(
                f"{percent(shares['ours'][0])}, {told(there)} more; {ours.cost:.0f} forward-equivalents{void_note}"
            ),
            baseline=f"plain {percent(shares['plain'][0])}; {plain.cost:.0f} forward-equivalents",
            holds=None if void else there.value >= 0.12 and there.p is not None and there.p < 0.01,
            **shown,
        ),
        Row(
            claim=f"{name}, 2-3 toys: all are there in their own colours no less often than in plain sampling",
            source=SOURCE,
            measured=f"{percent(shares['ours'][1])}, {told(bound)} more{void_note}",
            baseline=f"plain {percent(shares['plain'][1])}",
            holds=bound.value >= 0,
            **shown,
        ),
        Row(
            claim=f"{name}, 2-3 toys: random directions of the same length do not help, and ours beat them (p < 0.01)",
            source="this repository",
            measured=f"ours {both('ours')}; {told(lifts['random'][0])} more there",
            baseline=f"random {both('random')}; over plain {told(random)} there",
            holds=random.low <= 0 and gained("random", 0),
            **shown,
        ),
        Row(
            claim=f"{name}, 2-3 toys: more often all there than in the best of {n} plain pictures, which cost as much",
            source="this repository",
            measured=f"ours {both('ours')}; {told(lifts['best'][0])} there, {told(lifts['best'][1])} bound",
            baseline=f"best of {n} by toy-clip {both('best')}; {arms['best'].cost:.0f} forward-equivalents",
            holds=gained("best", 0),
            **shown,
        ),
        Row(
            claim=f"{name}, 2-3 toys: what iterative refinement adds to one step at a time",
            source=f"{SOURCE} (ablation)",
            measured=f"ours {both('ours')}; {told(lifts['once'][0])} more there",
            baseline=f"without refinement {both('once')}; {arms['once'].cost:.0f} forward-equivalents",
            holds=None,
            **shown,
        ),
    ]


def one_toy(name: str, context: Context) -> list[Row]:
    """Prompts that name one toy, where nothing is to be repaired."""
    params = chosen(context, name)
    asked = repeated(common.prompts("test", REPORT + 1, context.count(30, 4), 1, "short"), 2)
    plain = drawn(context, name, asked, REPORT, "one toy, plain")
    ours = drawn(context, name, asked, REPORT, "one toy, ours", lambda: AttendExcite(**params))
    difference, bound = stats.mcnemar(ours.there, plain.there), stats.mcnemar(ours.bound, plain.bound)
    return [
        Row(
            claim=f"{name}, one toy: it is there as often as in plain sampling, within 1 point",
            source="this repository",
            measured=f"{percent(stats.share(ours.there))}; difference {told(difference)}, in its colour {told(bound)}",
            baseline=f"plain {percent(stats.share(plain.there))}",
            holds=abs(difference.value) <= 0.01,
            n=len(asked),
            leans_on=common.trust_text(context, "shape", "color"),
            data={"there": difference.to_json(), "bound": bound.to_json(), "params": params},
        )
    ]


def parts(name: str) -> tuple[Part, ...]:
    """The parts of one model."""
    models = (name, "toy-judge", "toy-clip")
    return (
        Part(f"{name}: several toys", models, lambda context: several_toys(name, context)),
        Part(f"{name}: one toy", models, lambda context: one_toy(name, context)),
    )


EXPERIMENT = Experiment(
    key="attend_excite",
    title="Attend-and-Excite: nothing named is left out",
    intro=(
        "Prompts name 2 or 3 toys (in turn), all different; arms have the same prompts and seeds, and words are"
        " the prompt's nouns. Step sizes were chosen on other prompts and seeds. Compute is counted in"
        " forward-equivalents: a row through the denoiser is 1, so is its backward pass. The test is void where plain"
        " sampling already succeeds, or fails, too often."
    ),
    file=__file__,
    parts=(*parts("toy-sd"), *parts("toy-sd3")),
)
