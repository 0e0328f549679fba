"""Inpainting (GLIDE, Nichol et al. 2021, https://arxiv.org/abs/2112.10741, section 3.2): a fine-tuned model against
blending with the model that it was fine-tuned from.

A toy of a rendered scene is taken away, another one takes its place, or nothing is in the hole and nothing shall come.
The right answer is known exactly: the same scene rendered anew. The hole covers everything that differs between the two
renders, shadows included; both arms draw every latent that it touches anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from claims import common
from claims.bars import Bar
from claims.blend import edges
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato import mask_ops
from sfumato.edit.blend import Blend
from sfumato.edit.inpaint import Inpaint
from sfumato.metrics import stats
from sfumato.sampling import generate
from sfumato.toybox import COLORS, SHAPES, Scene, caption, oracle, render
from sfumato.toybox.dataset import draw_scene

SOURCE = "Nichol et al. 2021 (GLIDE)"
SMALLEST = 6 / 256  # share of the picture: six cells of a 16x16 latent grid
LARGEST = 0.6  # of the picture: more leaves too little to see
COVERAGE = 0.05  # of a latent cell: from here on it is drawn anew, else what was there would show through
STEPS = 25
N = 200
REPORT, TUNE = 16100, 16200  # seeds of scenes and noise: never the same for choosing and for reporting
GUIDANCE = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0)
PROMPTED = ("scene", "hole")
MODELS = ("toy-sd-inpaint", "toy-sd")
CLOSER, SEAM, THERE, EMPTY = 3.0, 0.75, 0.7, 0.9  # dB, of blending's error, of toys, of holes
SEEN = (0.8, 1.0)  # what the judge must read in the true results
SHOWN = 6


@dataclass(frozen=True)
class Setting:
    """What is chosen for each arm on other scenes: the guidance, and what the prompt tells."""

    guidance: float
    prompted: str

    def __str__(self) -> str:
        return f"guidance {self.guidance:g}, the prompt tells the {self.prompted}"


@dataclass(frozen=True)
class Case:
    """A picture (3, h, w), the true result ``truth``, the hole bool (h, w), prompts that tell the whole scene or the
    hole alone, and the toy wanted, if any."""

    picture: Tensor
    truth: Tensor
    hole: Tensor
    prompts: dict[str, str]
    request: oracle.RequestedToy | None


@dataclass(frozen=True)
class Outcome:
    """``inside``: PSNR in the hole against the re-render; ``seam``: error of edges along the border of the hole;
    ``kept``: whether every pixel outside is the picture's; ``there``: whether the judge finds the wanted toy;
    ``empty``: whether it finds no toy that lies mostly in the hole."""

    picture: Tensor
    inside: float
    seam: float
    kept: bool
    there: bool
    empty: bool


Method = Callable[[Sequence[Case], "Setting", int], Tensor]


def removals(split: str, seed: int, n: int, side: int) -> list[Case]:
    """A toy is to disappear; the prompt tells what is left."""
    return _cases(split, seed, n, side, lambda scene, _: scene.remove(0))


def replacements(split: str, seed: int, n: int, side: int) -> list[Case]:
    """Another shape and colour in the place of a toy; the hole is a box, which gives no silhouette away."""

    def other(scene: Scene, i: int) -> Scene:
        toy = scene.toys[0]
        shape = SHAPES[(SHAPES.index(toy.shape) + 1 + i % 5) % len(SHAPES)]
        color = COLORS[(COLORS.index(toy.color) + 1 + i % 7) % len(COLORS)]
        return scene.replace(0, shape=shape, color=color, pattern="plain")

    return _cases(split, seed, n, side, other)


def backgrounds(split: str, seed: int, n: int, side: int) -> list[Case]:
    """Nothing stands in the hole and nothing shall come: in turn the silhouette of a toy of another scene and its box,
    where the scene itself has only ground or sky."""
    found: list[Case] = []
    index = 0
    while len(found) < n:
        scene, stranger = (draw_scene(split, seed, 2 * index + k, 1) for k in (0, 1))
        index += 1
        frames = render([scene, stranger], side)
        hole = frames.mask[1] == 0
        if float(hole.float().mean()) < SMALLEST:
            continue
        hole = mask_ops.dilate((boxed(hole) if len(found) % 2 else hole).float(), _grown(side)) > 0.5
        own = mask_ops.dilate((frames.mask[0] == 0).float(), 2 * _grown(side)) > 0.5
        if (hole & own).any() or not own.any():
            continue
        prompts = {"scene": caption(scene, None, "plain").text, "hole": _described(scene.replace(toys=()))}
        found.append(Case(frames.image[0], frames.image[0], hole, prompts, None))
    return found


def _cases(split: str, seed: int, n: int, side: int, change: Callable[[Scene, int], Scene]) -> list[Case]:
    found: list[Case] = []
    index = 0
    while len(found) < n:
        scene = draw_scene(split, seed, index, 1 + index % 2)
        after = change(scene, index)
        index += 1
        frames = render([scene, after], side)
        replaced = len(after.toys) == len(scene.toys)
        sizes = [float((mask == 0).float().mean()) for mask in frames.mask[: 1 + replaced]]
        kinds = [(toy.shape, toy.color) for toy in after.toys]
        if min(sizes) < SMALLEST or len(set(kinds)) < len(kinds):
            continue
        hole = (frames.image[0] - frames.image[1]).abs().amax(0) > 0.03
        hole |= frames.mask[0] == 0
        if replaced:
            hole |= frames.mask[1] == 0
            hole = boxed(hole)
        hole = mask_ops.dilate(hole.float(), _grown(side)) > 0.5
        if float(hole.float().mean()) > LARGEST:
            continue
        request = oracle.RequestedToy(shape=kinds[0][0], color=kinds[0][1]) if replaced else None
        alone = after.replace(toys=after.toys[:1] if replaced else ())
        prompts = {"scene": _described(after), "hole": _described(alone)}
        found.append(Case(frames.image[0], frames.image[1], hole, prompts, request))
    return found


def _described(scene: Scene) -> str:
    return caption(scene, None, "plain").text


def _grown(side: int) -> int:
    """By how many pixels holes are grown."""
    return max(1, side // 32)


def boxed(mask: Tensor) -> Tensor:
    """The smallest box (h, w) around a mask."""
    box = torch.zeros_like(mask)
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return box


def inpainting(model: object) -> Method:
    """The fine-tuned model, every picture with its own hole."""

    def method(asked: Sequence[Case], setting: Setting, seed: int) -> Tensor:
        holes = [case.hole.float() for case in asked]
        system = Inpaint(mask=holes, each=True, coverage=COVERAGE)
        return _drawn(model, asked, system, setting, seed)

    return method


def blending(model: object) -> Method:
    """The model that it was fine-tuned from; the known part is put in at every noise level, and pasted at the end."""

    def method(asked: Sequence[Case], setting: Setting, seed: int) -> Tensor:
        systems = [Blend(mask=case.hole.float(), level=COVERAGE, paste=0.0) for case in asked]
        each = [
            _drawn(model, [case], system, setting, seed + i)
            for i, (case, system) in enumerate(zip(asked, systems, strict=True))
        ]
        return torch.cat(each)

    return method


def round_trip(model: Any) -> Method:
    """The true result through the codec, in the hole: what a perfect method on this model would give."""

    def method(asked: Sequence[Case], setting: Setting, seed: int) -> Tensor:
        drawn = model.decode(model.encode_image(torch.stack([case.truth for case in asked]))).clamp(-1, 1)
        return torch.stack([torch.where(c.hole, made, c.picture) for c, made in zip(asked, drawn, strict=True)])

    return method


def _drawn(model: object, asked: Sequence[Case], system: object, setting: Setting, seed: int) -> Tensor:
    result = generate(
        model,  # type: ignore[arg-type]
        [case.prompts[setting.prompted] for case in asked],
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

    def made() -> tuple[Tensor, float]:
        batches = context.batches(asked, 20, label)
        return torch.cat([method(chunk, setting, seed + start) for start, chunk in batches]), 0.0

    drawn, _ = common.resumed(context, (label, str(setting), seed, [case.prompts for case in asked]), made)
    readings = common.judge_of(context).read(drawn)
    return [measured(*each) for each in zip(asked, drawn, readings, strict=True)]


def measured(case: Case, picture: Tensor, reading: oracle.SceneReading) -> Outcome:
    """One picture held against its case."""
    error = (picture - case.truth)[:, case.hole].square().mean() / 4  # of the range -1 to 1
    grown, shrunk = (mask_ops.dilate(case.hole.float(), n) > 0.5 for n in (1, -1))
    seam = (edges(picture) - edges(case.truth)).abs()[grown & ~shrunk].mean()
    inside = [toy for toy in reading.objects if 2 * int((toy.mask & case.hole).sum()) > int(toy.mask.sum())]
    return Outcome(
        picture=picture,
        inside=float(-10 * error.clamp_min(1e-10).log10()),
        seam=float(seam),
        kept=bool((picture[:, ~case.hole] == case.picture[:, ~case.hole]).all()),
        there=case.request is not None and oracle.find(reading, case.request) is not None,
        empty=not inside,
    )


def values(found: Sequence[Outcome], name: str) -> list[float]:
    return [float(getattr(one, name)) for one in found]


def arms(context: Context) -> dict[str, Method]:
    return {
        "inpainting": inpainting(common.load(context, "toy-sd-inpaint")),
        "blending": blending(common.load(context, "toy-sd")),
    }


MAKERS = {"remove": removals, "replace": replacements, "background": backgrounds}
SCORE = {"remove": "inside", "replace": "there"}  # what settings are chosen by


def tuned(context: Context, task: str) -> dict[str, Setting]:
    """The setting with which each arm does best on other scenes and seeds; the background takes that of removals."""
    task = "remove" if task == "background" else task

    def chosen() -> dict[str, Setting]:
        asked = MAKERS[task]("val", TUNE, common.tenth(context, 20), common.side(context, "toy-sd"))
        grid = [Setting(scale, prompted) for prompted in PROMPTED for scale in GUIDANCE[:: 3 if context.quick else 1]]
        best = {}
        for arm, method in arms(context).items():
            sums = {
                setting: sum(
                    values(outcomes(context, asked, method, setting, TUNE, f"{task}, {arm}: {setting}"), SCORE[task])
                )
                for setting in grid
            }
            best[arm] = max(sums, key=lambda setting: sums[setting])
        return best

    return context.once(f"inpaint settings {task}", chosen)


Compared = Mapping[str, Sequence[Outcome]]


def compared(context: Context, task: str) -> tuple[Compared, dict[str, Setting], str]:
    """Both arms and the truth on the same cases and seeds, each arm at its best setting."""
    best = tuned(context, task)
    asked = MAKERS[task]("test", REPORT, common.tenth(context, N), common.side(context, "toy-sd"))
    both = arms(context) | {"truth": round_trip(common.load(context, "toy-sd"))}
    settings = best | {"truth": next(iter(best.values()))}
    found = {
        arm: outcomes(context, asked, method, settings[arm], REPORT, f"{task}, {arm}") for arm, method in both.items()
    }
    rows = {
        "before": [case.picture for case in asked[:SHOWN]],
        "the hole": [torch.where(case.hole, torch.zeros(()), case.picture) for case in asked[:SHOWN]],
    }
    rows |= {arm: [one.picture for one in found[arm][:SHOWN]] for arm in found}
    heads = [case.prompts["hole"] for case in asked[:SHOWN]]
    return found, best, context.save(f"inpaint-{task}.png", common.side_by_side(rows, heads))


def facts(found: Compared, best: Mapping[str, Setting]) -> dict[str, Any]:
    """Every figure of every arm."""
    return {
        arm: {
            "setting": str(best.get(arm, "")),
            **{what: stats.bootstrap(values(done, what)).to_json() for what in ("inside", "seam")},
            **{
                what: stats.share([getattr(one, what) for one in done]).to_json() for what in ("there", "empty", "kept")
            },
        }
        for arm, done in found.items()
    }


def in_words(best: Mapping[str, Setting]) -> str:
    return "tuned: " + "; ".join(f"{arm}: {setting}" for arm, setting in best.items())


def remove_rows(found: Compared, best: Mapping[str, Setting], picture: str | None = None) -> list[Row]:
    """The verdicts on toys taken away, from the arms inpainting, blending and truth."""
    ours, theirs, truth = (values(found[arm], "inside") for arm in ("inpainting", "blending", "truth"))
    gain, kept = stats.paired_difference(ours, theirs), stats.share([one.kept for one in found["inpainting"]])
    means = {arm: stats.bootstrap(values(each, "inside")) for arm, each in found.items()}
    return [
        Row(
            claim=f"a toy is taken away: the hole is filled {CLOSER:.0f} dB closer to the re-render without it than by "
            "blending with the model that was not fine-tuned, and every pixel outside is the picture's",
            source=f"{SOURCE}, section 3.2 (fine-tuning to see the hole; the size is ours)",
            measured=f"{means['inpainting'].text(digits=1)} dB in the hole, {gain.text(digits=1)} dB more; every pixel "
            f"outside exactly the picture's {percent(kept)}",
            baseline=f"blending {means['blending'].text(digits=1)} dB, the truth through the codec "
            f"{means['truth'].text(digits=1)} dB ({in_words(best)})",
            bars=[
                Bar(
                    gain,
                    null=0.0,
                    ideal=means["truth"].value - means["blending"].value,
                    above=0.0,
                    at_least=CLOSER,
                    what="PSNR in the hole",
                ),
                Bar(kept, null=0.0, ideal=1.0, at_least=1.0, what="pixels outside"),
            ],
            headline=True,
            n=len(ours),
            leans_on="exact re-render",
            picture=picture,
            data=facts(found, best) | {"gain": gain.to_json()},
        ),
        seam_row("taken away", found, picture),
    ]


def replace_rows(
    found: Compared, best: Mapping[str, Setting], leans_on: str = "", picture: str | None = None
) -> list[Row]:
    """The verdicts on toys replaced."""
    there = {arm: stats.share([one.there for one in done]) for arm, done in found.items()}
    more = stats.mcnemar(*([one.there for one in found[arm]] for arm in ("inpainting", "blending")))
    return [
        Row(
            claim=f"another toy takes its place: shape and colour asked for are there in {100 * THERE:.0f} % or more",
            source="this repository",
            measured=f"{percent(there['inpainting'])}, {percent(more)} more than by blending",
            baseline=f"blending {percent(there['blending'])}, the truth {percent(there['truth'])} ({in_words(best)})",
            bars=[Bar(there["inpainting"], null=1 / 48, ideal=there["truth"].value, at_least=THERE)],
            void=common.void(there["truth"], "the judge, on the true results,", SEEN),
            n=len(found["truth"]),
            leans_on=leans_on,
            picture=picture,
            data=facts(found, best) | {"more": more.to_json()},
        ),
        seam_row("replaced", found, picture),
    ]


def background_rows(
    found: Compared, best: Mapping[str, Setting], leans_on: str = "", picture: str | None = None
) -> list[Row]:
    """The verdict on holes in which nothing shall come."""
    empty = {arm: stats.share([one.empty for one in done]) for arm, done in found.items()}
    inside = {arm: stats.bootstrap(values(done, "inside")) for arm, done in found.items()}
    return [
        Row(
            claim="a hole of the shape of a toy, or its box, in which nothing stood and nothing is asked for, stays "
            f"without a toy in {100 * EMPTY:.0f} % or more",
            source="this repository (what users of inpainting models complain of)",
            measured=f"{percent(empty['inpainting'])}; {inside['inpainting'].text(digits=1)} dB in the hole",
            baseline=f"blending {percent(empty['blending'])}, {inside['blending'].text(digits=1)} dB; the truth "
            f"{percent(empty['truth'])} ({in_words(best)})",
            bars=[Bar(empty["inpainting"], null=0.5, ideal=empty["truth"].value, at_least=EMPTY, above=0.5)],
            n=len(found["truth"]),
            leans_on=leans_on,
            picture=picture,
            data=facts(found, best),
        )
    ]


def seam_row(what: str, found: Compared, picture: str | None = None) -> Row:
    """The error of edges along the border."""
    ours, theirs, truth = (values(found[arm], "seam") for arm in ("inpainting", "blending", "truth"))
    ratio = stats.bootstrap(ours, theirs, statistic=lambda a, b: a.mean(-1) / b.mean(-1), paired=True)
    return Row(
        claim=f"a toy is {what}: the error of edges along the border is a quarter smaller than with blending",
        source=f"{SOURCE}, section 3.2 (edges that blending leaves; the size is ours)",
        measured=f"{stats.bootstrap(ours).text()}, {ratio.text(percent=True)} of blending's",
        baseline=f"blending {stats.bootstrap(theirs).text()}, the truth through the codec "
        f"{stats.bootstrap(truth).text()}",
        bars=[Bar(ratio, null=1.0, ideal=sum(truth) / sum(theirs), at_most=SEAM, below=1.0)],
        n=len(ours),
        leans_on="exact re-render",
        picture=picture,
        data={"ratio": ratio.to_json()},
    )


def remove(context: Context) -> list[Row]:
    """A toy is taken away."""
    return remove_rows(*compared(context, "remove"))


def replace(context: Context) -> list[Row]:
    """Another toy takes its place."""
    found, best, picture = compared(context, "replace")
    return replace_rows(found, best, common.trust_text(context, "shape", "color"), picture)


def background(context: Context) -> list[Row]:
    """Nothing shall come."""
    found, best, picture = compared(context, "background")
    return background_rows(found, best, common.trust_text(context, "shape", "color"), picture)


EXPERIMENT = Experiment(
    key="inpaint",
    title="Inpainting with a masked-input model",
    intro=(
        "toy-sd-inpaint is toy-sd with five more input channels, fine-tuned. Toys of rendered scenes are taken away or "
        "replaced, or the hole lies where nothing is; hole and truth are exact. Both arms take 25 DDIM steps, each "
        "with "
        "the guidance and the prompt (of the whole scene, or of the hole alone) that did best on validation scenes and "
        "other seeds; both draw every latent that the hole touches anew and put the original pixels back outside it. "
        "The "
        "truth through the codec says how well one could do."
    ),
    file=__file__,
    parts=(
        Part("remove", (*MODELS, "toy-judge"), remove),
        Part("replace", (*MODELS, "toy-judge"), replace),
        Part("background", (*MODELS, "toy-judge"), background),
    ),
)
