"""The families of models that sfumato knows. Nothing outside this folder may know the class names of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

from sfumato.errors import NotSupported
from sfumato.models.families.base import Family, TextStream
from sfumato.models.families.flux import Flux
from sfumato.models.families.pixart import PixArtAlpha, PixArtSigma
from sfumato.models.families.sd3 import StableDiffusion3
from sfumato.models.families.unet import StableDiffusion, StableDiffusionInpaint, StableDiffusionXL

FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion,
    StableDiffusionInpaint,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    PixArtSigma,
    PixArtAlpha,
)

_BY_PIPELINE = {pipeline: family for family in FAMILIES for pipeline in family.pipeline_classes}


def family_of(pipeline_class: str) -> type[Family]:
    """The family that serves a diffusers pipeline class. Raises `NotSupported` with the list of known ones."""
    if pipeline_class not in _BY_PIPELINE:
        raise NotSupported(
            f"model family {pipeline_class!r} is not supported; known: {', '.join(sorted(_BY_PIPELINE))}."
        )
    return _BY_PIPELINE[pipeline_class]


def offering(needs: Iterable[str]) -> list[str]:
    """Names of the families that offer all of the capabilities ``needs``."""
    return [family.name for family in FAMILIES if family.capabilities.issuperset(needs)]


__all__ = ["FAMILIES", "Family", "TextStream", "family_of", "offering"]
