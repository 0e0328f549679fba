"""The tokenizer of the built-in text encoders: CLIP's byte-level BPE with every toybox word one token."""

from __future__ import annotations

from transformers import CLIPTokenizer

from sfumato.toybox import VOCABULARY

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32


def build_tokenizer(length: int = LENGTH) -> CLIPTokenizer:
    """A ``CLIPTokenizer`` whose vocabulary is the 256 bytes (inside and at the end of a word) and the toybox words.

    Each toybox word is one token; any other text falls back to smaller pieces down to bytes: everything tokenizes and
    decodes. The merges are learnt from no corpus: each word in turn is put together from left to right.
    """
    alphabet = sorted(_byte_characters())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges: dict[tuple[str, str], int] = {}
    for word in VOCABULARY:
        while len(parts := _encode(word, merges)) > 1:
            merges[parts[0], parts[1]] = len(merges)
            pieces.append(parts[0] + parts[1])
    vocabulary = {piece: i for i, piece in enumerate([*pieces, START, END])}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(merges),
        model_max_length=length,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
    )


def _encode(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """The pieces of ``word`` under byte-pair encoding: again and again the earliest merge that applies."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while known := [pair for pair in zip(parts, parts[1:], strict=False) if pair in merges]:
        best = min(known, key=merges.__getitem__)
        at = list(zip(parts, parts[1:], strict=False)).index(best)
        parts[at : at + 2] = ["".join(best)]
    return parts


def _byte_characters() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level BPE (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(extra)) for byte in range(256)]
