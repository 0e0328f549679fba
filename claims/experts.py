"""Expert denoisers (eDiff-I, Balaji et al. 2022, https://arxiv.org/abs/2211.01324): are several better than one?

The paper's tree: toy-sd is trained further on either half of the noise, and the experts so made further on the lowest
and the highest quarter. The control is toy-sd trained further on all of the noise for as many steps as all experts
together, and a picture costs the same. Without it any further training would look like a success of the experts.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from claims import common
from claims.attend_excite import Arm, pictured
from claims.bars import Bar
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato import registry
from sfumato.metrics import stats
from sfumato.models import Model, load
from sfumato.models.weights import find_weights, hash_files
from sfumato.sampling import generate
from sfumato.sampling.noise import Path as NoisePath
from sfumato.steer.experts import Experts
from sfumato.toybox import ToyboxDataset, oracle
from sfumato.toybox import caption as describe

SOURCE = "Balaji et al. 2022, the section on expert denoisers and its figures of one model against the ensemble"
BASE = "toy-sd"
REPORT = 18100
PARTS = 8  # of the noise, in which the loss is looked at: the ends of all experts' intervals are ends of parts
LOWER = 0.75  # of the parts
N = 240  # prompts
SHOWN = 6
CONTROL = "toy-sd-longer"


@dataclass(frozen=True)
class Branch:
    """A child: its share of the noise, and which model it is trained on from."""

    interval: tuple[float, float]
    parent: str


TREE = {
    "toy-sd-expert-1-0": Branch((0.0, 0.5), BASE),
    "toy-sd-expert-1-1": Branch((0.5, 1.0), BASE),
    "toy-sd-expert-2-0": Branch((0.0, 0.25), "toy-sd-expert-1-0"),
    "toy-sd-expert-2-3": Branch((0.75, 1.0), "toy-sd-expert-1-1"),
}


def trained(context: Context, name: str, branch: Branch, parent: Path, times: int = 1) -> Path:
    """The folder of a child: a run in the cache that started from these very weights of its ``parent``, or a new one.
    ``times`` the steps of the shipped recipe of an expert."""
    weights = hash_files([("unet", path) for path in find_weights(parent / "unet")])
    run_name = f"{name}-{weights[:8]}" + ("-quick" if context.quick else "")
    if run_name not in registry.trained():
        from sfumato.training.recipe import load_recipe
        from sfumato.training.runs import TrainingRun

        known = registry.recipes()
        text = known.get(name, known[min(TREE)]).read_text(encoding="utf-8")
        steps = 2 if context.quick else times * int(re.search(r"^steps = (\d+)", text, re.M)[1])  # type: ignore[index]
        low, high = branch.interval
        values = {"name": f'"{run_name}"', "init_from": f'"{parent}"', "interval": f"[{low}, {high}]"}
        values |= {"steps": str(steps), "seed": str(REPORT + list([*TREE, CONTROL]).index(name))}
        for key, value in values.items():
            text = re.sub(rf"^{key} = .*$", lambda _, key=key, value=value: f"{key} = {value}", text, flags=re.M)
        if context.quick:
            text = re.sub(r"^(train|val) = .*$", r"\1 = 64", text, flags=re.M)
            text += "" if "[data]" in text else "\n[data]\ntrain = 64\nval = 64\n"
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "recipe.toml"
            recipe.write_text(text, encoding="utf-8")
            this = TrainingRun(load_recipe(recipe), registry.cache_folder() / "runs" / run_name)
        this.folder.mkdir(parents=True, exist_ok=True)
        this.restore()
        this.fit(None, lambda p: context.report(f"  {run_name}: step {p.step} of {p.steps}"))
        this.export(this.folder / "export", {})  # what it is worth is measured here, not by the trainer
    return registry.trained()[run_name]


def children(context: Context) -> dict[str, Path]:
    """Folders of the experts and the control."""

    def made() -> dict[str, Path]:
        folders = {BASE: context.folder(BASE)}
        for name, branch in TREE.items():  # parents first
            folders[name] = trained(context, name, branch, folders[branch.parent])
        control = Branch((0.0, 1.0), BASE)
        return {**folders, CONTROL: trained(context, CONTROL, control, folders[BASE], times=len(TREE))}

    return context.once("children", made)


def expert_of(part: int) -> str:
    """The narrowest expert for a part of the noise."""
    at = (part + 0.5) / PARTS
    within = {name: b.interval for name, b in TREE.items() if b.interval[0] <= at < b.interval[1]}
    return min(within, key=lambda name: within[name][1] - within[name][0])


def child(context: Context, name: str) -> Model:
    return context.once(f"child {name}", lambda: load(str(children(context)[name])))


@torch.no_grad()
def losses(model: Model, clean: Tensor, texts: Sequence[str], part: int) -> list[float]:
    """The error of the noise that ``model`` says is in held-out latents (n c h w), each at a timestep of its own within
    one part of the schedule, with noise that every model gets alike."""
    dice = torch.Generator().manual_seed(REPORT + part)
    noise = torch.randn(clean.shape, generator=dice)
    t = ((part + torch.rand(len(clean), generator=dice)) / PARTS * 1000).long()
    scheduler = model.make_scheduler("ddim")
    model.timesteps(scheduler, PARTS)  # however many: the levels below are those of training
    path = NoisePath(scheduler)
    alpha, sigma = path.alpha_sigma(t)
    x = alpha * clean + sigma * noise
    out = []
    for rows in torch.arange(len(clean)).split(50):
        condition = model.encode_text([texts[i] for i in rows.tolist()], guidance=False)
        guess = path.to_eps(x[rows], model.predict(x[rows], t[rows], condition, ("cond",)), t[rows])
        out += (guess - noise[rows]).square().mean((1, 2, 3)).tolist()
    return out


def denoising(context: Context) -> list[Row]:
    """The held-out loss by part of the noise, experts against the control, on the same noise."""
    n = common.tenth(context, 400)
    dataset = ToyboxDataset("test", n, common.side(context, BASE))
    base = common.load(context, BASE)
    with torch.no_grad():
        pixels = common.pictures_of(dataset)
        clean = torch.cat([base.encode_image(part) for part in pixels.split(50)])
    dice = [np.random.default_rng((REPORT, i)) for i in range(n)]
    texts = [describe(scene, rng, "random").text for scene, rng in zip(dataset.scenes, dice, strict=True)]
    found: dict[str, list[list[float]]] = {"base": [], "longer": [], "experts": []}
    for part in range(PARTS):
        context.report(f"  loss: part {part + 1} of {PARTS}")
        models = {"base": base, "longer": child(context, CONTROL), "experts": child(context, expert_of(part))}
        for arm, model in models.items():
            found[arm].append(losses(model, clean, texts, part))
    against, longer = (
        [relative(*each) for each in zip(found[arm], found["base"], strict=True)] for arm in ("experts", "longer")
    )
    return loss_rows(found, context.save("experts-loss.png", chart(against, longer)))


def loss_rows(found: Mapping[str, Sequence[Sequence[float]]], picture: str | None = None) -> list[Row]:
    """The verdict from the losses of base, longer and experts: by part of the noise, by picture."""
    against = {
        other: [relative(mine, theirs) for mine, theirs in zip(found["experts"], found[other], strict=True)]
        for other in ("longer", "base")
    }
    longer = [relative(mine, theirs) for mine, theirs in zip(found["longer"], found["base"], strict=True)]
    # every part counts alike: the loss of clean pictures would drown the others
    mean = {arm: np.mean([np.array(row) / np.mean(ref) for row, ref in zip(rows, found["base"], strict=True)], 0)
            for arm, rows in found.items()}  # fmt: skip
    overall = stats.paired_difference(mean["experts"].tolist(), mean["longer"].tolist())
    gained = {arm: stats.paired_difference(mean[arm].tolist(), mean["base"].tolist()) for arm in ("longer", "experts")}
    better = sum(each.high < 0 for each in against["longer"])
    lower = sum(each.value < 0 for each in against["longer"]) / len(longer)
    idle = all(each.high >= 0 for each in gained.values())
    return [
        Row(
            claim="a tree of four experts has a lower held-out denoising loss than one model trained for as many steps "
            f"as all of them, in {100 * LOWER:.0f} % of the noise levels and in their mean (each part counts alike)",
            source=SOURCE,
            measured=f"lower in {100 * lower:.0f} % of {len(longer)} parts, in {better} beyond chance; mean difference "
            f"{percent(overall)} of the base model's loss",
            baseline=f"against the base model: the control {percent(gained['longer'])}, the experts "
            f"{percent(gained['experts'])}",
            bars=[
                Bar(overall, null=0.0, ideal=-0.1, below=0.0, what="mean"),
                Bar(common.exactly(lower, len(longer)), null=0.5, ideal=1.0, at_least=LOWER, what="parts"),
            ],
            void="training further changed nothing: neither experts nor control are better than toy-sd" if idle else "",
            headline=True,
            n=len(mean["base"]),
            picture=picture,
            data={
                "experts_to_longer": [each.to_json() for each in against["longer"]],
                "experts_to_base": [each.to_json() for each in against["base"]],
                "longer_to_base": [each.to_json() for each in longer],
                "loss": {arm: [float(np.mean(row)) for row in rows] for arm, rows in found.items()},
            },
        )
    ]


def relative(mine: Sequence[float], theirs: Sequence[float]) -> stats.Interval:
    """How much one loss is above another, pictures and noise being the same, as a share of the other."""
    scale = float(np.mean(theirs))
    return stats.paired_difference([each / scale for each in mine], [each / scale for each in theirs])


def chart(experts: Sequence[Any], longer: Sequence[Any]) -> Image.Image:
    """The difference of the loss to the base model's by part of the noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    for shift, label, points in ((-0.1, "longer", longer), (0.1, "experts", experts)):
        values = [point.value for point in points]
        ends = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
        axes.errorbar(np.arange(1, PARTS + 1) + shift, values, ends, fmt="o", markersize=4, capsize=2, label=label)
    axes.axhline(0, color="gray", linewidth=1)
    axes.set(
        xlabel="eighth of the noise, from clean to pure noise",
        ylabel="loss, relative to toy-sd",
        xticks=range(1, PARTS + 1),
    )
    axes.legend()
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return Image.open(target)


def drawing(context: Context) -> list[Row]:
    """Prompts followed, on the same prompts and seeds at the same cost."""
    asked = common.steering("three toys", REPORT, common.tenth(context, N))
    base, folders = common.load(context, BASE), children(context)
    arms: dict[str, tuple[Model, list[Any]]] = {
        "base": (base, []),
        "longer": (child(context, CONTROL), []),
        "experts": (base, [Experts(models=[str(folders[name]) for name in TREE])]),
    }
    found: dict[str, Arm] = {}
    for arm, (model, systems) in arms.items():
        made, cost = [], set()
        for start, chunk in context.batches(asked, common.BATCH, arm):
            seeds = list(range(REPORT + start, REPORT + start + len(chunk)))
            result = generate(model, [p.text for p in chunk], seed=seeds, interventions=systems)
            made.append(result.pixels.clamp(-1, 1))
            cost.add(result.cost)
        readings = common.judge_of(context).read(torch.cat(made))
        checks = [oracle.check(r, p.requests) for r, p in zip(readings, asked, strict=True)]
        found[arm] = Arm(torch.cat(made), checks, max(cost))
    assert len({one.cost for one in found.values()}) == 1, "the arms must cost the same"
    sheet = pictured(
        {"toy-sd": found["base"], "trained longer": found["longer"], "experts": found["experts"]}, asked, ""
    )
    return drawn_rows(found, common.trust_text(context, "shape", "color"), context.save("experts.png", sheet))


def drawn_rows(found: Mapping[str, Arm], leans_on: str = "", picture: str | None = None) -> list[Row]:
    """The verdict from the arms base, longer and experts."""
    more = stats.mcnemar(found["experts"].bound, found["longer"].bound)
    level = {arm: stats.share(each.bound) for arm, each in found.items()}
    return [
        Row(
            claim="pictures by experts show every one of three toys in its shape and colour more often than the "
            "control's",
            source=f"{SOURCE} (there by FID and CLIP score)",
            measured=f"{percent(level['experts'])}, difference {percent(more)}",
            baseline=f"control {percent(level['longer'])}, base model {percent(level['base'])}",
            bars=[common.lift(more, level["longer"].value)],
            void=common.void(level["longer"], "the control"),
            n=len(found["base"].checks),
            leans_on=leans_on,
            picture=picture,
            data={"levels": {arm: each.to_json() for arm, each in level.items()}, "more": more.to_json()},
        )
    ]


EXPERIMENT = Experiment(
    key="experts",
    title="Expert denoisers: sets of weights for parts of the noise",
    intro=(
        "toy-sd trained further on each half of the noise, these two further on the lowest and the highest quarter "
        "(`sfumato train toy-sd-expert-1-0` and so on), against toy-sd trained further on all of it for as many steps "
        "as "
        "all four together. The loss is measured on unseen scenes with the same noise for all, the pictures with the "
        "same prompts and seeds at the same cost. The runs are kept in the cache and are made again when the weights "
        "that they start from change."
    ),
    file=__file__,
    parts=(
        Part("denoising loss", (BASE,), denoising),
        Part("pictures", (BASE, "toy-judge"), drawing),
    ),
)
