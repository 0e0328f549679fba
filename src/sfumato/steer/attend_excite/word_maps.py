"""Maps of words from attention to tokens (section 3): shared out anew among tokens, smoothed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.attention.call import Call
from sfumato.attention.sites import Site
from sfumato.text.words import Reading, WordSpan

#: Inverse temperature of the second softmax over tokens (the original's code; not in the paper).
SHARPNESS = 100.0
#: The most attention that the tokens which share it may hold for that: Stable Diffusion's start token keeps the rest.
#: Where they hold more, a hundred times as much is all or nothing, and there is no gradient.
HELD = 0.1


class WordMaps:
    """The maps of each prompt's ``subjects``, from the attention of ``sites`` of one grid.

    ``against``: which tokens share a place's attention: "words", "all" (end and padding too), or "auto": all for CLIP
    cross-attention. Other encoders pad with hundreds of tokens, and in joint attention end and padding are no rivals
    that the temperature was made for. ``kernel`` (1 1 3 3) smooths. ``sharpness``: the inverse temperature; None:
    :data:`SHARPNESS`, less where these tokens hold more than :data:`HELD` of the attention.
    """

    def __init__(
        self,
        readings: Sequence[Reading],
        subjects: Sequence[Sequence[WordSpan]],
        sites: Sequence[Site],
        against: str,
        kernel: Tensor | None,
        device: torch.device,
        sharpness: float | None = None,
    ):
        self.sharpness = sharpness
        whole = against == "all"
        if against == "auto":
            clip = all(name.startswith("clip") for name in readings[0].streams)
            whole = clip and all(site.kind == "cross" for site in sites)
        rivals = [_rivals(reading, whole) for reading in readings]
        self.columns = sorted(set().union(*rivals))
        index = {position: i for i, position in enumerate(self.columns)}
        shares = torch.zeros(len(readings), len(index), dtype=torch.bool)  # (b c): who shares attention
        weights = torch.zeros(len(readings), max(map(len, subjects)), len(index))  # (b s c): words from tokens
        for row, (spans, others) in enumerate(zip(subjects, rivals, strict=True)):
            shares[row, [index[position] for position in others]] = True
            for s, span in enumerate(spans):
                for tokens in set(span.tokens.values()) - {()}:  # encoders add up, the tokens of one average
                    weights[row, s, [index[position] for position in tokens]] += 1 / len(tokens)
        self.rivals, self.weights = shares.to(device), weights.to(device)
        self.kernel = None if kernel is None else kernel.to(device)
        self.shape = sites[0].shape  # ([f] h w)
        self.sites: dict[str, Tensor] = {}

    def observe(self, call: Call) -> None:
        """Keeps the attention of one site from pixels to text (b k n c)."""
        assert call.site.text is not None
        first = call.site.text[0]
        within = call.site.text if call.site.kind == "joint" else None  # there pixels share it with pixels
        probs = call.branch("cond").word_probs([first + position for position in self.columns], within=within)
        self.sites[call.site.path] = call.site.unfold(probs)

    def take(self, rows: Sequence[int]) -> Tensor:
        """Maps of words (b s [f] h w) of these samples, from what was observed: attention to tokens, mean over sites
        and heads, without the start token shared out among the others by a sharp softmax (the code's), the tokens of a
        word averaged, smoothed."""
        attention = torch.cat(list(self.sites.values()), 1).mean(1)
        rivals = self.rivals[rows][:, None]
        sharpness = self._sharpness(attention, rivals) if self.sharpness is None else self.sharpness
        shares = (sharpness * attention).masked_fill(~rivals, float("-inf")).softmax(-1)
        maps = torch.einsum("bnc,bsc->bsn", shares, self.weights[rows].to(shares.dtype)).unflatten(-1, self.shape)
        if self.kernel is not None:  # every frame by itself
            padded = F.pad(maps.flatten(0, -3)[:, None], (1, 1, 1, 1), mode="reflect")
            maps = F.conv2d(padded, self.kernel.to(maps.dtype))[:, 0].unflatten(0, maps.shape[:-2])
        return maps

    @staticmethod
    def _sharpness(attention: Tensor, rivals: Tensor) -> Tensor:
        """Per sample (b 1 1), of attention (b n c) from places to tokens, among which ``rivals`` (b 1 c) share."""
        held = (attention.detach() * rivals).sum(-1).mean(-1).view(-1, 1, 1)
        return SHARPNESS * (HELD / held.clamp_min(HELD))


def smoothing_kernel(sigma: float, true_gaussian: bool = False) -> Tensor:
    """A 3x3 Gaussian (1 1 3 3). The original's is exp(-(x / 2 sigma)^2), whose standard deviation is sqrt(2) sigma."""
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    taps = torch.exp(-(x**2) / ((2 if true_gaussian else 4) * sigma**2))
    taps = taps / taps.sum()
    return torch.outer(taps, taps).float()[None, None]


def _rivals(reading: Reading, whole: bool) -> set[int]:
    """Positions on the text axis among which a place's attention is shared out."""
    words = {position for positions in reading.tokens().values() for position in positions}
    if not whole:
        return words
    rest = {position for name in ("<end>", "<pad>") for s in reading.streams.values() for position in s.special[name]}
    # the original leaves out the first and the last position; the last is never a word's
    return words | rest - {max(words | rest)}
