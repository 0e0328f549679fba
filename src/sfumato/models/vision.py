"""Nets that look at pictures: any transformers model with ``pixel_values``, from a folder, called with (b 3 h w) in
[-1, 1]."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import registry
from sfumato.errors import BadWeights, NotSupported, UnknownName
from sfumato.models.quiet import quiet
from sfumato.models.weights import find_weights, first_line, hash_files


def is_vision(name: str | Path) -> bool:
    """Whether this is the folder (or built-in name) of a single transformers net rather than of a pipeline."""
    folder = _folder(name)
    return folder is not None and (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def load_vision(name: str | Path) -> VisionNet:
    """The net in a folder or of a built-in name, frozen, in float32 and eval mode.

    Raises:
        UnknownName: nothing of this name. NotSupported: a net that does not look at pictures. BadWeights: unreadable.
    """
    import transformers

    folder = _folder(name)
    if folder is None:
        raise UnknownName("net", str(name), [each for each in registry.names() if is_vision(each)])
    hash_files([("net", path) for path in find_weights(folder)[0]])  # pickles are refused here
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
        if kind is None or getattr(kind, "main_input_name", "") != "pixel_values":
            raise NotSupported(
                f"{folder} holds {config.get('architectures')}, which is no transformers net for pictures."
            )
        with quiet():
            net = kind.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    except NotSupported:
        raise
    except Exception as error:  # transformers has a complaint of its own for every damage
        raise BadWeights(f"{folder} cannot be read as a net: {first_line(error)}") from None
    return VisionNet(net.eval().requires_grad_(False), *_normalisation(folder))


class VisionNet(nn.Module):
    """A transformers net with its normalisation: pictures (b 3 h w) in [-1, 1] in, the net's own record out.

    Layer names are those of the net: its children stand here directly.
    """

    def __init__(self, net: nn.Module, mean: Tensor, deviation: Tensor):
        super().__init__()
        self.config: Any = net.config
        object.__setattr__(self, "_net", net)  # not registered: its children are, under their own names
        for child, module in net.named_children():
            self.add_module(child, module)
        self.register_buffer("_mean", mean, persistent=False)
        self.register_buffer("_deviation", deviation, persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> VisionNet:
        """Sets the mode of the net too."""
        super().train(mode)
        self._net.train(mode)
        return self

    def forward(self, pixels: Tensor) -> Any:
        return self._net(pixel_values=(pixels / 2 + 0.5 - self._mean) / self._deviation)


def _normalisation(folder: Path) -> tuple[Tensor, Tensor]:
    try:
        about = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = {}
    mean, deviation = about.get("image_mean") or [0.5] * 3, about.get("image_std") or [0.5] * 3
    return torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(deviation).view(1, -1, 1, 1)


def _folder(name: str | Path) -> Path | None:
    found = registry.find(str(name)) or Path(name)
    return found if found.is_dir() else None
