"""Options of judging and comparing. Written by ``python -m docs.generate`` from the schemas, for type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class JudgeArguments(TypedDict, total=False):
    """Options of judging; see :class:`sfumato.bench.options.JudgeOptions`."""

    metrics: str | Sequence[str]
    """Which of presence, clip_score, frechet, kernel, manifold, attributes; empty: all that apply"""
    attributes: str | Sequence[str]
    """Attributes to compare; 'captions': the captions' own"""
    oracle: bool
    """Let the toy-judge say which attributes a picture shows, not CLIP"""
    net: str
    """Net of the distances: a CLIP by name or folder, or inception"""
    clip: str
    """CLIP of scores and attributes, by name or folder"""
    reader: str
    """Judge that reads pictures, by name or folder"""
    captions: bool
    """Whether captions are read"""
    cap: int
    """Most pictures a side for what needs pairs of them (>= 10, <= 200000)"""
    k: int
    """Neighbours of precision and recall (>= 1, <= 100)"""
    k_density: int
    """Neighbours of density and coverage (>= 1, <= 100)"""
    seed: int
    """Of the samples and permutations (>= 0)"""
    batch: int
    """Pictures looked at together (>= 1, <= 4096)"""
    dtype: str
    """Of the feature nets: float32, bfloat16 or float16"""
    device: str
    """Of the feature nets"""
    template: str
    """Sentence an attribute is put into"""
    pairs: bool
    """Whether pairs of attributes are compared"""
    draws: int
    """Permutations behind attribute densities (>= 0, <= 10000)"""
    ray: bool
    """Look at pictures on Ray workers"""
    workers: int | None
    """How many; none: as many as the cluster has CPUs (>= 1)"""


class CompareArguments(TypedDict, total=False):
    """Options of comparing; see :class:`sfumato.bench.options.CompareOptions`."""

    net: str
    """Net of the distances to the reference"""
    clip: str
    """CLIP of the scores, by name or folder"""
    reader: str
    """Judge that reads pictures, by name or folder"""
    encoder: str
    """Autoencoder of the perceptual distance"""
    batch: int
    """Pairs looked at together (>= 1, <= 4096)"""
    cap: int
    """Most pictures a side for the kernel distance (>= 10, <= 200000)"""
    shown: int
    """Pairs shown on the page (>= 0, <= 1000)"""
    names: tuple[str, str]
    """What the two sides are called"""
