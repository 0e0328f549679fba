"""What can be looked into of a model, from its configuration: networks without weights, in seconds at any size."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sfumato import cards, checkpoints, registry
from sfumato.errors import BadInput, NotSupported
from sfumato.models.families.base import accepted_by
from sfumato.models.folder import UNUSED, pipeline_of
from sfumato.models.model import Model
from sfumato.models.quiet import quiet
from sfumato.models.site import Site
from sfumato.models.weights import read_json
from sfumato.valid import first_line

__all__ = ["add_memory", "described", "outline"]


def outline(name_or_path: str | Path) -> Model:
    """A model whose networks have no weights: its facts, sites, layers and tokenizers, but no pictures.

    Only configuration and tokenizers are read. Raises `UnknownName`, `BadInput`, `NotSupported` (family).
    """
    import diffusers
    import transformers

    folder = checkpoints.find(str(name_or_path)).path
    if not checkpoints.is_pipeline(folder):
        raise BadInput(f"{folder} is not a diffusers model: it has no model_index.json.")
    index = read_json(folder / "model_index.json")
    pipeline, _ = pipeline_of(index, folder)
    name = pipeline.__name__
    wanted = accepted_by(pipeline.__init__) - {"self"}
    parts: dict[str, Any] = {"requires_safety_checker": False} if "requires_safety_checker" in wanted else {}
    for key in sorted(wanted):
        entry = index.get(key)
        if isinstance(entry, list) and len(entry) == 2 and None not in entry:
            library = {"diffusers": diffusers, "transformers": transformers}.get(str(entry[0]))
            kind = getattr(library, str(entry[1]), None)
            if kind is not None:
                parts[key] = _part(registry.part(folder, key), kind)
                continue
            if key not in UNUSED:
                raise NotSupported(f"{folder / key} is declared as {entry}, which the installed libraries do not have.")
            parts[key] = None
        elif isinstance(entry, list):
            parts[key] = None
        elif entry is not None:
            parts.setdefault(key, entry)
    try:
        with quiet():
            pipe = pipeline(**parts)
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{folder} is not a whole {name}: {first_line(error)}.") from error
    card = read_json(folder / "sfumato.json") if (folder / "sfumato.json").is_file() else {}
    return Model(pipe, name=str(name_or_path), card=card)


def _part(folder: Path, kind: Any) -> Any:
    try:
        with quiet(), _weightless():
            if issubclass(kind, torch.nn.Module) and hasattr(kind, "load_config"):
                return kind.from_config(kind.load_config(str(folder)))
            if not issubclass(kind, torch.nn.Module):
                return kind.from_pretrained(str(folder), local_files_only=True)
            network = kind(kind.config_class.from_pretrained(str(folder), local_files_only=True))
        network.tie_weights()  # the context above gives every module a weight of its own
        return network
    except Exception as error:  # both libraries raise whatever the broken file made them stumble over
        raise BadInput(f"cannot read the configuration in {folder} as {kind.__name__}: {first_line(error)}.") from error


@contextlib.contextmanager
def _weightless() -> Iterator[None]:
    from accelerate import init_empty_weights

    with init_empty_weights():
        yield


def described(model: Model) -> dict[str, Any]:
    """Facts of a model of :func:`outline` as plain JSON values: family, size, tokens, capabilities, attention by kind
    and grid, and of every system whether it runs or what the model lacks.

    Of each kind of attention the explicit map is the memory that a system adds which edits scores or probabilities
    there, one call of one picture in float32; the fused kernel keeps none.
    """
    height, width = model.default_size
    frames = model.frames()
    sites = model.sites()
    counts: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        counts.setdefault((site.kind, site.frames, site.grid, site.heads), []).append(site)
    return {
        "model": model.name,
        "family": model.family.name,
        "parameters": {key: sum(p.numel() for p in part.parameters()) for key, part in model.modules.items()},
        "size": f"{width}x{height}" + ("" if frames is None else f", {frames} frames"),
        "state": list(model.latent_shape(height, width, frames)),
        "text": {stream.name: stream.length for stream in model.tokenizers},
        "text axis": model.text_length,
        "capabilities": [each for each in cards.CAPABILITIES if model.family.has(each)],
        "layers": [layer.name for layer in model.layers],
        "sites": [_row(held) for held in counts.values()],
        "systems": [{"system": key, "runs": _lacking(model, card) or "+"} for key, card in cards.methods().items()],
    }


def add_memory(facts: dict[str, Any], known: dict[str, Any]) -> None:
    """Writes into what :func:`described` says of systems how many MiB each adds to drawing, None where that cannot be
    told. ``known``: bytes by system (:func:`sfumato.sampling.footprint.adds`, which changes the model: the facts come
    first)."""
    for row in facts["systems"]:
        count = known.get(row["system"])
        row["adds"] = round(count / 2**20, 1 if count < 2**24 else None) if isinstance(count, int) else count


def _row(held: list[Site]) -> dict[str, Any]:
    site = held[0]
    queries = site.image[1] - site.image[0]
    whole = max(site.image[1], site.text[1] if site.text else 0)
    n = whole if site.kind == "joint" else queries
    t = site.text[1] - site.text[0] if site.kind == "cross" and site.text else whole
    return {
        "kind": site.kind,
        "calls": len(held),
        "frames": site.frames,
        "grid": "x".join(map(str, site.grid or ())),
        "heads": site.heads,
        "queries": n,
        "keys": t,
        "explicit": math.ceil(site.fold * site.heads * n * t * 4 / 2**20),
    }


def _lacking(model: Model, card: cards.Card) -> str:
    return ", ".join(f"no {need}" for need in card.needs if not model.family.has(need))
