"""What a CLIP score rests on: words of the text and patches of the picture, as a differentiable map.

Chefer, Gur and Wolf 2021 (arXiv 2103.15679) for both towers of any ``transformers.CLIPModel``: the explained number is
the cosine of one picture with one text. The text's relevance is the row of its end token, the picture's that of its
class token. With ``second_order`` both can be part of a loss (Paiss, Chefer and Wolf 2022, arXiv 2204.04908).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.attention.sites import Site, find_sites
from sfumato.errors import BadInput
from sfumato.markup import described
from sfumato.models.families import TextStream
from sfumato.models.readers import Clip
from sfumato.relevance.capture import captured, gradients_of
from sfumato.relevance.rules import self_relevance
from sfumato.text.words import Reading, Words

__all__ = ["ClipExplainer", "ClipExplanation"]


@dataclass(eq=False)
class ClipExplanation:
    """What a CLIP made of pictures and texts, pair by pair.

    ``similarity`` (b) cosines; ``text`` (b t t) and ``image`` (b n n) relevance among the tokens of each tower (None
    where it was not wanted), image token 0 being the class token; ``end`` (b) where each text's end token stands;
    ``grid`` (h, w) of the patches; ``image_embeds`` and ``text_embeds`` (b d) of length 1.
    """

    similarity: Tensor
    text: Tensor | None
    image: Tensor | None
    end: Tensor
    grid: tuple[int, int]
    image_embeds: Tensor
    text_embeds: Tensor

    __repr__ = described

    def tokens(self) -> Tensor:
        """(b t): relevance of each token to the end token, as shares of what all tokens between start and end have;
        zero for these two and behind."""
        assert self.text is not None
        row = self.text[torch.arange(len(self.end), device=self.end.device), self.end]
        place = torch.arange(row.shape[1], device=row.device)
        inside = (place > 0) & (place < self.end[:, None])
        row = row * inside
        return row / row.sum(-1, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)

    def patches(self) -> Tensor:
        """(b h w): relevance of each patch to the class token."""
        assert self.image is not None
        return self.image[:, 0, 1:].unflatten(-1, self.grid)


class ClipExplainer:
    """Looks at pairs of pictures and texts with a frozen CLIP."""

    def __init__(self, clip: Clip):
        self.clip, self.model, self.tokenizer = clip, clip.model, clip.tokenizer
        self.length = clip.length
        patches = clip.side // int(self.model.config.vision_config.patch_size)
        self.grid = (patches, patches)
        self._text_sites, self._image_sites = self._find_sites()
        self.words = Words([TextStream(self.tokenizer, "clip", 0, self.length, str)])

    def read(self, text: str) -> Reading:
        """A text as the CLIP's tokenizer reads it: positions of words and phrases."""
        return self.words.read(text)

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and mask (b t) of texts, cut off where the text tower ends."""
        read = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt", verbose=False
        )
        return {name: read[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def prepare(self, images: Tensor) -> Tensor:
        """Pictures (b 3 H W) in [-1, 1] as the image tower wants them (b 3 s s); square, differentiable."""
        if images.shape[-1] != images.shape[-2]:
            raise BadInput(f"pictures are {images.shape[-1]}x{images.shape[-2]}; a CLIP sees squares: cut them out.")
        images = images.to(self.model.device, self.model.dtype)
        return self.clip.preprocessing.tensor(images)

    def explain(
        self,
        images: Tensor,
        texts: Sequence[str] | dict[str, Tensor],
        *,
        text: bool = False,
        image: bool = False,
        text_start: int = 0,
        image_start: int = -1,
        second_order: bool = False,
    ) -> ClipExplanation:
        """Look at pictures (b 3 H W) in [-1, 1] and as many texts (or their :meth:`tokens`), each with its own.

        ``text`` and ``image``: whose relevance is wanted, from the layers ``text_start`` and ``image_start`` on (-1:
        the last alone). Where gradients are recorded it can be differentiated: with ``second_order`` rightly, else with
        the gradients inside it held fixed. Raises BadInput for unequal numbers.
        """
        tokens = texts if isinstance(texts, dict) else self.tokens(texts)
        if len(tokens["input_ids"]) != len(images):
            raise BadInput(f"{len(images)} pictures and {len(tokens['input_ids'])} texts: there must be one each.")
        model, recording = self.model, torch.is_grad_enabled()
        with torch.enable_grad() if text or image else torch.set_grad_enabled(torch.is_grad_enabled()):
            pixels = self.prepare(images)
            text_sites = self._text_sites[text_start:] if text else []
            image_sites = self._image_sites[image_start:] if image else []
            written, text_maps = self._run(
                model.text_model, text_sites, lambda: model.text_model(**tokens).pooler_output
            )
            looked, image_maps = self._run(
                model.vision_model, image_sites, lambda: model.vision_model(pixel_values=pixels).pooler_output
            )
            image_embeds = F.normalize(model.visual_projection(looked).float(), dim=-1)
            text_embeds = F.normalize(model.text_projection(written).float(), dim=-1)
            similarity = (image_embeds * text_embeds).sum(-1)
            maps = [*text_maps, *image_maps]
            gradients = gradients_of(similarity, maps, second_order, keep_graph=True) if maps else []
            k = len(text_maps)
            found = [
                self_relevance(of, by) if of else None
                for of, by in ((text_maps, gradients[:k]), (image_maps, gradients[k:]))
            ]
            if not recording:
                found = [None if each is None else each.detach() for each in found]
        end = tokens["attention_mask"].sum(-1) - 1
        return ClipExplanation(similarity, found[0], found[1], end, self.grid, image_embeds, text_embeds)

    def explain_text(
        self, tokens: dict[str, Tensor], image_embeds: Tensor, second_order: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Cosines (b) of texts (ids and mask) with unit picture embeddings (b d) that exist already, and the relevance
        (b t t) among the tokens of each text; as :meth:`explain` with respect to gradients."""
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            written, maps = self._run(
                self.model.text_model, self._text_sites, lambda: self.model.text_model(**tokens).pooler_output
            )
            cosines = (F.normalize(self.model.text_projection(written).float(), dim=-1) * image_embeds).sum(-1)
            relevance = self_relevance(maps, gradients_of(cosines, maps, second_order, keep_graph=True))
        return (cosines, relevance) if recording else (cosines.detach(), relevance.detach())

    def _run(self, tower: Any, sites: list[Site], call: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What ``call()`` returns, and the attention maps (b k n t) of ``sites`` in it, explicit and with gradients."""
        if not sites:
            return call(), []
        with captured(tower, {site.path for site in sites}.__contains__) as calls:
            out = call()
        return out, [each.probs for each in calls]

    def _find_sites(self) -> tuple[list[Site], list[Site]]:
        """The attention layers of the text tower and of the image tower, in order."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.model.device)
        pixels = torch.zeros(1, 3, self.clip.side, self.clip.side, device=self.model.device, dtype=self.model.dtype)
        text, image = self.model.text_model, self.model.vision_model
        with torch.no_grad():
            return find_sites(text, lambda: text(input_ids=ids)), find_sites(image, lambda: image(pixel_values=pixels))
