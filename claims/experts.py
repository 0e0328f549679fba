"""Expert denoisers (eDiff-I, Balaji et al. 2022, https://arxiv.org/abs/2211.01324): are two better than one?

toy-sd is trained further three times: on the lower half of the noise, on the upper half, and, the control, on all of it
for as many steps as both together. So every noise level has been seen equally often by experts and control, and a
picture costs the same. Without that control any further training would look like a success of the experts.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from claims import common
from claims.common import Prompt, percent
from claims.core import Context, Experiment, Part, Row
from sfumato import registry
from sfumato.metrics import stats
from sfumato.models import Model, load
from sfumato.models.weights import find_weights, hash_files
from sfumato.sampling import generate
from sfumato.steer.experts import Experts
from sfumato.toybox import ToyboxDataset, oracle
from sfumato.toybox import caption as describe

SOURCE = "Balaji et al. 2022, the section on expert denoisers and its figures of one model against the ensemble"
BASE = "toy-sd"
REPORT = 8100
DECILES = 10
HALVES = {"toy-sd-expert-1-0": (0.0, 0.5), "toy-sd-expert-1-1": (0.5, 1.0)}
CONTROL = "toy-sd-longer"


def trained(context: Context, name: str, interval: tuple[float, float], times: int = 1) -> Path:
    """The folder of a child of the base model: a run in the cache that started from these very weights, or a new one.
    ``times`` the steps of the shipped recipe of an expert."""
    base = context.folder(BASE)
    weights = hash_files([("unet", path) for path in find_weights(base / "unet")])
    run_name = f"{name}-{weights[:8]}" + ("-quick" if context.quick else "")
    if run_name not in registry.trained():
        from sfumato.training.recipe import load_recipe
        from sfumato.training.runs import TrainingRun

        text = registry.recipes()[min(HALVES)].read_text(encoding="utf-8")
        steps = 2 if context.quick else times * int(re.search(r"^steps = (\d+)", text, re.M)[1])  # type: ignore[index]
        values = {"name": f'"{run_name}"', "init_from": f'"{base}"', "interval": f"[{interval[0]}, {interval[1]}]"}
        values |= {"steps": str(steps), "seed": str(REPORT + list([*HALVES, CONTROL]).index(name))}
        for key, value in values.items():
            text = re.sub(rf"^{key} = .*$", lambda _, key=key, value=value: f"{key} = {value}", text, flags=re.M)
        if context.quick:
            text += "\n[data]\ntrain = 64\nval = 16\n"
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
    """Folders of the two experts and the control."""

    def made() -> dict[str, Path]:
        found = {name: trained(context, name, interval) for name, interval in HALVES.items()}
        return {**found, CONTROL: trained(context, CONTROL, (0.0, 1.0), times=len(HALVES))}

    return context.once("children", made)


def child(context: Context, name: str) -> Model:
    return context.once(f"child {name}", lambda: load(str(children(context)[name])))


@torch.no_grad()
def losses(model: Model, clean: Tensor, texts: Sequence[str], decile: int) -> list[float]:
    """The error of the noise that ``model`` says is in held-out latents (n c h w), each at a timestep of its own within
    one tenth of the schedule, with noise that every model gets alike."""
    dice = torch.Generator().manual_seed(REPORT + decile)
    noise = torch.randn(clean.shape, generator=dice)
    t = ((decile + torch.rand(len(clean), generator=dice)) / DECILES * 1000).long()
    alphas = model.make_scheduler("ddim").alphas_cumprod[t].view(-1, 1, 1, 1)
    x = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    out = []
    for part in torch.arange(len(clean)).split(50):
        condition = model.encode_text([texts[i] for i in part.tolist()], guidance=False)
        guess = model.predict(x[part], t[part], condition, ("cond",))
        out += (guess - noise[part]).square().mean((1, 2, 3)).tolist()
    return out


def denoising(context: Context) -> list[Row]:
    """The held-out loss by tenth of the noise, experts against the control, on the same noise."""
    n = context.count(400, 8)
    dataset = ToyboxDataset("test", n, 64)
    base = common.load(context, BASE)
    with torch.no_grad():
        pixels = common.pictures_of(dataset)
        clean = torch.cat([base.encode_image(part) for part in pixels.split(50)])
    dice = [np.random.default_rng((REPORT, i)) for i in range(n)]
    texts = [describe(scene, rng, "random").text for scene, rng in zip(dataset.scenes, dice, strict=True)]
    found: dict[str, list[list[float]]] = {"base": [], "longer": [], "experts": []}
    for decile in range(DECILES):
        context.report(f"  loss: tenth {decile + 1} of {DECILES}")
        expert = min(HALVES) if decile < DECILES // 2 else max(HALVES)
        models = {"base": base, "longer": child(context, CONTROL), "experts": child(context, expert)}
        for arm, model in models.items():
            found[arm].append(losses(model, clean, texts, decile))
    against = {
        other: [relative(mine, theirs) for mine, theirs in zip(found["experts"], found[other], strict=True)]
        for other in ("longer", "base")
    }
    longer = [relative(mine, theirs) for mine, theirs in zip(found["longer"], found["base"], strict=True)]
    # every tenth counts alike: the loss of clean pictures would drown the others
    mean = {arm: np.mean([np.array(row) / np.mean(ref) for row, ref in zip(rows, found["base"], strict=True)], 0)
            for arm, rows in found.items()}  # fmt: skip
    overall = stats.paired_difference(mean["experts"].tolist(), mean["longer"].tolist())
    gained = stats.paired_difference(mean["longer"].tolist(), mean["base"].tolist())
    better = sum(each.high < 0 for each in against["longer"])
    lower = sum(each.value < 0 for each in against["longer"])
    picture = context.save("experts-loss.png", chart(against["base"], longer))
    return [
        Row(
            claim=(
                "two experts have a lower held-out denoising loss than one model trained for as many steps as both, in "
                "at least 8 of 10 tenths of the noise and in their mean (each tenth counts alike)"
            ),
            source=SOURCE,
            measured=(
                f"lower in {lower} of {DECILES} tenths, in {better} beyond chance; mean difference "
                f"{percent(overall)} of the base model's loss"
            ),
            baseline=f"the control itself against the base model: {percent(gained)}",
            holds=lower >= 8 and overall.high < 0,
            n=n,
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
    """The difference of the loss to the base model's by tenth of the noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    for shift, label, points in ((-0.1, "longer", longer), (0.1, "experts", experts)):
        values = [point.value for point in points]
        ends = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
        axes.errorbar(np.arange(1, DECILES + 1) + shift, values, ends, fmt="o", markersize=4, capsize=2, label=label)
    axes.axhline(0, color="gray", linewidth=1)
    axes.set(
        xlabel="tenth of the noise, from clean to pure noise", ylabel="loss, relative to toy-sd", xticks=range(1, 11)
    )
    axes.legend()
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return Image.open(target)


def drawing(context: Context) -> list[Row]:
    """Prompts followed, on the same prompts and seeds at the same cost."""
    n = context.count(160, 6)
    asked: list[Prompt] = common.prompts("test", REPORT, n // 2, 1, "random")
    asked += common.prompts("test", REPORT + 1, n - n // 2, 2, "random")
    base, folders = common.load(context, BASE), children(context)
    arms: dict[str, tuple[Model, list[Any]]] = {
        "base": (base, []),
        "longer": (child(context, CONTROL), []),
        "experts": (base, [Experts(models=[str(folders[name]) for name in HALVES])]),
    }
    hits: dict[str, list[bool]] = {}
    pictures: dict[str, Tensor] = {}
    cost = set()
    for arm, (model, systems) in arms.items():
        made = []
        for start, chunk in context.batches(asked, common.BATCH, arm):
            seeds = list(range(REPORT + start, REPORT + start + len(chunk)))
            result = generate(model, [p.text for p in chunk], seed=seeds, interventions=systems)
            made.append(result.pixels.clamp(-1, 1))
            cost.add(result.cost)
        pictures[arm] = torch.cat(made)
        readings = common.judge_of(context).read(pictures[arm])
        hits[arm] = [oracle.check(r, p.wishes).all_bound for r, p in zip(readings, asked, strict=True)]
    assert len(cost) == 1, "the arms must cost the same"
    more = stats.mcnemar(hits["experts"], hits["longer"])
    level = {arm: stats.share(each) for arm, each in hits.items()}
    chosen = [*range(0, min(5, n // 2)), *range(n // 2, n // 2 + min(5, n - n // 2))]
    picture = context.save("experts.png", common.sheet([[pictures[arm][i] for i in chosen] for arm in arms]))
    return [
        Row(
            claim="pictures by experts show every toy in its shape and colour more often than the control's",
            source=SOURCE,
            measured=f"{percent(level['experts'])}, difference {percent(more)}",
            baseline=f"control {percent(level['longer'])}, base model {percent(level['base'])}",
            holds=more.low > 0,
            n=n,
            leans_on=common.trust_text(context, "shape", "color"),
            picture=picture,
            data={"levels": {arm: each.to_json() for arm, each in level.items()}, "more": more.to_json()},
        )
    ]


EXPERIMENT = Experiment(
    key="experts",
    title="Expert denoisers: one set of weights for each half of the noise",
    intro=(
        "toy-sd trained further on each half of the noise (`sfumato train toy-sd-expert-1-0`, `-1-1`), against toy-sd "
        "trained further on all of it for as many steps as both together. The loss is measured on unseen scenes with "
        "the same noise for all, the pictures with the same prompts and seeds at the same cost. The runs are kept in "
        "the cache and are made again when toy-sd's weights change."
    ),
    file=__file__,
    parts=(
        Part("denoising loss", (BASE,), denoising),
        Part("pictures", (BASE, "toy-judge"), drawing),
    ),
)
