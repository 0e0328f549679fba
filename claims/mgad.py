"""MGAD (Huang et al. 2022, https://arxiv.org/abs/2209.13360): texts and pictures guide together.

The model is told nothing; toy-clip alone says what is drawn. The text names a toy; the reference picture shows another
toy in other surroundings. A picture follows the text when that toy is there, and the reference when it has the same
ground and sky, both by the toy-judge, which guides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from claims import common
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato.metrics import stats
from sfumato.sampling import generate
from sfumato.steer.mgad import MGAD
from sfumato.toybox import COLORS, GROUNDS, SHAPES, SKIES, Scene, Toy, oracle, render, to_uint8

SOURCE = "Huang et al. 2022"
STEPS = 25
REPORT, TUNE = 6300, 6400
CUTOUTS = 4
STRENGTHS = (30.0, 100.0, 300.0)


@dataclass(frozen=True)
class Case:
    """A text and a reference picture, which shows ``scene``; ``told`` describes what following both would be."""

    text: str
    wish: oracle.Wanted
    scene: Scene
    reference: np.ndarray
    told: str


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


def cases(seed: int, n: int) -> list[Case]:
    """Toys and surroundings drawn evenly; text and reference share neither shape nor colour."""
    found = []
    for index in range(n):
        rng = np.random.default_rng((seed, index, 13))
        shapes, colors = rng.permutation(SHAPES)[:2], rng.permutation(COLORS)[:2]
        scene = Scene((Toy(str(shapes[1]), str(colors[1])),), str(rng.choice(GROUNDS)), str(rng.choice(SKIES)))
        toy = f"{'an' if colors[0] == 'orange' else 'a'} {colors[0]} {shapes[0]}"
        picture = to_uint8(render(scene, 64).image)[0].permute(1, 2, 0).numpy()
        told = f"{toy} on the {scene.ground}"
        found.append(Case(toy, oracle.Wanted(str(shapes[0]), str(colors[0])), scene, picture, told))
    return found


def guided(context: Context, name: str, asked: Sequence[Case], seeds: Sequence[int], how: str, **params: Any) -> Arm:
    """``how``: text, image, both, plain (nothing guides) or prompted (the model reads what both would be)."""
    model = common.load(context, name)
    start, rows = time.process_time(), []
    for _, (case,) in context.batches(asked, 1, f"{name}, {how}"):
        texts = [case.text] if how in ("text", "both") else []
        images = [case.reference] if how in ("image", "both") else []
        system: Any = MGAD(texts=texts, images=images, prompted=False, **params) if texts or images else ()
        prompt = case.told if how == "prompted" else ""
        made = generate(model, [prompt] * len(seeds), seed=list(seeds), guidance=1.0, steps=STEPS, interventions=system)
        rows.append(made.pixels.clamp(-1, 1))
    seconds = (time.process_time() - start) / (len(asked) * len(seeds))
    pictures = torch.stack(rows)
    readings = common.judge_of(context).read(pictures.flatten(0, 1))
    owners = [case for case in asked for _ in seeds]
    return Arm(
        pictures,
        [oracle.find(r, case.wish) is not None for r, case in zip(readings, owners, strict=True)],
        [(r.ground, r.sky) == (case.scene.ground, case.scene.sky) for r, case in zip(readings, owners, strict=True)],
        [spread(common.judge_features(context, each)) for each in pictures],
        seconds,
    )


def spread(features: np.ndarray) -> float:
    """Mean distance of all pairs of rows (n, d)."""
    apart = np.linalg.norm(features[:, None] - features[None], axis=-1)
    return float(apart[np.triu_indices(len(features), 1)].mean())


def together(name: str, context: Context) -> list[Row]:
    """Both targets against either alone."""
    asked, seeds = cases(REPORT, context.count(6, 2)), range(REPORT, REPORT + context.count(4, 2))
    strength = tuned(context, name)
    options = {"cutouts": CUTOUTS, "strength": strength}
    found = {how: guided(context, name, asked, seeds, how, **options) for how in ("text", "image", "both")}
    for how in ("plain", "prompted"):
        found[how] = guided(context, name, asked, seeds, how)
    whole = guided(context, name, asked, seeds, "both", strength=strength, cutouts=1, smallest=1.0)
    both, n = found["both"], len(asked) * len(seeds)
    gain_look = stats.mcnemar(both.look, found["text"].look)
    gain_content = stats.mcnemar(both.content, found["image"].content)
    all_of_it = {how: stats.share(one.both) for how, one in found.items()}
    alone = max(("text", "image"), key=lambda how: all_of_it[how].value)
    more = stats.mcnemar(both.both, found[alone].both)
    kept = stats.ratio(both.diversity, found["prompted"].diversity)
    cut = stats.mcnemar(both.both, whole.both)
    leans = common.trust_text(context, "shape", "color")
    picture = context.save(f"mgad-{name}.png", shown(asked, found))
    data = {
        how: {
            "content": float(np.mean(one.content)),
            "look": float(np.mean(one.look)),
            "both": float(np.mean(one.both)),
            "diversity": float(np.mean(one.diversity)),
            "cpu_seconds": one.seconds,
        }
        for how, one in {**found, "whole view": whole}.items()
    } | {"strength": strength}
    return [
        Row(
            claim=f"{name}: guided by both, pictures have the reference's ground and sky more often than by the text "
            "alone, and the text's toy more often than by the reference alone",
            source=SOURCE,
            measured=f"look {percent(stats.share(both.look))}, {percent(gain_look)} more; toy "
            f"{percent(stats.share(both.content))}, {percent(gain_content)} more; strength {strength:g} (tuned)",
            baseline=f"text alone: look {percent(stats.share(found['text'].look))}, toy "
            f"{percent(stats.share(found['text'].content))}; reference alone: look "
            f"{percent(stats.share(found['image'].look))}, toy {percent(stats.share(found['image'].content))}",
            holds=gain_look.low > 0 and gain_content.low > 0,
            n=n,
            leans_on=leans,
            picture=picture,
            data=data,
        ),
        Row(
            claim=f"{name}: toy and surroundings both as asked for more often than with either target alone",
            source=SOURCE,
            measured=f"{percent(all_of_it['both'])}, {percent(more)} more; {both.seconds:.2f} CPU seconds a picture",
            baseline=f"{alone} alone {percent(all_of_it[alone])}; nothing {percent(all_of_it['plain'])}; the "
            f"model told so in words {percent(all_of_it['prompted'])} in {found['prompted'].seconds:.2f} seconds",
            holds=more.low > 0,
            n=n,
            leans_on=leans,
            picture=picture,
            data=data,
        ),
        Row(
            claim=f"{name}: pictures of one pair of targets stay at least 80 % as different as those of one prompt",
            source=SOURCE,
            measured=f"{kept.text()} of the mean distance in the toy-judge's features",
            baseline="1, the model told what both targets are and not guided",
            holds=kept.low >= 0.8,
            n=n,
            leans_on="toy-judge's features",
            picture=picture,
            data=data,
        ),
        Row(
            claim=f"{name}: {CUTOUTS} random crops a step are right more often than one look at the whole picture",
            source=SOURCE,
            measured=f"{percent(cut)} more; {both.seconds:.2f} CPU seconds a picture",
            baseline=f"whole view {percent(stats.share(whole.both))}, {whole.seconds:.2f} seconds",
            holds=cut.low > 0,
            n=n,
            leans_on=leans,
            data=data,
        ),
    ]


def tuned(context: Context, name: str) -> float:
    """The strength with which most pictures follow both, on other targets and seeds."""
    asked, seeds = cases(TUNE, context.count(3, 1)), range(TUNE, TUNE + 2)
    tried = STRENGTHS if not context.quick else STRENGTHS[:1]
    followed = [
        sum(map(np.mean, (one.content, one.look)))
        for one in (guided(context, name, asked, seeds, "both", cutouts=CUTOUTS, strength=s) for s in tried)
    ]
    return tried[int(np.argmax(followed))]


def shown(asked: Sequence[Case], found: dict[str, Arm]) -> Image.Image:
    """Per case a row: the reference, then one picture guided by the text, by the reference, and two by both."""
    rows = []
    for i, case in enumerate(asked[:6]):
        reference = torch.from_numpy(case.reference).permute(2, 0, 1).float() / 127.5 - 1
        few = [found[how].pictures[i, 0] for how in ("text", "image", "both")]
        rows.append([reference, *few, found["both"].pictures[i, -1]])
    return common.sheet(rows)


EXPERIMENT = Experiment(
    key="mgad",
    title="MGAD: guided by texts and pictures at once",
    intro=(
        "The model is unconditional here: toy-clip's view of random crops is all it follows. The reference differs "
        "from the text's toy in shape and colour. Strength was chosen on other targets and seeds; "
        f"{STEPS} steps, {CUTOUTS} crops."
    ),
    file=__file__,
    parts=tuple(
        Part(
            name, (name, "toy-judge", "toy-clip", "toy-clip-noisy"), lambda context, name=name: together(name, context)
        )
        for name in ("toy-sd", "toy-sd3")
    ),
)
