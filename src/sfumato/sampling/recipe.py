"""Recipes: what it takes to make a sample again, as plain JSON values."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
from torch import Tensor

from sfumato import cards
from sfumato.arrays import to_pixels
from sfumato.errors import BadInput
from sfumato.sampling.intervention import Intervention
from sfumato.sampling.options import recorded
from sfumato.version import __version__

if TYPE_CHECKING:
    from sfumato.models import Model
    from sfumato.sampling.request import Request


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    """Names and versions of the libraries; each is read from a long file of metadata, once."""
    return tuple((name, metadata.version(name)) for name in ("torch", "diffusers", "transformers"))


def recipe_of(model: Model, request: Request, parts: Sequence[Intervention], i: int) -> dict[str, Any]:
    """The recipe of sample ``i``. Given pictures and latents are named by a hash of their values only."""
    references = request.encoding.references
    dumped = request.options.model_dump(mode="json", exclude={"scheduler"})
    own = {
        "prompt": request.prompts[i],
        "negative": request.negatives[i] if request.negatives else None,
        "seed": request.seeds[i],
        "scheduler": _scheduler(request.options.scheduler),
    }
    return {
        "sfumato": __version__,
        "versions": dict(_versions()),
        "model": model.name,
        "revision": model.revision,
        "hash": model.weight_hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        **{name: own[name] if name in own else dumped[name] for name in recorded()},
        "image": _hash_of(request.source.pixels, i),
        "latents": _hash_of(request.source.latents, i),
        **({"reference": [_hash_of(to_pixels([each]), 0) for each in references]} if references else {}),
        "with": [_described(part) for part in parts],
    }


def recipe_args(
    recipe: dict[str, Any],
    *,
    image: Any = None,
    latents: Tensor | None = None,
    reference: Any = None,
    allow: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Arguments for ``generate(model, **recipe_args(recipe))`` that make the recipe's sample again.

    ``allow``: files, or folders of files, that its systems may open; a recipe that names others raises NotAllowed.

    A recipe that began from a picture or from given latents, or was drawn by reference pictures, needs the same ones
    again. Raises BadInput when they are missing. The same bits come out where the sample was made in a batch of its
    own; in a larger batch, float rounding differs.
    """
    for name, given in (("image", image), ("latents", latents), ("reference", reference)):
        if (recipe.get(name) is None) != (given is None):
            raise BadInput(f"{name} must be given exactly when the recipe was made with one.")
    arguments = {name: recipe[name] for name in recorded() if recipe.get(name) is not None}
    arguments.setdefault("long_prompts", "cut")  # recipes that do not say come from versions that knew nothing else
    if isinstance(arguments.get("scheduler"), dict):
        described = arguments["scheduler"]
        arguments["scheduler"] = getattr(diffusers, described["class"]).from_config(described["config"])
    arguments["interventions"] = [cards.from_recipe(each, allow) for each in recipe.get("with") or ()]
    return {**arguments, "image": image, "latents": latents, "reference": reference}


def _described(part: Intervention) -> dict[str, Any]:
    if hasattr(part, "CARD") and hasattr(part, "params"):
        return cards.to_recipe(part)
    return {"method": part.name, "params": {}}  # not a registered system: named, but only its author can build it again


def _scheduler(given: Any) -> Any:
    if given is None or isinstance(given, str):
        return given
    return {"class": type(given).__name__, "config": {k: v for k, v in given.config.items() if k[0] != "_"}}


def _hash_of(tensor: Tensor | None, i: int) -> str | None:
    if tensor is None:
        return None
    row = tensor[i if len(tensor) > 1 else 0].detach().float().cpu().contiguous()
    return hashlib.sha256(row.numpy().tobytes()).hexdigest()
