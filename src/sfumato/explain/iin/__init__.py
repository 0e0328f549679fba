"""IIN: a lossless translator from a frozen network's vector to blocks that mean one concept each.

Esser, Rombach, Ommer 2020 (arXiv 2004.13166). A bijection T takes the vector z of any network to v = (v_1 .. v_K,
residual), standard normal and independent (equation 5). Pairs of pictures that agree in one concept F are modelled as
correlated in block F alone, v'_F ~ N(sigma v_F, 1 - sigma^2), and independent in all others (equations 7, 8). How many
dimensions a concept deserves is estimated from such pairs before T exists (section 3.3). Edits change one block and go
back through T's inverse: nothing is lost.

    >>> found = IIN().explain_net(load_autoencoder("toy-ae"), "toy-ae")
    >>> found.interpretation.swap(z_host, z_donor, "color")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.cards import Card, Field, FilePath, register
from sfumato.errors import BadInput
from sfumato.explain.iin.factors import (
    ConceptPairs,
    Interpretation,
    factor_loss,
    fit_factors,
    load_interpretation,
)
from sfumato.explain.iin.report import BlockReading, readings
from sfumato.explain.iin.sketches import drawn_in, sketch_pairs
from sfumato.explain.shape_texture.dimensions import RESIDUAL, Dimensions, dimensions_of, estimate
from sfumato.models.readers.preprocessing import as_tensor
from sfumato.translation.examples import LabelledVectors, agreeing, open_examples
from sfumato.translation.networks import Network, network_of
from sfumato.translation.translator import FlowParams, fit_translator

__all__ = [
    "IIN",
    "Interpretation",
    "ConceptPairs",
    "BlockReading",
    "dimensions",
    "factor_loss",
    "fit_factors",
    "floor_of",
    "load_interpretation",
]

PAIRS = 4000  # of every concept, drawn once


@register
class IIN:
    """Fits the translator to a net and reports what each layer and each block knows."""

    CARD = Card(
        key="iin",
        title="A Disentangling Invertible Interpretation Network for Explaining Latent Representations",
        authors="Esser, Rombach, Ommer",
        year=2020,
        arxiv="2004.13166",
        verb="explain",
        needs=("pictures",),
        defaults_from="the authors' code (sigma, estimator); flow and schedule are sized for minutes on a CPU",
        cost="one forward for each picture; the flow itself costs no forward of the net",
        not_reproduced="style transfer by a network (drawings take a picture's colours); CelebA",
        summary="translates a net's vector into blocks that mean one concept each, and back without loss",
    )

    class Params(FlowParams):
        concepts: list[str] = Field(
            default=["shape", "color", "place", "scenery"],
            description="what pairs agree in: of the toybox (shape, texture, color, place, scenery, ground, sky), or"
            " columns of the folder's metadata",
        )
        data: FilePath = Field(default="toybox", description="toybox, or a folder of pictures with metadata.jsonl")
        pictures: int = Field(default=2000, ge=32, description="how many pictures to learn from at most")
        layer: str = Field(default="", description="the output that is translated; empty: the net's own vector")
        layers: list[str] = Field(default=[], description="layers whose dimensions are reported beside it")
        sizes: Literal["estimated", "equal"] = Field(default="estimated", description="how blocks get their dimensions")
        rho: float = Field(default=0.975, gt=0, lt=1, description="correlation of a shared block, sigma of the paper")
        supervised: bool = Field(default=True, description="no: independent dimensions without concepts, a sampler")
        sketches: list[FilePath] = Field(
            default=[], description="two drawings (files) that show one change: the only concept, in place of labels"
        )

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        p = self.params
        if p.supervised and not p.concepts:
            raise BadInput("iin needs a concept or more, or supervised=no.")
        if len(set(p.concepts)) < len(p.concepts) or RESIDUAL in p.concepts:
            raise BadInput(f"concepts of iin must be different and none is called {RESIDUAL!r}.")
        if len(p.sketches) not in (0, 2):
            raise BadInput(f"sketches of iin are two drawings, got {len(p.sketches)}.")

    def explain_net(
        self, net: Any, name: str = "", on_progress: Callable[..., None] | None = None, **options: Any
    ) -> BlockReading:
        """What a net's layers know of each concept, and the fitted translator of its vector.

        Args:
            net: a vector autoencoder, any module for pictures, or a text-to-image model
                (:mod:`sfumato.translation.networks`).

        Raises:
            UnknownName: layer, concept, column. BadInput: too few pictures, none or all of which agree, values that are
            not finite, a net that answers differently each time.
        """
        p = self.params
        network = network_of(net, p.layer, name)
        drawn = p.sketches or not p.supervised
        examples = open_examples(p.data, p.pictures, network.side, [] if drawn else p.concepts, p.seed)
        if p.sketches:
            return self._from_sketches(network, examples, on_progress)
        z, spread = network.vectors(examples.pixels)
        if not p.supervised:
            record = fit_translator(z, params=p, spread=spread, on_progress=on_progress, name="iin")
            free = Interpretation(record.translator, {RESIDUAL: record.translator.free}, {}, record)
            return BlockReading(network, free, {}, examples, z)
        rows = {c: agreeing(examples.labels[c], PAIRS, p.seed * 101 + i, c) for i, c in enumerate(p.concepts)}
        tables = {network.layer: dimensions(z, rows)}
        for layer in p.layers:
            other = network_of(net, layer, name)
            tables[layer] = dimensions(other.vectors(examples.pixels)[0], rows)
        sizes = tables[network.layer].dimensions
        if p.sizes == "equal":
            sizes = {c: z.shape[1] // (len(p.concepts) + 1) for c in p.concepts}
        pairs = concept_pairs(rows)
        found = fit_factors(z, pairs, sizes, p, rho=p.rho, spread=spread, on_progress=on_progress)
        found.facts |= {"network": network.name, "layer": network.layer, "concepts": p.concepts, "data": p.data}
        return BlockReading(network, found, tables, examples, z, readings(found, z, examples))

    def _from_sketches(self, network: Network, examples: LabelledVectors, on_progress: Any) -> BlockReading:
        from sfumato import files

        p, side = self.params, network.side
        drawings = as_tensor([files.fitted(files.read_picture(path), (side, side)) for path in p.sketches])
        found = from_sketches(network, drawings[0], drawings[1], examples.pixels, p, p.rho, on_progress)
        found.facts |= {"network": network.name, "layer": network.layer, "sketches": [Path(s).name for s in p.sketches]}
        z, _ = network.vectors(examples.pixels)
        return BlockReading(network, found, {}, examples, z)


def concept_pairs(rows: dict[str, Tensor]) -> ConceptPairs:
    """Pairs of every concept, each sharing that concept and nothing else that is known."""
    eye = torch.eye(len(rows), dtype=torch.bool)
    return ConceptPairs.joined(
        [ConceptPairs(each, eye[i].expand(len(each), -1)) for i, each in enumerate(rows.values())]
    )


def dimensions(z: Tensor, rows: dict[str, Tensor]) -> Dimensions:
    """Dimensions of concepts in vectors z (m n), from rows (p 2) of pictures that agree in each."""
    return estimate({name: (z[each[:, 0]], z[each[:, 1]]) for name, each in rows.items()}, draws=50)


def floor_of(d: int, concepts: int) -> int:
    """The dimensions that a concept gets of ``d`` where nothing correlates: d / (K + e), rounded down (13 of 64 for two
    concepts). Estimates mean something above it only."""
    return dimensions_of(d, {str(i): 0.0 for i in range(concepts)})["0"]


def from_sketches(
    network: Network,
    first: Tensor,
    second: Tensor,
    pictures: Tensor,
    params: FlowParams,
    rho: float = 0.975,
    on_progress: Callable[..., None] | None = None,
) -> Interpretation:
    """A concept from two drawings (3 h w) in [-1, 1], coloured by pictures (b 3 h w): blocks "drawn" and "residual".

    The residual is shared by pairs that differ in the drawing alone. Raises BadInput: a drawing that encloses nothing.
    """
    z, spread = network.vectors(torch.cat([drawn_in(first, pictures), drawn_in(second, pictures)]))
    pairs = sketch_pairs(len(pictures), PAIRS, params.seed)
    same = pairs.rows[pairs.shared[:, 0]]
    apart = pairs.rows[pairs.shared[:, 1]]
    share = estimate({"drawn": (z[same[:, 0]], z[same[:, 1]]), RESIDUAL: (z[apart[:, 0]], z[apart[:, 1]])}, draws=2)
    weight = torch.tensor([max(share.scores["drawn"].value, 0.02), max(share.scores[RESIDUAL].value, 0.02)])
    size = int(z.shape[1] * weight[0] / weight.sum())
    return fit_factors(z, pairs, {"drawn": size}, params, rho=rho, spread=spread, on_progress=on_progress)
