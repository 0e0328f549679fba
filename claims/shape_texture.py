"""Shape and texture in layers: nets trained with and without a telling texture, and toy-sd's U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from claims import common
from claims.bars import Bar
from claims.core import Context, Experiment, Part, Row
from sfumato.explain import shape_texture as st
from sfumato.explain.shape_texture import LayerTable, ShapeTexture
from sfumato.metrics import stats
from sfumato.models.readers import load_net
from sfumato.toybox import FACTORS, Scene, conflicts, factor_pairs, render
from sfumato.toybox.cues import CUE_SHAPES
from sfumato.toybox.dataset import draw_scene

SOURCE = "Islam et al. 2021"
NETS = ("toy-cnn", "toy-cnn-texture")
REPORT = 6000  # seed of pairs and scenes
STAGES = [f"resnet.encoder.stages.{i}" for i in range(4)]
LAST = STAGES[-1]
# chosen on other scenes and pairs (seed 6500): fewer units, or those of a later stage, can be lost without harm
SILENCED, SHARE = STAGES[1], 0.5
DRAWS = 20  # of random units, the control
EPOCHS = 12  # of a read-out


def net_of(context: Context, name: str) -> Any:
    """A net of the zoo, or one of its stages as ``name/step``, once per run."""
    where, _, step = name.partition("/")
    folder = context.folder(where) / "stages" / step if step else context.folder(where)
    return context.once(f"net {name}", lambda: load_net(folder))


def steps_of(context: Context, name: str) -> list[tuple[int, str]]:
    """(step, name) of the logged stages and of the finished net."""
    folder = context.folder(name) / "stages"
    found = sorted((int(path.name.rpartition("_")[2]), f"{name}/{path.name}") for path in folder.glob("step_*"))
    return [*found, (_last_step(context.folder(name)), name)]


def _last_step(folder: Path) -> int:
    import json

    return int(json.loads((folder / "sfumato.json").read_text(encoding="utf-8"))["training"]["steps"])


def table_of(context: Context, name: str, factors: tuple[str, ...] = ("shape", "texture")) -> LayerTable:
    """Dimensions by layer, once per run."""

    def made() -> LayerTable:
        pairs = context.count(300, 12)
        system = ShapeTexture(factors=list(factors), layers=STAGES, pairs=pairs, seed=REPORT, draws=200)
        return system.explain_net(net_of(context, name), name)

    return context.once(f"table {name} {factors}", made)


def trained(context: Context) -> list[Row]:
    """What training rewards is what the last stage is about."""
    tables = {name: table_of(context, name) for name in (*NETS, f"{NETS[0]}/step_000000")}
    score = {name: {f: table.layers[LAST].scores[f] for f in ("shape", "texture")} for name, table in tables.items()}
    unbiased, biased, raw = (score[name] for name in tables)
    gaps = {
        "shape": stats.newcombe(unbiased["shape"], biased["shape"]),
        "texture": stats.newcombe(biased["texture"], unbiased["texture"]),
    }
    picture = context.save(
        "shape-texture-layers.png",
        st.plot({**dict(list(tables.items())[:2]), "untrained": tables[f"{NETS[0]}/step_000000"]}),
    )

    def in_words(each: dict[str, stats.Interval]) -> str:
        return f"shape {each['shape'].text()}, texture {each['texture'].text()}"

    n = tables[NETS[0]].layers[LAST].n
    percents = {
        name: {f: round(tables[name].layers[LAST].percent(f), 1) for f in ("shape", "texture", "residual")}
        for name in NETS
    }
    rows = [
        Row(
            claim="last stage: the net trained on shapes under any texture scores 0.10 more for shape, the net trained"
            " where texture gives the label away 0.10 more for texture",
            source=f"{SOURCE}, table 1 (trained on ordinary and on stylised pictures)",
            measured=f"toy-cnn {in_words(unbiased)}; toy-cnn-texture {in_words(biased)}; "
            f"in percent of units {percents}",
            baseline=f"untrained {in_words(raw)}",
            bars=[Bar(gap, 0.0, 1.0, at_least=0.1, above=0.0, what=f) for f, gap in gaps.items()],
            headline=True,
            n=n,
            picture=picture,
            data={name: table.to_json()["layers"][LAST] | {"units": None} for name, table in tables.items()},
        )
    ]
    first, last = (tables[NETS[0]].layers[each].scores["shape"] for each in (STAGES[0], LAST))
    scaled = stats.Interval(*(1.3 * x for x in (first.value, first.low, first.high)), first.n)
    rise = stats.newcombe(last, scaled)
    by_stage = {
        name: {f: ", ".join(f"{table.layers[s].scores[f].value:.2f}" for s in STAGES) for f in ("shape", "texture")}
        for name, table in tables.items()
    }
    told_by = {name: f"shape {each['shape']}; texture {each['texture']}" for name, each in by_stage.items()}
    rows.append(
        Row(
            claim="toy-cnn: shape scores 1.3 times as high in the last stage as in the first",
            source=f"{SOURCE}, section 3.3 (shape is largely encoded in the last layers)",
            measured=f"{first.text()} in stage 1, {last.text()} in stage 4; stages 1 to 4: {told_by[NETS[0]]}",
            baseline=f"untrained: {told_by[f'{NETS[0]}/step_000000']}. toy-cnn-texture: {told_by[NETS[1]]}",
            bars=[Bar(rise, -0.3 * first.value, 1 - 1.3 * first.value, at_least=0.0, what="over 1.3 times the first")],
            n=n,
        )
    )
    return rows


def factor_table(context: Context) -> list[Row]:
    """Five factors instead of two: what "shape" pairs of restyled pictures lump together stands apart here."""
    tables = {name: table_of(context, name, FACTORS) for name in NETS}
    summary = {
        name: "; ".join(f"{f} " + ", ".join(f"{table.layers[s].scores[f].value:.2f}" for s in STAGES) for f in FACTORS)
        for name, table in tables.items()
    }
    return [
        Row(
            claim="scores of five factors, stage 1 to 4 (pose: place, turn and camera; scenery: ground, sky and light)",
            source="this repository",
            measured=f"toy-cnn {summary['toy-cnn']}",
            baseline=f"toy-cnn-texture {summary['toy-cnn-texture']}",
            n=tables[NETS[0]].layers[LAST].n,
            picture=context.save("shape-texture-factors.png", st.plot(tables)),
            data={
                name: {s: {f: table.layers[s].scores[f].to_json() for f in FACTORS} for s in STAGES}
                for name, table in tables.items()
            },
        )
    ]


def over_training(context: Context) -> list[Row]:
    """When shape comes."""
    logged = steps_of(context, NETS[0])
    found = [(step, table_of(context, name).layers[LAST].scores) for step, name in logged]
    early = max(i for i, (step, _) in enumerate(logged) if step <= 0.2 * logged[-1][0])
    # the same pairs for all three nets, so that what they have in common cancels out
    units = [pair_units(context, logged[i][1]) for i in (0, early, -1)]
    n = len(units[0]["shape"][0])
    rng = torch.Generator().manual_seed(REPORT)
    ways = [
        _way(units, rows) for rows in (torch.randint(0, n, (n,), generator=rng) for _ in range(context.count(200, 5)))
    ]
    way = stats.Interval(_way(units, torch.arange(n)), *(float(v) for v in np.quantile(ways, [0.025, 0.975])), n, 0.95)
    summary = "; ".join(
        f"step {step}: shape {s['shape'].text()}, texture {s['texture'].value:.3f}" for step, s in found
    )
    return [
        Row(
            claim="toy-cnn: a fifth of the training brings the last stage 80 % of the way to its final score for shape",
            source=f"{SOURCE}, section 3.4 (most shape is learned in the first epochs)",
            measured=f"{way.text(percent=True)} of the way; {summary}",
            baseline="proportional to the steps: 20 % of the way",
            bars=[Bar(way, 0.2, 1.0, at_least=0.8)],
            n=n,
            data={"way": way.to_json()} | {str(step): {f: s[f].to_json() for f in s} for step, s in found},
        )
    ]


def _way(units: list[dict[str, tuple[Tensor, Tensor]]], rows: Tensor) -> float:
    """How far the second net is on the way from the first to the third, from the pairs at ``rows``."""
    start, now, end = (
        st.estimate({f: (a[rows], b[rows]) for f, (a, b) in each.items()}, draws=0).scores["shape"].value
        for each in units
    )
    return (now - start) / (end - start)


def pair_units(context: Context, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Units of the last stage for the pairs that :func:`table_of` shows too."""

    count = context.count(300, 12)
    sides = {
        f: [
            st.rendered(tuple(pair[k] for pair in factor_pairs(f, count, REPORT)), common.side(context, NETS[0]))
            for k in range(2)
        ]
        for f in ("shape", "texture")
    }
    net = net_of(context, name)
    return {f: (st.features(net, a, [LAST])[LAST], st.features(net, b, [LAST])[LAST]) for f, (a, b) in sides.items()}


@torch.no_grad()
def decisions(net: Any, pixels: Tensor, batch: int = 100) -> np.ndarray:
    """The class (n,) that a classifier in eval mode names for pictures (n 3 h w)."""
    return torch.cat([net(chunk).logits.argmax(1) for chunk in pixels.split(batch)]).numpy()


def shape_classes(masks: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Toybox masks (n h w) as classes: 0 background, 1 and up the shape of the toy, in the order of the cues."""
    out = torch.zeros_like(masks, dtype=torch.long)
    for row, mask, scene in zip(out, masks, scenes, strict=True):
        for k, toy in enumerate(scene.toys):
            row[mask == k] = 1 + CUE_SHAPES.index(toy.shape)
    return out


def silencing(context: Context) -> list[Row]:
    """Units ranked high for what a net decides by are those it needs."""
    n = context.count(300, 24)
    scenes, shapes, textures = conflicts(n, REPORT)
    pixels = context.once("conflicts", lambda: render(scenes, common.side(context, NETS[0])).image)
    rows = []
    for name, own, other, truth in ((NETS[0], "shape", "texture", shapes), (NETS[1], "texture", "shape", textures)):
        net = net_of(context, name)
        ranks = table_of(context, name).layers[SILENCED]
        count = max(1, round(SHARE * ranks.d))
        whole = decisions(net, pixels) == truth
        right = {f: _without(net, ranks.ranked(f)[:count], pixels) == truth for f in (own, other)}
        rng = np.random.default_rng(REPORT)
        control = [
            (_without(net, rng.permutation(ranks.d)[:count].tolist(), pixels) == truth).mean()
            for _ in range(context.count(DRAWS, 3))
        ]
        gap = stats.paired_difference(right[other] * 1.0, right[own] * 1.0, draws=2000)
        rows.append(
            Row(
                claim=f"{name}, cue-conflict pictures: silencing the {count} units of 32 in the second stage that score"
                f" highest for {own} costs 5 points more of its accuracy by {own} than silencing as many for {other}",
                source=f"{SOURCE}, section 3.5 (removing shape and texture neurons)",
                measured=f"{gap.text(percent=True)} more: {100 * whole.mean():.1f} % whole,"
                f" {100 * right[own].mean():.1f} % without {own} units, {100 * right[other].mean():.1f} % without"
                f" {other} units",
                baseline=f"as many random units: {100 * np.mean(control):.1f} % (lowest of {len(control)} draws"
                f" {100 * min(control):.1f} %)",
                bars=[Bar(gap, 0.0, float(whole.mean()), at_least=0.05, above=0.0)],
                n=n,
                data={"gap": gap.to_json(), "whole": float(whole.mean()), "control": [float(v) for v in control]},
            )
        )
    return rows


def _without(net: Any, units: list[int], pixels: Tensor) -> np.ndarray:
    with st.ablated(net, SILENCED, units):
        return decisions(net, pixels)


def several_toys(n: int, seed: int) -> list[Scene]:
    """Scenes of two or three toys whose shapes are those that the nets name: in them, what and where differ."""
    found: list[Scene] = []
    index = 0
    while len(found) < n:
        scene = draw_scene("test", seed, index, 2 + index % 2)
        found += [scene] if {toy.shape for toy in scene.toys} <= set(CUE_SHAPES) else []
        index += 1
    return found


def read_outs(context: Context) -> list[Row]:
    """What a head can tell of each pixel from frozen maps, in scenes of several toys; three draws of scenes."""
    learn, held, draws = context.count(300, 20), context.count(150, 10), context.count(3, 2)
    names = (NETS[0], NETS[1], f"{NETS[0]}/step_000000")
    got: dict[str, dict[str, list[list[float]]]] = {n: {"binary": [], "semantic": []} for n in names}  # draw, stage
    for draw in range(draws):
        scenes = several_toys(learn + held, REPORT + draw)
        frames = render(scenes, common.side(context, NETS[0]))
        truths = {"binary": ((frames.mask >= 0).long(), 2), "semantic": (shape_classes(frames.mask, scenes), 5)}
        for name in names:
            maps = st.features(net_of(context, name), frames.image, STAGES, pool=None)
            for task, (truth, classes) in truths.items():
                # always background: its share of the pixels for that class, nothing for the others
                chance = float((truth[learn:] == 0).float().mean()) / classes
                row = []
                for stage in STAGES:
                    settings = {"depth": 1, "epochs": context.count(EPOCHS, 2), "learning_rate": 0.05, "seed": draw}
                    head = st.train_readout(maps[stage][:learn], truth[:learn], classes, **settings)
                    value = st.mean_iou(head, maps[stage][learn:], truth[learn:], classes)
                    row.append((value - chance) / (1 - chance))
                got[name][task].append(row)
        context.report(f"  read-outs, draw {draw}: {got[NETS[0]]}")
    means = {name: {task: np.mean(rows, 0) for task, rows in each.items()} for name, each in got.items()}
    best = {task: int(values.argmax()) for task, values in means[NETS[0]].items()}
    own = {task: [row[best[task]] for row in rows] for task, rows in got[NETS[0]].items()}
    gap = stats.mean([a - b for a, b in zip(own["binary"], own["semantic"], strict=True)])

    def in_words(name: str) -> str:
        return "; ".join(f"{task} {', '.join(f'{v:.2f}' for v in values)}" for task, values in means[name].items())

    return [
        Row(
            claim="toy-cnn: where things are can be read from frozen maps better than what they are: the best stage's"
            " mIoU, above chance, is 0.10 higher for foreground than for shape classes",
            source=f"{SOURCE}, section 4 (encoding shape does not imply localised semantic information)",
            measured=f"{gap.text()} higher; stages 1 to 4: {in_words(NETS[0])}",
            baseline=f"untrained: {in_words(names[2])}. toy-cnn-texture: {in_words(NETS[1])}",
            bars=[Bar(gap, 0.0, float(np.mean(own["binary"])), at_least=0.1, above=0.0)],
            n=draws,
            leans_on=f"exact masks of scenes of two and three toys; one-layer heads; {draws} draws of {learn} scenes;"
            " (mIoU - chance) / (1 - chance)",
            data=got,
        )
    ]


def unet(context: Context) -> list[Row]:
    """The same for the U-Net of toy-sd, stage by stage, at two noise levels."""
    model = common.load(context, "toy-sd")
    pairs = context.count(100, 4)
    tables = {
        f"toy-sd, {round(100 * at)} % denoised": ShapeTexture(
            factors=["shape", "texture", "color"], pairs=pairs, progress=at, seed=REPORT, draws=200
        ).explain_net(model, f"toy-sd at {at}")
        for at in (0.5, 0.8)
    }
    clean = tables["toy-sd, 80 % denoised"].layers
    first, middle = next(iter(clean.values())), clean.get("mid_block")
    base = first.scores["shape"]
    bars = [] if middle is None else [
        Bar(stats.newcombe(middle.scores["shape"], base), 0.0, 1 - base.value, above=0.0, what="middle over first")
    ]  # fmt: skip
    summary = "; ".join(
        f"{name}: " + ", ".join(f"{f} {each.scores[f].value:.2f}" for f in each.scores) for name, each in clean.items()
    )
    return [
        Row(
            claim="toy-sd's U-Net: the middle block scores higher for shape than the first",
            source="this repository",
            measured=f"80 % denoised, empty prompt, independent noise: {summary}",
            baseline="50 % denoised: "
            + "; ".join(
                f"{name} shape {each.scores['shape'].value:.2f}"
                for name, each in tables["toy-sd, 50 % denoised"].layers.items()
            ),
            bars=bars,
            n=pairs,
            picture=context.save("shape-texture-unet.png", st.plot(tables)),
            data={
                title: {name: each.to_json() | {"units": None} for name, each in table.layers.items()}
                for title, table in tables.items()
            },
        )
    ]


EXPERIMENT = Experiment(
    key="shape_texture",
    title="shape or texture, layer by layer",
    intro=(
        "Two small ResNets of one architecture: `toy-cnn` names a toy's shape under any texture, `toy-cnn-texture` was"
        " trained where the texture gives the label away. Scores are the covariance of units over pairs of renders that"
        " share one factor and nothing else, as a share of all variance; intervals are bootstraps over pairs. One"
        " training each."
    ),
    file=__file__,
    parts=(
        Part("training", NETS, trained),
        Part("over training", NETS[:1], over_training),
        Part("silencing", NETS, silencing),
        Part("read-outs", NETS, read_outs),
        Part("factors", NETS, factor_table),
        Part("U-Net", ("toy-sd",), unet),
    ),
)
