"""Frozen experts: what gives a representation of a text, a label or a picture, and what makes pictures of one.

An expert is asked with ``encode`` and, where it decodes, ``decode``; nothing else is needed of it, no gradients either.

===================================  =================================================================================
name                                 expert
===================================  =================================================================================
a CLIP (``toy-clip``, a folder)      texts as its projected embedding
``transformers:FOLDER``              texts as the mean of the last hidden states of any text encoder there
``label:NAME``                       one value of a concept of the pictures as one-hot
``pixels:SIDE``                      pictures shrunk to SIDE x SIDE, as maps: translated back it is super-resolution
an autoencoder of vectors            pictures as codes, and back (``toy-ae``, a folder)
===================================  =================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.arrays import to_tensor
from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models.nets.vector_ae import VectorAutoencoder, is_autoencoder, load_autoencoder
from sfumato.models.readers import load_clip
from sfumato.models.readers.loading import load_module
from sfumato.translation.examples import LabelledVectors
from sfumato.translation.networks import network_of

__all__ = ["NetExpert", "autoencoder_expert", "expert"]


@dataclass(eq=False)
class NetExpert:
    """``kind``: what it reads, "text", "label" or "picture". ``encode``: a list of texts or labels, or pictures
    (b 3 h w), to vectors (b n) or maps (b c h w). ``side``: of the pictures it makes."""

    name: str
    kind: str
    encode: Callable[[Any], Tensor]
    decode: Callable[[Tensor], Tensor] | None = None
    spread: Callable[[Any], Tensor | None] = lambda _: None
    side: int = 0
    concept: str = ""

    def of(self, examples: LabelledVectors) -> Any:
        """What this expert reads of examples. Raises BadInput where they have none of it."""
        if self.kind == "picture":
            return examples.pixels
        if self.kind == "label":
            if self.concept not in examples.labels:
                raise UnknownName("concept of the pictures", self.concept, examples.labels)
            return [examples.names[self.concept][i] for i in examples.labels[self.concept].tolist()]
        lacking = next((i for i, text in enumerate(examples.texts) if not text.strip()), None)
        if not examples.texts or lacking is not None:
            raise BadInput(f"picture {lacking or 0} has no caption, and {self.name} reads texts.")
        return examples.texts


def expert(name: str, labels: Sequence[str] = ()) -> NetExpert:
    """An expert by name; the table above says which. ``labels``: the values of a concept, for ``label:``.

    Raises UnknownName, BadInput, BadWeights as the loading of models does.
    """
    head, _, rest = name.partition(":")
    if head == "label":
        return _labels(rest, sorted(labels))
    if head == "pixels":
        return _pixels(rest)
    if head == "transformers":
        return _transformer(Path(rest))
    if is_autoencoder(name):
        return autoencoder_expert(load_autoencoder(name), name)
    clip = load_clip(name)

    def encode(texts: Sequence[str]) -> Tensor:
        parts = [clip.text_features(list(texts[i : i + 256])) for i in range(0, len(texts), 256)]
        return torch.cat([to_tensor(part) for part in parts])

    return NetExpert(name, "text", encode)


def autoencoder_expert(net: VectorAutoencoder, name: str) -> NetExpert:
    """Pictures as the codes of an autoencoder, and back."""
    network = network_of(net, name=name)
    return NetExpert(
        name, "picture", lambda x: network.vectors(x)[0], network.pictures, lambda x: network.vectors(x)[1],
        network.side,
    )  # fmt: skip


def _labels(concept: str, values: Sequence[str]) -> NetExpert:
    if not concept:
        raise BadInput("label: needs the name of a concept, such as label:shape.")

    def encode(given: Sequence[str]) -> Tensor:
        for word in given:
            if word not in values:
                raise UnknownName(f"value of {concept}", str(word), values)
        return F.one_hot(torch.tensor([values.index(word) for word in given]), len(values)).float()

    return NetExpert(f"label:{concept}", "label", encode, concept=concept)


def _pixels(side: str) -> NetExpert:
    if not side.isdigit() or not 4 <= int(side) <= 64:
        raise BadInput(f"pixels:{side} is no size; give a side from 4 to 64, such as pixels:16.")

    def encode(pixels: Tensor) -> Tensor:
        return F.interpolate(pixels, (int(side),) * 2, mode="bilinear", antialias=True, align_corners=False)

    return NetExpert(f"pixels:{side}", "picture", encode)


def _transformer(folder: Path) -> NetExpert:
    from transformers import AutoTokenizer

    module = load_module(folder, what="a text encoder")
    if getattr(module, "main_input_name", "") != "input_ids":
        raise NotSupported(f"{folder} holds a {type(module).__name__}, which reads no texts.")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        rows = []
        for i in range(0, len(texts), 64):
            given = tokenizer(list(texts[i : i + 64]), padding=True, truncation=True, return_tensors="pt")
            hidden = module(**given).last_hidden_state
            mask = given.get("attention_mask", torch.ones(hidden.shape[:2]))[..., None].to(hidden)
            rows.append((hidden * mask).sum(1) / mask.sum(1).clamp_min(1))
        return torch.cat(rows).float()

    return NetExpert(f"transformers:{folder}", "text", encode)
