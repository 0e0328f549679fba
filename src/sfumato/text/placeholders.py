"""Placeholders: words of a prompt that stand for vectors, any number of each, in every text encoder of a model.

    >>> with placeholders(model, {"<rex>": {"text_encoder": vectors}}):  # (k d)
    ...     condition = model.encode_text("a photo of <rex> on the grass")

Each tokenizer is replaced by a copy that knows the placeholder as k tokens of its own: the copy's normalizer puts them
in its place, so character offsets stay those of the prompt, ``Words`` finds it, and nobody who tokenizes has to know. A
hook on the table of embeddings answers with the vectors where these tokens are, and gradients flow to them. Tokenizers
and tables themselves are never touched.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sfumato.errors import BadInput, NotSupported
from sfumato.models.chunks import instead
from sfumato.models.text_towers import TextTower, text_towers

__all__ = ["placeholders", "refuse_unwritable"]

#: brackets and colons belong to the weights of prompts
_FORBIDDEN = re.compile(r"[\s()\[\]\\]")


@contextmanager
def placeholders(
    model: Any, words: Mapping[str, Mapping[str, Tensor]], used: Callable[[str], None] | None = None
) -> Iterator[None]:
    """While it lasts, each of ``words`` stands for vectors (k d), or one (d), by text encoder (``text_encoder``,
    ``text_encoder_2`` ...), wherever it occurs as a whole word, in any case; an encoder without vectors reads it as it
    is written. Contexts nest; of two for one word the inner holds. ``used`` is called with a word whenever it is read.

    Raises BadInput for a word that cannot be written in a prompt, an encoder that the model lacks and vectors of
    another width; NotSupported for tokenizers without a normalizer.
    """
    towers = {tower.name: tower for tower in text_towers(model)}
    for word, vectors in words.items():
        refuse_unwritable(word)
        for name, rows in vectors.items():
            if name not in towers:
                raise BadInput(f"{model.name} has no {name} to read {word}; it has {', '.join(towers)}.")
            width = towers[name].table.shape[1]
            if rows.ndim not in (1, 2) or rows.shape[-1] != width or not rows.numel():
                raise BadInput(f"{word} has vectors of shape {tuple(rows.shape)}; {name} reads (k, {width}).")
    with ExitStack() as stack:
        for name, tower in towers.items():
            known = {word: vectors[name].reshape(-1, vectors[name].shape[-1]) for word, vectors in words.items()
                     if name in vectors}  # fmt: skip
            if known:
                attribute = name.replace("text_encoder", "tokenizer")
                tokenizer, ids = _extended(tower.tokenizer, {word: len(rows) for word, rows in known.items()})
                stack.enter_context(instead(model.pipe, attribute, tokenizer))
                for word, rows in known.items():
                    stack.enter_context(_reading(tower, ids[word], rows, word, used))
        yield


def refuse_unwritable(word: str) -> None:
    """Raises BadInput for what cannot be written as a word of a prompt."""
    if not word or _FORBIDDEN.search(word):
        raise BadInput(f"{word!r} cannot be a word of a prompt: blanks, brackets and backslashes have a meaning.")


# copies by tokenizer: a vocabulary of 49,000 takes 0.4 seconds to copy, and a run of several batches needs it in each
_copies: WeakKeyDictionary[Any, dict[Any, tuple[Any, dict[str, int]]]] = WeakKeyDictionary()


def _extended(tokenizer: Any, words: Mapping[str, int]) -> tuple[Any, dict[str, int]]:
    """A copy that reads each word as so many new tokens; and the id of the first of each."""
    known, key = _copies.setdefault(tokenizer, {}), (len(tokenizer), *sorted(words.items()))
    if key not in known:
        if len(known) > 3:
            known.clear()
        known[key] = _copied(tokenizer, words)
    return known[key]


def _copied(tokenizer: Any, words: Mapping[str, int]) -> tuple[Any, dict[str, int]]:
    from tokenizers import Regex, normalizers

    extended = copy.deepcopy(tokenizer)
    backend: Any = getattr(extended, "_tokenizer", None)
    if not hasattr(backend, "normalizer"):
        raise NotSupported(f"tokenizer {type(tokenizer).__name__} can learn no words; load its fast version.")
    steps: list[Any] = []
    tokens: dict[str, list[str]] = {}
    number = len(extended)
    for word in sorted(words, key=len, reverse=True):  # a longer word before one that it contains
        # characters that no prompt has and no normalizer changes
        tokens[word] = [f"\ue000{number + i}\ue001" for i in range(words[word])]
        number += words[word]
        start = r"(?<!\w)" if re.match(r"\w", word) else ""
        end = r"(?!\w)" if re.search(r"\w$", word) else ""
        steps.append(normalizers.Replace(Regex(f"(?i){start}{re.escape(word)}{end}"), "".join(tokens[word])))
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*steps, *own])
    extended.add_tokens([token for each in tokens.values() for token in each])
    return extended, {word: int(extended.convert_tokens_to_ids(each[0])) for word, each in tokens.items()}


@contextmanager
def _reading(
    tower: TextTower, first: int, rows: Tensor, word: str, used: Callable[[str], None] | None
) -> Iterator[None]:
    """While it lasts, the encoder reads token ``first + i`` as ``rows[i]`` (k d).

    The new ids are taken out before the encoder sees them, not only before its table does: CLIPs with the settings of
    their first years take the highest id for the end of the text, and with it the pooled vector.
    """
    whole: list[Tensor] = []  # ids relative to the word's, of a call of the encoder
    pending: list[Tensor] = []  # ... of a call of its table

    def taken_out(ids: Tensor) -> Tensor:
        return torch.where((ids >= first) & (ids < first + len(rows)), 0, ids)  # the table does not go so far

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        whole.clear()
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, Tensor):
            whole[:] = [ids - first]
            args, kwargs = (
                ((taken_out(ids), *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": taken_out(ids)})
            )
        return args, kwargs

    def leave(*_: Any) -> None:
        whole.clear()

    rows = tower.as_read(rows)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        pending[:] = whole or [ids - first]
        return (taken_out(ids), *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        at = pending.pop()
        mine = (at >= 0) & (at < len(rows))
        if used is not None and bool(mine.any()):
            used(word)
        return torch.where(mine[..., None], rows.to(output)[at.clamp(0, len(rows) - 1)], output)

    with ExitStack() as stack:
        stack.callback(tower.encoder.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(tower.encoder.register_forward_hook(leave, always_call=True).remove)
        for part in tower.holders:
            stack.callback(part.register_forward_pre_hook(before).remove)
            stack.callback(part.register_forward_hook(after).remove)
        yield
