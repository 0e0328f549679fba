"""The tap: the output of one block of a denoiser, shown to a callback that may put other features in its place.

    >>> layer = bottleneck_of(model, "my system")
    >>> with tapped(model, layer, lambda h: slerp(h, other, 0.3)):
    ...     out = model.predict(x, t, condition)  # the skip connections stay as they are

The block itself says what its features look like: (b c h w) in a U-Net, (b n d) in a transformer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from sfumato.cards import CAPABILITIES
from sfumato.errors import NotSupported, UnknownName
from sfumato.models import Layer, Model
from sfumato.models.families import families_with

__all__ = ["bottleneck_of", "layer_of", "tapped"]


class _Stop(BaseException):
    """Leaves a forward pass whose remainder is not needed. Not an Exception, so that no library code swallows it."""


def bottleneck_of(model: Model, who: str) -> Layer:
    """The h-space of a U-Net. Raises NotSupported, in the name of ``who``, for a denoiser without one."""
    layer = model.bottleneck
    if layer is None:
        raise NotSupported(
            f"{who} needs {CAPABILITIES['h_space']}; {model.name} ({model.family.name}) has none; "
            f"{families_with('h_space')}."
        )
    return layer


def layer_of(model: Model, name: str | None) -> Layer:
    """A block by name; without one the h-space, or the middle block of a denoiser that has none. Raises UnknownName,
    NotSupported for a denoiser whose blocks give no picture."""
    layers = {layer.name: layer for layer in model.layers}
    if not layers:
        raise NotSupported(
            f"features of layers are asked for, but no block of {model.name} ({model.family.name}) gives a picture: "
            f"text and image run through them in one sequence."
        )
    if name is None:
        return model.bottleneck or model.layers[(len(layers) - 1) // 2]
    if name not in layers:
        raise UnknownName(f"layer of {model.name}", name, layers)
    return layers[name]


@contextlib.contextmanager
def tapped(
    model: Model, layer: Layer, look: Callable[[Tensor], Tensor | None], *, stop: bool = False
) -> Iterator[None]:
    """Show the features of ``layer`` to ``look`` in every denoiser call inside; what it returns, if not None, takes
    their place. ``stop``: the call ends there, and so does the ``with`` block."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        features = output if layer.entry is None else output[layer.entry]
        new = look(features)
        if stop:
            raise _Stop
        if new is None or layer.entry is None:
            return new
        return (*output[: layer.entry], new, *output[layer.entry + 1 :])

    handle = model.denoiser.get_submodule(layer.path).register_forward_hook(hook)
    try:
        yield
    except _Stop:
        if not stop:
            raise
    finally:
        handle.remove()
