"""Custom Diffusion: two secrets in one picture, taught together, merged in closed form, or merged naively."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from claims import common, subjects
from claims.core import Context, Experiment, Part, Row
from sfumato.adapters.closed_form import compressed
from sfumato.adapters.fresh import learning_weights
from sfumato.metrics import stats
from sfumato.teach.custom_diffusion import CustomDiffusion
from sfumato.teach.merging import Part as Concept
from sfumato.teach.merging import merged
from sfumato.text.placeholders import placeholders
from sfumato.toybox import SECRETS, Secret, caption
from sfumato.toybox.dataset import draw_scene

SOURCE = "Kumari et al. 2023"
PAIRS = (("teal", "magenta"), ("lime", "amber"), ("zigzag", "target"), ("halves", "grid"))
#: chosen on the pair ("teal", "amber")
SETTINGS: dict[str, Any] = {"lr": 1e-3, "word_lr": 5e-3, "batch": 4, "prompt": "a {}"}
ARMS = ("together", "merged", "average", "sum of changes")


def taught(context: Context, name: str, secret: Secret, word: str) -> Any:
    """One concept alone."""
    given = {"steps": context.count(250, 2), "prior": context.count(100, 2)}
    system = CustomDiffusion(name=word, class_noun=secret.noun, **given, **SETTINGS)
    return system.teach(common.load(context, name), subjects.folder_of(context, secret))


def both(context: Context, name: str, pair: Sequence[Secret]) -> Any:
    """Two concepts in one run."""
    folder = Path(tempfile.mkdtemp(prefix="pair-"))
    for i, secret in enumerate(pair):
        shutil.copytree(subjects.folder_of(context, secret), folder / f"<new{i + 1}> {secret.noun}")
    given = {"steps": context.count(500, 2), "prior": context.count(100, 2)}
    return CustomDiffusion(class_noun="toy", **given, **SETTINGS).teach(common.load(context, name), folder)


def drawn(context: Context, model: Any, pair: Sequence[Secret], weights: Any, words: Any, n: int, arm: str) -> Tensor:
    """Pictures of both."""
    text = f"a <new1> {pair[0].noun} and a <new2> {pair[1].noun} on the grass"
    with placeholders(model, words), learning_weights(model, weights):
        return common.generate(context, model, [text] * n, subjects.REPORT, arm)


def right(context: Context, pictures: Tensor, pair: Sequence[Secret]) -> list[bool]:
    """Whether both toys are there and recognised, the one of each shape."""
    reader, out = subjects.reader_of(context), []
    for picture, reading in zip(pictures, reader.judge.read(pictures), strict=True):
        seen = []
        for secret in pair:
            toys = [toy for toy in reading.objects if toy.shape == secret.noun]
            seen.append(any(reader.said(picture, toy.mask) == secret.key for toy in toys))
        out.append(all(seen))
    return out


def measured(context: Context, name: str) -> list[Row]:
    model, n = common.load(context, name), context.count(64, 4)
    captions = [caption(draw_scene("train", 91, i)).text for i in range(context.count(300, 40))]
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    residuals, kept, shown = [], [], []
    for keys in PAIRS[: context.count(len(PAIRS), 1)]:
        pair = [SECRETS[key] for key in keys]
        context.report(f"  {name}: {' and '.join(keys)}")
        alone = [taught(context, name, secret, f"<new{i + 1}>") for i, secret in enumerate(pair)]
        own = {path: model.modules[path.partition(".")[0]].get_parameter(path.partition(".")[2]).detach()
               for path in alone[0].weights}  # fmt: skip
        words = {word: vectors for each in alone for word, vectors in each.words.items()}
        concepts = [Concept(f"<new{i + 1}>", secret.noun, each.words[f"<new{i + 1}>"], each.weights)
                    for i, (secret, each) in enumerate(zip(pair, alone, strict=True))]  # fmt: skip
        closed = merged(model, concepts, captions, "a {}")
        joint = both(context, name, pair)
        residuals += [each["residual"] for each in closed.facts["matrices"].values()]
        first, second = (each.weights for each in alone)
        sets = {
            "together": (joint.weights, joint.words),
            "merged": (closed.weights, words),
            "average": ({path: (first[path] + second[path]) / 2 for path in own}, words),
            "sum of changes": ({path: first[path] + second[path] - own[path] for path in own}, words),
        }
        for arm, (weights, said) in sets.items():
            pictures = drawn(context, model, pair, _parameters(weights), said, n, arm)
            rates[arm].append(float(np.mean(right(context, pictures, pair))))
            shown.append(list(pictures[:4]))
        small = {path: own[path] + _product(compressed(first[path] - own[path], 0.6)) for path in own}
        ranks = [compressed(first[path] - own[path], 0.6).down.shape[0] for path in own]
        bytes_ = sum(r * sum(own[path].shape) for r, path in zip(ranks, own, strict=True)) / sum(
            each.numel() for each in own.values()
        )
        scores = []
        for weights in (first, small):
            with placeholders(model, words), learning_weights(model, _parameters(weights)):
                scores.append(subjects.drawn(context, "one", model, pair[0], f"<new1> {pair[0].noun}", n).identity)
        kept.append((scores[0], scores[1], bytes_))
    picture = context.save(f"custom-diffusion-{name}.png", common.sheet(shown))
    mean = {arm: float(np.mean(each)) for arm, each in rates.items()}
    lost, size = float(np.mean([a - b for a, b, _ in kept])), float(np.mean([c for _, _, c in kept]))
    listed = ", ".join(f"{arm} {value:.2f}" for arm, value in mean.items())
    shared: dict[str, Any] = {"source": SOURCE, "n": n * len(kept), "leans_on": subjects.reader_of(context).leans,
                              "data": {"both right": rates, "residual": residuals, "compression": kept}}  # fmt: skip
    difference = stats.paired_difference(rates["merged"], rates["average"]).text() if len(kept) > 1 else "one pair"
    return [
        Row(claim=f"{name}: the constraints of a merge hold to 1e-8 in every matrix",
            measured=f"largest residual {max(residuals):.1e}", baseline="none",
            holds=bool(max(residuals) < 1e-8), **shared),
        Row(claim=f"{name}: merged in closed form, both toys are right 0.8 times as often as taught together, and more "
            "often than by averages and sums", measured=listed, baseline=f"merged over average: {difference}",
            holds=bool(mean["merged"] >= 0.8 * mean["together"]
                       and mean["merged"] > max(mean["average"], mean["sum of changes"])), picture=picture, **shared),
        Row(claim=f"{name}: 60 % compression loses under 5 points of identity at a quarter of the bytes",
            measured=f"{lost:.2f} lost, {size:.2f} of the bytes", baseline="whole matrices",
            holds=bool(lost < 0.05 and size <= 0.25), **shared),
    ]  # fmt: skip


def _parameters(weights: dict[str, Tensor]) -> dict[str, torch.nn.Parameter]:
    return {path: torch.nn.Parameter(each.detach(), requires_grad=False) for path, each in weights.items()}


def _product(small: Any) -> Tensor:
    return small.up @ small.down


EXPERIMENT = Experiment(
    key="custom_diffusion",
    title="Custom Diffusion",
    intro="Four pairs of secret toys, five pictures each. Merging is defined in cross-attention, so on toy-sd alone.",
    file=__file__,
    parts=(Part("toy-sd", ("toy-sd", "toy-judge"), lambda context: measured(context, "toy-sd")),),
)
