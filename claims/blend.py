"""Blending (Avrahami et al. 2022, https://arxiv.org/abs/2206.02779): a region is redrawn, the rest stays.

One toy of a rendered scene is to take another colour. The region is the toy's exact mask, two pixels wider; what the
picture should look like is known exactly: the same scene rendered with that colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from claims import common
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato import masks
from sfumato.edit.blend import Blend
from sfumato.metrics import segmentation, stats
from sfumato.sampling import generate
from sfumato.toybox import COLORS, Scene, caption, oracle, render
from sfumato.toybox.dataset import draw_scene

SOURCE = "Avrahami, Fried, Lischinski 2022"
SIDE = 64
CELLS = 6 * 16  # pixels of six latent cells
STEPS = 30
REPORT, TUNE = 5100, 5200  # seeds of scenes and noise: never the same for choosing and for reporting
STRENGTHS = (0.5, 0.65, 0.8, 0.95)
MARGIN = 2  # pixels around the toy that may change as well


@dataclass(frozen=True)
class Case:
    """One edit: a picture (3, h, w) of ``before``, the toy's mask bool (h, w), and the true result ``truth``."""

    before: str
    after: str
    toy_before: str
    toy_after: str
    around: str
    picture: Tensor
    truth: Tensor
    mask: Tensor
    wish: oracle.Wanted


@dataclass(frozen=True)
class Outcome:
    """What one method made of one case. ``iou`` with the silhouette, 0 where the wanted toy is not to be seen."""

    picture: Tensor
    there: bool
    iou: float
    background: float
    seam: float


Method = Callable[[Case, int], Tensor]


def cases(split: str, seed: int, n: int) -> list[Case]:
    """``n`` scenes of one toy that is large enough, each with another colour for it."""
    found: list[Case] = []
    index = 0
    while len(found) < n:
        scene = draw_scene(split, seed, index, 1)
        index += 1
        other = scene.replace(0, color=COLORS[(COLORS.index(scene.toys[0].color) + 1 + index % 6) % len(COLORS)])
        frames = render([scene, other], SIDE)
        if int((frames.mask[0] == 0).sum()) >= CELLS:
            found.append(case(scene, other, frames))
    return found


def case(scene: Scene, other: Scene, frames: Any) -> Case:
    """The case of two scenes that differ in the colour of their one toy."""
    told, wanted = (caption(each, None, "plain") for each in (scene, other))
    named = [next(phrase.text for phrase in each.phrases if phrase.object == 0) for each in (told, wanted)]
    toy = other.toys[0]
    return Case(
        before=told.text,
        after=wanted.text,
        toy_before=named[0],
        toy_after=named[1],
        around=f"the {scene.ground}",
        picture=frames.image[0],
        truth=frames.image[1],
        mask=frames.mask[0] == 0,
        wish=oracle.Wanted(shape=toy.shape, color=toy.color),
    )


def outcomes(context: Context, asked: Sequence[Case], method: Method, seed: int, label: str) -> list[Outcome]:
    """Every case edited, one by one because each has a mask of its own, and read by the judge."""
    pictures = []
    for start, chunk in context.batches(asked, 1, label):
        pictures.append(method(chunk[0], seed + start)[0].clamp(-1, 1))
    readings = common.judge_of(context).read(torch.stack(pictures))
    return [measured(*each) for each in zip(asked, pictures, readings, strict=True)]


def measured(one: Case, picture: Tensor, reading: oracle.SceneReading) -> Outcome:
    """One picture held against its case."""
    toy = oracle.find(reading, one.wish)
    iou = 0.0 if toy is None else float(segmentation.iou(toy.mask[None], one.mask[None])[0])
    wide = masks.dilate(one.mask.float(), MARGIN) > 0.5
    error = (picture - one.picture)[:, ~wide].square().mean() / 4  # of the range -1 to 1
    border = wide & ~(masks.dilate(one.mask.float(), -1) > 0.5)
    seam = (edges(picture) - edges(one.truth)).abs()[border].mean()
    return Outcome(picture, toy is not None, iou, float(-10 * error.clamp_min(1e-10).log10()), float(seam))


def edges(picture: Tensor) -> Tensor:
    """How steep a picture (3, h, w) is at every pixel (h, w)."""
    right = torch.nn.functional.pad(picture.diff(dim=2), (0, 1))
    down = torch.nn.functional.pad(picture.diff(dim=1), (0, 0, 0, 1))
    return (right.square() + down.square()).sum(0).sqrt()


def schedule(model: Any) -> dict[str, Any]:
    """Settings that every method shares."""
    return {"steps": STEPS, "scheduler": None if model.flow else "ddim"}


def blending(model: Any, margin: int = MARGIN, **params: Any) -> Method:
    """Blending with a case's mask, grown by ``margin`` pixels."""

    def method(one: Case, seed: int) -> Tensor:
        system = Blend(mask=masks.dilate(one.mask.float(), margin), **params)
        given = {"image": one.picture[None], "strength": 1.0, "seed": seed, **schedule(model)}
        return generate(model, one.after, interventions=system, **given).pixels

    return method


def redrawing(model: Any, strength: float) -> Method:
    """Image-to-image (SDEdit, Meng et al. 2022): the whole picture noised and drawn again."""

    def method(one: Case, seed: int) -> Tensor:
        given = {"image": one.picture[None], "strength": strength, "seed": seed, **schedule(model)}
        return generate(model, one.after, **given).pixels

    return method


def values(found: Sequence[Outcome], name: str) -> list[float]:
    return [float(getattr(one, name)) for one in found]


def best_strength(context: Context, name: str) -> float:
    """The strength at which image-to-image changes the toy most often, on other scenes and seeds."""

    def chosen() -> float:
        model = common.load(context, name)
        tuned = cases("val", TUNE, context.count(16, 3))
        hits = {}
        for strength in STRENGTHS:
            found = outcomes(context, tuned, redrawing(model, strength), TUNE, f"{name}, strength {strength}")
            hits[strength] = sum(values(found, "iou"))
        return max(hits, key=lambda strength: hits[strength])

    return context.once(f"best strength {name}", chosen)


def edits(name: str, context: Context) -> list[Row]:
    """Blending, resampled blending and image-to-image on the same cases and seeds."""
    model = common.load(context, name)
    asked = cases("test", REPORT, context.count(60, 4))
    strength = best_strength(context, name)
    arms = {
        "blend": blending(model),
        "resampled": blending(model, resample=3, jump=5),
        "image to image": redrawing(model, strength),
    }
    found = {arm: outcomes(context, asked, arms[arm], REPORT, f"{name}, {arm}") for arm in arms}
    there = {arm: stats.share([one.there for one in found[arm]]) for arm in arms}
    gain = stats.paired_difference(values(found["blend"], "background"), values(found["image to image"], "background"))
    hits = stats.paired_difference(values(found["blend"], "there"), values(found["image to image"], "there"))
    seams = stats.paired_difference(values(found["resampled"], "seam"), values(found["blend"], "seam"))
    shown = [[one.picture for one in asked[:10]], [one.truth for one in asked[:10]]]
    shown += [[one.picture for one in found[arm][:10]] for arm in arms]
    picture = context.save(f"blend-{name}.png", common.sheet(shown))
    background = {arm: stats.bootstrap(values(found[arm], "background")) for arm in arms}
    data = {
        arm: {
            "there": there[arm].to_json(),
            "background": background[arm].to_json(),
            "iou": stats.bootstrap(values(found[arm], "iou")).to_json(),
            "seam": stats.bootstrap(values(found[arm], "seam")).to_json(),
        }
        for arm in arms
    }
    leans = common.trust_text(context, "shape", "color")
    return [
        Row(
            claim=(
                f"{name}: blending keeps the picture outside the region 5 dB better than image-to-image, and draws the "
                "wanted toy at most 10 points less often (95 % bounds)"
            ),
            source=SOURCE,
            measured=(
                f"background {background['blend'].text(digits=1)} dB, {gain.text(digits=1)} dB more; wanted toy there "
                f"{percent(there['blend'])}, difference {percent(hits)}"
            ),
            baseline=(
                f"image-to-image at strength {strength} (tuned): {background['image to image'].text(digits=1)} dB, "
                f"{percent(there['image to image'])}"
            ),
            holds=gain.low >= 5 and hits.low >= -0.1,
            n=len(asked),
            leans_on=leans,
            picture=picture,
            data=data,
        ),
        Row(
            claim=f"{name}: resampling (three times, five steps each) lowers the error of edges along the border",
            source="Lugmayr et al. 2022 (RePaint), section 4.2",
            measured=f"{seams.text()} of edge error, p {seams.p:.2g}; wanted toy there {percent(there['resampled'])}",
            baseline=f"without: {stats.bootstrap(values(found['blend'], 'seam')).text()}, at a third of the steps",
            holds=seams.high < 0,
            n=len(asked),
            leans_on="exact re-render",
            picture=picture,
            data=data,
        ),
    ]


def parts(name: str) -> tuple[Part, ...]:
    """The parts of one model."""
    return (Part(f"{name}: edits", (name, "toy-judge"), lambda context: edits(name, context)),)


EXPERIMENT = Experiment(
    key="blend",
    title="Blended latent diffusion: redraw a region, keep the rest",
    intro=(
        "Toys of rendered scenes take another colour; region and truth are exact. The strength of image-to-image was "
        "chosen on validation scenes and other seeds. Background is the peak signal-to-noise ratio against the render, "
        "codec included, two pixels away from the toy."
    ),
    file=__file__,
    parts=(*parts("toy-sd"), *parts("toy-sd3")),
)
