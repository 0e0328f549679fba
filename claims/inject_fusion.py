"""InjectFusion (Jeong, Kwon, Uh 2023, https://arxiv.org/abs/2303.15403): content of one picture, look of another.

Two pictures are drawn, one gives the look (colour of the toy, ground, sky), the other the content (shape of the toy);
they differ in all of these. The toy-judge reads both and what the method makes of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from claims import common
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
REPORT, TUNE = 8100, 8200
STRENGTHS = (0.3, 0.5, 0.7, 1.0)
LAYERS = ("up.0", "up.1")
RATIOS = (0.3, 0.5, 0.7)
BASELINES = ("none", "noise", "skips", "lerp")


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
    made = [method(chunk[0])[0].clamp(-1, 1) for _, chunk in context.batches(asked, 1, label)]
    read = common.judge_of(context).read(torch.stack(made))
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
        asked = pairs(context, model, TUNE, context.count(8, 2))
        grids: dict[str, list[dict[str, Any]]] = {
            "bottleneck": [{"strength": each} for each in STRENGTHS],
            "layer": [{"layer": layer, "strength": each} for layer in LAYERS for each in STRENGTHS],
            "noise": [{"ratio": each} for each in RATIOS],
            "skips": [{"ratio": each} for each in RATIOS],
        }
        best = {}
        for arm, grid in grids.items():
            make = MAKERS.get(arm, fusion)
            scores = [score(outcomes(context, asked, make(model, **each), f"{name}, {each}")) for each in grid]
            best[arm] = grid[max(range(len(grid)), key=scores.__getitem__)]
        return best

    return context.once(f"inject_fusion settings {name}", chosen)


def fused(name: str, context: Context) -> list[Row]:
    """The method at the bottleneck and at the best layer, its parts taken away, and latent interpolation."""
    model = common.load(context, name)
    best = tuned(context, name)
    layer = best["layer"]
    asked = pairs(context, model, REPORT, context.count(20, 3))
    arms: dict[str, Method] = {
        "none": fusion(model, strength=0.0),
        "bottleneck": fusion(model, **best["bottleneck"]),
        "noise": interpolation(model, **best["noise"]),
        "skips": skip_mixing(model, **best["skips"]),
        "lerp": fusion(model, **layer, mix="lerp"),
        "symmetric": fusion(model, **layer, process="symmetric"),
        "calibrated": fusion(model, **layer, calibration=1.0),
    }
    arms |= {f"layer {share:g}": fusion(model, **layer | {"strength": share}) for share in STRENGTHS}
    ours = f"layer {layer['strength']:g}"
    found = {arm: outcomes(context, asked, method, f"{name}, {arm}") for arm, method in arms.items()}
    hits = {arm: [one.fused for one in each] for arm, each in found.items()}
    rate = {arm: stats.share(each) for arm, each in hits.items()}
    shape = {arm: stats.share([one.shape for one in each]) for arm, each in found.items()}
    look = {arm: stats.bootstrap([sum(one.look) / 3 for one in each]) for arm, each in found.items()}
    gains = {arm: {b: stats.mcnemar(hits[arm], hits[b]) for b in BASELINES} for arm in ("bottleneck", ours)}
    steps = [shape["none"].value, *(shape[f"layer {share:g}"].value for share in STRENGTHS)]
    edits = stats.mcnemar([one.shape for one in found[ours]], [one.shape for one in found["symmetric"]])
    calibrated = stats.paired_difference(
        [sum(one.look) / 3 for one in found["calibrated"]], [sum(one.look) / 3 for one in found[ours]]
    )
    rows = [[pair.pictures[k] for pair in asked[:10]] for k in (0, 1)]
    rows += [
        [one.picture for one in found[arm][:10]] for arm in ("bottleneck", ours, "noise", "skips", "lerp", "calibrated")
    ]
    picture = context.save(f"inject-fusion-{name}.png", common.sheet(rows))
    leans = common.trust_text(context, "shape", "color")
    told = "; ".join(f"{arm} {percent(rate[arm])}" for arm in BASELINES)
    data = {
        arm: {"fused": rate[arm].to_json(), "shape": shape[arm].to_json(), "look": look[arm].to_json()} for arm in arms
    } | {"settings": best}

    def row(arm: str, where: str, source: str) -> Row:
        against = gains[arm]
        return Row(
            claim=(
                f"{name}: injected at {where}, the shape is the content's and two of colour, ground and sky are the "
                "look's, 15 points more often than by each baseline (lower bounds above 0)"
            ),
            source=source,
            measured=(
                f"{percent(rate[arm])} of pairs (shape {percent(shape[arm])}, look {percent(look[arm])}); more than "
                + ", ".join(f"{b} {percent(each)}" for b, each in against.items())
            ),
            baseline=f"{told} (tuned: slerp of x_T by {best['noise']['ratio']:g}, skips by {best['skips']['ratio']:g})",
            holds=all(each.value >= 0.15 and each.low > 0 for each in against.values()),
            n=len(asked),
            leans_on=leans,
            picture=picture,
            data=data,
        )

    return [
        row("bottleneck", f"the bottleneck (strength {best['bottleneck']['strength']:g}, tuned)", SOURCE),
        row(ours, f"{layer['layer']} (strength {layer['strength']:g}, tuned)", f"{SOURCE}; the layer is ours"),
        Row(
            claim=f"{name}: the stronger the injection at {layer['layer']}, the more often the shape is the content's",
            source=SOURCE,
            measured=", ".join(f"{s:g}: {100 * v:.0f} %" for s, v in zip((0.0, *STRENGTHS), steps, strict=True)),
            baseline=f"none {percent(shape['none'])}, noise {percent(shape['noise'])}",
            holds=all(a <= b for a, b in zip(steps, steps[1:], strict=False)) and steps[-1] > steps[0],
            n=len(asked),
            leans_on=leans,
            picture=picture,
            data={"shape": steps},
        ),
        Row(
            claim=f"{name}: the asymmetric process brings more of the content's shape than the symmetric one",
            source="Kwon, Jeong, Uh 2022 (Asyrp), section 3.2",
            measured=f"{percent(shape[ours])}, difference {percent(edits)}, p {edits.p:.2g}",
            baseline=f"symmetric {percent(shape['symmetric'])}",
            holds=edits.low > 0,
            n=len(asked),
            leans_on=leans,
            data=data,
        ),
        Row(
            claim=f"{name}: calibration keeps more of the look",
            source=f"{SOURCE}, section 3.3",
            measured=f"{percent(calibrated)} of colour, ground and sky; shape {percent(shape['calibrated'])}",
            baseline=f"without: look {percent(look[ours])}, shape {percent(shape[ours])}",
            holds=calibrated.low > 0,
            n=len(asked),
            leans_on=leans,
            picture=picture,
            data=data,
        ),
    ]


def influence(name: str, context: Context) -> list[Row]:
    """How much of the predicted noise depends on a layer at all, its skip connections left alone."""
    model = common.load(context, name)
    n = context.count(20, 4)
    asked = [f"a {COLORS[i % 8]} {SHAPES[i % 6]} on the {GROUNDS[i % 5]}" for i in range(n)]
    shares: dict[str, list[float]] = {layer: [] for layer in ("mid", *LAYERS)}

    def look(step: Any) -> None:
        if step.i not in (STEPS // 8, STEPS // 2):
            return
        with torch.no_grad():
            x, t, told = seen.pop(), step.t, step.condition
            own, others = (model.predict(x.roll(k, 0), t, told.rows(order(k)), "cond") for k in (0, 1))
            whole = (others - own).square().sum((1, 2, 3))
            for layer in shares:
                kept: list[Tensor] = []
                with tapped(model, layer_of(model, layer), kept.append):
                    model.predict(x, t, told, "cond")
                with tapped(model, layer_of(model, layer), lambda h, kept=kept: kept[0].roll(1, 0)):
                    swapped = model.predict(x, t, told, "cond")
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
    means = {layer: stats.bootstrap(each) for layer, each in shares.items()}
    return [
        Row(
            claim=(
                f"{name}: exchanging the bottleneck between pictures, skip connections kept, changes the predicted "
                "noise by a tenth or more of what exchanging everything does"
            ),
            source="what the paper presupposes of the model",
            measured=f"{percent(means['mid'])}",
            baseline=", ".join(f"{layer} {percent(means[layer])}" for layer in LAYERS),
            holds=means["mid"].low >= 0.1,
            n=n,
            data={layer: each.to_json() for layer, each in means.items()},
        )
    ]


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
        "Strength, layer and ratio were chosen on other prompts and seeds. toy-sd is shallow: almost everything passes "
        "its 4x4 bottleneck by, as the first row measures, so the method is also run on a later layer. lerp: the same "
        "layer and strength in a straight line, norms not matched; skips: its skip connections mixed "
        "instead. SD3 has no bottleneck and is refused."
    ),
    file=__file__,
    parts=parts("toy-sd"),
)
