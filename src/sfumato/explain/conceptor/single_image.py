"""Single-image decomposition (section 4.2): what one picture needs of a concept's words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.arrays import to_tensor
from sfumato.explain.conceptor.decomposition import Decomposition
from sfumato.explain.conceptor.vocabulary import PIECE
from sfumato.models import Model
from sfumato.models.readers import PLAIN, load_clip
from sfumato.sampling.pixels import as_pictures


def explain_seed(
    model: Model,
    found: Decomposition,
    seed: int,
    *,
    keep: int | None = None,
    enough: float = 0.93,
    alike: float = 0.95,
    clip: str = PLAIN,
    **drawing: Any,
) -> Decomposition:
    """What one picture needs of a decomposition: words are taken out from the least on, each with words whose text is
    more than ``alike`` it for CLIP, and stay out where the picture of ``seed`` stays at least ``enough`` similar for
    CLIP to what the whole decomposition draws; passes are repeated until none takes a word out."""
    net = load_clip(clip)
    top = found.alphas.argsort(descending=True, stable=True)[: found.keep if keep is None else keep].tolist()
    alphas = torch.zeros_like(found.alphas)
    alphas[top] = found.alphas[top]
    texts = F.normalize(
        to_tensor(net.text_features([found.template.format(found.names[i].removesuffix(PIECE)) for i in top])),
        dim=1,
    )
    near = texts @ texts.T > alike

    def drawn(coefficients: Tensor) -> tuple[Tensor, Tensor]:
        pixels = replace(found, alphas=coefficients).draw(model, [seed], **drawing)
        return F.normalize(to_tensor(net.features(as_pictures(pixels))), dim=1)[0], pixels

    target, first = drawn(alphas)
    last, removed = first, True
    while removed:
        removed = False
        for k in range(len(top) - 1, -1, -1):
            if alphas[top[k]] == 0:
                continue
            tried = alphas.clone()
            tried[[top[j] for j in range(len(top)) if near[k, j] or j == k]] = 0
            if not tried.any():
                continue
            features, pixels = drawn(tried)
            if float(features @ target) >= enough:
                alphas, last, removed = tried, pixels, True
    return replace(found, alphas=alphas, pictures=as_pictures(first), drawn=as_pictures(last), vectors={})
