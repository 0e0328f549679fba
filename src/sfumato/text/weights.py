"""Weights inside prompts: ``a (red:1.3) cube``, ``a (red) cube``, ``a [red] cube``.

The notation is that of AUTOMATIC1111's web UI, which ComfyUI shares but for the square brackets: round brackets
multiply the weight of what they hold by 1.1 or by the number named, square ones divide it by 1.1, brackets nest, a
backslash makes a bracket (or a backslash) ordinary text. Unlike there, a bracket without its partner is ordinary text
too, as are brackets that hold nothing or are nested more than 100 deep. What A1111 calls prompt editing
(``[a:b:0.5]``, ``[a|b]``) is not known here.

A token of weight w is moved along the line from what the *empty* prompt has at its position to what the encoder says
(ComfyUI's convention, in every text encoder alike): ``e_0 + w (e - e_0)``. At 1 the embedding keeps its bits, at 0 it
is the empty prompt's; nothing is renormalised, and pooled vectors are left as they are. With ``weighting="compel"``
prompts with weights below 1 are moved on, as compel does, towards what the encoder says while these words are hidden
from it: ``(e + sum_i a_i e_i) / (1 + sum_i a_i)`` over the stretches i of weight w_i < 1, with
``a_i = tan((1 - w_i) pi / 2)``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import NotSupported
from sfumato.models import Condition, Model
from sfumato.models.chunks import BREAK, MARK
from sfumato.models.families.chat_template import TemplatedTokenizer
from sfumato.text.words import Words

__all__ = ["WeightedPrompt", "encode_weighted", "read_weights"]

#: By how much a pair of brackets without a number changes the weight.
STEP = 1.1
#: Brackets nested deeper than this are ordinary text, so that reading takes time in proportion to the prompt's length.
DEEPEST = 100

_CLOSES = {")": "(", "]": "["}
#: Weights beyond this, from numbers or brackets within brackets, are this: the numbers behind them must stay finite.
LARGEST = 1e5
LONGEST_NUMBER = 40  # characters, with colon and blanks

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")


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

    def lowered(self) -> list[tuple[int, int, float]]:
        """The stretches of equal weight below 1: (start, end, weight), blanks between words left to either side."""
        visible = [i for i, char in enumerate(self.text) if not char.isspace()]
        runs = [list(run) for _, run in itertools.groupby(visible, key=self.weights.__getitem__)]
        return [(run[0], run[-1] + 1, self.weights[run[0]]) for run in runs if self.weights[run[0]] < 1]

    def part(self, text: str, origins: Sequence[int]) -> WeightedPrompt:
        """A text made from this one: ``origins`` names the character each of its own comes from, -1 for none."""
        return WeightedPrompt(text, tuple(self.weights[i] if i >= 0 else 1.0 for i in origins))


def read_weights(prompt: str) -> WeightedPrompt:
    """Reads the weights out of a prompt. Never fails: what is no weight is text. ``BREAK`` becomes the blank that
    begins a new chunk (:mod:`sfumato.models.chunks`)."""
    prompt = BREAK.sub(MARK, prompt)
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
        if bracket == ")":
            start = max(at + 1, end - LONGEST_NUMBER)
            held, colon, number = "".join(chars[start:]).rpartition(":")
            if colon and _NUMBER.fullmatch(number.strip()):
                factor, end = float(number), start + len(held)
                while end > at + 1 and chars[end - 1].isspace():
                    end -= 1
        if all(char.isspace() for char in chars[at + 1 : end]):
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
    return WeightedPrompt("".join(chars), tuple(map(_bounded, weights)))


def _bounded(weight: float) -> float:
    return round(max(-LARGEST, min(LARGEST, weight)), 6) if weight == weight else 0.0  # 0 times infinity


def encode_weighted(
    model: Model,
    prompts: Sequence[str | WeightedPrompt],
    negative: Sequence[str | WeightedPrompt] | None = None,
    guidance: bool = True,
    embedded_guidance: float | None = None,
    weighting: str = "comfyui",
) -> Condition:
    """:meth:`~sfumato.models.Model.encode_text` for prompts with weights, read already or not; the condition holds the
    plain texts. ``weighting``: ``"comfyui"`` or ``"compel"``, what weights below 1 mean.

    Prompts whose weights are all 1 are encoded to the very bits of the plain prompt. Raises NotSupported for compel's
    weights below 1 where the text stands inside a template of its encoder.
    """
    read = [text if isinstance(text, WeightedPrompt) else read_weights(text) for text in prompts]
    unwanted = None
    if negative is not None:
        unwanted = [text if isinstance(text, WeightedPrompt) else read_weights(text) for text in negative]
    with model.in_chunks(model.chunks_for([each.text for each in [*read, *(unwanted or ())]])):
        condition = model.encode_text(
            [each.text for each in read],
            None if unwanted is None else [each.text for each in unwanted],
            guidance=guidance,
            embedded_guidance=embedded_guidance,
        )
        for rows, texts in ((condition.cond, read), (condition.uncond, unwanted)):
            if rows is not None and texts is not None and not all(each.plain for each in texts):
                weighed = _weighed(model, rows["embeds"], texts)
                rows["embeds"] = _lowered(model, weighed, texts) if weighting == "compel" else weighed
    return condition


def _weighed(model: Model, embeds: Tensor, read: Sequence[WeightedPrompt]) -> Tensor:
    """Embeddings (b t d) with every token moved by its weight."""
    words = Words(model)
    weights = torch.ones(embeds.shape[:2])
    for row, each in enumerate(read):
        found: dict[int, list[float]] = {}
        for stream in words.read(each.text).streams.values():
            for place, (start, end) in zip(stream.places, stream.spans, strict=True):
                found.setdefault(place, []).append(each.weight(start, end))
        for position, values in found.items():  # two encoders side by side say the same, unless they split words apart
            weights[row, position] = sum(values) / len(values)
    empty = model.encode_text("", guidance=False).cond["embeds"].to(embeds)[:, : embeds.shape[1]]
    # of families that do not fill texts up: nothing stands where the empty text has no token
    empty = torch.nn.functional.pad(empty, (0, 0, 0, embeds.shape[1] - empty.shape[1]))
    w = weights.to(embeds)[..., None]
    return torch.where(w == 1, embeds, empty + w * (embeds - empty))


def _lowered(model: Model, weighed: Tensor, read: Sequence[WeightedPrompt]) -> Tensor:
    """Embeddings (b t d), weighed already, moved towards those of prompts without their words of weight below 1."""
    words, out = Words(model), weighed.clone()
    for row, each in enumerate(read):
        total = 1.0
        for start, end, weight in each.lowered():
            places = words.span(each.text, start, end).positions
            with _hidden(model, places):
                without = model.encode_text(each.text, guidance=False).cond["embeds"]
            share = math.tan((1 - max(weight, 1e-5)) * math.pi / 2)
            out[row] += share * _weighed(model, without, [each])[0]
            total += share
        out[row] /= total
    return out


@contextmanager
def _hidden(model: Model, places: Sequence[int]) -> Iterator[None]:
    """While it lasts, no token attends to those at ``places`` of the text axis, in any text encoder."""

    def hide(stream: Any) -> Any:
        calls = itertools.count()  # an encoder reads chunk after chunk

        def hook(
            _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            ids = args[0] if args else options["input_ids"]
            first = stream.offset + next(calls) * (stream.window or 0)
            given = options.get("attention_mask")
            mask = torch.ones_like(ids) if given is None else given.clone()
            mask[:, [place - first for place in places if 0 <= place - first < ids.shape[1]]] = 0
            return args, {**options, "attention_mask": mask}

        return hook

    with ExitStack() as stack:
        for stream in model.tokenizers:
            if isinstance(stream.tokenizer, TemplatedTokenizer):
                raise NotSupported(
                    f"weighting=compel cannot hide words from the text encoder of {model.name}, which reads them in a "
                    f"template; use weighting=comfyui."
                )
            encoder = getattr(model.pipe, stream.attribute.replace("tokenizer", "text_encoder"))
            stack.callback(encoder.register_forward_pre_hook(hide(stream), with_kwargs=True).remove)
        yield
