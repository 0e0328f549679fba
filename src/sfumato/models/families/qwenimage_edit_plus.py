"""Qwen-Image-Edit-2509 and later: several pictures, which the language model sees smaller than the transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfumato.models.families.qwenimage_edit import QwenImageEdit
from sfumato.models.processors import IMAGE_TOKEN

if TYPE_CHECKING:
    from PIL.Image import Image

#: what stands before the prompt for each picture
PICTURE = "Picture {}: <|vision_start|>{}<|vision_end|>"


class QwenImageEditPlus(QwenImageEdit):
    """As Qwen-Image-Edit; the text axis holds all pictures, in their order, then the prompt."""

    name = "qwenimage-edit-plus"
    pipeline_classes = ("QwenImageEditPlusPipeline",)
    references = range(1, 11)

    def _template(self, text: str, counts: Sequence[int]) -> str:
        pictures = "".join(PICTURE.format(i, IMAGE_TOKEN * count) for i, count in enumerate(counts, 1))
        return str(self.pipe.prompt_template_encode.format(pictures + text))

    def _shown(self) -> list[Image]:
        return [self._of_area(picture, 384 * 384) for picture in self.encoding.references]

    @staticmethod
    def _given(shown: list[Image]) -> list[Image]:
        return shown
