"""Blocks of an invertible network that mean one concept each: the loss for pairs (section 3.2), and edits by blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput, BadWeights, UnknownName
from sfumato.explain.shape_texture.dimensions import RESIDUAL
from sfumato.markup import described
from sfumato.training import Draw
from sfumato.translation.translator import FitRecord, FlowParams, Translator, fit_translator, load_translator, widened

__all__ = ["Interpretation", "ConceptPairs", "factor_loss", "fit_factors", "load_interpretation"]


@dataclass(frozen=True, eq=False)
class ConceptPairs:
    """Pairs of vectors, as rows of a set: ``rows`` (p 2), and ``shared`` (p k), True for each concept in which a pair
    is known to agree; it is taken to be independent in all others."""

    rows: Tensor
    shared: Tensor

    __repr__ = described

    @staticmethod
    def joined(parts: Sequence[ConceptPairs]) -> ConceptPairs:
        return ConceptPairs(torch.cat([p.rows for p in parts]), torch.cat([p.shared for p in parts]))


def factor_loss(va: Tensor, vb: Tensor, logdet_a: Tensor, logdet_b: Tensor, rho: Tensor) -> Tensor:
    """Negative log-likelihood (b) of pairs of codes (b d), up to a constant (equations 7 and 8).

    The first is standard normal, the second normal about ``rho`` times the first with variance 1 - rho^2; ``rho``
    (b d) is 0 in blocks that are not shared.
    """
    rest = 1 - rho.square()
    pairs = va.square() + (vb - rho * va).square() / rest + rest.log()
    return 0.5 * pairs.sum(1) - logdet_a - logdet_b


@dataclass(eq=False)
class Interpretation:
    """A bijection from a network's vectors z (b n) to v (b m) whose blocks are concepts; the last one is the residual.

    ``sizes``: dimensions of every block. ``record``: how well the flow fits, where it was fitted here.
    """

    translator: Translator
    sizes: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)
    record: FitRecord | None = None

    @property
    def concepts(self) -> list[str]:
        """The blocks without the residual."""
        return [name for name in self.sizes if name != RESIDUAL]

    def block(self, concept: str) -> slice:
        """Where a block lies in v. Raises UnknownName."""
        if concept not in self.sizes:
            raise UnknownName("concept", concept, self.sizes)
        start = 0
        for name, size in self.sizes.items():
            if name == concept:
                return slice(start, start + size)
            start += size
        raise AssertionError(concept)

    def codes(self, z: Tensor) -> Tensor:
        """v (b m) of vectors z (b n)."""
        return self.translator.residual(z)

    def vectors(self, v: Tensor) -> Tensor:
        """z (b n) of codes v (b m)."""
        return self.translator.vectors(v)

    def swap(self, host: Tensor, donor: Tensor, concept: str) -> Tensor:
        """Vectors (b n) of ``host`` with the concept of ``donor``."""
        v, at = self.codes(host).clone(), self.block(concept)
        v[:, at] = self.codes(donor)[:, at]
        return self.vectors(v)

    def resample(self, z: Tensor, concept: str, n: int = 1, seed: int = 0) -> Tensor:
        """Vectors (b n size): each z (b size) with ``n`` draws of one concept from its prior."""
        v, at = self.codes(z).repeat_interleave(n, 0), self.block(concept)
        v[:, at] = self.translator.noise(len(v), seed)[:, at]
        return self.vectors(v).unflatten(0, (len(z), n))

    def walk(self, z: Tensor, concept: str, direction: Tensor, steps: int = 7, reach: float = 2.0) -> Tensor:
        """Vectors (b steps n): each z moved in one block along ``direction`` (of the block's size), from -reach to
        reach times it."""
        at = self.block(concept)
        if direction.shape != (self.sizes[concept],):
            raise BadInput(
                f"a direction in {concept!r} has {self.sizes[concept]} numbers, got {tuple(direction.shape)}."
            )
        v = self.codes(z)[:, None].repeat(1, steps, 1)
        v[:, :, at] += torch.linspace(-reach, reach, steps)[None, :, None] * direction
        return self.vectors(v.flatten(0, 1)).unflatten(0, (len(z), steps))

    def direction(self, z: Tensor, labels: Tensor, concept: str, start: int, end: int) -> Tensor:
        """In a concept's block, from the mean of vectors labelled ``start`` to that of those labelled ``end``."""
        v = self.codes(z)[:, self.block(concept)]
        for value in (start, end):
            if not (labels == value).any():
                raise BadInput(f"no vector has the value {value} of {concept!r}.")
        return v[labels == end].mean(0) - v[labels == start].mean(0)

    def principal(self, z: Tensor, concept: str, axis: int = 0) -> Tensor:
        """A principal axis of a concept's block over vectors z (b n), as long as its deviation."""
        v = self.codes(z)[:, self.block(concept)]
        _, spread, axes = torch.linalg.svd(v - v.mean(0), full_matrices=False)
        if not 0 <= axis < len(spread):
            raise BadInput(f"axis must be from 0 to {len(spread) - 1}, got {axis}.")
        return axes[axis] * spread[axis] / max(1, len(v) - 1) ** 0.5

    def strength(self, z: Tensor, concept: str) -> Tensor:
        """|v_k|^2 / N_k (b): about 1 for what the concept usually is, large for what it never was."""
        return self.codes(z)[:, self.block(concept)].square().mean(1)

    def response(self, tail: Callable[[Tensor], Tensor], z: Tensor, concept: str, n: int = 8, seed: int = 0) -> Tensor:
        """How much a decision depends on a concept (b): the mean change of ``tail``'s output, vectors (b n) -> (b c),
        as total variation of its softmax, when the block is drawn anew; causal, not a correlation."""
        with torch.no_grad():
            before = tail(z).softmax(-1)
            after = tail(self.resample(z, concept, n, seed).flatten(0, 1)).softmax(-1).unflatten(0, (len(z), n))
        return 0.5 * (after - before[:, None]).abs().sum(-1).mean(1)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n vectors (n size) from the prior."""
        return self.translator.sample(n=n, seed=seed)

    def save(self, folder: Path | str) -> Path:
        """Writes the flow with its blocks. Raises BadInput if the folder is not empty."""
        self.translator.register_to_config(about={"blocks": [*map(list, self.sizes.items())], **self.facts})
        return self.translator.save(folder)


def load_interpretation(folder: Path | str) -> Interpretation:
    """One that :meth:`Interpretation.save` wrote. Raises BadInput, BadWeights."""
    translator = load_translator(folder)
    about = translator.about
    try:  # a list: files of settings are sorted by key
        sizes = {str(name): int(size) for name, size in about.pop("blocks")}
    except (KeyError, TypeError, ValueError):
        sizes = {}
    if sum(sizes.values()) != translator.free:
        raise BadWeights(f"{folder} holds a flow without blocks of concepts; iin wrote none of it.")
    return Interpretation(translator, sizes, about)


def block_sizes(free: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of concepts and residual that fill ``free`` dimensions, one or more each: as given, and where that is more
    than there are (dead dimensions count in no block) the largest concepts give. Raises BadInput: more blocks than
    dimensions."""
    wanted = {name: max(1, int(size)) for name, size in sizes.items() if name != RESIDUAL}
    if len(wanted) >= free:
        raise BadInput(
            f"{free} dimensions that vary hold {free - 1} concepts at most beside the residual, and {len(wanted)} are"
            f" asked for ({', '.join(wanted)}); ask for fewer, or of a layer with more dimensions."
        )
    while sum(wanted.values()) >= free:
        wanted[max(wanted, key=lambda name: wanted[name])] -= 1
    return {**wanted, RESIDUAL: free - sum(wanted.values())}


def fit_factors(
    z: Tensor,
    pairs: ConceptPairs,
    sizes: Mapping[str, int],
    params: FlowParams,
    *,
    rho: float = 0.975,
    spread: Tensor | None = None,
    on_progress: Callable[..., None] | None = None,
) -> Interpretation:
    """Fits the bijection on vectors z (m n) and their pairs.

    Args:
        pairs: ``shared`` has one column for every concept of ``sizes``, in its order, the residual left out or last.
        sizes: dimensions of every block, as :func:`block_sizes` fits them in; the residual takes what is left.
        rho: correlation of shared blocks, 0.975 in the authors' code.
        spread: deviations (m n) of posterior noise, drawn anew at every step, beside ``params.noise``.
    """
    names = [name for name in sizes if name != RESIDUAL]
    if pairs.shared.shape[1] not in (len(names), len(names) + 1):
        raise BadInput(f"pairs say what they share of {pairs.shared.shape[1]} concepts, but there are {len(names)}.")
    if not pairs.shared.any(1).all():
        raise BadInput("pairs that agree in nothing teach no concept; leave them out.")
    wide: dict[str, Any] = {}
    noisy = widened(z, spread, params.noise)

    def loss(translator: Translator, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        if not wide:  # dead dimensions are known by now
            own = block_sizes(translator.free, sizes)
            wide["sizes"] = own
            mask = torch.cat([pairs.shared, torch.zeros(len(pairs.shared), len(own) - pairs.shared.shape[1])], 1)
            wide["rho"] = rho * mask.float()
            wide["of"] = torch.cat([torch.full((size,), i) for i, size in enumerate(own.values())])
        chosen = draw.indices(len(pairs.rows), params.batch)
        rows = pairs.rows[chosen].T.flatten()
        both = z[rows]
        if noisy is not None:
            both = both + noisy[rows] * torch.randn(both.shape, generator=draw.generator("noise"))
        v, logdet = translator.transform(both)
        (va, vb), (la, lb) = v.chunk(2), logdet.chunk(2)
        found = factor_loss(va, vb, la, lb, wide["rho"][chosen][:, wide["of"]]).mean()
        return found, {"quadratic": 0.5 * va.detach().square().sum(1).mean()}

    record = fit_translator(z, params=params, spread=spread, loss=loss, on_progress=on_progress, name="iin")
    return Interpretation(record.translator, wide["sizes"], {"rho": rho}, record)
