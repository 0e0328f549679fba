"""Which words of a text a picture's score rests on (section 4.3), and which words those are by default."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.errors import NoMatch
from sfumato.models.readers import PLAIN, load_clip
from sfumato.relevance.clip import ClipExplainer
from sfumato.steer.no_token_left_behind.views import cut_outs
from sfumato.text.phrases import noun_phrases
from sfumato.text.words import Reading, WordSpan, find_phrases


def diagnose(images: Tensor, texts: Sequence[str], words: Sequence[str] = (), clip: str = PLAIN) -> list[dict]:
    """Per picture (b 3 H W) with its text, how much CLIP's score rests on each of ``words`` (none: the nouns): the most
    relevant word of the text has 1. Low ones are neglected; compare with pictures that do show everything."""
    explainer = ClipExplainer(load_clip(clip))
    readings = [explainer.read(text) for text in texts]
    spans = subjects(readings, words)
    with torch.no_grad():
        views = [cut_outs(image, None, 1, explainer.clip.side, 0.0, torch.Generator())[0] for image in images]
        row = explainer.explain(torch.cat(views), list(texts), text=True).tokens()
    row = row / row.amax(-1, keepdim=True).clamp_min(1e-12)
    return [
        {span.label: float(each[list(span.tokens["clip"])].max()) for span in found}
        for each, found in zip(row, spans, strict=True)
    ]


def subjects(readings: Sequence[Reading], words: Sequence[str]) -> list[list[WordSpan]]:
    """Per text the words that must count: those of ``words`` that it has, or the heads of its noun phrases. Raises
    NoMatch."""
    if words:
        return find_phrases(readings, words)
    found = []
    for reading in readings:
        heads = [phrase.head.start for phrase in noun_phrases(reading.prompt)]
        found.append([span for span in reading.all() if any(span.start <= at < span.end for at in heads)])
        if not found[-1]:
            raise NoMatch(
                f"no_token_left_behind: {reading.prompt!r} has no noun that is recognised; name words of it. "
                f"Its words: {', '.join(span.label for span in reading.all())}."
            )
    return found
