"""Attention relevance (Chefer, Gur, Wolf 2021, https://arxiv.org/abs/2103.15679): does it point to what the model used?

Every map is held against the renderer's exact masks, and against what the model itself still answers when the parts
said to matter are removed. All baselines run through the same call on the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from claims import common
from claims.bars import Bar
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato.explain.attention_relevance.questions import ask
from sfumato.explain.attention_relevance.words import word_maps
from sfumato.explain.daam import explain_images as daam_images
from sfumato.metrics import segmentation, stats
from sfumato.metrics.perturbation import Curve, perturb
from sfumato.models.readers import Reader, load_reader
from sfumato.models.readers.regions import box_overlap, region_features
from sfumato.relevance.attention import attention_relevance
from sfumato.toybox import ANSWERS, COLORS, SHAPES, Question, Scene, render, sample_question
from sfumato.toybox.dataset import draw_scene

SOURCE = "Chefer et al. 2021"
METHODS = ("relevance", "rollout", "raw", "gradcam", "input_gradient")
LEAST = 0.01  # of the picture: toys that show less are not asked for
SHARES = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)  # of boxes and words (Chefer et al. 2021, section 4)
PIXEL_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
REPORT, TUNE = 7100, 7200  # seeds of scenes


def reader(context: Context, name: str) -> Reader:
    """A reading model of the zoo, once per run."""
    return context.once(f"reader {name}", lambda: load_reader(context.folder(name)))


# -- two toys, one asked for -----------------------------------------------------------------------------------------


def pairs(seed: int, n: int, side: int) -> list[tuple[Scene, Tensor, Tensor]]:
    """Scenes of two toys of different shape and colour, both visible: (scene, picture (3, h, w), mask (h, w))."""
    out: list[tuple[Scene, Tensor, Tensor]] = []
    index = 0
    while len(out) < n:
        scenes = [draw_scene("test", seed, index + k, 2) for k in range(64)]
        index += 64
        scenes = [s for s in scenes if s.toys[0].shape != s.toys[1].shape and s.toys[0].color != s.toys[1].color]
        frames = render(scenes, side)
        for k, scene in enumerate(scenes):
            if all(float((frames.mask[k] == toy).float().mean()) >= LEAST for toy in (0, 1)):
                out.append((scene, frames.image[k], frames.mask[k].long()))
    return out[:n]


def questions_of(context: Context, name: str, seed: int, n: int) -> dict[str, Any]:
    """Each toy of each pair asked in turn: pictures, texts, masks of the asked and of the other toy."""

    def made() -> dict[str, Any]:
        pictures, asked, own, other, scenes = [], [], [], [], []
        for scene, picture, mask in pairs(seed, n, common.side(context, name)):
            for toy in (0, 1):
                shown = scene.toys[toy]
                asked.append(shown.shape if name == "toy-vit" else f"a {shown.color} {shown.shape}")
                pictures.append(picture)
                own.append(mask == toy)
                other.append(mask == 1 - toy)
                scenes.append(scene)
        stacked = {"pictures": torch.stack(pictures), "own": torch.stack(own), "other": torch.stack(other)}
        return {"asked": asked, "scenes": scenes, **stacked}

    return context.once(f"pairs {name} {seed} {n}", made)


def maps_of(context: Context, name: str, seed: int, n: int, method: str, **rules: Any) -> tuple[Tensor, Tensor]:
    """Maps (2 n, h, w) of every question and the model's own cells (2 n, cells)."""

    def made() -> tuple[Tensor, Tensor]:
        given = questions_of(context, name, seed, n)
        heat, cells = [], []
        for start, chunk in context.batches(given["asked"], 50, f"{name}: {method}"):
            pictures = given["pictures"][start : start + len(chunk)]
            for found in ask(reader(context, name), pictures, chunk, method=method, **rules):
                heat.append(found.map())
                cells.append(found.answer().cells.flatten())
        return torch.stack(heat), torch.stack(cells)

    return context.once(f"maps {name} {seed} {n} {method} {rules}", made)


def ratio(maps: Tensor, own: Tensor, other: Tensor, where: Sequence[int]) -> stats.Interval:
    """Relevance inside the asked toy over that inside the other, over all pictures (``where``: of which each is)."""
    level = segmentation.normalise(maps, "max")
    mass = [common.by_cluster((level * part).sum((1, 2)).tolist(), where) for part in (own, other)]
    return stats.ratio(*mass, paired=True)


def specific(name: str, context: Context) -> list[Row]:
    """The class-specific pointing game and pixel average precision, with all baselines."""
    n = context.count(300, 8)
    given = questions_of(context, name, REPORT, n)
    where = [i // 2 for i in range(2 * n)]  # two questions of one picture are no independent samples
    own, other = given["own"], given["other"]
    found = {method: maps_of(context, name, REPORT, n, method)[0] for method in METHODS}
    found["in the middle"] = segmentation.centred_gaussian(len(own), tuple(own.shape[-2:]))
    hits = {method: segmentation.pointing(maps, own) for method, maps in found.items()}
    points = {method: stats.bootstrap(common.by_cluster(hit.tolist(), where)) for method, hit in hits.items()}
    aps = {
        method: common.by_cluster(segmentation.average_precision(maps, own).tolist(), where)
        for method, maps in found.items()
    }
    mean = {method: float(np.mean(values)) for method, values in aps.items()}
    ratios = {method: ratio(maps, own, other, where) for method, maps in found.items()}
    more = {m: stats.paired_difference(aps["relevance"], aps[m]) for m in ("rollout", "raw")}
    rows = [
        [given["pictures"][i]] + [heat_picture(found[m][i], given["pictures"][i]) for m in METHODS] for i in range(4)
    ]
    sheet = common.sheet(rows, names=given["asked"][:4], heads=("picture", *METHODS))
    picture = context.save(f"attention-relevance-{name}.png", sheet)
    data = {m: {"pointing": points[m].to_json(), "ap": mean[m], "ratio": ratios[m].to_json()} for m in found}
    rest = [m for m in found if m != "relevance"]
    return [
        Row(
            claim=f"{name}: of two toys, relevance points to the one asked for in 85 % or more, with 3 times the "
            "relevance of the other; rollout in 60 % at most",
            source=SOURCE + " (class-specific maps)",
            measured=f"{percent(points['relevance'])}, {ratios['relevance'].text(digits=1)} to 1",
            baseline="; ".join(f"{m} {percent(points[m])}, {ratios[m].value:.1f} to 1" for m in rest),
            bars=[
                Bar(points["relevance"], points["rollout"].value, 1.0, at_least=0.85, what="points to it"),
                Bar(ratios["relevance"], 1.0, 100.0, at_least=3.0, what="times the other's"),
                Bar(points["rollout"], 1.0, 0.5, at_most=0.6, what="rollout"),
            ],
            headline=name == "toy-clip",
            n=n,
            leans_on="exact masks",
            picture=picture,
            data=data,
        ),
        Row(
            claim=f"{name}: average precision of the asked toy's pixels is 0.05 above rollout's and raw attention's",
            source=SOURCE + " (segmentation tests)",
            measured=f"{mean['relevance']:.3f}; above rollout {more['rollout'].text()}, above raw {more['raw'].text()}",
            baseline="; ".join(f"{m} {mean[m]:.3f}" for m in rest),
            bars=[Bar(each, 0.0, 1 - mean[m], at_least=0.05, above=0.0, what=f"over {m}") for m, each in more.items()],
            n=n,
            leans_on="exact masks",
            picture=picture,
            data=data,
        ),
    ]


def heat_picture(heat: Tensor, picture: Tensor) -> Tensor:
    """A map over its picture, as a picture."""
    return common.heat(segmentation.normalise(heat[None])[0], picture)


def still_seen(context: Context, name: str, given: dict[str, Any]) -> Callable[[Tensor], list[float]]:
    """A function of pictures (2 n, 3, h, w): whether the asked toy still scores above all that share
    neither shape nor colour with the picture's toys."""
    model = reader(context, name)
    if name == "toy-clip":
        everything = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
        with torch.no_grad():
            tokens = model.tokens(everything)
            out: Any = model.module.get_text_features(**{k: tokens[k] for k in ("input_ids", "attention_mask")})
        texts = functional.normalize(getattr(out, "pooler_output", out), dim=-1)
    else:
        everything, texts = model.labels, None

    def right(pictures: Tensor) -> list[float]:
        with torch.no_grad():
            if texts is None:
                scores = torch.cat([model.module(pixel_values=model.pixels(p)).logits for p in pictures.split(100)])
            else:
                out = [model.module.get_image_features(pixel_values=model.pixels(p)) for p in pictures.split(100)]
                scores = torch.cat([getattr(o, "pooler_output", o) for o in out]) @ texts.T
        verdicts = []
        for row, asked, scene in zip(scores, given["asked"], given["scenes"], strict=True):
            # rivals share nothing with what is in the picture: neither a colour nor a shape
            there = {word for toy in scene.toys for word in (toy.shape, toy.color)}
            kinds = SHAPES if texts is None else everything  # toy-vit names colours too
            rivals = [i for i, label in enumerate(everything) if label in kinds and not there & set(label.split())]
            verdicts.append(float(row[everything.index(asked)] > row[rivals].max()))
        return verdicts

    return right


def curves(
    found: dict[str, Tensor], score: Callable[[Tensor], Any], shares: Sequence[float], valid: Tensor | None = None
) -> dict[str, dict[str, Curve]]:
    """Positive and negative curves of every method; ``score`` is told which parts (b, parts) bool are kept."""
    fixed = None if valid is None else ~valid.bool()
    return {
        method: perturb(lambda gone: torch.as_tensor(score(~gone)), values, shares, fixed)
        for method, values in found.items()
    }


def without(images: Tensor, keep: Tensor) -> Tensor:
    """Pictures (b 3 h w) whose cells that are not in ``keep`` (b, cells) of a square grid are mid-grey."""
    side = round(keep.shape[1] ** 0.5)
    h, w = images.shape[-2:]
    mask = keep.view(-1, 1, side, side).repeat_interleave(h // side, 2).repeat_interleave(w // side, 3)
    return torch.where(mask, images, torch.zeros_like(images))


def curve_row(what: str, n: int, found: dict[str, dict[str, Curve]], against: Sequence[str], source: str) -> Row:
    """The row of a perturbation test: lower positive, higher negative area than every method in ``against``."""
    ours = found["relevance"]
    gaps = {
        (m, first): stats.paired_difference(ours[first].areas, found[m][first].areas)
        for m in against for first in ("positive", "negative")
    }  # fmt: skip
    bars = []
    for m in against:
        areas = {first: found[m][first].auc.value for first in ("positive", "negative")}
        bars.append(Bar(gaps[m, "positive"], 0.0, -areas["positive"], below=0.0, what=f"most relevant first, over {m}"))
        bars.append(
            Bar(gaps[m, "negative"], 0.0, 1 - areas["negative"], above=0.0, what=f"least relevant first, over {m}")
        )
    areas = [f"{m} {c['positive'].auc.value:.3f} / {c['negative'].auc.value:.3f}" for m, c in found.items()]
    return Row(
        claim=f"{what}: removing the most relevant first ends the answer sooner, the least relevant first later, than "
        f"with {', '.join(against[:-1])} or {against[-1]}",
        source=source,
        measured=f"area {ours['positive'].auc.text()} / {ours['negative'].auc.text()} (positive / negative)",
        baseline="; ".join(areas[1:]),
        bars=bars,
        n=n,
        leans_on="the model's own answers",
        data={
            "areas": {m: {f: c.auc.to_json() for f, c in both.items()} for m, both in found.items()},
            "means": {m: {f: c.to_json()["mean"] for f, c in both.items()} for m, both in found.items()},
            "gaps": {f"{m} {f}": gap.to_json() for (m, f), gap in gaps.items()},
        },
    )


def perturbed(name: str, context: Context) -> list[Row]:
    """Positive and negative perturbation of picture cells, where the model sees the asked toy to begin with."""
    n = context.count(300, 8)
    given = questions_of(context, name, REPORT, n)
    right = still_seen(context, name, given)
    known = torch.tensor(right(given["pictures"])) > 0
    found = {m: maps_of(context, name, REPORT, n, m)[1] for m in METHODS}
    found["chance"] = torch.rand(found["raw"].shape, generator=torch.Generator().manual_seed(0))

    def score(keep: Tensor) -> Tensor:
        return torch.tensor(right(without(given["pictures"], keep)))[known]

    row = curve_row(
        f"{name}: cells of the picture", int(known.sum()), curves(found, score, PIXEL_SHARES),
        ("rollout", "raw", "gradcam"), SOURCE + " (perturbation tests)",
    )  # fmt: skip
    row.leans_on = f"the model's own answers; it sees the asked toy in {percent(stats.share(known.numpy()))}"
    return [row]


# -- models that draw --------------------------------------------------------------------------------------------------


def drawn(name: str, context: Context) -> list[Row]:
    """Word maps of existing pictures by relevance through the denoiser, beside DAAM's."""
    model, n = common.load(context, name), context.count(120, 3)
    asked = [(scene, picture, mask) for scene, picture, mask in pairs(REPORT + 1, n, common.side(context, name))]
    methods = ("relevance", "rollout", "raw", "gradcam")
    heat: dict[str, list[Tensor]] = {m: [] for m in (*methods, "daam")}
    truths = []
    for start, chunk in context.batches(asked, 10, f"{name}: words"):
        texts = [" and ".join(f"a {toy.color} {toy.shape}" for toy in scene.toys) for scene, _, _ in chunk]
        pictures = torch.stack([picture for _, picture, _ in chunk])
        seeds = REPORT + start
        by = {m: word_maps(model, pictures, texts, steps=5, seed=seeds, method=m) for m in methods}
        traced = daam_images(model, pictures, texts, steps=5, seed=seeds)
        for i, (scene, _, mask) in enumerate(chunk):
            for toy, shown in enumerate(scene.toys):
                truths.append(mask == toy)
                for m in methods:
                    heat[m].append(by[m][i].map(shown.shape))
                heat["daam"].append(traced[i].map(shown.shape))
    own = torch.stack(truths)
    maps = {m: torch.stack(each) for m, each in heat.items()}
    where = [i // 2 for i in range(len(own))]  # two toys of one picture are no independent samples
    points = {
        m: stats.bootstrap(common.by_cluster(segmentation.pointing(each, own).tolist(), where))
        for m, each in maps.items()
    }
    aps = {m: common.by_cluster(segmentation.average_precision(each, own).tolist(), where) for m, each in maps.items()}
    mean = {m: float(np.mean(values)) for m, values in aps.items()}
    more = {m: stats.paired_difference(aps["relevance"], aps[m]) for m in maps if m != "relevance"}
    summary = {m: f"{mean[m]:.3f}, pointing {percent(points[m])}" for m in maps}
    gaps = ", ".join(f"above {m} {each.text()}" for m, each in more.items())
    shown = [pictures[-1]] + [heat_picture(maps[m][-1], pictures[-1]) for m in maps]
    return [
        Row(
            claim=f"{name}: a noun's relevance in a picture that exists finds its toy's pixels better than DAAM, the "
            "mean over layers, and than rollout, raw attention and Grad-CAM, of the last layer that reads text",
            source="ours: the paper explains no diffusion models",
            measured=f"average precision {summary['relevance']}; {gaps}",
            baseline="; ".join(f"{m} {each}" for m, each in summary.items() if m != "relevance"),
            bars=[Bar(each, 0.0, 1 - mean[m], above=0.0, what=f"over {m}") for m, each in more.items()],
            n=n,
            leans_on="exact masks",
            picture=context.save(
                f"attention-relevance-{name}.png", common.sheet([shown], heads=("picture", *maps), title=texts[-1])
            ),
            data={m: {"ap": mean[m], "pointing": points[m].to_json()} for m in maps},
        )
    ]


# -- encoder-decoder: boxes to masks -----------------------------------------------------------------------------------


def masks_of_queries(context: Context) -> list[Row]:
    """Masks of toys from a detector that never saw a mask: Otsu on the relevance of each query that found its toy."""
    model, n = reader(context, "toy-detr"), context.count(300, 12)
    side = common.side(context, "toy-detr")
    scenes = [draw_scene("test", REPORT + 2, i) for i in range(n)]
    frames = render(scenes, side)
    ways: dict[str, dict[str, Any]] = {m: {"method": m} for m in METHODS}
    ways |= {"unnormalised": {"normalise": False}, "no self matrices": {"mix": False}, "not added": {"add": False}}
    found: dict[str, list[Any]] = {way: [] for way in ways}
    for start, chunk in context.batches(scenes, 40, "toy-detr"):
        pictures = frames.image[start : start + len(chunk)]
        for way, rules in ways.items():
            found[way] += ask(model, pictures, [None] * len(chunk), **rules)
    ious: dict[str, list[float]] = {way: [] for way in (*ways, "Gaussian in the box")}
    where: list[int] = []  # several toys of one picture are no independent samples
    instances: dict[str, tuple[list, list, list]] = {way: ([], [], []) for way in ways}
    for i, scene in enumerate(scenes):
        truths = torch.stack([frames.mask[i] == k for k in range(len(scene.toys))])
        seen = truths.flatten(1).any(1)
        for way in ways:
            answers = found[way][i].answers
            masks = [otsu_mask(found[way][i].map(k)) for k in range(len(answers))]
            stack = torch.stack(masks) if masks else torch.zeros(0, side, side, dtype=torch.bool)
            for store, value in zip(
                instances[way], (stack, truths[seen], torch.tensor([a.score for a in answers])), strict=True
            ):
                store.append(value)
        answers = found["relevance"][i].answers
        if not answers:
            continue
        boxes = torch.tensor([a.box for a in answers])
        overlap = box_overlap(boxes, frames.boxes[i].nan_to_num(0) / side)
        for toy in seen.nonzero().flatten().tolist():
            query = int(overlap[:, toy].argmax())
            if overlap[query, toy] < 0.5 or not answers[query].label.startswith(scene.toys[toy].shape):
                continue
            where.append(i)
            for way in ways:
                mask = otsu_mask(found[way][i].map(query))
                ious[way].append(float(segmentation.iou(mask[None], truths[toy][None])))
            blob = otsu_mask(gaussian_in(boxes[query], side))
            ious["Gaussian in the box"].append(float(segmentation.iou(blob[None], truths[toy][None])))
    count = len(where)
    ious = {way: common.by_cluster(values, where) for way, values in ious.items()}
    means = {way: stats.bootstrap(values) for way, values in ious.items()}
    least = (0.2, 0.3, 0.4, 0.5)
    aps = {w: float(np.mean([segmentation.instance_ap(*instances[w], least=t) for t in least])) for w in ways}
    against = stats.paired_difference(ious["relevance"], ious["Gaussian in the box"])
    over = stats.ratio(ious["relevance"], ious["raw"], paired=True)
    above = {m: stats.paired_difference(ious["relevance"], ious[m]) for m in METHODS[1:]}
    ablations = ("unnormalised", "no self matrices", "not added")
    loses = {way: stats.paired_difference(ious["relevance"], ious[way]) for way in ablations}
    row = [
        frames.image[0],
        *(heat_picture(found[m][0].map(0), frames.image[0]) for m in METHODS if found[m][0].answers),
    ]
    heads = ("picture", *(m for m in METHODS if found[m][0].answers))
    picture = context.save("attention-relevance-toy-detr.png", common.sheet([row], heads=heads))
    rest = [way for way in means if way not in ("relevance", *ablations)]
    data = {"miou": {w: m.to_json() for w, m in means.items()}, "ap": aps}
    return [
        Row(
            claim="toy-detr: masks of the toys it found, cut from relevance, overlap 1.5 times better than raw "
            "cross-attention's and better than those of any other map",
            source=SOURCE + " (DETR, weakly supervised segmentation)",
            measured=f"mIoU {means['relevance'].text()}, {over.text(digits=2)} times raw; mask AP (IoU 0.2 to 0.5) "
            f"{aps['relevance']:.3f}",
            baseline="; ".join(f"{w} {means[w].text()}" + (f", AP {aps[w]:.3f}" if w in aps else "") for w in rest),
            bars=[
                Bar(over, 1.0, 1 / means["raw"].value, at_least=1.5, above=1.0, what="times raw"),
                *(Bar(each, 0.0, 1 - means[m].value, above=0.0, what=f"over {m}") for m, each in above.items()),
            ],
            n=len(ious["relevance"]),
            leans_on=f"exact masks of {count} toys",
            picture=picture,
            data=data,
        ),
        Row(
            claim="toy-detr: masks from relevance are better than a Gaussian that fills the found box",
            source="ours: what the box alone tells about the mask",
            measured=f"mIoU {means['relevance'].text()}, difference {against.text()}",
            baseline=f"Gaussian in the box {means['Gaussian in the box'].text()}",
            bars=[Bar(against, 0.0, 1 - means["Gaussian in the box"].value, above=0.0)],
            n=len(ious["relevance"]),
            leans_on="exact masks",
            data=data,
        ),
        Row(
            claim="toy-detr: leaving out normalisation, the self matrices of rule 10 or the sum costs overlap",
            source=SOURCE + " (ablations)",
            measured=f"mIoU {means['relevance'].text()}",
            baseline="; ".join(f"{w} {means[w].text()}, {loses[w].text()} less" for w in ablations),
            bars=[
                Bar(each, 0.0, means["relevance"].value, above=0.0, what=f"cost of {w}") for w, each in loses.items()
            ],
            n=len(ious["relevance"]),
            leans_on="exact masks",
            data=data,
        ),
    ]


def otsu_mask(heat: Tensor) -> Tensor:
    """A map (h, w) as a mask."""
    return segmentation.normalise(heat[None])[0] > segmentation.otsu(heat[None])[0]


def gaussian_in(box: Tensor, pixels: int) -> Tensor:
    """A Gaussian (h, w) filling a box (shares of the picture): what a box alone tells about a mask."""
    place = (torch.arange(pixels) + 0.5) / pixels
    middle, side = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).clamp_min(1 / pixels)
    x, y = (place - middle[0]) / side[0], (place - middle[1]) / side[1]
    return torch.exp(-4 * (x.square()[None] + y.square()[:, None]))


# -- two modalities: questions -----------------------------------------------------------------------------------------


def asked_about_one(context: Context, n: int) -> dict[str, Any]:
    """Pictures of two or three toys with a question about one toy's colour, shape or pattern; true regions in random
    order among those of the background."""
    from sfumato.zoo.objectives.vqa import draw_regions

    model, side = reader(context, "toy-vqa"), common.side(context, "toy-vqa")
    pictures, asked, regions, owners = [], [], [], []
    index = 0
    while len(asked) < n:
        scenes = [draw_scene("test", REPORT + 3, index + k, 2 + k % 2) for k in range(64)]
        frames = render(scenes, side)
        for k, scene in enumerate(scenes):
            if any(float((frames.mask[k] == toy).float().mean()) < LEAST for toy in range(len(scene.toys))):
                continue
            rng = np.random.default_rng((REPORT, index + k))
            question = sample_question(scene, rng, ["color", "shape", "pattern", "count"])
            if question.kind == "count":
                continue
            generator = torch.Generator().manual_seed(index + k)
            boxes, owner = draw_regions(frames.boxes[k] / side, model.regions, 0.0, generator)
            pictures.append(frames.image[k])
            asked.append(question)
            regions.append(boxes)
            owners.append(int((owner == question.objects[0]).nonzero()))
        index += 64
    return {
        "pictures": torch.stack(pictures[:n]), "asked": asked[:n],
        "regions": torch.stack(regions[:n]), "owner": torch.tensor(owners[:n]),
    }  # fmt: skip


def answered(context: Context) -> list[Row]:
    """The queried region ranked first, the words that say what is asked, and perturbation of both modalities."""
    model, n = reader(context, "toy-vqa"), context.count(300, 24)
    given = asked_about_one(context, n)
    questions: list[Question] = given["asked"]
    tokens = model.tokens([question.text for question in questions])
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    features = region_features(given["pictures"], given["regions"], model.cells)
    inputs = {"input_ids": ids, "visual_feats": features, "visual_pos": given["regions"]}
    truth = torch.tensor([ANSWERS.index(question.answer) for question in questions])

    def scores(words: Tensor, boxes: Tensor) -> Tensor:
        with torch.no_grad():
            out = model.module(**inputs, attention_mask=words.long(), visual_attention_mask=boxes.long())
        return out.question_answering_score

    everywhere = torch.ones(features.shape[:2])
    right = scores(mask, everywhere).argmax(1) == truth
    boxes, words = {}, {}
    full = {**inputs, "attention_mask": mask, "visual_attention_mask": everywhere}
    for method in METHODS:
        context.report(f"  toy-vqa: {method}")
        found = attention_relevance(
            model.module, full, lambda out: out.question_answering_score[torch.arange(n), truth], method=method
        )
        boxes[method] = found.row("text", 0, "image")
        words[method] = found.row("text", 0).clone()
        words[method][:, 0] = 0
    chance = torch.Generator().manual_seed(1)
    boxes["chance"] = torch.rand(boxes["raw"].shape, generator=chance)
    words["chance"] = torch.rand(words["raw"].shape, generator=chance)
    first = {m: stats.share((each.argmax(1) == given["owner"])[right].numpy()) for m, each in boxes.items()}
    between = mask.bool().clone()  # start and end are never removed
    between[:, 0] = False
    between[torch.arange(n), mask.sum(1) - 1] = False
    content = {m: stats.share(content_on_top(model, questions, each * between, right)) for m, each in words.items()}
    rows = right.nonzero().flatten()

    def hit(keep_boxes: Tensor | None, keep_words: Tensor | None) -> Tensor:
        b, w = everywhere.clone(), mask.clone()
        if keep_boxes is not None:
            b[rows] = keep_boxes.float()
        if keep_words is not None:
            w[rows] = (keep_words & mask[rows].bool()).long()
        return (scores(w, b).argmax(1) == truth)[rows].double()

    by_boxes = curves({m: each[right] for m, each in boxes.items()}, lambda keep: hit(keep, None), SHARES)
    by_words = curves(
        {m: each[right] for m, each in words.items()}, lambda keep: hit(None, keep), SHARES, valid=between[right]
    )
    rest = [m for m in boxes if m != "relevance"]
    accuracy = percent(stats.share(right.numpy()))
    out = [
        Row(
            claim="toy-vqa: asked about one toy, its region is ranked first among all in 80 % or more",
            source=SOURCE + " (LXMERT, VQA)",
            measured=percent(first["relevance"]),
            baseline="; ".join(f"{m} {percent(first[m])}" for m in rest),
            bars=[Bar(first["relevance"], first["chance"].value, 1.0, at_least=0.8)],
            n=int(right.sum()),
            leans_on=f"questions answered right: {accuracy}",
            data={m: each.to_json() for m, each in first.items()},
        ),
        Row(
            claim="toy-vqa: the most relevant words are those that say what is asked and of which toy in 75 % or more",
            source=SOURCE + " (LXMERT, VQA)",
            measured=percent(content["relevance"]),
            baseline="; ".join(f"{m} {percent(content[m])}" for m in rest),
            bars=[Bar(content["relevance"], content["chance"].value, 1.0, at_least=0.75)],
            n=int(right.sum()),
            leans_on=f"questions answered right: {accuracy}",
            data={m: each.to_json() for m, each in content.items()},
        ),
        curve_row("toy-vqa: regions", int(right.sum()), by_boxes, ("raw", "gradcam", "rollout"), SOURCE + " (VQA)"),
        curve_row("toy-vqa: words", int(right.sum()), by_words, ("raw", "gradcam", "rollout"), SOURCE + " (VQA)"),
    ]
    for row in out[2:]:
        row.leans_on = f"questions answered right: {accuracy}"
    return out


def content_on_top(model: Reader, questions: Sequence[Question], values: Tensor, right: Tensor) -> np.ndarray:
    """Whether the two most relevant words of each rightly answered question are content words."""
    hits = []
    for question, row, ok in zip(questions, values, right.tolist(), strict=True):
        if not ok:
            continue
        spans = model.tokenizer(question.text, return_offsets_mapping=True).offset_mapping
        starts = {word.start for word in question.words}
        best = row[: len(spans)].topk(2).indices.tolist()
        hits.append(all(spans[i][0] in starts and spans[i][1] > spans[i][0] for i in best))
    return np.array(hits)


def pointed(name: str) -> tuple[Part, ...]:
    """The parts of a model that names or matches."""
    return (
        Part(f"{name}: pointing", (name,), lambda context: specific(name, context)),
        Part(f"{name}: perturbation", (name,), lambda context: perturbed(name, context)),
    )


EXPERIMENT = Experiment(
    key="attention_relevance",
    title="Attention relevance: which patches, regions and words led to this answer",
    intro=(
        "Scenes of the test split. Truth is the renderer's masks, or the model's own answer once parts are removed: "
        "cells become mid-grey, regions and words are masked out of attention. Nothing is tuned: relevance has no free "
        "parameter, and masks are cut by Otsu's threshold, for every method alike. Perturbation areas are means over "
        "the share removed; all differences are paired."
    ),
    file=__file__,
    parts=(
        *pointed("toy-clip"),
        *pointed("toy-vit"),
        Part("toy-sd: words", ("toy-sd",), lambda context: drawn("toy-sd", context)),
        Part("toy-sd3: words", ("toy-sd3",), lambda context: drawn("toy-sd3", context)),
        Part("toy-detr: masks", ("toy-detr",), masks_of_queries),
        Part("toy-vqa: answers", ("toy-vqa",), answered),
    ),
)
