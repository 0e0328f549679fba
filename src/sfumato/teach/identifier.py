"""Identifiers: tokens that stand for one subject because they mean nothing else (Ruiz et al. 2023, section 4.2)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from sfumato.errors import NoMatch
from sfumato.models.text_towers import TextTower
from sfumato.rng import sequence
from sfumato.teach.word_vectors import bare

__all__ = ["candidates", "meant", "pick"]

LONGEST = 4  # characters; the paper: 3


def candidates(towers: Sequence[TextTower], avoid: Collection[str] = ()) -> list[str]:
    """Words of at most :data:`LONGEST` letters that are one token in every CLIP (T5 may read several), the rarest
    first: a token's place in a byte-pair vocabulary is about its rank in frequency, and late ones are rare. Words of
    the captions in ``avoid`` are left out, whatever their rank; single letters are taken where nothing else is left."""
    used = {word for text in avoid for word in re.findall(r"\w+", text.lower())}
    clips = [tower for tower in towers if hasattr(tower.encoder.config, "eos_token_id")
             and getattr(tower.encoder.config, "model_type", "") != "t5"] or list(towers)  # fmt: skip
    vocabulary = clips[0].tokenizer.get_vocab()
    found = []
    for token, _ in sorted(vocabulary.items(), key=lambda item: -item[1]):
        word = bare(token)
        if token == word and not token.isalpha():
            continue
        whole = token.endswith("</w>") or token.startswith(("▁", "Ġ"))
        if not whole or not 1 <= len(word) <= LONGEST or not re.fullmatch("[a-z]+", word) or word in used:
            continue
        if all(len(tower.tokenizer(word, add_special_tokens=False).input_ids) == 1 for tower in clips):
            found.append(word)
    return [word for word in found if len(word) > 1] or found


def meant(model: Any) -> tuple[str, ...]:
    """Words that a built-in model was trained to understand, whatever their rank; none for others."""
    if "toybox" not in model.card.get("data", {}):
        return ()
    from sfumato.toybox import VOCABULARY

    return tuple(VOCABULARY)


def pick(towers: Sequence[TextTower], avoid: Collection[str] = (), seed: int = 0, number: int = 1) -> list[str]:
    """``number`` identifiers, drawn from the rarest tenth. Raises NoMatch for a vocabulary without any."""
    known = candidates(towers, avoid)
    few = known[: max(number, 20, len(known) // 10)]
    if len(few) < number:
        raise NoMatch(
            f"{towers[0].name} has {len(known)} short words that no caption has, and {number} are needed: give "
            "name, a word that means nothing."
        )
    order = sequence("teach.identifier", seed).permutation(len(few))
    return [few[i] for i in order[:number]]
