"""The built-in models: names, folders, recipes. Nothing heavy is imported here.

Weights live in ``weights/<name>/`` in the standard folder formats of diffusers and transformers, each with a card
``sfumato.json`` and a ``MODEL_CARD.md``; recipes that reproduce them in ``recipes/<name>.toml``.

A model that shares parts with another one (the autoencoder, the text encoder) may ship without them: its card then
names the other model as its ``base``, with a hash of every part that is taken from there. :func:`export` writes any
model as a whole, plain diffusers folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from sfumato import valid
from sfumato.errors import BadInput, BadWeights, UnknownName
from sfumato.writing import atomic_folder, copy_tree, only_folder

_HERE = Path(__file__).parent / "zoo"
CARD = "sfumato.json"


def folder() -> Path:
    """The folder that holds the weights of all built-in models."""
    return _HERE / "weights"


def names() -> list[str]:
    """Names of the built-in models whose weights are present, sorted."""
    if not folder().is_dir():
        return []
    return sorted(path.name for path in folder().iterdir() if (path / CARD).is_file())


def find(name: str) -> Path | None:
    """The folder of the built-in model ``name``, or None when there is no such model."""
    return folder() / name if name in names() else None


def card(name: str) -> dict[str, Any]:
    """The card of a built-in model: recipe, data, measured quality, sampling defaults.

    Raises:
        UnknownName: no built-in model has this name.
    """
    return valid.loads((_known(name) / CARD).read_text(encoding="utf-8"))


def cache_folder() -> Path:
    """Where training runs and caches live: ``$SFUMATO_CACHE`` or ``~/.cache/sfumato``. Raises BadInput for a user
    without a home."""
    try:
        return Path(os.environ.get("SFUMATO_CACHE") or Path.home() / ".cache" / "sfumato")
    except RuntimeError:
        raise BadInput(
            "this user has no home folder, so say where runs and caches go: set SFUMATO_CACHE to a folder."
        ) from None


def in_cache(pattern: str) -> list[Path]:
    """What is in the cache folder and looks like this, sorted; nothing where there is no such folder."""
    try:
        return sorted(cache_folder().glob(pattern))
    except BadInput:
        return []


def trained() -> dict[str, Path]:
    """The exports of finished training runs in the cache: name -> folder."""
    return {path.parent.parent.name: path.parent for path in in_cache("runs/*/export/sfumato.json")}


def recipes() -> dict[str, Path]:
    """The shipped training recipes: name -> TOML file."""
    return {path.stem: path for path in sorted((_HERE / "recipes").glob("*.toml"))}


# --- parts shared with another model ---------------------------------------------------------------------------------


def part(model: Path, name: str) -> Path:
    """The folder of one component of the model in folder ``model``: its own, or that of the base its card names.

    Raises:
        BadWeights: the base is not here, or its component is no longer the one that the model was trained with.
    """
    base = {} if (model / name).is_dir() else _base(model)
    if name not in base.get("parts", {}):
        return model / name
    owner = find(str(base.get("name")))
    if owner is None:
        raise BadWeights(f"{model} takes its {name} from {base.get('name')!r}, which is not among the built-in models.")
    if part_hash(owner / name) != base["parts"][name]:
        raise BadWeights(
            f"{model} was trained with another {name} than {base['name']} has now; "
            f"train it again: sfumato train {model.name}."
        )
    return owner / name


def part_hash(folder: Path) -> str:
    """SHA-256 (hex) over the names and contents of a component's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def share(model: Path, base: str) -> list[str]:
    """Removes from the model in folder ``model`` the components that equal those of the built-in model ``base``, byte
    for byte, and notes them in its card; returns their names."""
    owner = _known(base)
    same = [p.name for p in sorted(model.iterdir()) if p.is_dir() and part_hash(p) == part_hash(owner / p.name)]
    facts = valid.loads((model / CARD).read_text(encoding="utf-8"))
    facts["base"] = {"name": base, "parts": {name: part_hash(model / name) for name in same}}
    (model / CARD).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for name in same:
        shutil.rmtree(model / name)
    return same


def export(name: str, target: Path) -> Path:
    """Writes the built-in model ``name`` as a whole folder that diffusers or transformers load by themselves.

    Raises:
        UnknownName: no such model. BadInput: ``target`` exists and is not empty. BadWeights: see :func:`part`. OSError.
    """
    source, target = _known(name), only_folder(target, "the files of a model")
    try:
        with atomic_folder(target) as beside:
            copy_tree(source, beside)
            shared = _base(source).get("parts", {})
            for each in shared:
                copy_tree(part(source, each), beside / each)
            if shared:
                facts = valid.loads((beside / CARD).read_text(encoding="utf-8"))
                del facts["base"]
                (beside / CARD).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:  # tell the name the caller knows
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error
    return target


def _known(name: str) -> Path:
    path = find(name)
    if path is None:
        raise UnknownName("built-in model", name, names())
    return path


def _base(model: Path) -> dict[str, Any]:
    """What a model's card says about the base that it takes parts from."""
    if not (model / CARD).is_file():
        return {}
    try:
        found = valid.loads((model / CARD).read_text(encoding="utf-8"))["base"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("parts"), dict) else {}
