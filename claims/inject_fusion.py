"""InjectFusion (Jeong, Kwon, Uh 2023, https://arxiv.org/abs/2303.15403): content of one picture, look of another.

Two pictures are drawn, one gives the look (colour of the toy, ground, sky), the other the content (shape of the toy);
they differ in all of these. The toy-judge reads both and what the method makes of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from claims import common
from claims.bars import Bar
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato.edit.inject_fusion import InjectFusion
from sfumato.hspace import layer_of, tapped
from sfumato.metrics import stats
from sfumato.metrics.geometry import slerp
from sfumato.sampling import Intervention, generate
from sfumato.toybox import COLORS, GROUNDS, SHAPES, oracle

SOURCE = "Jeong, Kwon, Uh 2023"
STEPS = 16
N, TUNED = 120, 16  # pairs to report on and to choose by
REPORT, TUNE = 18100, 18200
STRENGTHS = (0.3, 0.5, 0.7, 1.0)
LAYERS = ("up.0", "up.1")
RATIOS = (0.3, 0.5, 0.7)
BASELINES = ("none", "noise", "skips", "lerp")
MORE = 0.15
MOVES = 0.1  # share of the prediction that the bottleneck should move,
DEAD = 0.01  # and below which there is nothing to inject into
EVEN = 0.05  # contents that differ by less are equal
SHOWN = 6


@dataclass(frozen=True)
class Pair:
    """A look and a content: prompts, seeds, pictures (3, h, w), and what the judge reads in them."""

    look: str
    content: str
    seed: int
    other: int
    pictures: tuple[Tensor, Tensor]
    readings: tuple[oracle.SceneReading, oracle.SceneReading]


@dataclass(frozen=True)
class Outcome:
    """What a method made of a pair: whether the shape is the content's, and which of colour, ground and sky are the
    look's."""

    picture: Tensor
    shape: bool
    look: tuple[bool, bool, bool]

    @property
    def fused(self) -> bool:
        return self.shape and sum(self.look) >= 2


Method = Callable[[Pair], Tensor]


def settings(seed: int) -> dict[str, Any]:
    """What every method shares."""
    return {"steps": STEPS, "scheduler": "ddim", "seed": seed}


def pairs(context: Context, model: Any, seed: int, n: int) -> list[Pair]:
    """``n`` pairs whose pictures show a toy each, of different shape, colour and ground as the judge reads them."""
    found: list[Pair] = []
    index = 0
    while len(found) < n and index < 8 * n + 8:
        texts, seeds = [], []
        for k in range(index, index + 8):
            rng = np.random.default_rng((seed, k, 3))
            shapes, colors, grounds = (rng.permutation(words)[:2] for words in (SHAPES, COLORS, GROUNDS))
            texts += [f"a {c} {s} on the {g}" for s, c, g in zip(shapes, colors, grounds, strict=True)]
            seeds += [seed + 2 * k, seed + 2 * k + 1]
        made = generate(model, texts, **settings(0) | {"seed": seeds}).pixels
        assert made is not None
        made = made.clamp(-1, 1)
        read = common.judge_of(context).read(made)
        for k in range(0, len(texts), 2):
            one, two = read[k], read[k + 1]
            if one.objects and two.objects and not _alike(one, two):
                both = (made[k], made[k + 1])
                found.append(Pair(texts[k], texts[k + 1], seeds[k], seeds[k + 1], both, (one, two)))
        index += 8
    return found[:n]


def _alike(one: oracle.SceneReading, two: oracle.SceneReading) -> bool:
    a, b = one.objects[0], two.objects[0]
    return a.shape == b.shape or a.color == b.color or one.ground == two.ground


def outcomes(context: Context, asked: Sequence[Pair], method: Method, label: str) -> list[Outcome]:
    """Every pair through a method, one by one because each has a content of its own."""

    def drawn() -> tuple[Tensor, float]:
        return torch.stack([method(pair)[0].clamp(-1, 1) for _, (pair,) in context.batches(asked, 1, label)]), 0.0

    made, _ = common.resumed(context, (label, [(pair.look, pair.content, pair.seed) for pair in asked]), drawn)
    read = common.judge_of(context).read(made)
    found = []
    for pair, picture, one in zip(asked, made, read, strict=True):
        look, content = pair.readings
        toy = one.objects[0] if one.objects else None
        kept = (
            toy is not None and toy.color == look.objects[0].color,
            one.ground == look.ground,
            one.sky == look.sky,
        )
        found.append(Outcome(picture, toy is not None and toy.shape == content.objects[0].shape, kept))
    return found


def fusion(model: Any, **params: Any) -> Method:
    """The system; at strength 0 the picture that gives the look."""

    def method(pair: Pair) -> Tensor:
        system = InjectFusion(content=pair.content, content_seed=pair.other, **params)
        return generate(model, pair.look, interventions=system, **settings(pair.seed)).pixels

    return method


def interpolation(model: Any, ratio: float) -> Method:
    """The look's prompt from noise between that of both pictures (slerp)."""

    def method(pair: Pair) -> Tensor:
        shape = model.latent_shape(*model.default_size)
        one, two = (
            torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in (pair.seed, pair.other)
        )
        return generate(model, pair.look, latents=slerp(one, two, ratio), **settings(pair.seed)).pixels

    return method


def skip_mixing(model: Any, ratio: float) -> Method:
    """The look drawn with its skip connections moved towards those that the content had at the same step."""

    def method(pair: Pair) -> Tensor:
        kept: list[Tensor] = []
        with _skips(model, lambda skip: kept.append(skip) or skip):
            generate(model, pair.content, decode=False, **settings(pair.other))
        content = iter(kept)
        with _skips(model, lambda skip: torch.lerp(skip, next(content), ratio)):
            return generate(model, pair.look, **settings(pair.seed)).pixels

    return method


@contextlib.contextmanager
def _skips(model: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Every skip connection of the U-Net passes through ``change``, in the order in which they are read."""

    def hook(module: Any, args: Any, given: dict[str, Any]) -> Any:
        name = "res_hidden_states_tuple"
        return args, {**given, name: tuple(change(skip) for skip in given[name])}

    with contextlib.ExitStack() as stack:
        for block in model.denoiser.up_blocks:
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


MAKERS: dict[str, Callable[..., Method]] = {"noise": interpolation, "skips": skip_mixing}  # all other arms: fusion


def score(found: Sequence[Outcome]) -> float:
    """Share of pairs fused; ties are broken by the single attributes."""
    kept = sum(one.shape + sum(one.look) / 3 for one in found) / 2
    return sum(one.fused for one in found) / len(found) + 1e-3 * kept / len(found)


def tuned(context: Context, name: str) -> dict[str, dict[str, Any]]:
    """Best settings of each method on other seeds."""

    def chosen() -> dict[str, dict[str, Any]]:
        model = common.load(context, name)
        asked = pairs(context, model, TUNE, common.tenth(context, TUNED))
        grids: dict[str, list[dict[str, Any]]] = {
            "bottleneck": [{"strength": each} for each in STRENGTHS],
            "layer": [{"layer": layer, "strength": each} for layer in LAYERS for each in STRENGTHS],
            "noise": [{"ratio": each} for each in RATIOS],
            "skips": [{"ratio": each} for each in RATIOS],
        }
        best = {}
        for arm, grid in grids.items():
            make = MAKERS.get(arm, fusion)
            scores = [score(outcomes(context, asked, make(model, **each), f"{name}, {arm} {each}")) for each in grid]
            best[arm] = grid[max(range(len(grid)), key=scores.__getitem__)]
        return best

    return context.once(f"inject_fusion settings {name}", chosen)


def fused(name: str, context: Context) -> list[Row]:
    """The method at the bottleneck and at the best layer, its parts taken away, and latent interpolation."""
    model = common.load(context, name)
    best = tuned(context, name)
    layer = best["layer"]
    asked = pairs(context, model, REPORT, common.tenth(context, N))
    arms: dict[str, Method] = {
        "none": fusion(model, strength=0.0),
        "bottleneck": fusion(model, **best["bottleneck"]),
        "noise": interpolation(model, **best["noise"]),
        "skips": skip_mixing(model, **best["skips"]),
        "lerp": fusion(model, **layer, mix="lerp"),
        "symmetric": fusion(model, **layer, process="symmetric"),
    }
    for share in STRENGTHS:
        arms[f"layer {share:g}"] = fusion(model, **layer | {"strength": share})
        arms[f"calibrated {share:g}"] = fusion(model, **layer | {"strength": share}, calibration=1.0)
    found = {arm: outcomes(context, asked, method, f"{name}, {arm}") for arm, method in arms.items()}
    rows: dict[str, list[Any]] = {
        "look": [pair.pictures[0] for pair in asked[:SHOWN]],
        "content": [pair.pictures[1] for pair in asked[:SHOWN]],
    }
    names = {"at the bottleneck": "bottleneck", f"at {layer['layer']}": f"layer {layer['strength']:g}"}
    names |= {"noise mixed": "noise", "skips mixed": "skips", "straight line": "lerp"}
    for says, arm in names.items():
        rows[says] = [("fused" if one.fused else "not fused", one.picture) for one in found[arm][:SHOWN]]
    shown = {
        "leans_on": common.trust_text(context, "shape", "color"),
        "picture": context.save(f"inject-fusion-{name}.png", common.labelled(rows)),
    }
    return rows_of(name, found, best, moved(name, context)["mid"].value, shown)


def rows_of(
    name: str, found: Mapping[str, Sequence[Outcome]], best: Mapping[str, Any], mid: float, shown: Mapping[str, Any]
) -> list[Row]:
    """The verdicts from all arms; ``best``: the tuned settings, ``mid``: how much the bottleneck moves at all."""
    layer = best["layer"]
    ours = f"layer {layer['strength']:g}"
    hits = {arm: [one.fused for one in each] for arm, each in found.items()}
    rate = {arm: stats.share(each) for arm, each in hits.items()}
    shape = {arm: stats.share([one.shape for one in each]) for arm, each in found.items()}
    look = {arm: stats.bootstrap(looks(each)) for arm, each in found.items()}
    rates = "; ".join(f"{arm} {percent(rate[arm])}" for arm in BASELINES)
    about: dict[str, Any] = {
        "n": len(found["none"]),
        **shown,
        "data": {
            arm: {"fused": rate[arm].to_json(), "shape": shape[arm].to_json(), "look": look[arm].to_json()}
            for arm in found
        }
        | {"settings": dict(best)},
    }

    def row(arm: str, where: str, source: str, **more: Any) -> Row:
        against = {other: stats.mcnemar(hits[arm], hits[other]) for other in BASELINES}
        return Row(
            claim=f"{name}: injected at {where}, the shape is the content's and two of colour, ground and sky are the "
            f"look's, {100 * MORE:.0f} points more often than by each baseline",
            source=f"{source} (shown there by pictures and FID; the size is ours)",
            measured=f"{percent(rate[arm])} of pairs (shape {percent(shape[arm])}, look {percent(look[arm])}); more "
            f"than " + ", ".join(f"{other} {percent(each)}" for other, each in against.items()),
            baseline=f"{rates} (tuned: slerp of x_T by {best['noise']['ratio']:g}, skips by "
            f"{best['skips']['ratio']:g})",
            bars=[common.lift(each, rate[other].value, MORE, f"over {other}") for other, each in against.items()],
            **about,
            **more,
        )

    steps = ["none", *(f"layer {share:g}" for share in STRENGTHS)]
    rises = common.agreement(np.array([[float(one.shape) for one in found[arm]] for arm in steps]))
    edits = stats.mcnemar(*([one.shape for one in found[arm]] for arm in (ours, "symmetric")))
    dead = f"the bottleneck moves {100 * mid:.1f} % of the prediction: nothing to inject into" if mid < DEAD else ""
    return [
        row(
            "bottleneck",
            f"the bottleneck (strength {best['bottleneck']['strength']:g}, tuned)",
            SOURCE,
            headline=True,
            void=dead,
        ),
        row(ours, f"{layer['layer']} (strength {layer['strength']:g}, tuned)", f"{SOURCE}; the layer is ours"),
        Row(
            claim=f"{name}: the stronger the injection at {layer['layer']}, the more often the shape is the content's "
            "(mean rank correlation within a pair)",
            source=f"{SOURCE}, figure of strengths",
            measured=rises.text(),
            baseline=", ".join(f"{arm}: {100 * shape[arm].value:.0f} %" for arm in steps),
            bars=[Bar(rises, null=0.0, ideal=1.0, above=0.0)],
            **about,
        ),
        Row(
            claim=f"{name}: the asymmetric process brings more of the content's shape than the symmetric one",
            source="Kwon, Jeong, Uh 2022 (Asyrp), section 3.2",
            measured=f"{percent(shape[ours])}, difference {percent(edits)}, p {edits.p:.2g}",
            baseline=f"symmetric {percent(shape['symmetric'])}",
            bars=[common.lift(edits, shape["symmetric"].value)],
            **about,
        ),
        calibration_row(name, found, about),
    ]


def looks(found: Sequence[Outcome]) -> list[float]:
    """Of every pair the share of colour, ground and sky that are the look's."""
    return [sum(one.look) / 3 for one in found]


def calibration_row(name: str, found: Mapping[str, Sequence[Outcome]], about: Mapping[str, Any]) -> Row:
    """The verdict on calibration at equal content: the strengths, one with and one without it, that bring the content's
    shape about equally often; among those, the two that bring most of it."""

    def content(arm: str) -> float:
        return float(np.mean([one.shape for one in found[arm]]))

    pairs = [(f"calibrated {a:g}", f"layer {b:g}") for a in STRENGTHS for b in STRENGTHS]
    even = [pair for pair in pairs if abs(content(pair[0]) - content(pair[1])) <= EVEN]
    with_it, without = max(even, key=lambda pair: content(pair[0])) if even else pairs[0]
    gained = min(content(with_it), content(without)) - content("none")
    kept = stats.paired_difference(looks(found[with_it]), looks(found[without]))
    before = float(np.mean(looks(found[without])))
    nothing = "" if gained >= 2 * EVEN else f"at equal content only {100 * gained:.0f} points of it are brought"
    return Row(
        claim=f"{name}: at equal content calibration keeps more of the look",
        source=f"{SOURCE}, section 3.3",
        measured=f"{percent(kept)} more of colour, ground and sky; shape {100 * content(with_it):.0f} % ({with_it})",
        baseline=f"without: look {100 * before:.0f} %, shape {100 * content(without):.0f} % ({without})",
        bars=[common.lift(kept, before)],
        void=nothing if even else "no two strengths bring the content equally often",
        **about,
    )


def influence(name: str, context: Context) -> list[Row]:
    """How much of the predicted noise depends on a layer at all, its skip connections left alone."""
    return influence_rows(name, moved(name, context))


def influence_rows(name: str, means: Mapping[str, stats.Interval]) -> list[Row]:
    """The verdict from the shares of the layers, mid among them."""
    return [
        Row(
            claim=f"{name}: exchanging the bottleneck between pictures, skip connections kept, changes the predicted "
            f"noise by {100 * MOVES:.0f} % or more of what exchanging everything does",
            source="what the paper presupposes of the model (the size is ours)",
            measured=percent(means["mid"]),
            baseline=", ".join(f"{layer} {percent(each)}" for layer, each in means.items() if layer != "mid"),
            bars=[Bar(means["mid"], null=0.0, ideal=1.0, at_least=MOVES)],
            n=means["mid"].n,
            data={layer: each.to_json() for layer, each in means.items()},
        )
    ]


def moved(name: str, context: Context) -> dict[str, stats.Interval]:
    """The share of the prediction that each layer moves, once per run."""
    return context.once(f"influence {name}", lambda: _moved(name, context))


def _moved(name: str, context: Context) -> dict[str, stats.Interval]:
    model = common.load(context, name)
    n = context.count(40, 4)
    asked = [f"a {COLORS[i % 8]} {SHAPES[i % 6]} on the {GROUNDS[i % 5]}" for i in range(n)]
    shares: dict[str, list[float]] = {layer: [] for layer in ("mid", *LAYERS)}

    def look(step: Any) -> None:
        if step.i not in (STEPS // 8, STEPS // 2):
            return
        with torch.no_grad():
            x, t, condition = seen.pop(), step.t, step.condition
            own, others = (model.predict(x.roll(k, 0), t, condition.rows(order(k)), "cond") for k in (0, 1))
            whole = (others - own).square().sum((1, 2, 3))
            for layer in shares:
                kept: list[Tensor] = []
                with tapped(model, layer_of(model, layer), kept.append):
                    model.predict(x, t, condition, "cond")
                with tapped(model, layer_of(model, layer), lambda h, kept=kept: kept[0].roll(1, 0)):
                    swapped = model.predict(x, t, condition, "cond")
                shares[layer] += ((swapped - own).square().sum((1, 2, 3)) / whole).tolist()

    def order(k: int) -> list[int]:
        return [(i - k) % n for i in range(n)]

    class Remember(Intervention):
        def before_predict(self, step: Any) -> None:
            seen[:] = [step.x]
            self.mark(step)

    seen: list[Tensor] = []
    given = settings(TUNE) | {"guidance": 1.0, "decode": False, "on_step": look, "interventions": Remember()}
    generate(model, asked, **given)
    pictures = [i % n for i in range(2 * n)]  # both noise levels of one picture belong together
    return {layer: stats.bootstrap(common.by_cluster(each, pictures)) for layer, each in shares.items()}


def parts(name: str) -> tuple[Part, ...]:
    """The parts of one model."""
    return (
        Part(f"{name}: influence", (name,), lambda context: influence(name, context)),
        Part(f"{name}: fusion", (name, "toy-judge"), lambda context: fused(name, context)),
    )


EXPERIMENT = Experiment(
    key="inject_fusion",
    title="InjectFusion: the content of one picture in the look of another",
    intro=(
        "Pairs of drawn pictures that differ in the shape, colour and ground which the toy-judge reads in them. "
        "Strength, layer and ratio were chosen on other prompts and seeds. How much the bottleneck moves at all is the "
        "first row; where it is next to nothing the test is void there, and the method is also run on a later layer. "
        "lerp: the same layer and strength in a straight line, norms not matched; skips: the skip connections mixed "
        "instead. SD3 has no bottleneck and is refused."
    ),
    file=__file__,
    parts=parts("toy-sd"),
)
