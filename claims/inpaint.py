"""Inpainting (GLIDE, Nichol et al. 2021, https://arxiv.org/abs/2112.10741, section 3.2): a fine-tuned model against
blending with the model that it was fine-tuned from.

A toy of a rendered scene is taken away, or another one takes its place. The right answer is known exactly: the same
scene rendered anew. The hole covers everything that differs between the two renders, shadows included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from claims import common
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato import masks
from sfumato.edit.blend import Blend
from sfumato.edit.inpaint import Inpaint
from sfumato.metrics import stats
from sfumato.sampling import generate
from sfumato.toybox import COLORS, SHAPES, Scene, caption, oracle, render
from sfumato.toybox.dataset import draw_scene

SOURCE = "Nichol et al. 2021 (GLIDE)"
SIDE = 64
CELLS = 6 * 16  # pixels of six latent cells
STEPS = 25
REPORT, TUNE = 6100, 6200  # seeds of scenes and noise: never the same for choosing and for reporting
GUIDANCE = (2.0, 4.0)
TOLD = ("scene", "hole")
MODELS = ("toy-sd-inpaint", "toy-sd")


@dataclass(frozen=True)
class Setting:
    """What is chosen for each arm on other scenes: the guidance, and what the prompt tells."""

    guidance: float
    told: str

    def __str__(self) -> str:
        return f"guidance {self.guidance:g}, the prompt tells the {self.told}"


@dataclass(frozen=True)
class Case:
    """A picture (3, h, w), the true result ``truth``, the hole bool (h, w), prompts that tell the whole scene or the
    hole alone, and the toy wanted, if any."""

    picture: Tensor
    truth: Tensor
    hole: Tensor
    prompts: dict[str, str]
    wish: oracle.Wanted | None


@dataclass(frozen=True)
class Outcome:
    """``inside``: PSNR in the hole against the re-render; ``seam``: error of edges along the border of the hole;
    ``kept``: whether every pixel outside is the picture's; ``there``: whether the judge finds the wanted toy."""

    picture: Tensor
    inside: float
    seam: float
    kept: bool
    there: bool


Method = Callable[[Sequence[Case], "Setting", int], Tensor]


def removals(split: str, seed: int, n: int) -> list[Case]:
    """A toy is to disappear; the prompt tells what is left."""
    return _cases(split, seed, n, lambda scene, _: scene.remove(0))


def replacements(split: str, seed: int, n: int) -> list[Case]:
    """Another shape and colour in the place of a toy; the hole is a box, which gives no silhouette away."""

    def other(scene: Scene, i: int) -> Scene:
        toy = scene.toys[0]
        shape = SHAPES[(SHAPES.index(toy.shape) + 1 + i % 5) % len(SHAPES)]
        color = COLORS[(COLORS.index(toy.color) + 1 + i % 7) % len(COLORS)]
        return scene.replace(0, shape=shape, color=color, pattern="plain")

    return _cases(split, seed, n, other)


def _cases(split: str, seed: int, n: int, change: Callable[[Scene, int], Scene]) -> list[Case]:
    found: list[Case] = []
    index = 0
    while len(found) < n:
        scene = draw_scene(split, seed, index, 1 + index % 2)
        after = change(scene, index)
        index += 1
        frames = render([scene, after], SIDE)
        sizes = [int((mask == 0).sum()) for mask in frames.mask]
        if sizes[0] < CELLS or (len(after.toys) == len(scene.toys) and sizes[1] < CELLS):
            continue
        replaced = len(after.toys) == len(scene.toys)
        kinds = [(toy.shape, toy.color) for toy in after.toys]
        if len(set(kinds)) < len(kinds):
            continue
        hole = (frames.image[0] - frames.image[1]).abs().amax(0) > 0.03
        hole |= frames.mask[0] == 0
        if replaced:
            hole |= frames.mask[1] == 0
            hole = boxed(hole)
        hole = masks.dilate(hole.float(), 2) > 0.5
        if hole.float().mean() > 0.6:  # too little is left to see
            continue
        wish = oracle.Wanted(shape=kinds[0][0], color=kinds[0][1]) if replaced else None
        alone = after.replace(toys=after.toys[:1] if replaced else ())
        told = {"scene": caption(after, None, "plain").text, "hole": caption(alone, None, "plain").text}
        found.append(Case(frames.image[0], frames.image[1], hole, told, wish))
    return found


def boxed(mask: Tensor) -> Tensor:
    """The smallest box (h, w) around a mask."""
    box = torch.zeros_like(mask)
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return box


def inpainting(model: object) -> Method:
    """The fine-tuned model, every picture with its own hole."""

    def method(asked: Sequence[Case], setting: Setting, seed: int) -> Tensor:
        system = Inpaint(mask=[case.hole.float() for case in asked], each=True)
        return _drawn(model, asked, system, setting, seed)

    return method


def blending(model: object) -> Method:
    """The model that it was fine-tuned from; the known part is put in at every noise level, and pasted at the end."""

    def method(asked: Sequence[Case], setting: Setting, seed: int) -> Tensor:
        each = [
            _drawn(model, [case], Blend(mask=case.hole.float(), paste=0.0), setting, seed + i)
            for i, case in enumerate(asked)
        ]
        return torch.cat(each)

    return method


def _drawn(model: object, asked: Sequence[Case], system: object, setting: Setting, seed: int) -> Tensor:
    result = generate(
        model,  # type: ignore[arg-type]
        [case.prompts[setting.told] for case in asked],
        image=torch.stack([case.picture for case in asked]),
        strength=1.0,
        seed=list(range(seed, seed + len(asked))),
        steps=STEPS,
        scheduler="ddim",
        guidance=setting.guidance,
        interventions=system,  # type: ignore[arg-type]
    )
    assert result.pixels is not None
    return result.pixels.clamp(-1, 1)


def outcomes(
    context: Context, asked: Sequence[Case], method: Method, setting: Setting, seed: int, label: str
) -> list[Outcome]:
    """Every case edited and held against its truth."""
    pictures = []
    for start, chunk in context.batches(asked, 20, label):
        pictures.append(method(chunk, setting, seed + start))
    drawn = torch.cat(pictures)
    readings = common.judge_of(context).read(drawn)
    return [measured(*each) for each in zip(asked, drawn, readings, strict=True)]


def measured(case: Case, picture: Tensor, reading: oracle.SceneReading) -> Outcome:
    """One picture held against its case."""
    error = (picture - case.truth)[:, case.hole].square().mean() / 4  # of the range -1 to 1
    grown, shrunk = (masks.dilate(case.hole.float(), n) > 0.5 for n in (1, -1))
    seam = (edges(picture) - edges(case.truth)).abs()[grown & ~shrunk].mean()
    return Outcome(
        picture=picture,
        inside=float(-10 * error.clamp_min(1e-10).log10()),
        seam=float(seam),
        kept=bool((picture[:, ~case.hole] == case.picture[:, ~case.hole]).all()),
        there=case.wish is not None and oracle.find(reading, case.wish) is not None,
    )


def edges(picture: Tensor) -> Tensor:
    """How steep a picture (3, h, w) is at every pixel (h, w)."""
    right = torch.nn.functional.pad(picture.diff(dim=2), (0, 1))
    down = torch.nn.functional.pad(picture.diff(dim=1), (0, 0, 0, 1))
    return (right.square() + down.square()).sum(0).sqrt()


def values(found: Sequence[Outcome], name: str) -> list[float]:
    return [float(getattr(one, name)) for one in found]


def arms(context: Context) -> dict[str, Method]:
    return {
        "inpainting": inpainting(common.load(context, "toy-sd-inpaint")),
        "blending": blending(common.load(context, "toy-sd")),
    }


def tuned(context: Context, task: str, score: str) -> dict[str, Setting]:
    """The setting with which each arm does best on other scenes and seeds."""
    make = {"remove": removals, "replace": replacements}[task]
    asked = make("val", TUNE, context.count(20, 2))
    best = {}
    for arm, method in arms(context).items():
        sums = {
            setting: sum(values(outcomes(context, asked, method, setting, TUNE, f"{task}, {arm}: {setting}"), score))
            for setting in (Setting(scale, told) for told in TOLD for scale in GUIDANCE)
        }
        best[arm] = max(sums, key=lambda setting: sums[setting])
    return best


def compared(context: Context, task: str, score: str) -> tuple[dict[str, list[Outcome]], dict[str, Setting], str]:
    """Both arms on the same cases and seeds, each at its best guidance."""
    make = {"remove": removals, "replace": replacements}[task]
    best = tuned(context, task, score)
    asked = make("test", REPORT, context.count(100, 4))
    found = {
        arm: outcomes(context, asked, method, best[arm], REPORT, f"{task}, {arm}")
        for arm, method in arms(context).items()
    }
    blank = [torch.where(case.hole, torch.zeros(()), case.picture) for case in asked[:12]]
    shown = [[case.picture for case in asked[:12]], blank, [case.truth for case in asked[:12]]]
    shown += [[one.picture for one in found[arm][:12]] for arm in found]
    return found, best, context.save(f"inpaint-{task}.png", common.sheet(shown))


def facts(found: dict[str, list[Outcome]], best: dict[str, Setting]) -> dict[str, dict[str, object]]:
    return {
        arm: {
            "setting": str(best[arm]),
            "inside": stats.bootstrap(values(done, "inside")).to_json(),
            "seam": stats.bootstrap(values(done, "seam")).to_json(),
            "there": stats.share([one.there for one in done]).to_json(),
            "kept": sum(one.kept for one in done),
        }
        for arm, done in found.items()
    }


def remove(context: Context) -> list[Row]:
    """A toy is taken away."""
    found, best, picture = compared(context, "remove", "inside")
    ours, theirs = found["inpainting"], found["blending"]
    gain = stats.paired_difference(values(ours, "inside"), values(theirs, "inside"))
    kept = stats.share([one.kept for one in ours])
    return [
        Row(
            claim=(
                "a toy is taken away: the hole is filled 3 dB closer to the re-render without it than by blending with "
                "the un-tuned model (whole 95 % interval above 0)"
            ),
            source=f"{SOURCE}, section 3.2",
            measured=f"{stats.bootstrap(values(ours, 'inside')).text(digits=1)} dB in the hole, "
            f"{gain.text(digits=1)} dB more; every pixel outside exactly the picture's {percent(kept)}",
            baseline=f"blending {stats.bootstrap(values(theirs, 'inside')).text(digits=1)} dB "
            f"(tuned: {best['blending']}; inpainting: {best['inpainting']})",
            holds=gain.value >= 3 and gain.low > 0 and kept.value == 1,
            n=len(ours),
            leans_on="exact re-render",
            picture=picture,
            data=facts(found, best) | {"gain": gain.to_json()},
        ),
        seam_row("taken away", found, best, picture),
    ]


def replace(context: Context) -> list[Row]:
    """Another toy takes its place."""
    found, best, picture = compared(context, "replace", "there")
    ours, theirs = found["inpainting"], found["blending"]
    there = {arm: stats.share([one.there for one in done]) for arm, done in found.items()}
    more = stats.paired_difference(values(ours, "there"), values(theirs, "there"))
    return [
        Row(
            claim="another toy takes its place: shape and colour asked for are there in 70 % or more",
            source=SOURCE,
            measured=f"{percent(there['inpainting'])}, {percent(more)} more than by blending",
            baseline=f"blending {percent(there['blending'])} "
            f"(tuned: {best['blending']}; inpainting: {best['inpainting']})",
            holds=there["inpainting"].value >= 0.7,
            n=len(ours),
            leans_on=common.trust_text(context, "shape", "color"),
            picture=picture,
            data=facts(found, best) | {"more": more.to_json()},
        ),
        seam_row("replaced", found, best, picture),
    ]


def seam_row(what: str, found: dict[str, list[Outcome]], best: dict[str, Setting], picture: str) -> Row:
    """The error of edges along the border."""
    ours, theirs = values(found["inpainting"], "seam"), values(found["blending"], "seam")
    ratio = stats.bootstrap([a / b for a, b in zip(ours, theirs, strict=True)])
    pooled = sum(ours) / sum(theirs)
    less = stats.paired_difference(ours, theirs)
    return Row(
        claim=f"a toy is {what}: the error of edges along the border is a quarter smaller than with blending",
        source=SOURCE,
        measured=f"{stats.bootstrap(ours).text()}, {100 * pooled:.0f} % of blending's, p {less.p:.2g}",
        baseline=f"blending {stats.bootstrap(theirs).text()}",
        holds=pooled <= 0.75 and less.high < 0,
        n=len(ours),
        leans_on="exact re-render",
        picture=picture,
        data={
            "ratio": ratio.to_json(),
            "difference": less.to_json(),
            "settings": {arm: str(one) for arm, one in best.items()},
        },
    )


EXPERIMENT = Experiment(
    key="inpaint",
    title="Inpainting with a masked-input model",
    intro=(
        "toy-sd-inpaint is toy-sd with five more input channels, fine-tuned for minutes. Toys of rendered scenes are "
        "taken away or replaced; hole and truth are exact. Both arms take 25 DDIM steps, each with the guidance and "
        "the prompt (of the whole scene, or of the hole alone) that did best on validation scenes and other seeds, and "
        "both put the original pixels back outside the hole."
    ),
    file=__file__,
    parts=(
        Part("remove", (*MODELS, "toy-judge"), remove),
        Part("replace", (*MODELS, "toy-judge"), replace),
    ),
)
