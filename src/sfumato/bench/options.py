"""What can be said about judging and comparing: checked before anything heavy is imported."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from sfumato import cards
from sfumato.cards import Field, ModelPath
from sfumato.errors import BadInput, UnknownName

CAP = 10_000  # pictures a side where pairs of them count
SHOWN = 40  # pairs on the page
CLIP = "toy-clip"
METRICS = ("presence", "clip_score", "frechet", "kernel", "manifold", "attributes")


def refuse_idle_net(chosen: cards.Params, real: Any) -> None:
    """Raises BadInput for a ``net`` that was given although there is nothing to measure a distance to."""
    if real is None and "net" in chosen.model_fields_set:
        raise BadInput("net measures distances to real pictures, and there are none: give --real, or leave net out.")


class JudgeOptions(cards.Params):
    """What can be said about judging folders, besides the folders."""

    SYSTEM = "judge"

    metrics: list[str] = Field(default=[], description=f"which of {', '.join(METRICS)}; empty: all that apply")
    attributes: list[str] = Field(default=[], description="attributes to compare; 'captions': the captions' own")
    oracle: bool = Field(default=False, description="let the toy-judge say which attributes a picture shows, not CLIP")
    net: ModelPath = Field(default=CLIP, description="net of the distances: a CLIP by name or folder, or inception")
    clip: ModelPath = Field(default=CLIP, description="CLIP of scores and attributes, by name or folder")
    reader: ModelPath = Field(default="toy-judge", description="judge that reads pictures, by name or folder")
    captions: bool = Field(default=True, description="whether captions are read")
    cap: int = Field(default=CAP, ge=10, le=200_000, description="most pictures a side for what needs pairs of them")
    k: int = Field(default=3, ge=1, le=100, description="neighbours of precision and recall")
    k_density: int = Field(default=5, ge=1, le=100, description="neighbours of density and coverage")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the samples and permutations")
    batch: int = Field(default=32, ge=1, le=4096, description="pictures looked at together")
    dtype: str = Field(default="float32", description="of the feature nets: float32, bfloat16 or float16")
    device: str = Field(default="cpu", description="of the feature nets")
    template: str = Field(default="a photo of {}", description="sentence an attribute is put into")
    pairs: bool = Field(default=True, description="whether pairs of attributes are compared")
    draws: int = Field(default=100, ge=0, le=10_000, description="permutations behind attribute densities")
    ray: bool = Field(default=False, description="look at pictures on Ray workers")
    workers: int | None = Field(default=None, ge=1, description="how many; none: as many as the cluster has CPUs")

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: list[str]) -> list[str]:
        for name in metrics:
            if name not in METRICS:
                raise UnknownName("metric", name, METRICS)
        return metrics


class CompareOptions(cards.Params):
    """What can be said about comparing, besides what is compared."""

    SYSTEM = "compare"

    net: ModelPath = Field(default=CLIP, description="net of the distances to the reference")
    clip: ModelPath = Field(default=CLIP, description="CLIP of the scores, by name or folder")
    reader: ModelPath = Field(default="toy-judge", description="judge that reads pictures, by name or folder")
    encoder: ModelPath = Field(default="toy-vae", description="autoencoder of the perceptual distance")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of bootstrap and samples")
    batch: int = Field(default=32, ge=1, le=4096, description="pairs looked at together")
    cap: int = Field(default=CAP, ge=10, le=200_000, description="most pictures a side for the kernel distance")
    shown: int = Field(default=SHOWN, ge=0, le=1000, description="pairs shown on the page")
    names: tuple[str, str] = Field(default=("A", "B"), description="what the two sides are called")

    @field_validator("names")
    @classmethod
    def _two(cls, names: tuple[str, str]) -> tuple[str, str]:
        if names[0] == names[1]:
            raise ValueError("the two sides need different names")
        return names
