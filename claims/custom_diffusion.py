"""Custom Diffusion: two secrets in one picture, taught together, merged in closed form, or merged naively."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from claims import children, common, dreambooth, subjects
from claims.bars import Bar
from claims.core import Context, Experiment, Part, Row
from sfumato.adapters.closed_form import low_rank
from sfumato.adapters.trainable import substituted_weights
from sfumato.metrics import stats
from sfumato.teach.custom_diffusion import CustomDiffusion
from sfumato.teach.merging import Part as Concept
from sfumato.teach.merging import merged
from sfumato.teach.taught import Taught
from sfumato.text.placeholders import placeholders
from sfumato.toybox import SECRETS, VALIDATION, Secret, caption, references, render
from sfumato.toybox.dataset import draw_scene

SOURCE = "Kumari et al. 2023"
PAIRS = (
    ("teal", "magenta"), ("lime", "amber"), ("zigzag", "target"), ("halves", "grid"),
    ("teal", "halves"), ("magenta", "grid"), ("lime", "zigzag"), ("amber", "target"),
)  # fmt: skip
TUNED_ON = (("mint", "waves"), ("indigo", "quarters"))
SETTINGS: dict[str, Any] = {"batch": 4, "prompt": "a {}", "checkpoint_every": 10_000, "timesteps": "cubic"}
RATES = ((3e-4, 5e-3), (1e-3, 5e-3), (1e-3, 2e-2), (4e-3, 2e-2))  # of the matrices and of the word
SHOWN = 6  # pictures of an arm
ARMS = ("together", "merged", "average", "sum of changes", "DreamBooth")


def system(context: Context, rates: tuple[float, float], steps: int, **given: Any) -> CustomDiffusion:
    lr, word_lr = rates
    counts = {"steps": context.count(steps, 2), "prior": context.count(100, 2)}
    return CustomDiffusion(lr=lr, word_lr=word_lr, **counts, **SETTINGS, **given)


def alone(context: Context, model: Any, secret: Secret, word: str, rates: tuple[float, float]) -> Taught:
    """One concept, once per run."""

    def made() -> Taught:
        context.report(f"  teaching {secret.key}, rates {rates}")
        folder = subjects.folder_of(context, secret, side=model.default_size[0])
        with subjects.at_work(context, model, secret.noun) as work:
            return system(context, rates, 250, name=word, class_noun=secret.noun).teach(model, folder, work=work)

    return kept(context, model, f"{secret.key} as {word} at {rates}", made)


def kept(context: Context, model: Any, what: str, make: Callable[[], Taught]) -> Taught:
    """What was taught, once per run, as far as it is used here: words and weights."""

    def made() -> Taught:
        def parts() -> dict[str, Any]:
            taught = make()
            return {"words": taught.words, "weights": taught.weights}

        return Taught(model, "custom_diffusion", **context.kept((what, model.name), parts))

    return context.once(f"{model.name} {what}", made)


def folders(context: Context, pair: Sequence[Secret], names: Sequence[str], side: int) -> Path:
    """A folder of folders "NAME CLASS"."""
    folder = Path(tempfile.mkdtemp(prefix="pair-"))
    for name, secret in zip(names, pair, strict=True):
        shutil.copytree(subjects.folder_of(context, secret, side=side), folder / f"{name} {secret.noun}")
    return folder


def words_of(pair: Sequence[Secret]) -> list[str]:
    return [f"<new{i + 1}>" for i in range(len(pair))]


def scored(
    context: Context, model: Any, pair: Sequence[Secret], names: Sequence[str], weights: Any, words: Any, n: int,
    arm: str,
) -> tuple[float, Tensor]:  # fmt: skip
    """How often both are there and recognised, and the pictures. ``arm`` names the weights and words."""
    text = f"a {names[0]} {pair[0].noun} and a {names[1]} {pair[1].noun} on the grass"
    seed = subjects.TUNE if pair[0].key in VALIDATION else subjects.REPORT

    def drawn() -> Tensor:
        with placeholders(model, words), substituted_weights(model, _parameters(weights)):
            return common.generate(context, model, [text] * n, seed, arm, **subjects.quickly(context))

    pictures = context.kept((arm, model.name, [each.key for each in pair], text, n), drawn)
    reader, both = subjects.reader_of(context, pair[0]), []
    sized = reader.sized(pictures)
    for picture, reading in zip(sized, reader.judge.read(sized), strict=True):
        seen = [any(toy.shape == secret.noun and reader.said(picture, toy.mask) == secret.key
                    for toy in reading.objects) for secret in pair]  # fmt: skip
        both.append(all(seen))
    return float(np.mean(both)), pictures


def rates(context: Context, name: str) -> tuple[float, float]:
    """The learning rates with which two validation secrets that were taught together are both right most often."""
    model, n = children.world(context, name), context.count(16, 3)

    def score(value: tuple[float, float]) -> float:
        found = []
        for keys in TUNED_ON[: context.count(2, 1)]:
            pair = [VALIDATION[key] for key in keys]
            taught = together(context, model, pair, value)
            found.append(
                scored(context, model, pair, words_of(pair), taught.weights, taught.words, n, f"rates {value}")[0]
            )
        return float(np.mean(found))

    return subjects.chosen(context, f"{name}, custom diffusion: rates", RATES[: context.count(len(RATES), 1)], score)


def together(context: Context, model: Any, pair: Sequence[Secret], value: tuple[float, float]) -> Taught:
    """Two concepts in one run."""
    what = f"{' and '.join(each.key for each in pair)} together, rates {value}"

    def made() -> Taught:
        context.report(f"  {what}")
        folder = folders(context, pair, words_of(pair), model.default_size[0])
        with subjects.at_work(context, model, "pair") as work:
            return system(context, value, 500, class_noun="toy").teach(model, folder, work=work)

    return kept(context, model, what, made)


def by_dreambooth(context: Context, name: str, pair: Sequence[Secret]) -> Taught:
    """Both in one run of DreamBooth, all weights."""
    model, lr = children.world(context, name), dreambooth.rate(context, name, "full")
    what = f"{' and '.join(each.key for each in pair)} by DreamBooth at {lr:g}"

    def made() -> Taught:
        context.report(f"  {what}")
        folder = folders(context, pair, ["zqa", "zqb"], model.default_size[0])
        counts = {"steps": context.count(500, 2), "prior": context.count(100, 2)}
        system = dreambooth.DreamBooth(class_noun="toy", mode="full", lr=lr, **counts, **dreambooth.SETTINGS)
        with subjects.at_work(context, model, "pair") as work:
            return system.teach(model, folder, work=work)

    return kept(context, model, what, made)


def small(own: dict[str, Tensor], taught: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Weights whose changes were compressed to 60 % of their singular values, and their share of the bytes."""
    found = {path: low_rank(taught[path] - own[path], 0.6) for path in own}
    numbers = sum(each.down.numel() + each.up.numel() for each in found.values())
    weights = {path: own[path] + each.up @ each.down for path, each in found.items()}
    return weights, numbers / sum(each.numel() for each in own.values())


def measured(context: Context, name: str) -> list[Row]:
    model, n, value = children.world(context, name), context.count(48, 4), rates(context, name)
    captions = [caption(draw_scene("train", 91, i)).text for i in range(context.count(300, 40))]
    both: dict[str, list[float]] = {arm: [] for arm in ARMS}
    residuals, shown = [], {}
    own: dict[str, Tensor] = {}
    for keys in PAIRS[: context.count(len(PAIRS), 1)]:
        pair = [SECRETS[key] for key in keys]
        context.report(f"  {name}: {' and '.join(keys)}")
        single = [alone(context, model, secret, f"<new{i + 1}>", value) for i, secret in enumerate(pair)]
        own = {path: model.modules[path.partition(".")[0]].get_parameter(path.partition(".")[2]).detach()
               for path in single[0].weights}  # fmt: skip
        words = {word: vectors for each in single for word, vectors in each.words.items()}
        concepts = [Concept(f"<new{i + 1}>", secret.noun, each.words[f"<new{i + 1}>"], each.weights)
                    for i, (secret, each) in enumerate(zip(pair, single, strict=True))]  # fmt: skip
        closed, joint = merged(model, concepts, captions, "a {}"), together(context, model, pair, value)
        residuals.append(max(each["residual"] for each in closed.facts["matrices"].values()))
        first, second = (each.weights for each in single)
        sets = {
            "together": (joint.weights, joint.words),
            "merged": (closed.weights, words),
            "average": ({path: (first[path] + second[path]) / 2 for path in own}, words),
            "sum of changes": ({path: first[path] + second[path] - own[path] for path in own}, words),
            "DreamBooth": (by_dreambooth(context, name, pair).weights, {}),
        }
        frames = render([scene for secret in pair for scene in references(secret, SHOWN // 2)], model.default_size[0])
        shown[f"{' and '.join(keys)}: rendered, each alone"] = list(frames.image)
        for arm, (weights, said) in sets.items():
            called = ["zqa", "zqb"] if arm == "DreamBooth" else words_of(pair)
            rate, pictures = scored(context, model, pair, called, weights, said, n, arm)
            both[arm].append(rate)
            shown[f"{' and '.join(keys)}: {arm}"] = list(pictures[:SHOWN])
    few, heads = 2 * (len(ARMS) + 1), [f"seed {i}" for i in range(SHOWN)]  # two pairs
    sheet = common.sheet(list(shown.values())[:few], names=list(shown)[:few], heads=heads)
    picture = context.save(f"custom-diffusion-{name}.png", sheet)
    naive = [max(each) for each in zip(both["average"], both["sum of changes"], strict=True)]
    shared: dict[str, Any] = {"source": SOURCE, "n": n * len(residuals), "leans_on": subjects.reader_of(context).leans,
                              "data": {"both right": both, "residual": residuals, "rates": value}}  # fmt: skip
    listed = ", ".join(f"{arm} {np.mean(each):.2f}" for arm, each in both.items())
    of_joint = subjects.against(both["merged"], both["together"])
    more = stats.paired_difference(both["merged"], naive)
    return [
        Row(claim=f"{name}: the constraints of a merge hold to 1e-8 in every matrix",
            measured=f"largest residual {max(residuals):.1e}", baseline="none",
            bars=[Bar(stats.Interval(max(residuals), min(residuals), max(residuals), len(residuals)), null=1.0,
                      ideal=0.0, at_most=1e-8, what="residual")], **shared),
        Row(claim=f"{name}: merged in closed form, both toys are right 0.8 times as often as taught together, and more "
            "often than by averages and sums", measured=f"{of_joint.text()}; {more.text()} more", baseline=listed,
            void="" if np.mean(both["together"]) >= 0.1 else "taught together, both are hardly ever right",
            picture=picture, headline=True,
            bars=[Bar(of_joint, null=0.0, ideal=1.0, at_least=0.8, what="of together"),
                  Bar(more, null=0.0, ideal=0.5, above=0.0, what="over the better naive merge")], **shared),
        *one_by_one(context, name, own, value),
    ]  # fmt: skip


def one_by_one(context: Context, name: str, own: dict[str, Tensor], value: tuple[float, float]) -> list[Row]:
    """Single concepts: beside DreamBooth, compressed, and which layers a whole fine-tune changes most."""
    model, n = children.world(context, name), context.count(48, 4)
    before = dreambooth.unrelated(context, model, n)
    per: dict[str, list[float]] = {key: [] for key in ("gap", "full gap", "drift", "full drift", "lost", "bytes")}
    ranks = []
    for secret in subjects.secrets(context):
        mine = context.kept(
            (f"{secret.key} alone", name, value, n), partial(scores, context, name, secret, own, value, n)
        )
        per["drift"].append(before - mine["unrelated"])
        per["lost"].append(mine["identity"] - mine["compressed"])
        per["bytes"].append(mine["bytes"])
        if secret.kind == "B":
            continue
        full = dreambooth.after(context, name, secret, "full", dreambooth.rate(context, name, "full"), n)
        ranks.append(full["changes"])
        arm = subjects.seen(context, "full", secret, full["noun"], full["pictures"])
        per["full drift"].append(before - full["unrelated"])
        top, floor = subjects.ceiling(context, secret, n).identity, max(mine["floors"])
        per["gap"].append(subjects.closed(mine["identity"], floor, top))
        per["full gap"].append(subjects.closed(arm.identity, floor, top))
    lost, size, gap = (subjects.average(per["lost"]), subjects.average(per["bytes"]),
                       subjects.against(per["gap"], per["full gap"]))  # fmt: skip
    drift = subjects.average(np.subtract(per["drift"][: len(per["full drift"])], per["full drift"]))
    text = "keys and values of the text"
    others = [kind for kind in ranks[0] if kind != text]
    ahead = subjects.average([each[text] / max(each[kind] for kind in others) for each in ranks])
    shared: dict[str, Any] = {"source": SOURCE, "n": n * len(per["lost"]),
                              "leans_on": subjects.reader_of(context).leans,
                              "data": {**per, "changes": ranks}}  # fmt: skip
    return [
        Row(claim=f"{name}: keys and values alone close 0.9 of the gap that all weights close (type A), and drift "
            "less",
            measured=f"{gap.text()}, drift {drift.text()} more", baseline="DreamBooth, all weights",
            bars=[Bar(gap, null=0.0, ideal=1.0, at_least=0.9, what="gap over DreamBooth's"),
                  Bar(drift, null=0.1, ideal=-0.1, at_most=0.0, what="drift over DreamBooth's")], **shared),
        Row(claim=f"{name}: 60 % compression loses under 5 points of identity at a quarter of the bytes",
            measured=f"{lost.text()} lost, {size.text()} of the bytes", baseline="whole matrices",
            bars=[Bar(lost, null=0.5, ideal=0.0, at_most=0.05, what="lost"),
                  Bar(size, null=1.0, ideal=0.1, at_most=0.25, what="bytes")], **shared),
        Row(claim=f"{name}: of all weights, keys and values of the text change most (the premise of the method)",
            measured=f"{ahead.text()} of the largest other",
            baseline=", ".join(f"{kind} {np.mean([each[kind] for each in ranks]):.3f}" for kind in ranks[0]),
            bars=[Bar(ahead, null=0.5, ideal=2.0, at_least=1.0, what="over the largest other kind")], **shared),
    ]  # fmt: skip


def scores(
    context: Context, name: str, secret: Secret, own: dict[str, Tensor], value: tuple[float, float], n: int
) -> dict[str, Any]:
    """Of one concept: identity, before and after it is compressed, and of plain prompts; its size; other toys."""
    model = children.world(context, name)
    taught = alone(context, model, secret, "<new1>", value)
    plain = (f"{secret.near} {secret.noun}", secret.description)
    out: dict[str, Any] = {"floors": [subjects.drawn(context, noun, model, secret, noun, n).identity for noun in plain]}
    weights, out["bytes"] = small(own, taught.weights)
    for figure, arm in (("identity", taught.weights), ("compressed", weights)):
        with placeholders(model, taught.words), substituted_weights(model, _parameters(arm)):
            out[figure] = subjects.drawn(context, figure, model, secret, f"<new1> {secret.noun}", n).identity
            if figure == "identity":
                out["unrelated"] = dreambooth.unrelated(context, model, n)
    return out


def _parameters(weights: dict[str, Tensor]) -> dict[str, torch.nn.Parameter]:
    return {path: torch.nn.Parameter(each.detach(), requires_grad=False) for path, each in weights.items()}


EXPERIMENT = Experiment(
    key="custom_diffusion",
    title="Custom Diffusion",
    intro="Eight pairs of secret toys, five pictures each, in the generator of the textual-inversion claims. Merging "
    "is defined in cross-attention, so on toy-sd alone. Learning rates are chosen on other toys; intervals are over "
    "pairs and toys.",
    file=__file__,
    parts=(Part("toy-sd", ("toy-sd", "toy-judge"), lambda context: measured(context, "toy-sd")),),
)
