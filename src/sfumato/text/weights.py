"""Weights inside prompts: ``a (red:1.3) cube``, ``a (red) cube``, ``a [red] cube``.

The notation is that of AUTOMATIC1111's web UI, which ComfyUI shares but for the square brackets: round brackets
multiply the weight of what they hold by 1.1 or by the number named, square ones divide it by 1.1, brackets nest, a
backslash makes a bracket (or a backslash) ordinary text. Unlike there, a bracket without its partner is ordinary text
too, as are brackets that hold nothing or are nested more than 100 deep. What A1111 calls prompt editing
(``[a:b:0.5]``, ``[a|b]``) is not known here.

A token of weight w is moved along the line from what the *empty* prompt has at its position to what the encoder says
(ComfyUI's convention, in every text encoder alike): ``e_0 + w (e - e_0)``. At 1 the embedding keeps its bits, at 0 it
is the empty prompt's; nothing is renormalised, and pooled vectors are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.models import Condition, Model
from sfumato.text.words import Words

__all__ = ["WeightedPrompt", "encode_weighted", "read_weights"]

#: By how much a pair of brackets without a number changes the weight.
STEP = 1.1
#: Brackets nested deeper than this are ordinary text, so that reading takes time in proportion to the prompt's length.
DEEPEST = 100

_CLOSES = {")": "(", "]": "["}
_NUMBER = re.compile(r"\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")


@dataclass(frozen=True)
class WeightedPrompt:
    """A prompt without its weights: the plain ``text``, and the weight of each of its characters."""

    text: str
    weights: tuple[float, ...]

    @property
    def plain(self) -> bool:
        """Whether every weight is 1."""
        return all(weight == 1 for weight in self.weights)

    def weight(self, start: int, end: int) -> float:
        """The mean weight of characters [start, end) that are not blank; 1 where there are none."""
        held = [w for w, char in zip(self.weights[start:end], self.text[start:end], strict=True) if not char.isspace()]
        return sum(held) / len(held) if held else 1.0

    def part(self, text: str, home: Sequence[int]) -> WeightedPrompt:
        """A text made from this one: ``home`` names the character each of its own comes from, -1 for none."""
        return WeightedPrompt(text, tuple(self.weights[i] if i >= 0 else 1.0 for i in home))


def read_weights(prompt: str) -> WeightedPrompt:
    """Reads the weights out of a prompt. Never fails: what is no weight is text."""
    chars: list[str] = []
    weights: list[float] = []
    opened: list[tuple[str, int]] = []  # brackets not closed yet, with their place among chars
    parted = False  # a bracket was closed just before: what it held and what follows are words apart

    def put(char: str) -> None:
        nonlocal parted
        if parted and chars and chars[-1].isalnum() and char.isalnum():
            chars.append(" ")
            weights.append(1.0)
        parted = False
        chars.append(char)
        weights.append(1.0)

    def close(bracket: str) -> bool:
        """Apply the pair that ``bracket`` closes; False if it has no partner or holds nothing."""
        nonlocal parted
        depth = next((i for i in reversed(range(len(opened))) if opened[i][0] == _CLOSES[bracket]), None)
        if depth is None:
            return False
        at, end, factor = opened[depth][1], len(chars), STEP if bracket == ")" else 1 / STEP
        if bracket == ")" and (number := _NUMBER.search("".join(chars[at + 1 :]))):
            end, factor = at + 1 + number.start(), float(number[1])
        if not "".join(chars[at + 1 : end]).strip():
            return False
        del opened[depth:], chars[end:], weights[end:]
        weights[at + 1 :] = [weight * factor for weight in weights[at + 1 :]]
        if at and chars[at - 1].isalnum() and chars[at + 1].isalnum():
            chars[at] = " "
        else:
            del chars[at], weights[at]
        parted = True
        return True

    i = 0
    while i < len(prompt):
        char = prompt[i]
        if char == "\\" and prompt[i + 1 : i + 2] in ("(", ")", "[", "]", "\\"):
            put(prompt[i + 1])
            i += 2
            continue
        if char in _CLOSES and close(char):
            i += 1
            continue
        put(char)
        if char in _CLOSES.values() and len(opened) < DEEPEST:
            opened.append((char, len(chars) - 1))
        i += 1
    return WeightedPrompt("".join(chars), tuple(round(weight, 6) for weight in weights))


def encode_weighted(
    model: Model,
    prompts: Sequence[str | WeightedPrompt],
    negative: Sequence[str | WeightedPrompt] | None = None,
    guidance: bool = True,
    embedded_guidance: float | None = None,
) -> Condition:
    """:meth:`~sfumato.models.Model.encode_text` for prompts with weights, read already or not; the condition holds the
    plain texts.

    Prompts whose weights are all 1 are encoded to the very bits of the plain prompt.
    """
    read = [text if isinstance(text, WeightedPrompt) else read_weights(text) for text in prompts]
    unwanted = None
    if negative is not None:
        unwanted = [text if isinstance(text, WeightedPrompt) else read_weights(text) for text in negative]
    condition = model.encode_text(
        [each.text for each in read],
        None if unwanted is None else [each.text for each in unwanted],
        guidance=guidance,
        embedded_guidance=embedded_guidance,
    )
    for rows, texts in ((condition.cond, read), (condition.uncond, unwanted)):
        if rows is not None and texts is not None and not all(each.plain for each in texts):
            rows["embeds"] = _weighed(model, rows["embeds"], texts)
    return condition


def _weighed(model: Model, embeds: Tensor, read: Sequence[WeightedPrompt]) -> Tensor:
    """Embeddings (b t d) with every token moved by its weight."""
    words = Words(model)
    weights = torch.ones(embeds.shape[:2])
    for row, each in enumerate(read):
        found: dict[int, list[float]] = {}
        for stream in words.read(each.text).streams.values():
            for i, (start, end) in enumerate(stream.spans):
                found.setdefault(stream.first + i, []).append(each.weight(start, end))
        for position, values in found.items():  # two encoders side by side say the same, unless they split words apart
            weights[row, position] = sum(values) / len(values)
    empty = model.encode_text("", guidance=False).cond["embeds"].to(embeds)
    w = weights.to(embeds)[..., None]
    return torch.where(w == 1, embeds, empty + w * (embeds - empty))
