"""Flux.2 [klein]: Flux.2 with Qwen3 as text encoder and guidance of two branches, or distilled to none."""

from __future__ import annotations

from typing import Any

from sfumato.models.families.base import TextStream
from sfumato.models.families.chat_template import TemplatedTokenizer, chat_template
from sfumato.models.families.flux2 import Flux2


class Flux2Klein(Flux2):
    """Black Forest Labs 2026. As Flux.2, reference pictures included."""

    name = "flux2-klein"
    pipeline_classes = ("Flux2KleinPipeline",)
    siblings = {
        "Flux2KleinInpaintPipeline": ("Flux2KleinPipeline", ""),
        "Flux2KleinKVPipeline": (
            "Flux2KleinPipeline",
            "keys and values of reference pictures are computed in every step rather than once",
        ),
    }

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        super().__init__(pipe, max_sequence_length)
        distilled = bool(pipe.config.is_distilled)
        self.defaults = {"steps": 4, "guidance": 1.0} if distilled else {"steps": 50, "guidance": 4.0}

    @property
    def embeds_guidance(self) -> bool:
        return False

    @property
    def streams(self) -> list[TextStream]:
        tokenizer = self.pipe.tokenizer
        if tokenizer is None:
            return []
        return [self._templated("qwen", TemplatedTokenizer(tokenizer, chat_template(tokenizer, thinking=False)))]
