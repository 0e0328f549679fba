"""The built-in models: names, folders, recipes. Nothing heavy is imported here.

Weights live in ``weights/<name>/`` in the standard folder formats of diffusers and transformers, each with a card
``sfumato.json`` and a ``MODEL_CARD.md``; recipes that reproduce them in ``recipes/<name>.toml``.

A model that has components in common with others (the autoencoder, the text encoder), or one of them twice, may ship
without them: its card then says whose they are, under ``shared``, with their hashes. :func:`export` writes any model as
a whole, plain diffusers folder.
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
    """The folder of one component of the model in folder ``model``: its own, or the one that its card says it shares.

    Raises:
        BadWeights: the component's owner is not here, or it is no longer what the model was trained with.
    """
    entry = {} if (model / name).is_dir() else _shared(model).get(name)
    if not entry:
        return model / name
    owner, _, inside = str(entry["folder"]).partition("/")
    home = find(owner)
    if home is None or inside not in ("", *_folders(home)):
        raise BadWeights(f"{model} takes its {name} from {entry['folder']!r}, which is not among the built-in models.")
    if part_hash(home / inside) != entry["hash"]:
        raise BadWeights(
            f"{model} was trained with another {name} than {entry['folder']} is now; "
            f"train it again: sfumato train {model.name}."
        )
    return home / inside


def part_hash(folder: Path) -> str:
    """SHA-256 (hex) over the names and contents of a component's files."""
    digest = hashlib.sha256()
    for path in _files(folder):
        content = path.read_bytes()
        if path.name == "config.json":  # it tells where the component came from, which is not what it is
            facts = valid.loads(content)
            content = json.dumps({k: v for k, v in facts.items() if k != "_name_or_path"}, sort_keys=True).encode()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def share(model: Path, *bases: str) -> dict[str, str]:
    """Removes from the model in folder ``model`` the components that equal one of the built-in models ``bases`` or an
    earlier one of its own, and notes in its card whose they are, beside those of before. Returns these: component ->
    ``model/component``, or ``model`` for one that is a component itself.

    Raises:
        UnknownName: no such base. BadWeights: see :func:`part`.
    """
    owners: dict[str, str] = {}
    for base in bases:
        home = _known(base)
        if not (home / "model_index.json").is_file():
            owners.setdefault(part_hash(home), base)
            continue
        for name in sorted({*_folders(home), *_shared(home)}):
            at = part(home, name)
            owners.setdefault(part_hash(at), at.relative_to(folder()).as_posix())
    facts = valid.loads((model / CARD).read_text(encoding="utf-8"))
    new = {}
    for name in _folders(model):
        known = part_hash(model / name)
        owner = owners.setdefault(known, f"{model.name}/{name}")
        if owner != f"{model.name}/{name}":
            new[name] = {"folder": owner, "hash": known}
    before = {name: entry for name, entry in _shared(model).items() if not (model / name).is_dir()}
    (model / CARD).write_text(json.dumps({**facts, "shared": before | new}, indent=1) + "\n", encoding="utf-8")
    for name in new:
        shutil.rmtree(model / name)
    return {name: entry["folder"] for name, entry in new.items()}


def export(name: str, target: Path) -> Path:
    """Writes the built-in model ``name`` as a whole folder that diffusers or transformers load by themselves.

    Raises:
        UnknownName: no such model. BadInput: ``target`` exists and is not empty. BadWeights: see :func:`part`. OSError.
    """
    source, target = _known(name), only_folder(target, "the files of a model")
    try:
        with atomic_folder(target) as beside:
            copy_tree(source, beside)
            shared = _shared(source)
            for each in shared:
                (beside / each).mkdir()
                for path in _files(part(source, each)):
                    shutil.copyfile(path, beside / each / path.name)
            if shared:
                facts = valid.loads((beside / CARD).read_text(encoding="utf-8"))
                del facts["shared"]
                (beside / CARD).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:  # tell the name the caller knows
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error
    return target


def _known(name: str) -> Path:
    path = find(name)
    if path is None:
        raise UnknownName("built-in model", name, names())
    return path


def _shared(model: Path) -> dict[str, dict[str, Any]]:
    """What a model's card says about components that are another's: name -> folder in the zoo and hash."""
    if not (model / CARD).is_file():
        return {}
    try:
        found = valid.loads((model / CARD).read_text(encoding="utf-8"))["shared"]
    except (KeyError, TypeError, ValueError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {name: each for name, each in entries if isinstance(each, dict) and {"folder", "hash"} <= set(each)}


def _folders(model: Path) -> list[str]:
    """Names of the components in a pipeline's folder, sorted."""
    return sorted(path.name for path in model.iterdir() if path.is_dir())


def _files(folder: Path) -> list[Path]:
    """The files of a component, without the card and the description that one has which is a model by itself."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if path.is_file() and path.name not in (CARD, "MODEL_CARD.md")]
