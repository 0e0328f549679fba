"""How well a model was taught a subject, in the features of any net: alike, obedient, not leaking, diverse, not adrift.

The figures of DreamBooth's evaluation (Ruiz et al. 2023, section 4.3) on unit vectors of a feature net: *identity* is
DINO or CLIP-I, the mean cosine over all pairs of a drawn and a real picture; *prompt* is CLIP-T; *leak* is PRES, the
identity of pictures of the class alone, here as the share of the way from before the teaching to the subject's own;
*diversity* is 1 - the mean cosine of two pictures of one prompt (DIV has LPIPS); *drift* is 1 - the mean cosine of
pictures of unrelated prompts before and after, from the same seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from sfumato.metrics.clip_score import unit

__all__ = ["Score", "diversity", "drift", "identity", "pareto", "scored"]


def identity(drawn: np.ndarray, real: np.ndarray) -> float:
    """Mean cosine over all pairs of features (n d) and (m d)."""
    return float((unit(drawn) @ unit(real).T).mean())


def diversity(drawn: np.ndarray) -> float:
    """1 - mean cosine over all pairs of different rows of features (n d); 0 for fewer than two."""
    if len(drawn) < 2:
        return 0.0
    cosines = unit(drawn) @ unit(drawn).T
    return float(1 - (cosines.sum() - np.trace(cosines)) / (len(drawn) * (len(drawn) - 1)))


def drift(before: np.ndarray, after: np.ndarray) -> float:
    """1 - mean cosine of features (n d) of the same prompts and seeds before and after."""
    return float(1 - (unit(before) * unit(after)).sum(1).mean())


@dataclass(frozen=True)
class Score:
    """Of one checkpoint; see the top of this page. ``step``: how much it had learnt."""

    step: int
    identity: float
    leak: float
    drift: float
    diversity: float
    prompt: float = float("nan")

    def to_json(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value == value}

    @classmethod
    def from_json(cls, values: Mapping[str, float]) -> Score:
        """Inverse of :meth:`to_json`; other entries are left out."""
        known: dict[str, Any] = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        return cls(**known)

    def figure(self, most_leak: float = 0.1, most_drift: float = 0.05) -> float:
        """One number, lower is better: the identity, as long as leak and drift are within their bounds."""
        over = max(0.0, self.leak - most_leak) + max(0.0, self.drift - most_drift)
        return -self.identity + 10 * over


def scored(
    step: int, real: np.ndarray, subject: np.ndarray, plain: np.ndarray, plain_before: np.ndarray,
    others: np.ndarray, others_before: np.ndarray, prompt: float = float("nan"),
) -> Score:  # fmt: skip
    """From features (n d) of the real pictures, of drawn ones of the subject, of its class alone and of other prompts,
    these two before the teaching as well."""
    floor, ceiling = identity(plain_before, real), identity(real, real)
    leak = (identity(plain, real) - floor) / max(ceiling - floor, 1e-6)
    return Score(
        step, identity(subject, real), leak, drift(others_before, others), diversity(subject), prompt
    )  # fmt: skip


def pareto(scores: Sequence[Score]) -> list[Score]:
    """The scores that no other beats in identity without more leak plus drift."""
    return [
        each for each in scores
        if not any(other.identity > each.identity and other.leak + other.drift <= each.leak + each.drift
                   for other in scores)
    ]  # fmt: skip
