"""Data biases: one picture as each data set would have it, and what that says of the sets.

Esser, Rombach, Ommer 2020 (arXiv 2012.02516). One autoencoder codes the pictures of all sets, z = E(x); one flow with
the set's name as its condition takes z to v = tau^-1(z | set), normal for every set. v holds what the sets share, tau
what is each set's own. A picture of set a as set b has it is D(tau(tau^-1(z | a) | b)).

    sfumato judge photos paintings --by data_biases -o biases
    sfumato judge toybox toybox:biased --by data_biases
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sfumato.cards import Card, Field, ModelPath, register
from sfumato.errors import BadInput
from sfumato.judge.data_biases.projection import Projection, fit_projection, load_projection
from sfumato.judge.data_biases.report import BiasReport, PairBias, pair_bias
from sfumato.models.nets.vector_ae import load_autoencoder
from sfumato.toybox.sets import SETS, SetDataset
from sfumato.translation.examples import LabelledVectors, folder_examples, of_toys
from sfumato.translation.networks import network_of
from sfumato.translation.reading import CodeReader
from sfumato.translation.translator import FlowParams

__all__ = ["BiasReport", "DataBiases", "PairBias", "Projection", "fit_projection", "load_projection", "pair_bias"]

TOYBOX = "toybox"


@register
class DataBiases:
    """Fits the flow on the sets that are named, and reports what each does to the pictures of the others."""

    CARD = Card(
        key="data_biases",
        title="A Note on Data Biases in Generative Models",
        authors="Esser, Rombach, Ommer",
        year=2020,
        arxiv="2012.02516",
        verb="judge",
        needs=(),
        defaults_from="the authors' code (embedding of 10); sets are drawn equally often, sized for minutes on a CPU",
        cost="one forward of the autoencoder for each picture, and one flow",
        not_reproduced="faces, portraits and anime: give folders and an autoencoder of vectors trained on their union",
        summary="shows a picture as each data set would have it, and what a set adds, drops or skews",
    )

    class Params(FlowParams):
        autoencoder: ModelPath = Field(
            default="toy-ae", description="autoencoder of vectors that knows all sets: a built-in one or a folder"
        )
        concepts: list[str] = Field(
            default=[], description="what contents are counted by: columns of the folders' metadata; toybox: all"
        )
        pictures: int = Field(default=2000, ge=32, description="how many pictures of each set at most")
        noise: float = Field(
            default=0.2, ge=0, le=1,
            description="deviation of normal noise added to the codes at every step, in units of their own: without it"
            " sets of one rule come apart",
        )  # fmt: skip
        balance: bool = Field(default=True, description="draw from all sets equally often, whatever their sizes")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def judge_sets(
        self, sets: Sequence[str | Path], *, on_progress: Callable[[int, int, float, str], None] | None = None
    ) -> BiasReport:
        """The report of two or more data sets: folders, ``toybox`` (neutral), or ``toybox:NAME`` (biased, degraded,
        a style).

        Raises:
            BadInput: fewer than two sets, one twice, too few pictures, a concept that one set alone knows. UnknownName:
            a set of the toybox, a column, the autoencoder.
        """
        p = self.params
        names = _names(sets)
        network = network_of(load_autoencoder(p.autoencoder), name=p.autoencoder)
        concepts = list(p.concepts)
        if not concepts and all(str(each).partition(":")[0] == TOYBOX for each in sets):
            concepts = ["shape", "texture", "color", "place", "ground", "sky"]
        examples = {
            name: _examples(str(each), p.pictures, network.side, concepts, p.seed)
            for name, each in zip(names, sets, strict=True)
        }
        codes = {name: network.vectors(each.pixels) for name, each in examples.items()}
        z = {name: each[0] for name, each in codes.items()}
        words = _common_words(examples, concepts)
        reader = _reader(examples, z, words, min(500, p.steps), p.seed) if words else None

        def report(progress: Any) -> None:
            if on_progress is not None:
                on_progress(progress.step, progress.steps, progress.seconds, "fitting the flow")

        pixels = {name: each.pixels for name, each in examples.items()}
        projection = fit_projection(network, pixels, p, balance=p.balance, codes=codes, on_progress=report)
        unseen = projection.unseen
        pairs = [pair_bias(projection, z, a, b, reader, words, unseen[a]) for a, b in itertools.permutations(names, 2)]
        return BiasReport(projection, pairs, examples, z, reader)


def _names(sets: Sequence[str | Path]) -> list[str]:
    """Short names of the sets. Raises BadInput where there are fewer than two, or one is given twice."""
    if len(sets) < 2:
        raise BadInput(f"data_biases compares two data sets or more, got {len(sets)}.")
    found = []
    for each in map(str, sets):
        head, _, rest = each.partition(":")
        found.append((rest or "neutral") if head == TOYBOX else Path(each).name)
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise BadInput(f"two of the data sets are called {twice!r}; give each another name.")
    return found


def _examples(name: str, n: int, side: int, concepts: Sequence[str], seed: int) -> LabelledVectors:
    head, _, rest = name.partition(":")
    if head != TOYBOX:
        return folder_examples(name, side, concepts, n)
    kind = rest or "neutral"
    # sets of one world do not share scenes, or pairs of pictures would give the answer
    data = SetDataset(kind, n, side, seed * len(SETS) + (SETS.index(kind) if kind in SETS else 0))
    return of_toys(data, concepts)


def _common_words(examples: dict[str, LabelledVectors], concepts: Sequence[str]) -> dict[str, list[str]]:
    """The values of every concept over all sets. Raises BadInput for a concept that only one set has values of."""
    out = {}
    for concept in concepts:
        words = sorted({word for each in examples.values() for word in each.names[concept]})
        if len(words) < 2:
            raise BadInput(f"all pictures of all sets agree in {concept!r}; a concept needs two values or more.")
        shared = set.intersection(*[set(each.names[concept]) for each in examples.values()])
        if not shared:
            raise BadInput(f"the sets have no value of {concept!r} in common; are they labelled in the same words?")
        out[concept] = words
    return out


def _reader(
    examples: dict[str, LabelledVectors], z: dict[str, Any], words: dict[str, list[str]], steps: int, seed: int
) -> CodeReader:
    labels = {}
    for concept, known in words.items():
        rows = []
        for each in examples.values():
            to = torch.tensor([known.index(word) for word in each.names[concept]])
            rows.append(to[each.labels[concept]])
        labels[concept] = torch.cat(rows)
    return CodeReader.fitted(torch.cat(list(z.values())), labels, steps, seed)
