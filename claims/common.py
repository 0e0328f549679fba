"""Prompts with known requests, generation in batches, and sheets of pictures, for the experiments."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata
from torch import Tensor

from claims.bars import Bar
from claims.core import Context
from sfumato import sampling, sheets
from sfumato.metrics import stats
from sfumato.models import load as load_model
from sfumato.models.readers import load_clip
from sfumato.toybox import COLORS, PATTERNS, SHAPES, Caption, Scene, Toy, ToyboxDataset, caption, oracle, to_uint8
from sfumato.toybox.dataset import draw_scene
from sfumato.toybox.oracle.accuracy import MIN_PIXELS, Accuracy

BATCH = 50


@dataclass(frozen=True)
class Prompt:
    """A caption of an unseen scene and what a picture of it must show."""

    text: str
    caption: Caption
    scene: Scene
    requests: tuple[oracle.RequestedToy, ...]


def prompts(split: str, seed: int, n: int, toys: int | None, style: str) -> list[Prompt]:
    """``n`` captions of scenes of a split; disjoint seeds give disjoint scenes."""
    out = []
    for index in range(n):
        scene = draw_scene(split, seed, index, toys)
        parsed = caption(scene, np.random.default_rng((seed, index, 9)), style)
        out.append(Prompt(parsed.text, parsed, scene, oracle.requested_toys(parsed)))
    return out


def pair_prompts(seed: int, n: int, toys: int = 2) -> list[Prompt]:
    """Such as "a red ball and a blue cone": as many shapes and colours as ``toys``, all different."""
    return [several(seed, index, toys) for index in range(n)]


def several(seed: int, index: int, toys: int) -> Prompt:
    """One of :func:`pair_prompts`."""
    rng = np.random.default_rng((seed, index, 11))
    shapes, colors = rng.permutation(SHAPES)[:toys], rng.permutation(COLORS)[:toys]
    scene = Scene(tuple(Toy(str(s), str(c)) for s, c in zip(shapes, colors, strict=True)))
    parsed = caption(scene, None, "short")
    return Prompt(parsed.text, parsed, scene, oracle.requested_toys(parsed))


def mixed_prompts(seed: int, n: int) -> list[Prompt]:
    """Two and three toys in turn: with pairs alone a plain model is right too often for anything to be repaired."""
    return [several(seed, index, 2 + index % 2) for index in range(n)]


KINDS = ("three toys", "equal shapes", "patterns")


def steering(kind: str, seed: int, n: int) -> list[Prompt]:
    """``n`` different prompts of a kind that plain sampling often gets wrong, so that there is something to steer.

    "three toys": all shapes and colours differ. "equal shapes": two of three toys have one shape, all colours differ.
    "patterns": two toys, each with a shape, colour and pattern of its own.
    """
    found: dict[str, Prompt] = {}
    index = 0
    while len(found) < n:
        rng = np.random.default_rng((seed, index, 23 + KINDS.index(kind)))
        shapes, colors = rng.permutation(SHAPES)[:3].tolist(), rng.permutation(COLORS)[:3].tolist()
        patterns = rng.permutation(PATTERNS[1:]).tolist()  # the first is plain
        if kind == "equal shapes":
            shapes = rng.permutation([shapes[0], shapes[0], shapes[1]]).tolist()
        if kind != "patterns":
            patterns = ["plain"] * 3
        toys = [Toy(*each) for each in zip(shapes, colors, patterns, strict=True)]
        scene = Scene(tuple(toys[:2] if kind == "patterns" else toys))
        parsed = caption(scene, None, "plain" if kind == "patterns" else "short")
        found.setdefault(parsed.text, Prompt(parsed.text, parsed, scene, oracle.requested_toys(parsed)))
        index += 1
    return list(found.values())


def tenth(context: Context, full: int) -> int:
    """``full`` samples, or in a quick run a tenth of them."""
    return context.count(full, max(2, full // 10))


def load(context: Context, name: str) -> Any:
    """A model of the zoo (or its replacement), once per run."""
    return context.once(f"model {name}", lambda: load_model(str(context.folder(name))))


def judge_of(context: Context) -> oracle.ToyJudge:
    """The toy-judge, once per run."""
    return context.once("judge", lambda: oracle.load_judge(str(context.folder("toy-judge"))))


def side(context: Context, name: str) -> int:
    """Pixels along a side of the pictures that a model of the zoo was trained on, from its card."""
    if (loaded := context.cache.get(f"model {name}")) is not None:
        return int(loaded.default_size[0])
    card = json.loads((context.folder(name) / "sfumato.json").read_text(encoding="utf-8"))
    return int(card["recipe"]["data"]["size"])


def least(context: Context, name: str, cells: int = 4) -> int:
    """Pixels of so many latent cells of a generator: a toy with fewer cannot be drawn on its grid."""
    pixels = side(context, name)
    return cells * (pixels // load(context, name).latent_shape(pixels, pixels)[-1]) ** 2


def pictures_of(dataset: ToyboxDataset, n: int | None = None) -> Tensor:
    """The pictures of a dataset as float (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.array(dataset.images[:n])).permute(0, 3, 1, 2).float() / 127.5 - 1


def masks_of(dataset: ToyboxDataset, n: int | None = None) -> Tensor:
    """The masks of a dataset as int64 (n, h, w)."""
    return torch.from_numpy(np.array(dataset.masks[:n])).long()


def generate(
    context: Context,
    model: Any,
    texts: Sequence[str],
    seed: int,
    label: str,
    guidance: float | None = None,
    **options: Any,
) -> Tensor:
    """Pictures (n, 3, h, w) of ``texts``; sample i is drawn from seed ``seed + i``."""
    out = []
    for start, chunk in context.batches(texts, BATCH, label):
        seeds = list(range(seed + start, seed + start + len(chunk)))
        out.append(sampling.generate(model, list(chunk), seed=seeds, guidance=guidance, **options).pixels.clamp(-1, 1))
    return torch.cat(out)


def resumed(context: Context, what: Sequence[Any], make: Callable[[], tuple[Tensor, float]]) -> tuple[Tensor, float]:
    """Pictures (n, 3, h, w) of one arm and what they cost, which an interrupted run of the experiment may have made
    already. ``what`` tells them apart within the experiment: names, seeds, prompts. Outside a run nothing is kept."""
    pixels, cost = context.kept(what, lambda: list(make()))
    return pixels, cost


def clip_scores(context: Context, pixels: Tensor, texts: Sequence[str]) -> list[float]:
    """toy-clip's cosine of each picture (n, 3, h, w) in [-1, 1] with its own text."""
    clip = load_clip(context.folder("toy-clip"))
    with torch.no_grad():
        return (clip.pictures(pixels) * clip.text(texts)).sum(-1).tolist()


def trust(context: Context) -> Accuracy:
    """The judge's own accuracy on renders it has not seen, once per run; printed wherever a figure leans on it."""

    def measured() -> Accuracy:
        dataset = ToyboxDataset("test", context.count(1000, 100), side(context, "toy-judge"))
        return oracle.measure(judge_of(context).read(pictures_of(dataset)), dataset.scenes, masks_of(dataset))

    return context.once("trust", measured)


def trust_text(context: Context, *names: str) -> str:
    """The judge's accuracy in the named attributes (all when none is named), in words."""
    got = trust(context)
    if not names:
        return f"toy-judge {got.attributes.text(percent=True)} of attributes"
    each = ", ".join(f"{name} {100 * got.single[name].value:.1f} %" for name in names)
    return f"toy-judge {each} (toys of {MIN_PIXELS}+ pixels)"


def as_image(picture: Tensor, scale: int = 2) -> Image.Image:
    """A picture (3, h, w) in [-1, 1] as a PIL image, enlarged without smoothing."""
    image = Image.fromarray(to_uint8(picture[None])[0].permute(1, 2, 0).numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def heat(level: Tensor, picture: Tensor | None = None) -> Tensor:
    """A map (h, w) in [0, 1] as a picture (3, h, w) in [-1, 1]; over ``picture`` when given."""
    level = level.clamp(0, 1)
    color = torch.stack([(3 * level).clamp(0, 1), (3 * level - 1).clamp(0, 1), (3 * level - 2).clamp(0, 1)]) * 2 - 1
    if picture is None:
        return color
    gray = picture.mean(0, keepdim=True) * 0.5 - 0.3
    return torch.lerp(gray.expand(3, -1, -1), color, level.sqrt() * 0.85)


def sheet(
    rows: Sequence[Sequence[Tensor | None]],
    scale: int = 0,
    gap: int = 4,
    names: Sequence[str] = (),
    heads: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """Pictures (3, h, w) in rows as one image on white, with the rows' ``names`` and the columns' ``heads``; by default
    enlarged to 128 pixels."""
    columns = max(map(len, rows))
    cells = [picture for row in rows for picture in [*row, *[None] * (columns - len(row))]]
    width = next(int(cell.shape[-1]) for cell in cells if cell is not None)
    scale = scale or max(1, 128 // width)
    return sheets.sheet(cells, columns, rows=names, heads=heads, title=title, scale=scale, gap=gap)


def exactly(value: float, n: int) -> stats.Interval:
    """A figure that no sampling has blurred: a largest deviation, a count of all there are."""
    return stats.Interval(value, value, value, n)


def by_cluster(values: Sequence[float], where: Sequence[Any]) -> list[float]:
    """Means of values that belong together (maps of one picture, seeds of one prompt): those are the independent
    samples. In order of first appearance."""
    found: dict[Any, list[float]] = {}
    for value, at in zip(values, where, strict=True):
        found.setdefault(at, []).append(float(value))
    return [float(np.mean(each)) for each in found.values()]


def percent(interval: stats.Interval) -> str:
    """An interval in percent."""
    return interval.text(percent=True)


def judge_features(context: Context, pixels: Tensor) -> np.ndarray:
    """What the toy-judge sees in pictures (n, 3, h, w) in [-1, 1], before it names anything: (n, d) float32, averaged
    over the picture. For distances between sets of pictures where toy-clip took part in making them."""
    net = judge_of(context).net
    rows = []
    with torch.no_grad():
        for part in pixels.split(64):
            dense = net(part)
            rows.append(torch.cat([dense.features.mean((2, 3)), dense.context], 1))
    return torch.cat(rows).numpy()


# --- bars and verdicts -----------------------------------------------------------------------------------------------

OPEN = (0.35, 0.85)  # plain sampling must lie here, else there is too little to repair or nothing to build on
MARGIN = 0.05  # what counts as no harm


def lift(more: stats.Interval, base: float, size: float | None = None, what: str = "") -> Bar:
    """A share that rises by ``more`` over ``base``: the whole interval above 0, and the estimate ``size`` or more."""
    return Bar(more, null=0.0, ideal=1 - base, above=0.0, at_least=size, what=what)


def no_harm(more: stats.Interval, what: str, margin: float = MARGIN) -> Bar:
    """A share that may not fall: the whole interval above ``-margin``. Without an effect here is a method that costs
    just that much."""
    return Bar(more, null=-margin, ideal=0.0, above=-margin, what=what)


def void(plain: stats.Interval, what: str = "plain sampling", bounds: tuple[float, float] = OPEN) -> str:
    """Why a test of steering says nothing: plain sampling succeeds too often, or fails too often; else empty."""
    low, high = bounds
    if low <= plain.value <= high:
        return ""
    return f"{what} succeeds in {100 * plain.value:.0f} %, not between {100 * low:.0f} and {100 * high:.0f} %"


def agreement(levels: np.ndarray) -> stats.Interval:
    """Whether something rises with a knob: of figures (settings in rising order, cases) the rank correlation with the
    setting within each case, 0 where nothing moves, averaged over the cases."""
    ranks, place = rankdata(levels, axis=0), np.arange(len(levels))[:, None] - (len(levels) - 1) / 2
    centred = ranks - ranks.mean(0)
    length = np.sqrt((centred**2).sum(0) * (place**2).sum())
    return stats.bootstrap((place * centred).sum(0) / np.where(length > 0, length, 1))


# --- pictures with labels --------------------------------------------------------------------------------------------


def asked_for(requests: Sequence[oracle.RequestedToy]) -> str:
    """What a prompt asks for, short enough to stand above a picture."""
    each = (" ".join(word for word in (w.color, w.pattern, w.shape) if word) for w in requests)
    return ", ".join(each)


def failing(check: oracle.Check, requests: Sequence[oracle.RequestedToy]) -> str:
    """What the judge misses in a picture, to stand above it."""
    pairs = list(zip(requests, check.present, check.bound, strict=True))
    missing = ", ".join(request.shape or "toy" for request, there, _ in pairs if not there)
    wrong = ", ".join(request.shape or "toy" for request, there, bound in pairs if there and not bound)
    said = [f"{word} {which}" for word, which in (("no", missing), ("wrong", wrong)) if which]
    return "; ".join(said) or "all right"


def labelled(rows: Mapping[str, Sequence[Any]], heads: Sequence[str] = (), title: str = "") -> Image.Image:
    """Rows of pictures (3, h, w), or of (label, picture), by the name of each row; ``heads`` above the columns. Small
    pictures are enlarged to about 192 pixels."""
    columns = max(map(len, rows.values()))
    cells = [cell for row in rows.values() for cell in [*row, *[None] * (columns - len(row))]]
    first = next(cell for cell in cells if cell is not None)
    side = (first[1] if isinstance(first, tuple) else first).shape[-1]
    scale = max(1, round(192 / side))
    return sheets.sheet(cells, columns, rows=list(rows), heads=heads, title=title, scale=scale)


def side_by_side(columns: Mapping[str, Sequence[Any]], cases: Sequence[str], title: str = "") -> Image.Image:
    """One row a case, what was made of it side by side: columns of pictures, or of (label, picture), by their name."""
    rows = zip(*columns.values(), strict=True)
    named = {f"{i + 1}. {case}": list(row) for i, (case, row) in enumerate(zip(cases, rows, strict=True))}
    return labelled(named, list(columns), title)
