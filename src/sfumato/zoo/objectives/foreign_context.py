"""Captions in which what a word lends to the others is another word's.

A causal text tower lets "ball" in "a red ball" know that it is red, and the end and the padding know everything. A
denoiser may then read all colours there, and whoever exchanges, weighs or watches the word "red" watches a word that
does nothing. In some captions of a training, each kind of attribute (colours, shapes, patterns, sizes, grounds) is
therefore told wrongly with probability one half: the tower reads "a green ball", and of what it says only the features
at the colour itself are taken from "a red ball". Where word and context disagree the word is right, always; where they
agree the context still tells which colour is whose.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from sfumato.arrays import to_tensor
from sfumato.toybox import COLORS, GROUNDS, PATTERNS, SHAPES, SIZES


def word_kinds(tokenizer: CLIPTokenizer) -> list[list[int]]:
    """The tokens of the words of each kind of attribute, of those that are one token."""
    kinds = []
    for words in (COLORS, SHAPES, PATTERNS, SIZES, GROUNDS):
        ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
        kinds.append([each[0] for each in ids if len(each) == 1])
    return [each for each in kinds if len(each) > 1]


def other_words(tokens: Tensor, kinds: Sequence[Sequence[int]], share: float, rng: np.random.Generator) -> Tensor:
    """Token ids (b t) like ``tokens`` in which, for ``share`` of the rows, the words of every second kind are others of
    their kind: the same one wherever a word stands, and none that the row named, as far as there are such."""
    out = tokens.numpy().copy()
    for row in out:
        if rng.random() >= share:
            continue
        for kind in kinds:
            if rng.random() < 0.5:
                continue
            named = [each for each in kind if (row == each).any()]
            spare = [each for each in kind if each not in named]
            # as many as are named, if there are so many; else the named ones take turns
            new = rng.permutation(spare)[: len(named)] if len(spare) >= len(named) else np.roll(named, 1)
            places = [row == each for each in named]
            for place, other in zip(places, new, strict=True):
                row[place] = other
    return to_tensor(out)


def mixed(tokens: Tensor, foreign: Tensor, own: Tensor, context: Tensor) -> Tensor:
    """``context`` (b t d), read from token ids ``foreign`` (b t), with ``own``, read from ``tokens``, at the words that
    differ."""
    return torch.where((tokens != foreign)[..., None], own, context)
