"""The text encoders of a pipeline, and vectors in place of the embeddings of some tokens of a prompt.

Nothing is added to tokenizers and no weight changes: a hook on the table of token embeddings answers otherwise while
the context lasts, and gradients flow to the vectors.

    >>> with pseudo_word(model, "cube", vectors):  # {"text_encoder": (d)}
    ...     condition = model.encode_text("a cube on the grass")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import BadInput, NotSupported

__all__ = ["TextTower", "in_place", "pseudo_word", "text_towers", "token_of", "tokens_of"]


@dataclass(frozen=True, eq=False)
class TextTower:
    """One text encoder of a pipeline with its tokenizer. ``name``: the component's, such as ``text_encoder_2``."""

    name: str
    encoder: nn.Module
    tokenizer: Any

    @property
    def table(self) -> Tensor:
        """Embeddings (v d) of all tokens."""
        return self.encoder.get_input_embeddings().weight  # type: ignore[operator]

    def as_read(self, rows: Tensor) -> Tensor:
        """Rows of the table (... d) as the encoder reads them: Gemma's table multiplies what it looks up."""
        scale = getattr(self.encoder.get_input_embeddings(), "embed_scale", None)  # type: ignore[operator]
        rows = rows.to(self.table)
        return rows if scale is None else rows * scale.to(rows)

    def row(self, token: int) -> Tensor:
        """A token's embedding (d), as the table has it; that of a placeholder, which is beyond its end, as it is read
        now."""
        if token < len(self.table):
            return self.table.detach()[token]
        read = self.holders[0](torch.tensor([[token]], device=self.table.device))[0, 0].detach()
        scale = getattr(self.encoder.get_input_embeddings(), "embed_scale", None)  # type: ignore[operator]
        return read if scale is None else read / scale.to(read)

    @property
    def holders(self) -> list[nn.Module]:
        """The modules that look embeddings up."""
        return table_holders(self.encoder)


def table_holders(encoder: nn.Module) -> list[nn.Module]:
    """The modules that hold an encoder's table of embeddings: T5 has the same weight in two, and not the one that it
    names is the one that runs."""
    table = encoder.get_input_embeddings().weight  # type: ignore[operator]
    return [part for part in encoder.modules() if getattr(part, "weight", None) is table]


def text_towers(model: Any) -> list[TextTower]:
    """The text encoders of a model in the pipeline's order. Raises NotSupported where there is none."""
    parts, found = model.pipe.components, []
    for suffix in ("", "_2", "_3"):
        encoder, tokenizer = parts.get(f"text_encoder{suffix}"), parts.get(f"tokenizer{suffix}")
        if encoder is not None and tokenizer is not None:
            found.append(TextTower(f"text_encoder{suffix}", encoder, tokenizer))
    if not found:
        raise NotSupported(f"{model.name} has no text encoder whose tokens could be replaced.")
    return found


def tokens_of(tower: TextTower, word: str) -> tuple[int, ...]:
    """The ids of a word that is a single token of this tower: within a text, and at its beginning where that is another
    one (byte-pair pieces of language models begin with the blank before them). Raises BadInput for other words."""

    def ids(text: str) -> list[int]:
        return tower.tokenizer(text, add_special_tokens=False).input_ids

    inside, alone = ids(f"a {word}")[len(ids("a")) :], ids(word)
    found = [each[0] for each in (inside, alone) if len(each) == 1 and each[0] != tower.tokenizer.unk_token_id]
    if not found:
        count = max(len(inside), len(alone))
        raise BadInput(f"{word!r} is {count} tokens in {tower.name}; only a word of one token can stand for a vector.")
    return tuple(dict.fromkeys(map(int, found)))


def token_of(tower: TextTower, word: str) -> int:
    """The first of :func:`tokens_of`: the id of a word within a text."""
    return tokens_of(tower, word)[0]


@contextmanager
def in_place(encoder: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, ``change(ids (b t), embeddings (b t d))`` says what the encoder reads in place of its tokens."""

    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return change(args[0], output)

    handles = [part.register_forward_hook(hook) for part in table_holders(encoder)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def pseudo_word(
    model: Any, word: str, vectors: Mapping[str, Tensor], used: Callable[[], None] | None = None
) -> Iterator[None]:
    """While it lasts, ``word`` means ``vectors``: per text encoder (by :class:`TextTower` name) a vector (d), wherever
    the word's token occurs. Encoders without a vector keep the word. ``used`` is called whenever it is read. Raises
    BadInput for a word of several tokens."""
    with ExitStack() as stack:
        visited: set[int] = set()
        for tower in text_towers(model):
            vector = vectors.get(tower.name)
            if vector is None or id(tower.encoder) in visited:
                continue
            visited.add(id(tower.encoder))
            stack.enter_context(in_place(tower.encoder, _putting(tokens_of(tower, word), tower.as_read(vector), used)))
        yield


def _putting(
    tokens: tuple[int, ...], vector: Tensor, used: Callable[[], None] | None
) -> Callable[[Tensor, Tensor], Tensor]:
    def change(ids: Tensor, embeds: Tensor) -> Tensor:
        mine = torch.isin(ids, torch.tensor(tokens, device=ids.device))
        if used is not None and bool(mine.any()):
            used()
        return torch.where(mine[..., None], vector.to(embeds), embeds)

    return change
