"""Processors of language models that see: texts and pictures as the tensors that such a model reads.

Those of transformers need what only videos need (torchvision), so a processor's folder is read for its tokenizer and
what reads pictures alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

#: what stands in a text of Qwen2-VL for a picture
IMAGE_TOKEN = "<|image_pad|>"


class Processor:
    """A tokenizer, and ``image_processor``, which some folders lack, as `transformers.Qwen2VLProcessor` uses them."""

    def __init__(self, tokenizer: Any, image_processor: Any = None):
        self.tokenizer, self.image_processor = tokenizer, image_processor

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> Processor:
        """From a processor's folder. Raises what transformers raises."""
        from transformers import AutoImageProcessor, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
        if not any((Path(folder) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            return cls(tokenizer)
        return cls(tokenizer, AutoImageProcessor.from_pretrained(folder, use_fast=False, **settings))

    def __getattr__(self, name: str) -> Any:
        if name in ("tokenizer", "image_processor"):  # not yet there, while it is copied
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def places(self, picture: Image) -> int:
        """How many tokens of a text a picture becomes."""
        reader = self.image_processor
        return int(reader.get_number_of_image_patches(picture.height, picture.width, {}) // reader.merge_size**2)

    def __call__(self, text: Sequence[str], images: Any = None, **options: Any) -> Any:
        """Token ids (b t), their mask, and of pictures their patches and grids. ``images``: one or several pictures, in
        the order of their places in the texts."""
        from transformers import BatchFeature

        found = {} if images is None else self.image_processor(images=images, return_tensors="pt")
        grids = found.get("image_grid_thw", ())
        counts = iter([int(grid.prod()) // self.image_processor.merge_size**2 for grid in grids])
        texts = []
        for each in text:
            first, *rest = each.split(IMAGE_TOKEN)
            texts.append(first + "".join(IMAGE_TOKEN * next(counts) + part for part in rest))
        return BatchFeature({**self.tokenizer(texts, **options), **found})
