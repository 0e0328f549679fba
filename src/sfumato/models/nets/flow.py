"""Invertible networks on vectors: a bijection z -> v in which v is to be standard normal, with or without a condition.

Blocks are those of the CompVis papers (arXiv 2004.13166, 2005.13580): ActNorm, a two-sided affine coupling whose log
scales are limited by tanh, a fixed permutation. FrEIA (MIT) gives the coupling; ActNorm and permutation are ours, as
FrEIA's initialise on any first call in any mode and reseed numpy's global generator.

    >>> flow = CouplingFlow(64, blocks=8, hidden=128, condition=(32,))
    >>> v, logdet = flow(z, c)       # (b 64), (b): log|det dv/dz|
    >>> z, logdet = flow.inverse(v, c)  # log|det dz/dv|
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from FrEIA.modules import InvertibleModule, RNVPCouplingBlock
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.rng import stream

__all__ = ["ActNorm", "CouplingFlow", "MapEmbedding", "Permutation", "VectorEmbedding", "embedding_of"]

Norm = Literal["layer", "batch", "none"]


class ActNorm(InvertibleModule):
    """Scale and shift of every dimension (Kingma, Dhariwal 2018, section 3.1), set once from the first batch that is
    seen in training mode; whether that has happened is saved with the weights."""

    ready: Tensor

    def __init__(self, dims_in: Sequence[tuple[int, ...]], dims_c: Sequence[tuple[int, ...]] | None = None):
        super().__init__(dims_in, dims_c)
        self.scale = nn.Parameter(torch.zeros(1, dims_in[0][0]))  # log
        self.shift = nn.Parameter(torch.zeros(1, dims_in[0][0]))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Sequence[Tensor], c: object = None, rev: bool = False, jac: bool = True):  # noqa: D102
        z = x[0]
        if not self.ready:
            self._start(z, rev)
        logdet = self.scale.sum().expand(len(z))
        if rev:
            return ((z - self.shift) * (-self.scale).exp(),), -logdet
        return (z * self.scale.exp() + self.shift,), logdet

    @torch.no_grad()
    def _start(self, z: Tensor, rev: bool) -> None:
        if rev or not self.training:
            raise BadInput("this flow has not been fitted; fit it, or load one that was.")
        if len(z) < 2:
            raise BadInput("a flow starts from a batch of at least 2 vectors, got 1; give 64 or more.")
        spread = z.std(0, keepdim=True)
        if not (spread > 1e-7).all():
            dead = (spread[0] <= 1e-7).nonzero().flatten().tolist()
            raise BadInput(f"dimensions {dead[:8]} never vary in the first batch; leave constant dimensions out.")
        self.scale.copy_(-spread.log())
        self.shift.copy_(-z.mean(0, keepdim=True) / spread)
        self.ready.fill_(True)

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return input_dims


class Permutation(InvertibleModule):
    """A fixed order of the dimensions, drawn from ``seed`` and saved with the weights."""

    order: Tensor
    back: Tensor

    def __init__(
        self,
        dims_in: Sequence[tuple[int, ...]],
        dims_c: Sequence[tuple[int, ...]] | None = None,
        seed: int = 0,
    ):
        super().__init__(dims_in, dims_c)
        order = torch.randperm(dims_in[0][0], generator=stream("flow.permutation", seed))
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def forward(self, x: Sequence[Tensor], c: object = None, rev: bool = False, jac: bool = True):  # noqa: D102
        return (x[0][:, self.back if rev else self.order],), 0.0

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return input_dims


def _mlp(hidden: int, depth: int):
    """FrEIA's constructor of a coupling's subnets; the last layer starts at zero, so every block starts as identity
    (ours: the papers' start at torch's default and need more steps)."""

    def make(inside: int, outside: int) -> nn.Sequential:
        layers: list[nn.Module] = [nn.Linear(inside, hidden), nn.LeakyReLU(0.01)]
        for _ in range(depth - 1):
            layers += [nn.Linear(hidden, hidden), nn.LeakyReLU(0.01)]
        last = nn.Linear(hidden, outside)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(*layers, last)

    return make


class VectorEmbedding(nn.Module):
    """Conditions (b d) as (b e): an MLP with a norm before each LeakyReLU. The papers use BatchNorm ("batch"), which
    needs batches of 2 and more; LayerNorm is our default."""

    def __init__(self, inside: int, outside: int, hidden: int = 256, depth: int = 2, norm: Norm = "layer"):
        super().__init__()
        kinds = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "none": lambda width: nn.Identity()}
        layers: list[nn.Module] = []
        for width in [inside, *[hidden] * (depth - 1)]:
            layers += [nn.Linear(width, hidden), kinds[norm](hidden), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, outside))

    def forward(self, c: Tensor) -> Tensor:
        return self.net(c)


class MapEmbedding(nn.Module):
    """Conditions (b c h w) as (b e), by strided convolutions down to 4 x 4 or less, never by a mean over places: what
    the embedding forgot would look like an invariance of the network whose maps these are (arXiv 2008.01777)."""

    def __init__(self, shape: tuple[int, int, int], outside: int, width: int = 32, limit: int = 128):
        super().__init__()
        inside, h, w = shape
        layers: list[nn.Module] = []
        while max(h, w) > 4:
            layers += [nn.Conv2d(inside, width, 4, 2, 1), nn.GroupNorm(4, width), nn.LeakyReLU(0.2)]
            inside, h, w, width = width, h // 2, w // 2, min(2 * width, limit)
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inside * h * w, outside))

    def forward(self, c: Tensor) -> Tensor:
        return self.net(c)


def embedding_of(shape: Sequence[int], outside: int, hidden: int, norm: Norm) -> nn.Module:
    """An embedding for conditions of ``shape`` without the batch: (d) or (c h w). Raises BadInput for others."""
    if len(shape) == 1:
        return VectorEmbedding(shape[0], outside, hidden, norm=norm)
    if len(shape) == 3:
        return MapEmbedding((shape[0], shape[1], shape[2]), outside)
    raise BadInput(f"a condition must be a vector (d) or maps (c, h, w), got {tuple(shape)}.")


class CouplingFlow(nn.Module):
    """The bijection.

    Args:
        dim: d, dimensions of z and v, at least 2.
        blocks, hidden, depth: of the couplings' MLPs (depth counts hidden layers).
        condition: shape of a condition without the batch, () for none.
        embedding: e, numbers that the couplings see of a condition.
        norm: within the embedding of vectors.
        seed: of the permutations; weights are drawn from torch's generator.
    """

    def __init__(
        self,
        dim: int,
        blocks: int = 12,
        hidden: int = 256,
        depth: int = 2,
        condition: Sequence[int] = (),
        embedding: int = 32,
        norm: Norm = "layer",
        seed: int = 0,
    ):
        super().__init__()
        if dim < 2 or blocks < 1 or hidden < 1 or depth < 1:
            raise BadInput(f"a flow needs 2 dimensions and 1 block or more, got {dim} and {blocks}.")
        self.dim, self.condition = dim, tuple(condition)
        self.embed = embedding_of(condition, embedding, hidden, norm) if condition else None
        dims_c = [(embedding,)] if condition else []
        stages: list[nn.Module] = []
        for i in range(blocks):
            stages += [
                ActNorm([(dim,)]),
                RNVPCouplingBlock(
                    [(dim,)], dims_c, subnet_constructor=_mlp(hidden, depth), clamp=1.0, clamp_activation="TANH"
                ),
                Permutation([(dim,)], seed=1_000 * seed + i),
            ]
        self.stages = nn.ModuleList(stages)

    def forward(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (b d) -> v (b d) and log|det dv/dz| (b)."""
        return self._walk(z, c, False)

    def inverse(self, v: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """v (b d) -> z (b d) and log|det dz/dv| (b)."""
        return self._walk(v, c, True)

    def nll(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Negative log-likelihood (b) of z, in nats, the normal's constant included."""
        v, logdet = self(z, c)
        return 0.5 * v.square().sum(1) - logdet + 0.5 * self.dim * math.log(2 * math.pi)

    def _walk(self, z: Tensor, c: Tensor | None, rev: bool) -> tuple[Tensor, Tensor]:
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise BadInput(f"this flow is for vectors (b, {self.dim}), got {tuple(z.shape)}.")
        if (c is None) != (self.embed is None):
            raise BadInput(
                "this flow has no condition." if self.embed is None else "this flow needs a condition for each vector."
            )
        embedded: list[Tensor] = []
        if self.embed is not None and c is not None:
            if len(c) != len(z) or tuple(c.shape[1:]) != self.condition:
                raise BadInput(f"conditions must be {(len(z), *self.condition)}, got {tuple(c.shape)}.")
            embedded = [self.embed(c)]
        total = torch.zeros(len(z), dtype=z.dtype, device=z.device)
        for stage in reversed(self.stages) if rev else self.stages:
            given = {"c": embedded} if isinstance(stage, RNVPCouplingBlock) else {}
            (z,), logdet = stage((z,), rev=rev, **given)
            total = total + logdet
        return z, total
