"""MGAD (Huang et al. 2022, https://arxiv.org/abs/2209.13360): texts and pictures guide together.

The model is told nothing; the noise-aware toy-clip alone says what is drawn, and beside it, as in the paper, one that
sees random crops of the predicted picture. The text names a toy; the reference picture shows
surroundings without any toy. A picture follows the text when that toy is there, and the reference when it has the same
ground and sky, both by the toy-judge, which guides nothing. A case has several seeds and counts once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from claims import common
from claims.bars import Bar
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato.metrics import stats
from sfumato.sampling import generate
from sfumato.steer.mgad import MGAD
from sfumato.toybox import COLORS, GROUNDS, SHAPES, SKIES, Scene, oracle, render, to_uint8
from sfumato.toybox.captions import SKY_PHRASES

SOURCE = "Huang et al. 2022"
STEPS = 25
N, SEEDS = 60, 2  # cases, and pictures of each
REPORT, TUNE = 16500, 16600
CUTOUTS = 16  # the paper's
STRENGTHS = (300.0, 1000.0, 3000.0)  # of the noise-aware CLIP, and of the one that sees crops
OF_CROPS = (30.0, 100.0, 300.0)
PICTURES = {"clip": "toy-clip", "cutouts": CUTOUTS}  # as the paper looks
WHOLE = {"clip": "toy-clip", "cutouts": 1, "smallest": 1.0}
DIFFERENT = 0.8
SHOWN = 6


@dataclass(frozen=True)
class Case:
    """A text and a reference picture, which shows ``scene``; ``combined`` describes what following both would be."""

    text: str
    request: oracle.RequestedToy
    scene: Scene
    reference: np.ndarray
    combined: str


@dataclass(frozen=True)
class Arm:
    """One way of guiding: pictures (cases, seeds, 3, h, w); whether each follows the text, and the reference; CPU
    seconds a picture; how different the pictures of one case are."""

    pictures: Tensor
    content: list[bool]
    look: list[bool]
    diversity: list[float]
    seconds: float

    @property
    def both(self) -> list[bool]:
        return [a and b for a, b in zip(self.content, self.look, strict=True)]

    @property
    def followed(self) -> list[float]:
        """Half for either."""
        return [(a + b) / 2 for a, b in zip(self.content, self.look, strict=True)]

    def by_case(self, what: str) -> list[float]:
        """Of every case the share of its pictures."""
        return np.array(getattr(self, what), dtype=float).reshape(len(self.diversity), -1).mean(1).tolist()


def cases(seed: int, n: int, side: int) -> list[Case]:
    """Toys and surroundings drawn evenly; references ``side`` pixels wide."""
    found = []
    for index in range(n):
        rng = np.random.default_rng((seed, index, 13))
        shape, color = str(rng.choice(SHAPES)), str(rng.choice(COLORS))
        scene = Scene((), str(rng.choice(GROUNDS)), str(rng.choice(SKIES)))
        toy = f"{'an' if color == 'orange' else 'a'} {color} {shape}"
        picture = to_uint8(render(scene, side).image)[0].permute(1, 2, 0).numpy()
        sky = " ".join(word for word in SKY_PHRASES[scene.sky] if word)
        text = f"{toy} on the {scene.ground} {sky}"
        found.append(Case(toy, oracle.RequestedToy(shape, color), scene, picture, text))
    return found


def guided(context: Context, name: str, asked: Sequence[Case], seeds: Sequence[int], how: str, **params: Any) -> Arm:
    """``how``: text, image, both, plain (nothing guides) or prompted (the model reads what both would be)."""

    def made() -> tuple[Tensor, float]:
        model, start, rows = common.load(context, name), time.process_time(), []
        for _, (case,) in context.batches(asked, 1, f"{name}, {how}"):
            texts = [case.text] if how in ("text", "both") else []
            images = [case.reference] if how in ("image", "both") else []
            guide = texts or images
            system: Any = MGAD(texts=texts, images=images, prompted=False, **params) if guide else ()
            prompts = [case.combined if how == "prompted" else ""] * len(seeds)
            given = {"seed": list(seeds), "guidance": 1.0, "steps": STEPS, "interventions": system}
            rows.append(generate(model, prompts, **given).pixels.clamp(-1, 1))
        return torch.stack(rows), (time.process_time() - start) / (len(asked) * len(seeds))

    what = (f"{name}, {how}", sorted(params.items()), list(seeds), [case.combined for case in asked])
    pictures, seconds = common.resumed(context, what, made)
    readings = common.judge_of(context).read(pictures.flatten(0, 1))
    owners = [case for case in asked for _ in seeds]
    return Arm(
        pictures,
        [oracle.find(r, case.request) is not None for r, case in zip(readings, owners, strict=True)],
        [(r.ground, r.sky) == (case.scene.ground, case.scene.sky) for r, case in zip(readings, owners, strict=True)],
        [spread(common.judge_features(context, each)) if len(each) > 1 else 0.0 for each in pictures],
        seconds,
    )


def spread(features: np.ndarray) -> float:
    """Mean distance of all pairs of rows (n, d)."""
    apart = np.linalg.norm(features[:, None] - features[None], axis=-1)
    return float(apart[np.triu_indices(len(features), 1)].mean())


def together(name: str, context: Context) -> list[Row]:
    """Both targets against either alone."""
    asked = cases(REPORT, common.tenth(context, N), common.side(context, name))
    seeds = range(REPORT, REPORT + SEEDS)
    strength, of_crops = tuned(context, name, STRENGTHS), tuned(context, name, OF_CROPS, **PICTURES)
    found = {how: guided(context, name, asked, seeds, how, strength=strength) for how in ("text", "image", "both")}
    for how in ("plain", "prompted"):
        found[how] = guided(context, name, asked, seeds, how)
    for label, view in {"crops": PICTURES, "whole view": WHOLE}.items():
        found[label] = guided(context, name, asked, seeds, "both", strength=of_crops, **view)
    shown = {
        "leans_on": common.trust_text(context, "shape", "color", "ground", "sky"),
        "picture": context.save(f"mgad-{name}.png", pictured(asked, found)),
    }
    return rows_of(name, found, strength, shown)


def rows_of(name: str, found: Mapping[str, Arm], strength: float, shown: Mapping[str, Any]) -> list[Row]:
    """The verdicts from the arms text, image, both, plain, prompted, crops and whole view; intervals are over cases."""
    both = found["both"]
    level = {
        how: {what: stats.bootstrap(one.by_case(what)) for what in ("content", "look", "both")}
        for how, one in found.items()
    }

    def more(what: str, over: str, of: str = "both") -> stats.Interval:
        return stats.paired_difference(found[of].by_case(what), found[over].by_case(what))

    look, content = more("look", "text"), more("content", "image")
    alone = max(("text", "image"), key=lambda how: level[how]["both"].value)
    kept = stats.bootstrap(
        both.diversity,
        found["prompted"].diversity,
        statistic=lambda a, b: a.mean(-1) / np.maximum(b.mean(-1), 1e-12),
        paired=True,
    )
    crops, whole = found["crops"], found["whole view"]
    halves = {how: stats.bootstrap(found[how].by_case("followed")) for how in ("both", "crops", "whole view")}
    over_crops, over_whole = more("followed", "crops"), more("followed", "whole view", of="crops")
    about: dict[str, Any] = {
        "n": len(both.diversity),
        **shown,
        "data": {
            how: {what: each.to_json() for what, each in level[how].items()}
            | {"diversity": float(np.mean(one.diversity)), "cpu_seconds": one.seconds}
            for how, one in found.items()
        }
        | {"strength": strength},
    }
    rates = {how: {what: percent(each) for what, each in level[how].items()} for how in found}
    return [
        Row(
            claim=f"{name}: guided by both, pictures have the reference's ground and sky more often than by the text "
            "alone, and the text's toy more often than by the reference alone",
            source=f"{SOURCE} (shown there by pictures)",
            measured=f"look {rates['both']['look']}, {percent(look)} more; toy {rates['both']['content']}, "
            f"{percent(content)} more; strength {strength:g} (tuned)",
            baseline=f"text alone: look {rates['text']['look']}, toy {rates['text']['content']}; reference alone: look "
            f"{rates['image']['look']}, toy {rates['image']['content']}",
            bars=[
                common.lift(look, level["text"]["look"].value, what="look"),
                common.lift(content, level["image"]["content"].value, what="toy"),
            ],
            headline=True,
            **about,
        ),
        Row(
            claim=f"{name}: toy and surroundings both as asked for more often than with either target alone",
            source=f"{SOURCE} (shown there by pictures)",
            measured=f"{rates['both']['both']}, {percent(more('both', alone))} more; {both.seconds:.2f} CPU seconds a "
            "picture",
            baseline=f"{alone} alone {rates[alone]['both']}; nothing {rates['plain']['both']}; the model told so in "
            f"words "
            f"{rates['prompted']['both']} in {found['prompted'].seconds:.2f} seconds",
            bars=[common.lift(more("both", alone), level[alone]["both"].value)],
            **about,
        ),
        Row(
            claim=f"{name}: pictures of one pair of targets are at least {100 * DIFFERENT:.0f} % as different from "
            f"each "
            "other as those of one prompt",
            source=f"{SOURCE} (diverse results; the size is ours)",
            measured=f"{kept.text()} of the mean distance in the toy-judge's features",
            baseline="1, the model told what both targets are and not guided",
            bars=[Bar(kept, null=0.0, ideal=1.0, at_least=DIFFERENT)],
            **about | {"leans_on": "toy-judge's features"},
        ),
        Row(
            claim=f"{name}: a noise-aware CLIP is followed more often (toys and surroundings, each half) than one that "
            f"sees {CUTOUTS} random crops of the predicted picture",
            source="this library",
            measured=f"{percent(halves['both'])}, {percent(over_crops)} more; {both.seconds:.2f} CPU seconds a picture",
            baseline=f"crops {percent(halves['crops'])}, {crops.seconds:.2f} seconds",
            bars=[common.lift(over_crops, halves["crops"].value)],
            **about,
        ),
        Row(
            claim=f"{name}: {CUTOUTS} random crops a step are followed more often than one look at the whole picture",
            source=f"{SOURCE}, section 3",
            measured=f"{percent(halves['crops'])}, {percent(over_whole)} more; {crops.seconds:.2f} CPU seconds a "
            "picture",
            baseline=f"whole view {percent(halves['whole view'])}, {whole.seconds:.2f} seconds",
            bars=[common.lift(over_whole, halves["whole view"].value)],
            **about,
        ),
    ]


def tuned(context: Context, name: str, strengths: Sequence[float], **view: Any) -> float:
    """The strength with which most pictures follow both, on other targets and seeds."""
    asked = cases(TUNE, common.tenth(context, 20), common.side(context, name))
    tried = strengths if not context.quick else strengths[1:2]
    followed = [
        sum(map(np.mean, (one.content, one.look)))
        for one in (guided(context, name, asked, range(TUNE, TUNE + 1), "both", strength=s, **view) for s in tried)
    ]
    return tried[int(np.argmax(followed))]


def pictured(asked: Sequence[Case], found: Mapping[str, Arm]) -> Image.Image:
    """Per case a row: the reference, then a picture guided by the text, by the reference, and two by both."""
    rows: dict[str, list[Tensor]] = {}
    for i, case in enumerate(asked[:SHOWN]):
        reference = torch.from_numpy(case.reference).permute(2, 0, 1).float() / 127.5 - 1
        few = [found[how].pictures[i, 0] for how in ("text", "image", "both")]
        rows[f"{i + 1}. {case.text}"] = [reference, *few, found["both"].pictures[i, -1]]
    return common.labelled(rows, ["reference", "text alone", "reference alone", "both", "both, other seed"])


EXPERIMENT = Experiment(
    key="mgad",
    title="MGAD: guided by texts and pictures at once",
    intro=(
        "The model is unconditional here: a CLIP is all it follows, the noise-aware one where no crops are spoken of. "
        "The text names a toy, the reference shows a ground and a sky without any toy. Strengths were chosen on other "
        f"targets and seeds; {STEPS} steps, {SEEDS} seeds of each case; intervals are over cases."
    ),
    file=__file__,
    parts=tuple(
        Part(
            name, (name, "toy-judge", "toy-clip", "toy-clip-noisy"), lambda context, name=name: together(name, context)
        )
        for name in ("toy-sd", "toy-sd3")
    ),
)
