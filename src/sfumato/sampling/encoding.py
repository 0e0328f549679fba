"""What a request says about the encoding of its texts: layers left out, and SDXL's size conditioning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato.errors import BadInput
from sfumato.models import Encoding
from sfumato.sampling.options import Options

if TYPE_CHECKING:
    from PIL.Image import Image

_POSITIVE = ("original_size", "crops_coords_top_left", "target_size")
_NEGATIVE = tuple(f"negative_{name}" for name in _POSITIVE)


def encoding_of(model: Any, options: Options, size: tuple[int, int], references: tuple[Image, ...] = ()) -> Encoding:
    """The encoding for pictures of ``size`` (width, height) with these reference pictures. Raises BadInput for what
    means nothing to the model."""
    most, skip = model.family.clip_layers, options.clip_skip
    if skip is not None and not most:
        raise BadInput(f"clip_skip means nothing to {model.name}: no CLIP reads its text for attention.")
    if skip is not None and skip > most:
        raise BadInput(f"clip_skip is {skip}; the text encoder of {model.name} has {most} layers that can be left out.")
    return Encoding(skip, _micro(model, options, size), references)


def _micro(model: Any, options: Options, size: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """SDXL's six numbers of either branch, None where nothing is said; what is not said is as in diffusers."""
    given = {name: getattr(options, name) for name in (*_POSITIVE, *_NEGATIVE)}
    named = [name for name, value in given.items() if value is not None]
    if not named:
        return None
    if not model.family.micro_conditions:
        raise BadInput(f"{named[0]} means nothing to {model.name}: only SDXL is conditioned on sizes.")
    cond = _six(given, _POSITIVE, (size, (0, 0), size))
    if not any(name in _NEGATIVE for name in named):
        return cond, cond
    original, target = given["original_size"] or size, given["target_size"] or size
    return cond, _six(given, _NEGATIVE, (original, (0, 0), target))


def _six(given: dict[str, Any], names: tuple[str, ...], otherwise: tuple[Any, ...]) -> tuple[int, ...]:
    """Height and width, top and left, height and width."""
    original, crop, target = (given[name] or default for name, default in zip(names, otherwise, strict=True))
    return (*original[::-1], *crop, *target[::-1])
