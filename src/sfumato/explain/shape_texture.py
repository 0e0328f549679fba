"""Shape or texture: how much of a layer is about which, unit by unit, and whether it can be read per pixel.

*Dimensions.* Two pictures that share one factor and nothing else are shown to a net; units that vary together over many
such pairs carry the factor. For jointly normal units the information shared is at least -1/2 log(1 - rho^2) (section
3.1).
The score of a factor is the covariance of the pairs summed over units and divided by the variance of all units, and

    dimensions = floor(d * softmax([scores of the factors, 1])),  the residual takes the remainder.

The softmax squeezes everything into a narrow band - scores of 0 and 0 for two factors give 21 %, 21 % and 58 %
residual, 1 and 0 give 42 %, 16 % and 42 % - so raw scores, correlations and their intervals are reported beside it.

*Read-outs.* A small head is trained on a frozen layer's maps to say what each pixel shows (section 4).

*Ablation.* Units are silenced in the order of their scores (section 3.4): :func:`silenced`.

Works on any ``torch.nn.Module`` by layer names, and on the denoiser of a :class:`~sfumato.models.Model`, which is
shown the pictures noised to one level with a fixed prompt.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato import cards
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, NoMatch, NotSupported, UnknownName, nearest
from sfumato.metrics.stats import Interval
from sfumato.models import Model
from sfumato.rng import stream
from sfumato.sampling.noise import Path as NoisePath
from sfumato.toybox.cues import CUE_SHAPES, FACTORS, factor_pairs

if TYPE_CHECKING:
    from PIL.Image import Image

RESIDUAL = "residual"
Forward = Callable[[Tensor], Any]


# --- looking at layers ------------------------------------------------------------------------------------------------


def stages(net: nn.Module) -> list[str]:
    """Names of a net's stages, in the order in which they are registered: the members of its outermost lists of
    blocks and the compound modules beside them (stem, middle). A net without lists: its compound children, or all."""
    found = list(_outermost(net, ""))
    if not any(isinstance(module, nn.ModuleList) for module in net.modules()):
        found = [name for name, child in net.named_children() if any(child.children())]
    return found or [name for name, _ in net.named_children()]


def _outermost(module: nn.Module, prefix: str) -> Iterator[str]:
    here = any(isinstance(child, nn.ModuleList) for child in module.children())
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from (f"{path}.{i}" for i in range(len(child)))
        elif not here and any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            yield from _outermost(child, f"{path}.")
        elif any(child.children()):
            yield path


def _module(net: nn.Module, name: str) -> nn.Module:
    known = dict(net.named_modules())
    if name not in known or not name:
        # the stages, and of the hundreds of other modules those that look alike
        raise UnknownName("layer", name, dict.fromkeys([*stages(net), *nearest(name, known)]))
    return known[name]


def _key(output: Any) -> Any:
    """Where in what a layer returns its maps are: () for a tensor itself, the last tensor of a tuple (joint-attention
    blocks return text, then picture), the last hidden state of a record. None where there is no tensor."""
    if isinstance(output, Tensor):
        return ()
    if isinstance(output, Mapping):
        keys = [key for key, value in output.items() if isinstance(value, Tensor)]
        return "last_hidden_state" if "last_hidden_state" in keys else next(iter(keys), None)
    if isinstance(output, tuple | list):
        return next((i for i in reversed(range(len(output))) if isinstance(output[i], Tensor)), None)
    return None


def _maps(output: Any) -> Tensor | None:
    key = _key(output)
    return output if key == () else None if key is None else output[key]


@contextlib.contextmanager
def watched(net: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within: a dict that holds what each layer put out last. Afterwards no hook is left.

    Raises UnknownName for a layer that the net has not.
    """
    seen: dict[str, Tensor] = {}

    def listener(name: str) -> Callable[..., None]:
        def hear(module: nn.Module, args: Any, output: Any) -> None:
            maps = _maps(output)
            if maps is not None:
                seen[name] = maps.detach()

        return hear

    modules = [(name, _module(net, name)) for name in layers]
    with contextlib.ExitStack() as stack:
        for name, module in modules:
            stack.callback(module.register_forward_hook(listener(name)).remove)
        yield seen


@contextlib.contextmanager
def silenced(net: nn.Module, layer: str, units: Sequence[int]) -> Iterator[None]:
    """Within: these units of a layer put out 0. Units are channels of maps (b c h w), features of tokens (b n d).

    Raises UnknownName for the layer, BadInput for units that it has not (when it runs).
    """
    module, chosen = _module(net, layer), [int(unit) for unit in units]

    def silence(_: nn.Module, args: Any, output: Any) -> Any:
        maps = _maps(output)
        if maps is None:
            raise NotSupported(f"layer {layer!r} puts out no tensor; name one that does.")
        axis = 1 if maps.ndim == 4 else maps.ndim - 1
        d = maps.shape[axis]
        if any(not 0 <= unit < d for unit in chosen):
            raise BadInput(f"units of {layer!r} are 0 to {d - 1}, got {max(chosen, key=abs)}.")
        keep = torch.ones(d, dtype=maps.dtype, device=maps.device)
        keep[chosen] = 0
        quiet = maps * keep.view([-1 if i == axis else 1 for i in range(maps.ndim)])
        key = _key(output)
        if key == ():
            return quiet
        if isinstance(output, tuple | list):
            return type(output)([*output[:key], quiet, *output[key + 1 :]])
        output[key] = quiet
        return output

    handle = module.register_forward_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def pooled(maps: Tensor, pool: str = "mean") -> Tensor:
    """A layer's output as one row of units per picture (b d): maps (b c h w) and tokens (b n d) are averaged, or of
    tokens the first is taken ("cls"), or everything is laid out ("flatten")."""
    if maps.ndim == 2:
        return maps
    if pool == "flatten":
        return maps.flatten(1)
    if maps.ndim == 4:
        return maps.mean((2, 3))
    if maps.ndim == 3:
        return maps[:, 0] if pool == "cls" else maps.mean(1)
    raise NotSupported(f"a layer with outputs of shape {tuple(maps.shape)} cannot be pooled; use pool=flatten.")


def features(
    net: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    pool: str | None = "mean",
    forward: Forward | None = None,
    batch: int = 50,
) -> dict[str, Tensor]:
    """What layers put out for pictures (b 3 h w): units (b d) by layer name, float32 on the CPU.

    Args:
        pool: see :func:`pooled`; None keeps maps (b c h w).
        forward: how to run the net on a batch of pictures; by default it is called with them, in eval mode.

    Raises:
        UnknownName: a layer. NoMatch: a layer that does not run on pictures, or puts out no tensor.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    mode = net.training
    net.eval()
    try:
        with torch.no_grad(), watched(net, layers) as seen:
            for chunk in images.split(batch):
                (forward or net)(chunk)
                for name in layers:
                    if name not in seen or len(seen[name]) != len(chunk):
                        raise NoMatch(
                            f"layer {name!r} puts out nothing for each picture; others: {', '.join(stages(net))}."
                        )
                    maps = seen.pop(name)
                    parts[name].append((maps if pool is None else pooled(maps, pool)).float().cpu())
    finally:
        net.train(mode)
    return {name: torch.cat(rows) for name, rows in parts.items()}


# --- the estimator ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Dimensions:
    """What one layer knows of each factor. All by factor name.

    Attributes:
        d: units. n: pairs of each factor. dead: units that never vary.
        scores: covariance of the pairs, summed over units, as a share of all variance. correlations: its mean per
            unit that is alive. information: mean of -1/2 log(1 - rho^2), in nats. Each with its bootstrap interval
            over pairs.
        dimensions: how many units, with "residual". Their sum is d.
        units: the share that each unit has in the score (d,), by which units are ranked.
    """

    d: int
    n: int
    dead: int
    scores: dict[str, Interval]
    correlations: dict[str, Interval]
    information: dict[str, Interval]
    dimensions: dict[str, int]
    units: dict[str, Tensor]

    def ranked(self, factor: str) -> list[int]:
        """Units, those that carry most of ``factor`` first."""
        return self.units[factor].argsort(descending=True, stable=True).tolist()

    def percent(self, factor: str) -> float:
        """Dimensions of a factor as a share of all, in percent."""
        return 100 * self.dimensions[factor] / self.d

    def to_json(self) -> dict[str, Any]:
        """Every figure as plain numbers."""
        kinds = {"scores": self.scores, "correlations": self.correlations, "information": self.information}
        return {
            "d": self.d, "n": self.n, "dead": self.dead, "dimensions": self.dimensions,
            **{kind: {name: value.to_json() for name, value in each.items()} for kind, each in kinds.items()},
            "units": {name: [round(float(v), 6) for v in each] for name, each in self.units.items()},
        }  # fmt: skip


def dimensions_of(d: int, scores: Mapping[str, float]) -> dict[str, int]:
    """``d`` units among the factors and the residual: floor(d softmax(scores, 1)), the residual takes the remainder."""
    raised = {name: math.exp(score) for name, score in scores.items()}
    total = sum(raised.values()) + math.e
    out = {name: math.floor(d * value / total) for name, value in raised.items()}
    return {**out, RESIDUAL: d - sum(out.values())}


def estimate(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    score: Literal["covariance", "correlation"] = "covariance",
    draws: int = 200,
    seed: int = 0,
) -> Dimensions:
    """Dimensions of factors from units of picture pairs.

    Args:
        pairs: for each factor the units (n d) of the first and of the second pictures; row i is a pair.
        score: what the dimensions come from: the pooled covariance (the authors' code) or the mean correlation.
        draws, seed: of the bootstrap over pairs.

    Raises:
        BadInput: fewer than 3 pairs, shapes that do not fit, values that are not finite, no unit that varies.
    """
    sides = {name: (a.double(), b.double()) for name, (a, b) in pairs.items()}
    if not sides:
        raise BadInput("estimate needs pairs of at least one factor.")
    shape = next(iter(sides.values()))[0].shape
    for name, (a, b) in sides.items():
        if a.shape != shape or b.shape != shape or a.ndim != 2 or len(a) < 3:
            raise BadInput(
                f"pairs of {name!r} have units {tuple(a.shape)} and {tuple(b.shape)}; give 3 or more rows each."
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise BadInput(f"units of {name!r} are not finite; compute them in float32.")
    n, d = shape
    everything = torch.cat([side for both in sides.values() for side in both])
    variance = everything.var(0, unbiased=False)
    # constants that float arithmetic blurs are not variation
    alive = variance > 1e-12 * everything.square().mean(0).clamp_min(1e-30)
    if not alive.any():
        raise BadInput(f"none of the {d} units varies; the layer says nothing about these pictures.")
    total = variance[alive].sum()
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.arange(n), *(torch.randint(0, n, (n,), generator=rng) for _ in range(draws))]
    figures: dict[str, tuple[Interval, Interval, Interval]] = {}
    units = {}
    for name, (a, b) in sides.items():
        a, b = a[:, alive], b[:, alive]
        drawn = [_figures(a[row], b[row], total) for row in rows]
        shares = torch.zeros(d, dtype=torch.float64)
        shares[alive] = drawn[0][3]
        units[name] = shares.float()
        figures[name] = tuple(_interval([each[k] for each in drawn], n) for k in range(3))  # type: ignore[assignment]
    scores, correlations, information = ({name: each[k] for name, each in figures.items()} for k in range(3))
    chosen = {"covariance": scores, "correlation": correlations}.get(score)
    if chosen is None:
        raise UnknownName("score", score, ("covariance", "correlation"))
    found = dimensions_of(d, {name: value.value for name, value in chosen.items()})
    return Dimensions(d, n, int((~alive).sum()), scores, correlations, information, found, units)


def _figures(a: Tensor, b: Tensor, total: Tensor) -> tuple[float, float, float, Tensor]:
    """Score, mean correlation, mean information, and the score's share of each unit, of pairs (n d)."""
    middle = (a.mean(0) + b.mean(0)) / 2
    share = ((a - middle) * (b - middle)).mean(0) / total
    a, b = a - a.mean(0), b - b.mean(0)
    spread = (a.square().mean(0) * b.square().mean(0)).sqrt()
    rho = torch.where(spread > 0, (a * b).mean(0) / spread.clamp_min(1e-300), torch.zeros_like(spread))
    bound = -0.5 * torch.log1p(-rho.square().clamp_max(1 - 1e-12))
    return float(share.sum()), float(rho.mean()), float(bound.mean()), share


def _interval(values: list[float], n: int) -> Interval:
    drawn = np.array(values[1:] or values[:1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(values[0], float(min(low, values[0])), float(max(high, values[0])), n, 0.95)


# --- read-outs --------------------------------------------------------------------------------------------------------


class ReadOut(nn.Module):
    """A head on a frozen layer's maps (b c h w) that names what each pixel shows: (b classes H W) logits.

    ``depth`` 3: 3x3 convolutions to ``widths`` with batch norm and ReLU, then to the classes (section 4); 1: the last
    only.
    Logits are upsampled bilinearly. Maps are standardised with the training maps' mean and deviation per channel.
    """

    def __init__(self, channels: int, classes: int, depth: int = 3, widths: tuple[int, int] = (256, 128)):
        super().__init__()
        if depth not in (1, 3):
            raise BadInput(f"depth of a read-out is 1 or 3, got {depth}.")
        sizes = [channels, *(widths if depth == 3 else ())]
        inner = [
            part
            for i, o in zip(sizes, sizes[1:], strict=False)
            for part in (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        ]
        self.head = nn.Sequential(*inner, nn.Conv2d(sizes[-1], classes, 3, padding=1))
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("deviation", torch.ones(1, channels, 1, 1))

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        logits = self.head((maps - self.mean) / self.deviation)
        return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def train_readout(
    maps: Tensor,
    truth: Tensor,
    classes: int,
    depth: int = 3,
    widths: tuple[int, int] = (256, 128),
    epochs: int = 20,
    batch: int = 16,
    lr: float = 0.02,
    seed: int = 0,
) -> ReadOut:
    """Trains a head on maps (n c h w) to say the class (n H W) of each pixel; -1 is ignored.

    Optimiser of the authors' code: SGD with momentum 0.9, weight decay 5e-4, rate lr (1 - t)^0.9, cross-entropy. The
    net below has no part in it, so its batch norms stay as they are. Deterministic for a seed.

    Raises:
        BadInput: maps and truth that do not fit, or classes out of range.
    """
    if len(maps) != len(truth) or maps.ndim != 4 or truth.ndim != 3:
        raise BadInput(f"maps {tuple(maps.shape)} and truth {tuple(truth.shape)} must be (n c h w) and (n H W).")
    if truth.max() >= classes or truth.min() < -1:
        raise BadInput(
            f"truth has values from {int(truth.min())} to {int(truth.max())}; -1 to {classes - 1} are allowed."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ReadOut(maps.shape[1], classes, depth, widths)
    head.mean.copy_(maps.mean((0, 2, 3), keepdim=True))
    head.deviation.copy_(maps.std((0, 2, 3), keepdim=True).clamp_min(1e-6))
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    rng = torch.Generator().manual_seed(seed)
    total, done = epochs * -(-len(maps) // batch), 0
    head.train()
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(maps), generator=rng).split(batch):
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 - done / total) ** 0.9
                target = truth[rows].long()
                loss = functional.cross_entropy(head(maps[rows], target.shape[-2:]), target, ignore_index=-1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
    return head.eval().requires_grad_(False)


@torch.no_grad()
def mean_iou(head: ReadOut, maps: Tensor, truth: Tensor, classes: int) -> float:
    """Mean over classes of intersection over union, counted over all pixels; -1 is ignored, absent classes left out."""
    table = torch.zeros(classes, classes)
    for part, target in zip(maps.split(50), truth.split(50), strict=True):
        said = head(part, target.shape[-2:]).argmax(1)
        known = target >= 0
        pairs = target[known].long() * classes + said[known]
        table += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    inside, union = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
    return float((inside / union.clamp_min(1))[union > 0].mean())


# --- the system -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerTable:
    """Dimensions of every layer of one net, in order."""

    net: str
    layers: dict[str, Dimensions]

    def lines(self) -> list[str]:
        """The table as text: percent of the units and raw score of every factor, layer by layer."""
        out = []
        for name, found in self.layers.items():
            told = [f"{f} {found.percent(f):.1f} % (score {found.scores[f].text()})" for f in found.scores]
            out.append(f"{name}: {found.d} units: " + ", ".join(told) + f", residual {found.percent(RESIDUAL):.1f} %")
        return out

    def to_json(self) -> dict[str, Any]:
        return {"net": self.net, "layers": {name: found.to_json() for name, found in self.layers.items()}}

    def picture(self) -> Image:
        """Raw scores by layer, one line per factor, with their intervals."""
        return plot({self.net: self})

    def save(self, folder: Path, stem: str) -> list[Path]:
        """Writes ``<stem>.json`` and ``<stem>.png``; returns them."""
        from sfumato import files

        with files.replacing(folder / f"{stem}.json") as file:
            file.write((json.dumps(self.to_json(), indent=1) + "\n").encode())
        return [folder / f"{stem}.json", files.save_png(folder / f"{stem}.png", self.picture(), {"net": self.net})]


def plot(tables: Mapping[str, LayerTable]) -> Image:
    """Raw scores of every factor by layer, a panel for each net."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image as PILImage

    figure = Figure(figsize=(4.2 * len(tables), 3.6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        names = [name.replace("encoder.", "").replace("resnet.", "") for name in table.layers]
        for factor in next(iter(table.layers.values())).scores:
            found = [each.scores[factor] for each in table.layers.values()]
            values = np.array([each.value for each in found])
            bars = np.abs(np.array([[each.low, each.high] for each in found]).T - values)
            axis.errorbar(range(len(names)), values, bars, marker="o", ms=4, capsize=2, label=factor)
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.axhline(0, color="0.8", lw=0.8, zorder=0)
    axes[0].set_ylabel("score (share of variance)")
    axes[-1].legend(fontsize=8, frameon=False)
    canvas.draw()
    return PILImage.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


@register
class ShapeTexture:
    """Dimensions of shape, texture and other factors in each layer of a net, from pairs of toybox pictures."""

    CARD = Card(
        key="shape_texture",
        title="Shape or Texture: Understanding Discriminative Features in CNNs",
        authors="Islam, Kowal, Esser, Jia, Ommer, Derpanis, Bruce",
        year=2021,
        arxiv="2101.11604",
        verb="explain",
        needs=("pictures", "noise_path"),
        defaults_from="the paper: covariance of pairs, softmax with a residual of 1; 500 pairs are ours",
        cost="one forward for each of 2 x pairs x factors pictures",
        not_reproduced="AdaIN-stylised PASCAL VOC: pairs are rendered, pose, colour and scenery apart",
        summary="how much of each layer is about shape and how much about texture",
    )

    class Params(cards.Params):
        factors: list[str] = Field(
            default=["shape", "texture"], min_length=1, description=f"what pairs share, of {', '.join(FACTORS)}"
        )
        layers: list[str] = Field(default=[], description="module paths to look at; none: the stages of the net")
        pairs: int = Field(default=500, ge=3, le=100_000, description="pairs of pictures of each factor")
        score: Literal["covariance", "correlation"] = Field(
            default="covariance",
            description="what dimensions come from: the authors' pooled covariance, or correlation",
        )
        pool: Literal["mean", "cls", "flatten"] = Field(
            default="mean", description="how a layer's places become one row"
        )
        progress: float = Field(
            default=0.7,
            ge=0,
            lt=1,
            description="denoisers: the share of the denoising that lies behind the picture shown",
        )
        prompt: str = Field(default="", description="denoisers: the prompt told with every picture")
        noise: Literal["independent", "shared"] = Field(
            default="independent", description="denoisers: the noise of a pair; shared noise is itself a shared factor"
        )
        draws: int = Field(default=200, ge=0, le=10_000, description="draws of the bootstrap over pairs")
        seed: int = Field(default=0, ge=0, description="of pairs, noise and bootstrap")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        for name in self.params.factors:
            if name not in FACTORS:
                raise UnknownName("factor of shape_texture", name, FACTORS)

    def explain_net(self, net: nn.Module | Model, name: str = "", size: int | None = None) -> LayerTable:
        """The table of a net.

        Args:
            net: any module that is called with pictures (b 3 h w) in [-1, 1], or a text-to-image model.
            size: side of the pictures in pixels; by default what the net says of itself, else 64.

        Raises:
            UnknownName, NoMatch: layers. BadInput: units that never vary.
        """
        p = self.params
        denoiser = net.denoiser if isinstance(net, Model) else net
        side = size or _side(net)
        layers = p.layers or self._stages(net, denoiser, side)
        found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {layer: {} for layer in layers}
        for factor in p.factors:
            both = factor_pairs(factor, p.pairs, p.seed)
            sides = []
            for k in range(2):
                pixels = rendered(tuple(pair[k] for pair in both), side)
                # noise of independent pairs comes from seeds that no other picture has
                seed = p.seed * 1_000_003 + (
                    0 if p.noise == "shared" else k * 500_000 + 1_000 * p.factors.index(factor)
                )
                forward = noised_forward(net, p.progress, p.prompt, seed) if isinstance(net, Model) else None
                sides.append(features(denoiser, pixels, layers, p.pool, forward))
            for layer in layers:
                found[layer][factor] = (sides[0][layer], sides[1][layer])
        tables = {layer: estimate(pairs, p.score, p.draws, p.seed) for layer, pairs in found.items()}
        return LayerTable(name or (net.name if isinstance(net, Model) else type(net).__name__), tables)

    def _stages(self, net: nn.Module | Model, denoiser: nn.Module, side: int) -> list[str]:
        """The stages that put out places, of what runs when the net sees a picture."""
        p, candidates = self.params, stages(denoiser)
        forward = noised_forward(net, p.progress, p.prompt) if isinstance(net, Model) else denoiser
        with torch.no_grad(), watched(denoiser, candidates) as seen:
            mode = denoiser.training
            try:
                denoiser.eval()
                forward(torch.zeros(1, 3, side, side))
            finally:
                denoiser.train(mode)
        found = [name for name in candidates if name in seen and seen[name].ndim > 2]
        if not found:
            raise NoMatch(
                f"no stage of {type(denoiser).__name__} puts out maps or tokens; name layers among its modules."
            )
        return found


def noised_forward(model: Model, progress: float, prompt: str = "", seed: int = 0) -> Forward:
    """A way to show pictures (b 3 h w) to a model's denoiser: encoded, noised to one level of its schedule, with a
    prompt.

    Picture i, counted over all calls, gets the noise of seed + i. ``progress`` 0 is pure noise, towards 1 the clean
    picture.
    """
    scheduler = model.make_scheduler("flow_euler" if model.flow else "ddim")
    condition, shown = None, 0

    def forward(pixels: Tensor) -> Tensor:
        nonlocal condition, shown
        h, w = pixels.shape[-2:]
        times = model.timesteps(scheduler, 50, h, w)
        t = times[min(int(progress * len(times)), len(times) - 1)]
        path = NoisePath(scheduler)
        if condition is None or len(condition) != len(pixels):
            condition = model.encode_text([prompt] * len(pixels), guidance=False, embedded_guidance=1.0)
        clean = model.encode_image(pixels.to(model.device, model.dtype))
        noise = torch.stack(
            [torch.randn(clean.shape[1:], generator=stream("sample", seed + shown + i)) for i in range(len(clean))]
        ).to(clean)
        shown += len(clean)
        return model.predict(path.add_noise(clean, noise, t).to(model.dtype), t, condition)

    return forward


def _side(net: nn.Module | Model) -> int:
    if isinstance(net, Model):
        return net.default_size[0]
    size = getattr(getattr(net, "config", None), "image_size", None)
    return int(size) if isinstance(size, int) else 64


_cache: dict[tuple[Any, int], Tensor] = {}


def rendered(scenes: tuple[Any, ...], side: int) -> Tensor:
    """Pictures (n 3 side side); the last few sets are kept, so that several nets are shown the same ones at once."""
    from sfumato.toybox import render

    key = (scenes, side)
    if key not in _cache:
        while len(_cache) >= 12:
            _cache.pop(next(iter(_cache)))
        _cache[key] = render(list(scenes), side).image
    return _cache[key]


@torch.no_grad()
def decisions(net: nn.Module, pixels: Tensor, batch: int = 100) -> np.ndarray:
    """The class (n,) that a classifier names for pictures (n 3 h w)."""
    mode = net.training
    net.eval()
    try:
        out = [_maps_or_logits(net(chunk)).argmax(1) for chunk in pixels.split(batch)]
    finally:
        net.train(mode)
    return torch.cat(out).numpy()


def _maps_or_logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output


def semantic(masks: Tensor, scenes: Sequence[Any]) -> Tensor:
    """Toybox masks (n h w) as classes: 0 background, 1 and up the shape of the toy, in the order of the cues."""
    out = torch.zeros_like(masks, dtype=torch.long)
    for row, mask, scene in zip(out, masks, scenes, strict=True):
        for k, toy in enumerate(scene.toys):
            row[mask == k] = 1 + CUE_SHAPES.index(toy.shape)
    return out
