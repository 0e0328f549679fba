"""Blending (Avrahami et al. 2022, https://arxiv.org/abs/2206.02779): a region is redrawn, the rest stays.

One toy of a rendered scene is to take another colour. The region is the toy's exact mask, a little wider; what the
picture should look like is known exactly: the same scene rendered with that colour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from claims import common
from claims.bars import Bar
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato import mask_ops
from sfumato.edit.blend import Blend
from sfumato.metrics import segmentation, stats
from sfumato.sampling import generate
from sfumato.toybox import COLORS, Scene, caption, oracle, render
from sfumato.toybox.dataset import draw_scene

SOURCE = "Avrahami, Fried, Lischinski 2022"
SMALLEST = 6 / 256  # share of the picture: six cells of a 16x16 latent grid
STEPS = 30
N, FEW = 200, 100  # cases of the comparison, and of resampling, which takes three times as long
SHOWN = 6
REPORT, TUNE = 15100, 15200  # seeds of scenes and noise: never the same for choosing and for reporting
STRENGTHS = (0.5, 0.65, 0.8, 0.95)
MARGIN = 1 / 32  # of the picture's side: how far around the toy the picture may change as well
KEPT = 5.0  # dB
HARM = 0.1  # share of toys that may be missing where image-to-image draws them
SEEN = (0.8, 1.0)  # what the judge must read in the true results


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
    request: oracle.RequestedToy


@dataclass(frozen=True)
class Outcome:
    """What one method made of one case. ``iou`` with the silhouette, 0 where the wanted toy is not to be seen."""

    picture: Tensor
    there: bool
    iou: float
    background: float
    seam: float


Method = Callable[[Case, int], Tensor]


def margin_of(side: int) -> int:
    """:data:`MARGIN` in pixels."""
    return max(1, round(MARGIN * side))


def recoloured(scene: Scene, index: int) -> Scene:
    """The scene with another colour for its first toy."""
    return scene.replace(0, color=COLORS[(COLORS.index(scene.toys[0].color) + 1 + index % 6) % len(COLORS)])


def cases(split: str, seed: int, n: int, side: int) -> list[Case]:
    """``n`` scenes of one toy that is large enough, each with another colour for it, ``side`` pixels wide."""
    found: list[Case] = []
    index = 0
    while len(found) < n:
        scene = draw_scene(split, seed, index, 1)
        index += 1
        other = recoloured(scene, index)
        frames = render([scene, other], side)
        if float((frames.mask[0] == 0).float().mean()) >= SMALLEST:
            found.append(case(scene, other, frames))
    return found


def case(scene: Scene, other: Scene, frames: Any) -> Case:
    """The case of two scenes that differ in the colour of their one toy."""
    before, wanted = (caption(each, None, "plain") for each in (scene, other))
    named = [next(phrase.text for phrase in each.phrases if phrase.object == 0) for each in (before, wanted)]
    toy = other.toys[0]
    return Case(
        before=before.text,
        after=wanted.text,
        toy_before=named[0],
        toy_after=named[1],
        around=f"the {scene.ground}",
        picture=frames.image[0],
        truth=frames.image[1],
        mask=frames.mask[0] == 0,
        request=oracle.RequestedToy(shape=toy.shape, color=toy.color),
    )


def outcomes(context: Context, asked: Sequence[Case], method: Method, seed: int, label: str) -> list[Outcome]:
    """Every case edited, one by one because each has a mask of its own, and read by the judge."""

    def made() -> tuple[Tensor, float]:
        drawn = [method(one, seed + i)[0].clamp(-1, 1) for i, (one,) in context.batches(asked, 1, label)]
        return torch.stack(drawn), 0.0

    pictures, _ = common.resumed(context, (label, seed, [one.after for one in asked]), made)
    readings = common.judge_of(context).read(pictures)
    return [measured(*each) for each in zip(asked, pictures, readings, strict=True)]


def measured(one: Case, picture: Tensor, reading: oracle.SceneReading) -> Outcome:
    """One picture held against its case."""
    toy = oracle.find(reading, one.request)
    iou = 0.0 if toy is None else float(segmentation.iou(toy.mask[None], one.mask[None])[0])
    wide = mask_ops.dilate(one.mask.float(), margin_of(one.mask.shape[-1])) > 0.5
    error = (picture - one.picture)[:, ~wide].square().mean() / 4  # of the range -1 to 1
    border = wide & ~(mask_ops.dilate(one.mask.float(), -1) > 0.5)
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


def blending(model: Any, margin: int | None = None, **params: Any) -> Method:
    """Blending with a case's mask, grown by ``margin`` pixels (none: as far as the picture may change)."""

    def method(one: Case, seed: int) -> Tensor:
        grown = margin_of(one.mask.shape[-1]) if margin is None else margin
        system = Blend(mask=mask_ops.dilate(one.mask.float(), grown), **params)
        given = {"image": one.picture[None], "strength": 1.0, "seed": seed, **schedule(model)}
        return generate(model, one.after, interventions=system, **given).pixels

    return method


def redrawing(model: Any, strength: float) -> Method:
    """Image-to-image (SDEdit, Meng et al. 2022): the whole picture noised and drawn again."""

    def method(one: Case, seed: int) -> Tensor:
        given = {"image": one.picture[None], "strength": strength, "seed": seed, **schedule(model)}
        return generate(model, one.after, **given).pixels

    return method


def round_trip(model: Any) -> Method:
    """The true result through the codec: what a perfect method on this model would give."""

    def method(one: Case, seed: int) -> Tensor:
        return model.decode(model.encode_image(one.truth[None]))

    return method


def values(found: Sequence[Outcome], name: str) -> list[float]:
    return [float(getattr(one, name)) for one in found]


def best_strength(context: Context, name: str) -> float:
    """The strength at which image-to-image changes the toy most often, on other scenes and seeds."""

    def chosen() -> float:
        model = common.load(context, name)
        tuned = cases("val", TUNE, common.tenth(context, 40), common.side(context, name))
        hits = {}
        for strength in STRENGTHS:
            found = outcomes(context, tuned, redrawing(model, strength), TUNE, f"{name}, strength {strength}")
            hits[strength] = sum(values(found, "iou"))
        return max(hits, key=lambda strength: hits[strength])

    return context.once(f"best strength {name}", chosen)


def as_data(found: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """Every figure of every arm."""
    return {
        arm: {"there": stats.share([each.there for each in one]).to_json()}
        | {what: stats.bootstrap(values(one, what)).to_json() for what in ("background", "iou", "seam")}
        for arm, one in found.items()
    }


def pictured(asked: Sequence[Case], found: Mapping[str, Sequence[Outcome]], names: Mapping[str, str]) -> Any:
    """What was asked for, before, and the arms by their names."""
    rows = {"before": [one.picture for one in asked[:SHOWN]]}
    rows |= {says: [one.picture for one in found[arm][:SHOWN]] for arm, says in names.items()}
    return common.side_by_side(rows, [one.toy_after for one in asked[:SHOWN]])


def edit_rows(
    name: str, found: Mapping[str, Sequence[Outcome]], strength: float, shown: Mapping[str, Any]
) -> list[Row]:
    """The verdict on blend against "image to image" at ``strength``; "truth" says how well one could do."""
    ours, theirs, truth = found["blend"], found["image to image"], found["truth"]
    there = {arm: stats.share([one.there for one in each]) for arm, each in found.items()}
    background = {arm: stats.bootstrap(values(each, "background")) for arm, each in found.items()}
    gain = stats.paired_difference(values(ours, "background"), values(theirs, "background"))
    hits = stats.mcnemar([one.there for one in ours], [one.there for one in theirs])
    return [
        Row(
            claim=f"{name}: blending keeps the picture outside the region {KEPT:.0f} dB better than image-to-image, "
            f"and "
            f"draws the wanted toy no less often, within {100 * HARM:.0f} points",
            source=f"{SOURCE} (keeps the background exactly; the sizes are ours)",
            measured=f"background {background['blend'].text(digits=1)} dB, {gain.text(digits=1)} dB more; wanted toy "
            f"there {percent(there['blend'])}, difference {percent(hits)}",
            baseline=f"image-to-image at strength {strength} (tuned): {background['image to image'].text(digits=1)} "
            f"dB, {percent(there['image to image'])}; the truth through the codec "
            f"{background['truth'].text(digits=1)} dB, {percent(there['truth'])}",
            bars=[
                Bar(
                    gain,
                    null=0.0,
                    ideal=background["truth"].value - background["image to image"].value,
                    above=0.0,
                    at_least=KEPT,
                    what="background",
                ),
                Bar(hits, null=-HARM, ideal=max(0.0, 1 - there["image to image"].value), above=-HARM, what="toy there"),
            ],
            void=common.void(there["truth"], "the judge, on the true results,", SEEN),
            headline=True,
            n=len(ours),
            **{**shown, "data": as_data({"blend": ours, "image to image": theirs, "truth": truth})},
        )
    ]


def resampled_rows(name: str, found: Mapping[str, Sequence[Outcome]], shown: Mapping[str, Any]) -> list[Row]:
    """The verdict on "resampled" against "blend"."""
    plain, truth = stats.bootstrap(values(found["blend"], "seam")), stats.bootstrap(values(found["truth"], "seam"))
    seams = stats.paired_difference(values(found["resampled"], "seam"), values(found["blend"], "seam"))
    there = stats.share([one.there for one in found["resampled"]])
    return [
        Row(
            claim=f"{name}: resampling (three times, five steps each) lowers the error of edges along the border",
            source="Lugmayr et al. 2022 (RePaint), section 4.2",
            measured=f"{seams.text()} of edge error, p {seams.p:.2g}; wanted toy there {percent(there)}",
            baseline=f"without: {plain.text()}, at a third of the steps; the truth through the codec {truth.text()}",
            bars=[Bar(seams, null=0.0, ideal=truth.value - plain.value, below=0.0)],
            n=len(found["blend"]),
            **{**shown, "data": as_data(found)},
        )
    ]


def edits(name: str, context: Context) -> list[Row]:
    """Blending and image-to-image on the same cases and seeds."""
    model = common.load(context, name)
    asked = cases("test", REPORT, common.tenth(context, N), common.side(context, name))
    strength = best_strength(context, name)
    arms = {"blend": blending(model), "image to image": redrawing(model, strength), "truth": round_trip(model)}
    found = {arm: outcomes(context, asked, arms[arm], REPORT, f"{name}, {arm}") for arm in arms}
    names = {"blend": "blended", "image to image": "image-to-image", "truth": "truth"}
    shown = {
        "leans_on": common.trust_text(context, "shape", "color"),
        "picture": context.save(f"blend-{name}.png", pictured(asked, found, names)),
    }
    return edit_rows(name, found, strength, shown)


def resampling(name: str, context: Context) -> list[Row]:
    """Blending with and without going back some steps."""
    model = common.load(context, name)
    asked = cases("test", REPORT, common.tenth(context, FEW), common.side(context, name))
    arms = {"blend": blending(model), "resampled": blending(model, resample=3, jump=5), "truth": round_trip(model)}
    found = {arm: outcomes(context, asked, arms[arm], REPORT, f"{name}, {arm}") for arm in arms}
    names = {"blend": "blended", "resampled": "resampled", "truth": "truth"}
    picture = context.save(f"blend-{name}-resampled.png", pictured(asked, found, names))
    return resampled_rows(name, found, {"leans_on": "exact re-render", "picture": picture})


def parts(name: str) -> tuple[Part, ...]:
    """The parts of one model."""
    models = (name, "toy-judge")
    return (
        Part(f"{name}: edits", models, lambda context: edits(name, context)),
        Part(f"{name}: resampling", models, lambda context: resampling(name, context)),
    )


EXPERIMENT = Experiment(
    key="blend",
    title="Blended latent diffusion: redraw a region, keep the rest",
    intro=(
        "Toys of rendered scenes take another colour; region and truth are exact. The strength of image-to-image was "
        "chosen on validation scenes and other seeds. Background is the peak signal-to-noise ratio against the render, "
        "codec included, a 32nd of the picture away from the toy. The truth through the codec says how well one could "
        "do."
    ),
    file=__file__,
    parts=(*parts("toy-sd"), *parts("toy-sd3")),
)
