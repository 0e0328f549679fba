"""A flow with what it needs to work on a network's vectors: centre, spread, dead dimensions, fitting, files.

>>> translator = fit_translator(z, c, steps=2000).translator
>>> v = translator.residual(z, c)         # what z holds beyond c; normal and independent of c if the fit is good
>>> z2 = translator.vectors(v, other_c)   # the same residual under another condition
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from sfumato import valid
from sfumato.cards import Field, Params
from sfumato.errors import BadInput, BadWeights
from sfumato.models.nets.flow import CouplingFlow, Norm
from sfumato.models.weights import check_numbers, find_weights, read_header
from sfumato.rng import stream
from sfumato.training import BestTensors, Draw, Player, Progress, fit
from sfumato.valid import first_line

__all__ = ["FlowParams", "FitRecord", "Translator", "fit_translator", "load_translator", "standardising", "widened"]

DEAD = 1e-4  # of the median spread


class FlowParams(Params):
    """Size of a flow and how it is fitted; a system's own parameters extend these."""

    blocks: int = Field(default=8, ge=1, le=64, description="blocks of the flow; the papers: 12 to 24")
    hidden: int = Field(
        default=128, ge=1, le=16384, description="width of the couplings' networks; the papers: 512 to 1024"
    )
    depth: int = Field(default=2, ge=1, le=8, description="hidden layers of the couplings' networks")
    steps: int = Field(default=1500, ge=1, description="steps of fitting the flow")
    batch: int = Field(default=128, ge=2, le=100000, description="vectors per step")
    lr: float = Field(
        default=1e-3, gt=0, description="learning rate (Adam); the papers: about 1e-4 for many more steps"
    )
    noise: float = Field(
        default=0.05, ge=0, le=1,
        description="deviation of normal noise added to the vectors at every step, in units of their own: few vectors"
        " are otherwise learnt by heart",
    )  # fmt: skip
    seed: int = Field(default=0, ge=0, description="of weights, order of the vectors and noise")


class Translator(ModelMixin, ConfigMixin):
    """Vectors z (b n) <-> v (b m), m = n without dead dimensions, given conditions c of shape (b, *condition).

    Vectors are centred and scaled to deviation 1 before the flow; conditions too, maps by channel.

    Args:
        size: n. condition: shape of a condition, () for none. dead: dimensions that never varied; they stay what they
            were on average. others: see :class:`~sfumato.models.nets.flow.CouplingFlow`.
        about: facts to keep with it, such as which networks the vectors came from.
    """

    config_name = "config.json"

    mean: Tensor
    std: Tensor
    condition_mean: Tensor
    condition_std: Tensor

    @register_to_config
    def __init__(
        self,
        size: int,
        condition: tuple[int, ...] = (),
        dead: tuple[int, ...] = (),
        blocks: int = 8,
        hidden: int = 128,
        depth: int = 2,
        embedding: int = 32,
        norm: Norm = "layer",
        seed: int = 0,
        about: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.live = [i for i in range(size) if i not in set(dead)]
        self.flow = CouplingFlow(len(self.live), blocks, hidden, depth, tuple(condition), embedding, norm, seed)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        shape = (condition[0], *[1] * (len(condition) - 1)) if condition else (0,)
        self.register_buffer("condition_mean", torch.zeros(shape))
        self.register_buffer("condition_std", torch.ones(shape))

    @property
    def about(self) -> dict[str, Any]:
        return dict(self.config["about"] or {})

    @property
    def size(self) -> int:
        """n, the length of the vectors."""
        return int(self.config["size"])

    @property
    def free(self) -> int:
        """m, the length of the residuals."""
        return len(self.live)

    def scaled(self, z: Tensor) -> Tensor:
        """Vectors (b n) as the flow takes them (b m). Raises BadInput for other shapes and what is not finite."""
        if z.ndim != 2 or z.shape[1] != self.size:
            raise BadInput(f"vectors must be (b, {self.size}), got {tuple(z.shape)}.")
        if not torch.isfinite(z).all():
            raise BadInput("the vectors hold values that are not finite; compute them in float32.")
        return ((z.to(self.mean) - self.mean) / self.std)[:, self.live]

    def unscaled(self, y: Tensor) -> Tensor:
        """Inverse of :meth:`scaled`; dead dimensions take their mean."""
        whole = torch.zeros(len(y), self.size, dtype=y.dtype, device=y.device)
        whole[:, self.live] = y
        return whole * self.std + self.mean

    def conditions(self, c: Tensor | None) -> Tensor | None:
        """Conditions as the flow takes them. Raises BadInput for what is not finite."""
        if c is None or not self.config["condition"]:
            return c
        if not torch.isfinite(c).all():
            raise BadInput("the conditions hold values that are not finite; compute them in float32.")
        if tuple(c.shape[1:]) != tuple(self.config["condition"]):
            raise BadInput(f"conditions must be (b, *{tuple(self.config['condition'])}), got {tuple(c.shape)}.")
        return (c.to(self.mean) - self.condition_mean) / self.condition_std

    def transform(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (b n) -> v (b m) and log|det| (b) with respect to the scaled vectors; gradients flow."""
        return self.flow(self.scaled(z), self.conditions(c))

    @torch.no_grad()
    def residual(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """v (b m) of vectors z (b n)."""
        return self.transform(z, c)[0]

    @torch.no_grad()
    def vectors(self, v: Tensor, c: Tensor | None = None) -> Tensor:
        """z (b n) of residuals v (b m)."""
        return self.unscaled(self.flow.inverse(v.to(self.mean), self.conditions(c))[0])

    @torch.no_grad()
    def nll(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Negative log-likelihood (b) of z given c, in nats, of the scaled vectors."""
        return self.flow.nll(self.scaled(z), self.conditions(c))

    def noise(self, n: int, seed: int = 0, temperature: float = 1.0) -> Tensor:
        """n residuals (n m) drawn from a normal of deviation ``temperature``; row i is that of seed + i."""
        if not 0 <= temperature <= 10:
            raise BadInput(f"temperature must be from 0 to 10, got {temperature}.")
        rows = [torch.randn(self.free, generator=stream("translator", seed + i)) for i in range(n)]
        return temperature * torch.stack(rows).to(self.mean)

    def sample(self, c: Tensor | None = None, n: int = 1, seed: int = 0, temperature: float = 1.0) -> Tensor:
        """Vectors drawn given each condition: (b n size), or (n size) without conditions."""
        if c is None:
            return self.vectors(self.noise(n, seed, temperature))
        v = self.noise(n * len(c), seed, temperature)
        return self.vectors(v, c.repeat_interleave(n, 0)).unflatten(0, (len(c), n))

    @torch.no_grad()
    def inverse_error(self, z: Tensor, c: Tensor | None = None) -> float:
        """Largest absolute error of z -> v -> z, in units of each dimension's deviation."""
        y = self.scaled(z)
        back = self.flow.inverse(self.flow(y, self.conditions(c))[0], self.conditions(c))[0]
        return float((back - y).abs().max())

    def save(self, folder: Path | str) -> Path:
        """Writes config.json and safetensors. Raises BadInput if the folder is not empty."""
        target = Path(folder)
        if target.exists() and any(target.iterdir()):
            raise BadInput(f"output folder {str(target)!r} is not empty; name a new one.")
        self.save_pretrained(target)
        return target


def load_translator(folder: Path | str) -> Translator:
    """One that :meth:`Translator.save` wrote, frozen, in eval mode and float32.

    Raises BadInput (no such folder), BadWeights (no translator, damaged, not fitted).
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} holds no fitted flow: it has no config.json.")
    try:
        kind = valid.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError, UnicodeDecodeError) as error:
        raise BadWeights(f"{folder / 'config.json'} is not JSON: {error}.") from None
    if kind != "Translator":
        raise BadWeights(f"{folder} holds a {kind}, not a fitted flow.")
    for path in find_weights(folder):
        read_header(path)
    try:
        found = Translator.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    except Exception as error:  # diffusers has a complaint of its own for every damage
        raise BadWeights(f"{folder} cannot be read as a fitted flow: {first_line(error)}.") from None
    check_numbers(folder.name, found)
    return found.eval().requires_grad_(False)


def standardising(x: Tensor, what: str) -> tuple[Tensor, Tensor, list[int]]:
    """Mean and deviation of every dimension of x (m n), and the dimensions that never vary.

    Raises BadInput: fewer than 16 rows, what is not finite, no dimension that varies.
    """
    if x.ndim != 2 or len(x) < 16:
        raise BadInput(f"{len(x) if x.ndim else 0} {what} are too few to fit a flow; give 16 or more, better 1000.")
    wrong = (~torch.isfinite(x)).any(1).sum()
    if wrong:
        raise BadInput(f"{int(wrong)} of {len(x)} {what} hold values that are not finite; compute them in float32.")
    mean, std = x.double().mean(0), x.double().std(0)
    typical = std[std > 0].median() if (std > 0).any() else torch.tensor(0.0)
    dead = (std <= DEAD * typical).nonzero().flatten().tolist()
    if len(dead) > x.shape[1] - 2:
        raise BadInput(f"the {what} hardly vary: {len(dead)} of {x.shape[1]} dimensions are constant.")
    std[dead] = 1.0
    return mean.float(), std.float(), dead


def widened(z: Tensor, spread: Tensor | None, noise: float) -> Tensor | None:
    """Deviations (m n) of posteriors, if any, with ``noise`` in units of each dimension of z (m n) on top."""
    if not noise:
        return spread
    extra = (noise * z.std(0)).expand(len(z), -1)
    return extra if spread is None else (spread.square() + extra.square()).sqrt()


@dataclass(eq=False)
class FitRecord:
    """A fitted translator and how well it fits, in nats and in units of the scaled vectors.

    ``facts``: quadratic (mean |v|^2 / 2) beside half (its value for normal v), logdet, nll, bits_per_dim, inverse_error
    and beyond_4 (share of |v| > 4), on held-out vectors; nll_fitted, of as many that it was fitted to; dead, dimensions
    left out; steps, and kept, the one whose weights these are. ``held_out``: numbers of the rows that were not fitted.
    """

    translator: Translator
    facts: dict[str, Any] = field(default_factory=dict)
    history: list[Progress] = field(default_factory=list)
    held_out: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long), repr=False)

    def line(self) -> str:
        f = self.facts
        return (
            f"flow of step {f['kept']} of {f['steps']}: "
            f"|v|^2/2 {f['quadratic']:.1f} (normal {f['half']:.1f}), NLL {f['nll']:.1f} nats "
            f"(of what it was fitted to {f['nll_fitted']:.1f}), "
            f"{f['bits_per_dim']:.2f} bits per dimension, inverse error {f['inverse_error']:.1e}, "
            f"|v| > 4: {100 * f['beyond_4']:.2f} %, {f['dead']} dead dimensions left out"
        )


Loss = Callable[[Translator, Draw], tuple[Tensor, dict[str, Tensor]]]


def fit_translator(
    z: Tensor,
    c: Tensor | None = None,
    *,
    params: FlowParams | None = None,
    spread: Tensor | None = None,
    loss: Loss | None = None,
    weights: Tensor | None = None,
    embedding: int = 32,
    norm: Norm = "layer",
    about: dict[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    name: str = "flow",
    **given: Any,
) -> FitRecord:
    """Fits a flow to vectors z (m n), given conditions c (m, *condition) if any.

    The loss is 0.5 |v|^2 - log|det dv/dz| (net2net, equation 6; iin, equation 6 with every factor of one dimension).

    Args:
        params: size and training, or its fields in ``given``.
        spread: deviations (m n) of normal noise added to z at every step, as posteriors of autoencoders have, beside
            ``params.noise``.
        loss: another loss, called with the translator and the step's draw.
        weights: how often each row is drawn, relative (m); every row alike without.
        embedding, norm: of the condition. about: facts to keep in its config.

    A tenth of the rows (at most 500) is held out for the figures and, without a ``loss`` of its own, to end it: the
    weights with the best likelihood of these rows are kept. Raises BadInput: see :func:`standardising`.
    """
    o = params or FlowParams(**given)
    mean, std, dead = standardising(z, "vectors")
    shape: Sequence[int] = () if c is None else tuple(c.shape[1:])
    held = max(2, min(500, len(z) // 10))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(o.seed)
        translator = Translator(
            z.shape[1], tuple(shape), tuple(dead), o.blocks, o.hidden, o.depth, embedding, norm, o.seed, about
        )
    translator.mean, translator.std = mean, std
    if c is not None:
        if len(c) != len(z):
            raise BadInput(f"{len(z)} vectors but {len(c)} conditions; one for each is needed.")
        rows = c.float() if c.ndim == 2 else c.float().transpose(0, 1).flatten(1).T
        if not torch.isfinite(rows).all():
            raise BadInput("the conditions hold values that are not finite; compute them in float32.")
        place = translator.condition_mean.shape
        translator.condition_mean = rows.mean(0).view(place)
        spread_of = rows.std(0)
        if not (spread_of > 0).any():
            raise BadInput(f"all {len(c)} conditions are the same, so they tell the flow nothing; leave them out.")
        # a dimension that never varied stays in its own unit: what it may do later must not be blown up
        translator.condition_std = torch.where(spread_of < 1e-6, 1.0, spread_of).view(place)
    train = len(z) - held
    spread = widened(z, spread, o.noise)
    chances = None if weights is None else weights[:train].double()

    def likelihood(translator: Translator, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        if chances is None:
            at = draw.indices(train, o.batch)
        else:
            at = torch.multinomial(chances, o.batch, True, generator=draw.generator("rows"))
        rows = z[at]
        if spread is not None:
            rows = rows + spread[at] * torch.randn(rows.shape, generator=draw.generator("noise"))
        v, logdet = translator.transform(rows, None if c is None else c[at])
        quadratic = 0.5 * v.square().sum(1).mean()
        return quadratic - logdet.mean(), {"quadratic": quadratic.detach(), "logdet": logdet.mean().detach()}

    chosen = loss or likelihood
    translator.train()
    with torch.no_grad():  # ActNorms start from a batch of their own, larger than a step's
        start = torch.randperm(train, generator=stream("flow.start", o.seed))[: max(o.batch, 512)]
        first = z[start]
        if spread is not None:
            first = first + spread[start] * torch.randn(first.shape, generator=stream("flow.start.noise", o.seed))
        translator.transform(first, None if c is None else c[start])
    optimizer = torch.optim.Adam(translator.parameters(), lr=o.lr, betas=(0.9, 0.99), fused=True)
    player = Player(
        lambda draw: chosen(translator, draw),
        optimizer,
        translator,
        schedule=lambda step: _decay(step, o.steps),
        clip=5.0,
    )
    unseen, seen = ((z[part], None if c is None else c[part]) for part in (slice(train, None), slice(held)))
    best = BestTensors(dict(translator.named_parameters())) if loss is None else None

    def measure(best: BestTensors, step: int) -> None:
        translator.eval()
        best.measured(step, float(translator.nll(*unseen).mean()))
        translator.train()

    def look(progress: Progress) -> None:
        if best is not None:
            measure(best, progress.step)
        if on_progress is not None:
            on_progress(progress)

    done = fit(player, o.steps, seed=o.seed, log_every=max(1, o.steps // 100), on_progress=look, name=name)
    if best is not None:
        if done.step not in dict(best.figures):  # interrupted between two measurements
            measure(best, done.step)
        best.take()
    translator.eval().requires_grad_(False)
    facts: dict[str, Any] = {"steps": done.step, "interrupted": done.interrupted, "dead": len(dead), "vectors": len(z)}
    facts |= measures(translator, *unseen) | {"kept": done.step if best is None else best.step}
    facts["nll_fitted"] = float(translator.nll(*seen).mean())
    return FitRecord(translator, facts, done.history, torch.arange(train, len(z)))


def _decay(step: int, steps: int) -> float:
    """Short warm-up, then cosine to a twentieth."""
    warm = min(1.0, (step + 1) / min(50, max(1, steps // 10)))
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def measures(translator: Translator, z: Tensor, c: Tensor | None) -> dict[str, float]:
    """The figures of :class:`FitRecord` on vectors z (m n)."""
    v, logdet = translator.transform(z, c)
    nll = translator.nll(z, c).mean()
    return {
        "quadratic": float(0.5 * v.square().sum(1).mean()),
        "half": translator.free / 2,
        "logdet": float(logdet.mean()),
        "nll": float(nll),
        "bits_per_dim": float(nll) / translator.free / math.log(2),
        "inverse_error": translator.inverse_error(z, c),
        "beyond_4": float((v.abs() > 4).float().mean()),
    }
