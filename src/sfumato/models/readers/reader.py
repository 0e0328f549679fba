"""Models that answer questions about pictures and texts: transformers checkpoints behind one small face.

A :class:`Reader` holds a genuine transformers model (CLIP, ViT, DETR, LXMERT, VisualBERT, BERT ...), its tokenizer and
what it wants done to a picture. ``kind`` says what can be asked of it:

==========  ======================================================  ===========================
kind        what it does                                            recognised by
==========  ======================================================  ===========================
matcher     scores how well a text fits a picture                   picture and text features
classifier  names what a picture shows                              ``pixel_values``, labels
detector    finds things and their boxes                            object queries
answerer    answers a question about the regions of a picture       visual features
texts       classifies a text                                       ``input_ids``, labels
==========  ======================================================  ===========================
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato import registry
from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models.load import _device, _dtype
from sfumato.models.readers.loading import is_reader, load_module
from sfumato.models.readers.preprocessing import Preprocessing
from sfumato.models.weights import hash_modules, read_json

__all__ = ["Reader", "load_reader", "wrap"]

Kind = Literal["matcher", "classifier", "detector", "answerer", "texts"]


@dataclass(eq=False)
class Reader:
    """A reading model and what it wants done to pictures.

    ``regions``: how many regions an answerer was trained with, 0 if unknown.
    """

    name: str
    module: nn.Module
    kind: Kind
    tokenizer: Any = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    regions: int = 0

    def __repr__(self) -> str:
        return f"Reader({self.name!r}, {type(self.module).__name__}, {self.kind})"

    @property
    def config(self) -> Any:
        return self.module.config

    @cached_property
    def weight_hash(self) -> str:
        """SHA-256 over all weights."""
        return hash_modules({"model": self.module})

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def labels(self) -> list[str]:
        """Names of the classes or answers, in the order of their scores."""
        named = getattr(self.config, "id2label", None) or {}
        return [str(named[i]) for i in sorted(named)]

    def label(self, name: str) -> int:
        """Index of a class or answer. Raises UnknownName with the nearest ones."""
        if name not in self.labels:
            raise UnknownName(f"class of {self.name}", name, self.labels)
        return self.labels.index(name)

    @property
    def cells(self) -> int:
        """Side in pixels to which an answerer's regions are resampled; NotSupported if its features are not pixels."""
        wide = getattr(self.config, "visual_feat_dim", None) or getattr(self.config, "visual_embedding_dim", None) or 0
        cells = round((wide / 3) ** 0.5)
        if 3 * cells * cells != wide or cells > 64:
            raise NotSupported(
                f"{self.name} wants features of {wide} numbers per region from a detector of its own; "
                f"give them in inputs= of sfumato.relevance.attention.attention_relevance."
            )
        return cells

    def pixels(self, images: Tensor) -> Tensor:
        """Pictures (b 3 h w) in [-1, 1], resized and normalised as the model wants them."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise BadInput(f"images have shape {tuple(images.shape)}; (b 3 h w) is expected.")
        return self.preprocessing.tensor(images.to(self.device, torch.float32), clamp=True).to(self.dtype)

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and mask (b t), padded. BadInput for a text longer than the model reads."""
        limit = getattr(self.tokenizer, "model_max_length", 10**6)
        for text in texts:
            if len(self.tokenizer(text).input_ids) > limit:
                raise BadInput(f"the text {text[:40]!r}... has more than the {limit} tokens that {self.name} reads.")
        padded = self.tokenizer(texts, padding=True, return_tensors="pt")
        return {key: value.to(self.device) for key, value in padded.items()}


def load_reader(
    name_or_path: str | Path, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
) -> Reader:
    """A reading model from a built-in name or a transformers folder, in ``dtype`` whatever it is stored in.

    Raises `UnknownName` (no such folder), `NotSupported` (nothing this library can ask anything of), `BadWeights`.
    """
    name = str(name_or_path)
    folder = registry.find(name) or Path(name)
    if not (folder / "config.json").is_file():
        raise UnknownName(
            "reading model (a built-in name or a transformers folder)", name, list(filter(is_reader, registry.names()))
        )
    module = load_module(folder, _dtype(dtype) or torch.float32, _device(device))
    return wrap(module, name, folder)


def wrap(module: nn.Module, name: str = "", folder: Path | None = None) -> Reader:
    """A :class:`Reader` around a transformers model in memory; ``folder`` brings tokenizer and picture settings."""
    config: Any = getattr(module, "config", None)
    kind = _kind(module, config)
    reader = Reader(name or type(module).__name__, module, kind, preprocessing=Preprocessing.of(folder, config))
    if folder is None:
        return reader
    if kind in ("matcher", "answerer", "texts"):
        from transformers import AutoTokenizer

        reader.tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "sfumato.json").is_file():
        reader.regions = int(read_json(folder / "sfumato.json").get("regions", 0))
    return reader


def _kind(module: nn.Module, config: Any) -> Kind:
    if hasattr(module, "get_image_features") and hasattr(module, "get_text_features"):
        return "matcher"
    if hasattr(config, "visual_feat_dim") or hasattr(config, "visual_embedding_dim"):
        return "answerer"
    reads = getattr(module, "main_input_name", "")
    if hasattr(config, "num_queries") or hasattr(config, "num_detection_tokens"):
        return "detector"
    if reads == "pixel_values" and _has_head(module):
        return "classifier"
    if reads == "input_ids" and _has_head(module):
        return "texts"
    raise NotSupported(
        f"{type(module).__name__} gives no scores to explain; readers are classifiers, detectors, picture-text "
        f"matchers and question answerers. For any other scalar use sfumato.relevance.attention.attention_relevance."
    )


def _has_head(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("classifier", "score", "cls_classifier"))
