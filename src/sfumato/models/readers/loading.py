"""Single transformers models from folders: found, checked, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato import registry
from sfumato.errors import BadWeights, NotSupported, UnknownName
from sfumato.models.quiet import quiet
from sfumato.models.weights import check_numbers, find_weights, read_header, read_json
from sfumato.valid import first_line

__all__ = ["is_reader", "load_module", "net_folder"]


def is_reader(name_or_path: str | Path) -> bool:
    """Whether a name or folder holds one transformers model rather than a pipeline that draws."""
    folder = registry.find(str(name_or_path)) or Path(name_or_path)
    if not (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        return False
    return bool(read_json(folder / "config.json").get("architectures"))


def net_folder(name: str | Path, kind: str, built_in: Sequence[str], more: Sequence[str] = ()) -> Path:
    """The folder of a built-in net, or ``name`` itself when it is a folder. Raises UnknownName, which lists
    ``built_in`` and ``more``."""
    found = registry.find(str(name)) or Path(name)
    if not found.is_dir():
        raise UnknownName(kind, str(name), [*built_in, *more])
    return found


def load_module(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    cls: Any = None,
    what: str = "a model",
) -> nn.Module:
    """The transformers model of a folder, by default of the class that its config names: frozen, in eval mode.

    Raises:
        NotSupported: the class is none of transformers. BadWeights: no weights, pickles, damage, lacking tensors.
    """
    import transformers

    if cls is None:
        classes = read_json(folder / "config.json").get("architectures") or []
        cls = getattr(transformers, classes[0], None) if classes else None
        if cls is None:
            named = ", ".join(classes) or "model of no named class"
            raise NotSupported(f"{folder.name} is a {named}, not one of transformers.")
    for path in find_weights(folder):  # refuses pickles and damaged files
        read_header(path)
    try:
        with quiet():
            module, found = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # transformers has a complaint of its own for every damage
        raise BadWeights(f"{folder} cannot be read as {what}: {first_line(error)}.") from None
    if found["missing_keys"] or found["mismatched_keys"]:
        lost = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
        raise BadWeights(f"{folder} lacks {len(lost)} of the tensors of {cls.__name__}, such as {lost[0]}.")
    check_numbers(folder.name, module)
    return module.requires_grad_(False).eval().to(device)
