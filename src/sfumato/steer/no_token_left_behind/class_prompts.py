"""Prompts of learnt vectors around class names, for a CLIP: their embeddings and the relevance of the names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.models.text_towers import in_place
from sfumato.relevance.clip import ClipExplainer


def logit_scale(explainer: ClipExplainer) -> float:
    return float(explainer.model.logit_scale.detach().exp())


def image_embeds(explainer: ClipExplainer, images: Tensor) -> Tensor:
    """Unit embeddings (b d) of pictures (b 3 H W)."""
    pooled = explainer.model.vision_model(pixel_values=explainer.prepare(images)).pooler_output
    return F.normalize(explainer.model.visual_projection(pooled).float(), dim=-1)


class ClassPrompts:
    """Prompts of ``count`` slots with a class name in the middle, for all classes."""

    def __init__(self, explainer: ClipExplainer, classes: Sequence[str], count: int):
        tokenizer, self.explainer = explainer.tokenizer, explainer
        half = count // 2
        names = [tokenizer(name, add_special_tokens=False).input_ids for name in classes]
        longest = max(map(len, names)) + count + 2
        if longest > explainer.length:
            raise BadInput(
                f"learn_prompt: {count} vectors and a class name take {longest} tokens; "
                f"the CLIP reads {explainer.length}."
            )
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        rows = [
            [tokenizer.bos_token_id, *[0] * half, *name, *[0] * (count - half), end]
            + [end if pad is None else pad] * (longest - len(name) - count - 2)
            for name in names
        ]
        self.ids = torch.tensor(rows)
        self.end = torch.tensor([len(name) + count + 1 for name in names])
        place = torch.arange(longest)
        size = torch.tensor([len(name) for name in names])[:, None]
        self.name = (place > half) & (place <= half + size)
        self.slot = (place > 0) & (place < self.end[:, None]) & ~self.name

    def tokens(self, rows: Tensor) -> dict[str, Tensor]:
        """Ids and mask of these classes' prompts."""
        mask = (torch.arange(self.ids.shape[1]) <= self.end[rows][:, None]).long()
        return {"input_ids": self.ids[rows], "attention_mask": mask}

    def embeds(self, context: Tensor) -> Tensor:
        """Unit embeddings (classes d) of all prompts."""
        rows = torch.arange(len(self.ids))
        with self._filled(context, rows):
            written = self.explainer.model.text_model(**self.tokens(rows)).pooler_output
        return F.normalize(self.explainer.model.text_projection(written).float(), dim=-1)

    def relevance(self, context: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines (b classes) with picture embeddings (b d), and the share of relevance of the most relevant token of
        each class's name (b classes); the end token's own entry does not count, the start token's does."""
        rows = torch.arange(len(self.ids)).repeat(len(pictures))
        with self._filled(context, rows):
            cosines, relevance = self.explainer.explain_text(
                self.tokens(rows), pictures.repeat_interleave(len(self.ids), 0)
            )
        end = self.end[rows]
        row = relevance[torch.arange(len(rows)), end]
        row = row * (torch.arange(row.shape[1]) != end[:, None])
        share = (row * self.name[rows]).amax(1) / row.sum(1).clamp_min(1e-12)
        shape = (len(pictures), len(self.ids))
        return cosines.unflatten(0, shape), share.unflatten(0, shape)

    def _filled(self, context: Tensor, rows: Tensor) -> Any:
        slot = self.slot[rows]

        def fill(ids: Tensor, embeds: Tensor) -> Tensor:
            filled = embeds.clone()
            filled[slot] = context.to(embeds).repeat(len(slot), 1)  # every prompt has all slots, in their order
            return filled

        return in_place(self.explainer.model.text_model, fill)
