"""Which words may be used: not the concept's own, not those too similar to it, and the nearest to the pictures."""

from __future__ import annotations

from collections.abc import Set

import torch.nn.functional as F
from torch import Tensor

from sfumato.arrays import to_tensor
from sfumato.errors import NoMatch
from sfumato.explain.conceptor.vocabulary import PIECE, Dictionary
from sfumato.models.readers import Clip
from sfumato.sampling.pixels import as_pictures


def candidates_of(
    known: Dictionary,
    excluded: Set[str],
    net: Clip | None,
    pixels: Tensor,
    template: str,
    concept: str,
    similar: float,
    limit: int,
) -> Dictionary:
    """The dictionary without ``excluded`` words, without words more than ``similar`` to the ``concept`` for CLIP, and
    of the rest the ``limit`` nearest to the pictures (b 3 H W) for CLIP. Raises NoMatch where nothing is left."""
    keep = [i for i, name in enumerate(known.names) if name.removesuffix(PIECE) not in excluded]
    if not keep:
        raise NoMatch(f"the dictionary holds nothing but the concept's own words: {', '.join(sorted(excluded))}.")
    if net is not None and (similar < 1 or len(keep) > limit):
        texts = to_tensor(net.text_features([template.format(known.names[i].removesuffix(PIECE)) for i in keep]))
        texts = F.normalize(texts, dim=1)
        if similar < 1 and concept:
            target = F.normalize(to_tensor(net.text_features([template.format(concept)])), dim=1)[0]
            near = texts @ target > similar
            keep, texts = [i for i, no in zip(keep, near.tolist(), strict=True) if not no], texts[~near]
            if not keep:
                raise NoMatch(f"every word is more similar to the concept than similar={similar:g} allows.")
        if len(keep) > limit:
            mean = F.normalize(to_tensor(net.features(as_pictures(pixels))), dim=1).mean(0)
            order = (texts @ mean).argsort(descending=True, stable=True)[:limit]
            keep = [keep[i] for i in sorted(order.tolist())]
    return known.only(keep)
