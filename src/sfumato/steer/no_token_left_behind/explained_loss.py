"""The loss: CLIP's score, how much it rests on each word, and where in the picture it looks (sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.markup import described
from sfumato.metrics.geometry import spherical_distance
from sfumato.relevance.clip import ClipExplainer
from sfumato.steer.no_token_left_behind.views import cut_outs

SHARPNESS, LEVEL = 20.0, 0.1  # relevance, its maximum 1, becomes a mask by sigmoid(20 (r - 0.1)) (the authors' code)


@dataclass(frozen=True, eq=False)
class Region:
    """What shall be where: a text, and its mask (H W) in [0, 1] on the picture."""

    text: str
    mask: Tensor

    __repr__ = described


@dataclass(frozen=True, eq=False)
class Target:
    """What one picture shall show: its text, the token positions of the words that must count, and regions."""

    text: str
    words: tuple[tuple[int, ...], ...] = ()
    regions: tuple[Region, ...] = ()


@dataclass(eq=False)
class LossParts:
    """The parts of a loss, each (b), and ``relevance``: per picture that of each of its words, from 0 to 1."""

    total: Tensor
    similarity: Tensor
    words: Tensor
    regions: Tensor
    relevance: list[list[float]] = field(default_factory=list)

    __repr__ = described


class ExplainedLoss:
    """How far pictures are from targets, for CLIP and for what CLIP's score rests on; one number per picture.

    - similarity: squared spherical distance 2 arcsin(|a - b| / 2)^2 of picture and text;
    - ``explain`` times 1 - the mean over the chosen words of their relevance, the most relevant word of the text having
      1 and a word's being that of its best token (section 4.3; the text tower, all layers);
    - per region the distance of its text to the whole picture and to the picture inside the mask, their mean, less
      ``spatial`` / sqrt(share of the area) times the overlap (Dice) of the mask with where the score of its text looks
      (section 4.4; the image tower, last layer).

    All are means over ``cutouts`` views of the picture, each distorted on its own, which makes it harder to raise the
    figures without drawing anything. ``augment`` 1 distorts as the authors do, 0 not at all.
    """

    def __init__(
        self,
        explainer: ClipExplainer,
        *,
        similarity: float = 1.0,
        explain: float = 1.0,
        spatial: float = 0.15,
        cutouts: int = 8,
        augment: float = 1.0,
        image_start: int = -1,
        second_order: bool = True,
    ):
        self.explainer, self.cutouts, self.augment = explainer, cutouts, augment
        self.similarity, self.explain, self.spatial = similarity, explain, spatial
        self.image_start, self.second_order = image_start, second_order

    def __call__(self, images: Tensor, targets: Sequence[Target], generators: Sequence[torch.Generator]) -> LossParts:
        """The loss of pictures (b 3 H W) in [-1, 1], each with its target and the generator of its views."""
        views, placed = [], []
        for image, target, generator in zip(images, targets, generators, strict=True):
            covers = torch.stack([region.mask for region in target.regions]).to(image) if target.regions else None
            view, cover = cut_outs(image, covers, self.cutouts, self.explainer.clip.side, self.augment, generator)
            views.append(view)
            placed.append(cover)
        stacked = torch.stack(views)  # (b c 3 s s)
        similarity, words, relevance = self._text(stacked, targets)
        regions = self._regions(stacked, targets, placed)
        total = self.similarity * similarity + self.explain * words + regions
        return LossParts(total, similarity, words, regions, relevance)

    def _text(self, views: Tensor, targets: Sequence[Target]) -> tuple[Tensor, Tensor, list[list[float]]]:
        """Distance to the whole text (b), neglect of its chosen words (b), their relevance."""
        b, c = views.shape[:2]
        texts = [target.text for target in targets for _ in range(c)]
        wanted = self.explain > 0 and any(target.words for target in targets)
        explained = self.explainer.explain(views.flatten(0, 1), texts, text=wanted, second_order=self.second_order)
        near = spherical_distance(explained.image_embeds, explained.text_embeds).unflatten(0, (b, c)).mean(1)
        if not wanted:
            return near, torch.zeros_like(near), [[] for _ in targets]
        row = explained.tokens()
        row = (row / row.amax(-1, keepdim=True).clamp_min(1e-12)).unflatten(0, (b, c))
        neglect: list[Tensor] = []
        found: list[Any] = []
        for one, target in zip(row, targets, strict=True):
            if not target.words:
                neglect.append(near.new_zeros(()))
                found.append([])
                continue
            best = torch.stack([one[:, list(positions)].amax(-1) for positions in target.words], 1)  # (c words)
            neglect.append(1 - best.mean())
            found.append(best.detach().mean(0).tolist())
        return near, torch.stack(neglect), found

    def _regions(self, views: Tensor, targets: Sequence[Target], placed: Sequence[Tensor | None]) -> Tensor:
        """The regions' part (b), the mean over the regions of a picture."""
        rows = [(i, k) for i, target in enumerate(targets) for k in range(len(target.regions))]
        if not rows:
            return views.new_zeros(len(views))
        c = views.shape[1]
        texts = [targets[i].regions[k].text for i, k in rows for _ in range(c)]
        whole = torch.cat([views[i] for i, _ in rows])
        mask = torch.cat([placed[i][:, k] for i, k in rows])  # type: ignore[index]
        explained = self.explainer.explain(
            whole, texts, image=self.spatial > 0, image_start=self.image_start, second_order=self.second_order
        )
        inside = self.explainer.explain(whole * mask[:, None], texts)
        near = (
            spherical_distance(explained.image_embeds, explained.text_embeds)
            + spherical_distance(inside.image_embeds, inside.text_embeds)
        ) / 2
        if self.spatial > 0:
            share = torch.cat([targets[i].regions[k].mask.mean().clamp_min(1e-3).expand(c) for i, k in rows]).to(near)
            near = near - self.spatial * share.rsqrt() * overlap(explained.patches(), mask)
        out = views.new_zeros(len(views))
        for (i, _), each in zip(rows, near.unflatten(0, (len(rows), c)).mean(1), strict=True):
            out = out + F.one_hot(torch.tensor(i), len(views)).to(out) * each / len(targets[i].regions)
        return out


def overlap(patches: Tensor, mask: Tensor) -> Tensor:
    """Dice (b) of masks (b s s) with relevance (b h w) made a soft mask: enlarged, its maximum 1, sharpened."""
    large = F.interpolate(patches[:, None].float(), size=tuple(mask.shape[-2:]), mode="bicubic")[:, 0].clamp_min(0)
    large = large / large.amax((1, 2), keepdim=True).clamp_min(1e-12)
    looks = torch.sigmoid(SHARPNESS * (large - LEVEL))
    inside, outside = (looks * mask).sum((1, 2)), (looks * (1 - mask)).sum((1, 2))
    return 2 * inside / (2 * inside + outside).clamp_min(1e-12)
