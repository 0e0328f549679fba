"""Models that read pictures and texts instead of making them: transformers checkpoints behind one small face.

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

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato import registry
from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName
from sfumato.models.quiet import quiet
from sfumato.models.weights import check_numbers, find_weights, hash_modules, read_header, read_json

__all__ = ["Reader", "is_reader", "load_reader"]

Kind = Literal["matcher", "classifier", "detector", "answerer", "texts"]


@dataclass(eq=False)
class Reader:
    """A reading model; ``mean`` and ``std`` of pixels in [0, 1], ``size`` (h, w) of pictures, None for any.

    ``regions``: how many regions an answerer was trained with, 0 if unknown.
    """

    name: str
    module: nn.Module
    kind: Kind
    tokenizer: Any = None
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
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
                f"give them in inputs= of sfumato.explain.attention_relevance.relevance."
            )
        return cells

    def pixels(self, images: Tensor) -> Tensor:
        """Pictures (b 3 h w) in [-1, 1], resized and normalised as the model wants them."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise BadInput(f"images have shape {tuple(images.shape)}; (b 3 h w) is expected.")
        images = (images.to(self.device, torch.float32) + 1) / 2
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (images.new_tensor(part)[:, None, None] for part in (self.mean, self.std))
        return ((images - mean) / std).to(self.dtype)

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and mask (b t), padded. BadInput for a text longer than the model reads."""
        limit = getattr(self.tokenizer, "model_max_length", 10**6)
        for text in texts:
            if len(self.tokenizer(text).input_ids) > limit:
                raise BadInput(f"the text {text[:40]!r}... has more than the {limit} tokens that {self.name} reads.")
        padded = self.tokenizer(texts, padding=True, return_tensors="pt")
        return {key: value.to(self.device) for key, value in padded.items()}


def is_reader(name_or_path: str | Path) -> bool:
    """Whether a name or folder holds one transformers model rather than a pipeline that draws."""
    folder = registry.find(str(name_or_path)) or Path(name_or_path)
    if not (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        return False
    return bool(read_json(folder / "config.json").get("architectures"))


def load_reader(
    name_or_path: str | Path, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
) -> Reader:
    """A reading model from a built-in name or a transformers folder, in ``dtype`` whatever it is stored in.

    Raises `UnknownName` (no such folder), `NotSupported` (nothing this library can ask anything of), `BadWeights`.
    """
    import transformers

    from sfumato.models.load import _device, _dtype

    dtype, device = _dtype(dtype) or torch.float32, _device(device)
    name = str(name_or_path)
    folder = registry.find(name) or Path(name)
    if not (folder / "config.json").is_file():
        raise UnknownName("reading model (a built-in name or a transformers folder)", name, registry.names())
    config = read_json(folder / "config.json")
    classes = config.get("architectures") or []
    cls = getattr(transformers, classes[0], None) if classes else None
    if cls is None:
        raise NotSupported(f"{name} is a {', '.join(classes) or 'model of no named class'}, not one of transformers.")
    for path in find_weights(folder)[0]:
        read_header(path)
    with quiet():
        module, found = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if found["missing_keys"] or found["mismatched_keys"]:
        lost = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
        raise BadWeights(f"{name} lacks {len(lost)} of the tensors of {classes[0]}, such as {lost[0]}.")
    check_numbers(name, module)
    module.requires_grad_(False).eval().to(device)
    return wrap(module, name, folder)


def wrap(module: nn.Module, name: str = "", folder: Path | None = None) -> Reader:
    """A :class:`Reader` around a transformers model in memory; ``folder`` brings tokenizer and picture settings."""
    config: Any = getattr(module, "config", None)
    kind = _kind(module, config)
    reader = Reader(name or type(module).__name__, module, kind, size=_size(config))
    if folder is None:
        return reader
    if (folder / "preprocessor_config.json").is_file():
        given = read_json(folder / "preprocessor_config.json")
        reader.mean, reader.std = (tuple(given.get(key) or (0.5,) * 3) for key in ("image_mean", "image_std"))
        reader.size = reader.size or _side(given.get("crop_size") or given.get("size"))
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
        f"matchers and question answerers. For any other scalar use sfumato.explain.attention_relevance.relevance."
    )


def _has_head(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("classifier", "score", "cls_classifier"))


def _size(config: Any) -> tuple[int, int] | None:
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    return _side(size)


def _side(size: Any) -> tuple[int, int] | None:
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if size else None
