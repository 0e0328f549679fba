"""Recipes: what it takes to make a sample again, as plain JSON values."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import diffusers
from torch import Tensor

import sfumato
from sfumato import cards
from sfumato.errors import BadInput
from sfumato.sampling.guidance import Guidance
from sfumato.sampling.intervention import Intervention

if TYPE_CHECKING:
    from sfumato.models import Model
    from sfumato.sampling.request import Request

_SETTINGS = (
    "prompt", "negative", "seed", "steps", "guidance", "true_guidance", "rescale", "scheduler", "eta", "start",
    "strength",
)  # fmt: skip


def recipe_of(model: Model, request: Request, parts: Sequence[Intervention], i: int) -> dict[str, Any]:
    """The recipe of sample ``i``. Given pictures and latents are named by a hash of their values only."""
    source = request.source
    return {
        "sfumato": sfumato.__version__,
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "transformers")},
        "model": model.name,
        "revision": model.revision,
        "hash": model.weight_hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt": request.prompts[i],
        "negative": request.negatives[i] if request.negatives else None,
        "seed": request.seeds[i],
        "steps": request.steps,
        "guidance": float(request.guidance.scale if request.embedded is None else request.embedded),
        "true_guidance": float(request.guidance.scale)
        if request.embedded is not None and request.guidance.on
        else None,
        "rescale": float(request.guidance.rescale),
        "guidance_interval": list(request.guidance.interval),
        "compose": [list(pair) for pair in request.compose],
        "size": [request.width, request.height],
        "scheduler": _scheduler(request.scheduler),
        "eta": request.eta,
        "start": source.start,
        "strength": source.strength,
        "image": _hash_of(source.pixels, i),
        "latents": _hash_of(source.latents, i),
        "with": [_described(part) for part in parts],
    }


def recipe_args(recipe: dict[str, Any], *, image: Any = None, latents: Tensor | None = None) -> dict[str, Any]:
    """Arguments for ``generate(model, **recipe_args(recipe))`` that make the recipe's sample again.

    A recipe that began from a picture or from given latents needs the same ones again. Raises BadInput when they are
    missing. The same bits come out where the sample was made in a batch of its own; in a larger batch, float rounding
    differs.
    """
    for name, given in (("image", image), ("latents", latents)):
        if (recipe.get(name) is None) != (given is None):
            raise BadInput(f"{name} must be given exactly when the recipe began from one.")
    arguments = {name: recipe[name] for name in _SETTINGS if recipe.get(name) is not None}
    interval = tuple(recipe.get("guidance_interval") or (0.0, 1.0))
    if interval != (0.0, 1.0):
        name = "true_guidance" if arguments.get("true_guidance") is not None else "guidance"
        arguments[name] = Guidance(arguments[name], arguments.pop("rescale", 0.0), interval)
    if isinstance(arguments.get("scheduler"), dict):
        described = arguments["scheduler"]
        arguments["scheduler"] = getattr(diffusers, described["class"]).from_config(described["config"])
    if recipe.get("size"):
        arguments["size"] = tuple(recipe["size"])
    arguments["compose"] = [(text, weight) for text, weight in recipe.get("compose") or ()]
    arguments["interventions"] = [cards.from_recipe(each) for each in recipe.get("with") or ()]
    return {**arguments, "image": image, "latents": latents}


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
