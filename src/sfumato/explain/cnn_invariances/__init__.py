"""Making sense of CNNs: what a layer still knows of a picture, and what it has thrown away.

Rombach, Esser, Ommer 2020 (arXiv 2008.01777). A classifier's layer z = Phi(x) loses part of the picture. An autoencoder
keeps all that is visible in a code zbar; a conditional flow recovers the lost part as v = t(zbar | z), normal and
independent of z (section 3.1). Fixing z and drawing v gives pictures that the layer cannot tell apart: what stays is
what it knows, what varies is what it is invariant to. Exchanging v between pictures, and looking at attacked pictures
through z, are the same flow used otherwise (sections 3.2, 4).

    sfumato explain picture.png --model toy-cnn --by cnn_invariances:layers=[logits]     samples for one picture
    sfumato explain toy-cnn --by cnn_invariances                                        the table of layers
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from sfumato import files
from sfumato.arrays import to_tensor
from sfumato.cards import Card, Field, FilePath, ModelPath, register
from sfumato.errors import BadInput, NotSupported
from sfumato.explain.cnn_invariances.explorer import (
    LOGITS,
    PROBABILITIES,
    InvarianceExplorer,
    default_layers,
    fgsm,
    logits_of,
)
from sfumato.explain.cnn_invariances.table import InvarianceTable, LayerRow, LayerSamples, variance_ratios
from sfumato.explain.iin import concept_pairs, dimensions, fit_factors
from sfumato.models.nets.vector_ae import load_autoencoder
from sfumato.models.readers import PictureNet, Reader
from sfumato.translation.examples import agreeing, open_examples
from sfumato.translation.networks import Network, network_of
from sfumato.translation.translator import FlowParams, load_translator

__all__ = [
    "LOGITS",
    "PROBABILITIES",
    "CnnInvariances",
    "InvarianceExplorer",
    "InvarianceTable",
    "default_layers",
    "fgsm",
    "logits_of",
    "variance_ratios",
]

SHOWN = 200  # pictures behind the figures of a table


@register
class CnnInvariances:
    """Fits a flow for each layer; the samples for a picture, or the table of a net."""

    CARD = Card(
        key="cnn_invariances",
        title="Making Sense of CNNs: Interpreting Deep Representations & Their Invariances with INNs",
        authors="Rombach, Esser, Ommer",
        year=2020,
        arxiv="2008.01777",
        verb="explain",
        needs=("classifier",),
        defaults_from="the paper and the authors' code; flow and schedule are sized for minutes on a CPU",
        cost="one forward of net and autoencoder for each picture that is learnt from, and one flow for each layer",
        not_reproduced="ImageNet nets and the BigGAN decoder: give an autoencoder of vectors for other pictures",
        summary="draws pictures that a layer cannot tell apart, and says what each layer is invariant to",
    )

    class Params(FlowParams):
        layers: list[str] = Field(
            default=[],
            description="layers, in order; logits: the answer and how sure it is; probabilities: the answer; none: all"
            " stages (of a picture: the last)",
        )
        autoencoder: ModelPath = Field(
            default="toy-ae", description="autoencoder of vectors: a built-in one or a folder"
        )
        concepts: list[str] = Field(
            default=["shape", "texture", "color", "place", "scenery"],
            description="rows of the table: concepts of the toybox, or columns of the folder's metadata",
        )
        data: FilePath = Field(default="toybox", description="toybox, or a folder of pictures (with metadata.jsonl)")
        pictures: int = Field(default=2000, ge=32, description="how many pictures to learn from at most")
        samples: int = Field(default=7, ge=1, le=64, description="pictures drawn for each layer")
        temperature: float = Field(default=1.0, ge=0, le=2, description="deviation of the draws; below 1 less varied")
        attack: float = Field(
            default=0.0, ge=0, le=1, description="FGSM of this size, of a range of 2, before the layer looks; 0: none"
        )
        flow: FilePath = Field(
            default="", description="a folder that a table of this system wrote: nothing is fitted anew"
        )

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def explain_net(self, net: Any, name: str = "", on_progress: Callable[..., None] | None = None) -> InvarianceTable:
        """The table of a net: for each layer how far it is invariant to each concept, and how far to trust that.

        Raises:
            NotSupported: no module for pictures. UnknownName: a layer, a concept, the autoencoder. BadInput: too few
            pictures, a net that answers differently each time, values that are not finite.
        """
        p, net = self.params, _module(net)
        autoencoder = self._autoencoder()
        examples = open_examples(p.data, p.pictures, autoencoder.side, p.concepts, p.seed)
        z, spread = autoencoder.vectors(examples.pixels)
        rows = {c: agreeing(examples.labels[c], 3000, p.seed * 101 + i, c) for i, c in enumerate(p.concepts)}
        reader = None
        if rows:
            sizes = dimensions(z, rows).dimensions
            reader = fit_factors(z, concept_pairs(rows), sizes, p, spread=spread, on_progress=on_progress)
        found = []
        shown = examples.pixels[-SHOWN:]
        for layer in p.layers or default_layers(net):
            explorer = InvarianceExplorer(net, layer, autoencoder)
            record = explorer.fit(examples.pixels, p, on_progress, (z, spread))
            drawn = explorer.samples(shown, 4, p.seed, p.temperature)
            ratios = variance_ratios(reader, drawn, z) if reader is not None else {}
            found.append(LayerRow(layer, explorer, ratios, explorer.fidelity(shown, 2, p.seed), record))
        return InvarianceTable(name or type(net).__name__, found, shown[: p.samples + 1], p.temperature, p.seed)

    def explain_reading(
        self,
        reader: Reader,
        image: Any,
        prompt: str | None = None,
        on_progress: Callable[..., None] | None = None,
        **options: Any,
    ) -> LayerSamples:
        """Pictures that layers of a classifier cannot tell from ``image`` (PIL); a prompt has no meaning here.

        Raises as :meth:`explain_net` does.
        """
        p = self.params
        if reader.kind != "classifier":
            raise NotSupported(f"{self.CARD.key} looks into classifiers of pictures; {reader.name} is a {reader.kind}.")
        if prompt is not None:
            raise BadInput(f"{self.CARD.key} asks nothing of a picture; leave the prompt out.")
        if options:
            raise BadInput(
                f"{self.CARD.key} takes no {', '.join(sorted(options))}; its parameters are given with --by."
            )
        net = PictureNet(reader.module, reader.preprocessing)
        autoencoder = self._autoencoder()
        layers = p.layers or default_layers(net)[-1:]
        side = autoencoder.side
        taken = to_tensor(np.asarray(files.fitted(image.convert("RGB"), (side, side))))
        pixels = taken.permute(2, 0, 1)[None] / 127.5 - 1
        seen = fgsm(net, pixels, p.attack) if p.attack else pixels
        rows = []
        fitted: dict[str, InvarianceExplorer] = {}
        if p.flow:
            translator = load_translator(p.flow)
            layers = [str(translator.about.get("layer", ""))]
            fitted[layers[0]] = InvarianceExplorer(net, layers[0], autoencoder, translator)
        else:
            examples = open_examples(p.data, p.pictures, side, [], p.seed)
            codes = autoencoder.vectors(examples.pixels)
            for layer in layers:
                fitted[layer] = InvarianceExplorer(net, layer, autoencoder)
                fitted[layer].fit(examples.pixels, p, on_progress, codes)
        for layer, explorer in fitted.items():
            drawn = explorer.samples(seen, p.samples, p.seed, p.temperature)
            rows.append((layer, explorer.pictures(drawn)[0]))
        rebuilt: Tensor = autoencoder.pictures(autoencoder.vectors(seen)[0])[0]
        return LayerSamples(reader.name, pixels[0], rebuilt, rows, bool(p.attack))

    def _autoencoder(self) -> Network:
        return network_of(load_autoencoder(self.params.autoencoder), name=self.params.autoencoder)


def _module(net: Any) -> nn.Module:
    if not isinstance(net, nn.Module):
        raise NotSupported(f"cnn_invariances looks into nets for pictures; {getattr(net, 'name', net)} draws them.")
    return net
