"""Checkpoints of a training run: safetensors and JSON, written beside and renamed, verified before they are used."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato import valid, writing
from sfumato.errors import BadWeights

KEEP = 2


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Writes checkpoint ``folder/step_<step>`` atomically and drops all but the last two."""
    target = folder / f"step_{step:08d}"
    with writing.atomic_folder(target, replace=True) as beside:
        save_file({key: value.contiguous() for key, value in tensors.items()}, beside / "tensors.safetensors")
        digest = _digest(beside / "tensors.safetensors")
        text = json.dumps({**state, "step": step, "sha256": digest}, indent=1)
        (beside / "state.json").write_text(text, encoding="utf-8")
    for old in listing(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def listing(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint.

    Raises:
        BadWeights: a file is missing, truncated or altered.
    """
    try:
        state = valid.loads((path / "state.json").read_text(encoding="utf-8"))
        if _digest(path / "tensors.safetensors") != state["sha256"]:
            raise BadWeights(f"checkpoint {path} is damaged: its tensors do not match their recorded hash.")
        return load_file(path / "tensors.safetensors"), state
    except (OSError, ValueError, KeyError) as error:
        raise BadWeights(f"checkpoint {path} cannot be read: {error}.") from None


def load_latest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """The newest sound checkpoint and the warnings about damaged newer ones; None when there is none at all.

    Raises:
        BadWeights: there are checkpoints, but every one is damaged.
    """
    warnings: list[str] = []
    for path in reversed(listing(folder)):
        try:
            return *load(path), warnings
        except BadWeights as error:
            warnings.append(str(error))
    if warnings:
        raise BadWeights(f"no sound checkpoint in {folder}: {warnings[0]} Remove the folder to start anew.")
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
