"""What PixArt and Sana have in common: transformer blocks with cross-attention to one caption, its padding masked."""

from __future__ import annotations

from typing import ClassVar

from sfumato.models.condition import Rows
from sfumato.models.families.base import Family, TextStream
from sfumato.models.site import Layer


class CrossAttentionTransformer(Family):
    """The base of such families; ``encoder``: the name of their text stream."""

    encoder: ClassVar[str] = "t5"

    @property
    def default_size(self) -> tuple[int, int]:
        side = self.config.sample_size * self.scale
        return side, side

    @property
    def streams(self) -> list[TextStream]:
        def prepare(text: str) -> str:
            return self.pipe._text_preprocessing(text, clean_caption=_can_clean())[0]

        length = self.max_sequence_length or 0
        return [TextStream(self.pipe.tokenizer, self.encoder, 0, length, prepare)] if self.pipe.tokenizer else []

    @property
    def layers(self) -> list[Layer]:
        return [Layer(f"block.{i}", f"transformer_blocks.{i}") for i in range(len(self.denoiser.transformer_blocks))]

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        embeds, mask, negative, negative_mask = self.pipe.encode_prompt(
            prompts,
            guidance,
            negative_prompt=negatives or "",
            device=self.device,
            clean_caption=_can_clean(),
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds, "mask": mask}, {"embeds": negative, "mask": negative_mask} if guidance else None


def _can_clean() -> bool:
    """Whether the pipeline's caption cleaning is at hand; without its two libraries it only lower-cases."""
    from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available

    return is_bs4_available() and is_ftfy_available()
