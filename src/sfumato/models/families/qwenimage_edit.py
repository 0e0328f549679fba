"""Qwen-Image-Edit: Qwen-Image that edits a picture by a text, which both its language model and its
transformer look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sfumato.errors import BadInput
from sfumato.models import codec
from sfumato.models.condition import Rows
from sfumato.models.families.base import TextStream
from sfumato.models.families.chat_template import TemplatedTokenizer
from sfumato.models.families.qwenimage import QwenImage
from sfumato.models.processors import IMAGE_TOKEN

if TYPE_CHECKING:
    from PIL.Image import Image


class QwenImageEdit(QwenImage):
    """Wu et al. 2025, arXiv 2508.02324, section 4. The text axis holds the picture as the language model sees it, then
    the prompt; tokens of the picture's latents follow those that are drawn. Each text is encoded alone, with the
    picture."""

    name = "qwenimage-edit"
    pipeline_classes = ("QwenImageEditPipeline",)
    siblings = {"QwenImageEditInpaintPipeline": ("QwenImageEditPipeline", "")}
    capabilities = QwenImage.capabilities | {"reference"}
    references = range(1, 2)
    max_sequence_length = 1024

    @property
    def streams(self) -> list[TextStream]:
        if self.pipe.tokenizer is None:
            return []
        counts = [self.pipe.processor.places(picture) for picture in self._shown()] or [1]
        head = int(self.pipe.prompt_template_encode_start_idx)
        length = head + (self.max_sequence_length or 0) + sum(counts)
        tokenizer = TemplatedTokenizer(self.pipe.tokenizer, lambda text: self._template(text, counts))
        return [TextStream(tokenizer, "qwen", -head, length, lambda text: text, padded=False)]

    def _template(self, text: str, counts: Sequence[int]) -> str:
        """What the language model reads where pictures are so many tokens each."""
        return self.pipe.prompt_template_encode.replace(IMAGE_TOKEN, IMAGE_TOKEN * counts[0]).format(text)

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        shown = self._shown()
        if not shown:
            raise BadInput(f"{self.name} reads texts beside a picture only; give one as reference.")

        def rows(texts: list[str]) -> Rows:
            found = [self.pipe.encode_prompt([text], self._given(shown), self.device)[0][0] for text in texts]
            embeds = pad_sequence(found, batch_first=True)
            mask = torch.arange(embeds.shape[1]) < torch.tensor([len(each) for each in found])[:, None]
            return {"embeds": embeds, "mask": mask.long().to(embeds.device)}

        return rows(prompts), rows(negatives or [" "] * len(prompts)) if guidance else None

    def _shown(self) -> list[Image]:
        """The reference pictures as the language model sees them."""
        return [self.fit_reference(picture) for picture in self.encoding.references]

    @staticmethod
    def _given(shown: list[Image]) -> Any:
        """As the pipeline takes them."""
        return shown[0]

    def fit_reference(self, picture: Image) -> Image:
        """As large as a picture that is drawn, in its own shape, in steps of 32 pixels."""
        return self._of_area(picture, 1024 * 1024)

    def _of_area(self, picture: Image, area: int) -> Image:
        """A picture in so many pixels where 1024x1024 are drawn."""
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
        from PIL.Image import Resampling

        area = area * math.prod(self.default_size) // 1024**2
        width, height, _ = calculate_dimensions(area, picture.width / picture.height)
        return picture.resize((width, height), Resampling.LANCZOS)

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        vae = self.pipe.vae
        latents = codec.unscaled(vae, images[:, :, None].to(dtype=vae.dtype), generators)
        statistics = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1).to(latents) for each in statistics)
        return ((latents - mean) / std)[:, :, 0]
