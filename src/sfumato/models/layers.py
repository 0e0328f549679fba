"""What the layers of any net put out: by name, as units per picture, and with some units silenced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import BadInput, NoMatch, NotSupported, UnknownName, nearest

Forward = Callable[[Tensor], Any]


def stages(net: nn.Module) -> list[str]:
    """Names of a net's stages, in the order in which they are registered: the members of its outermost lists of
    blocks and the compound modules beside them (stem, middle). A net without lists: its compound children, or all."""
    found = list(_outermost(net, ""))
    if not any(isinstance(module, nn.ModuleList) for module in net.modules()):
        found = [name for name, child in net.named_children() if any(child.children())]
    return found or [name for name, _ in net.named_children()]


def _outermost(module: nn.Module, prefix: str) -> Iterator[str]:
    here = any(isinstance(child, nn.ModuleList) for child in module.children())
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from (f"{path}.{i}" for i in range(len(child)))
        elif not here and any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            yield from _outermost(child, f"{path}.")
        elif any(child.children()):
            yield path


def _module(net: nn.Module, name: str) -> nn.Module:
    known = dict(net.named_modules())
    if name not in known or not name:
        # the stages, and of the hundreds of other modules those that look alike
        raise UnknownName("layer", name, dict.fromkeys([*stages(net), *nearest(name, known)]))
    return known[name]


def _place_of(output: Any) -> Any:
    """Where in what a layer returns its maps are: () for a tensor itself, the last tensor of a tuple (joint-attention
    blocks return text, then picture), the last hidden state of a record. None where there is no tensor."""
    if isinstance(output, Tensor):
        return ()
    if isinstance(output, Mapping):
        keys = [key for key, value in output.items() if isinstance(value, Tensor)]
        return "last_hidden_state" if "last_hidden_state" in keys else next(iter(keys), None)
    if isinstance(output, tuple | list):
        return next((i for i in reversed(range(len(output))) if isinstance(output[i], Tensor)), None)
    return None


def _maps_in(output: Any) -> Tensor | None:
    key = _place_of(output)
    return output if key == () else None if key is None else output[key]


@contextlib.contextmanager
def layer_outputs(net: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within: a dict that holds what each layer put out last. Afterwards no hook is left.

    Raises UnknownName for a layer that the net has not.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            maps = _maps_in(output)
            if maps is not None:
                outputs[name] = maps.detach()

        return hook

    modules = [(name, _module(net, name)) for name in layers]
    with contextlib.ExitStack() as stack:
        for name, module in modules:
            stack.callback(module.register_forward_hook(keep(name)).remove)
        yield outputs


@contextlib.contextmanager
def ablated(net: nn.Module, layer: str, units: Sequence[int]) -> Iterator[None]:
    """Within: these units of a layer put out 0. Units are channels of maps (b c h w), features of tokens (b n d).

    Raises UnknownName for the layer, BadInput for units that it has not (when it runs).
    """
    module, chosen = _module(net, layer), [int(unit) for unit in units]

    def silence(_: nn.Module, args: Any, output: Any) -> Any:
        maps = _maps_in(output)
        if maps is None:
            raise NotSupported(f"layer {layer!r} puts out no tensor; name one that does.")
        axis = 1 if maps.ndim == 4 else maps.ndim - 1
        d = maps.shape[axis]
        if any(not 0 <= unit < d for unit in chosen):
            raise BadInput(f"units of {layer!r} are 0 to {d - 1}, got {max(chosen, key=abs)}.")
        keep = torch.ones(d, dtype=maps.dtype, device=maps.device)
        keep[chosen] = 0
        quiet = maps * keep.view([-1 if i == axis else 1 for i in range(maps.ndim)])
        key = _place_of(output)
        if key == ():
            return quiet
        if isinstance(output, tuple | list):
            return type(output)([*output[:key], quiet, *output[key + 1 :]])
        output[key] = quiet
        return output

    handle = module.register_forward_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def pooled(maps: Tensor, pool: str = "mean") -> Tensor:
    """A layer's output as one row of units per picture (b d): maps (b c h w) and tokens (b n d) are averaged, or of
    tokens the first is taken ("cls"), or everything is laid out ("flatten")."""
    if maps.ndim == 2:
        return maps
    if pool == "flatten":
        return maps.flatten(1)
    if maps.ndim == 4:
        return maps.mean((2, 3))
    if maps.ndim == 3:
        return maps[:, 0] if pool == "cls" else maps.mean(1)
    raise NotSupported(f"a layer with outputs of shape {tuple(maps.shape)} cannot be pooled; use pool=flatten.")


def features(
    net: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    pool: str | None = "mean",
    forward: Forward | None = None,
    batch: int = 50,
) -> dict[str, Tensor]:
    """What layers put out for pictures (b 3 h w): units (b d) by layer name, float32 on the CPU.

    Args:
        pool: see :func:`pooled`; None keeps maps (b c h w).
        forward: how to run the net on a batch of pictures; by default it is called with them, in eval mode.

    Raises:
        UnknownName: a layer. NoMatch: a layer that does not run on pictures, or puts out no tensor.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    mode = net.training
    net.eval()
    try:
        with torch.no_grad(), layer_outputs(net, layers) as outputs:
            for chunk in images.split(batch):
                (forward or net)(chunk)
                for name in layers:
                    if name not in outputs or len(outputs[name]) != len(chunk):
                        raise NoMatch(
                            f"layer {name!r} puts out nothing for each picture; others: {', '.join(stages(net))}."
                        )
                    maps = outputs.pop(name)
                    parts[name].append((maps if pool is None else pooled(maps, pool)).float().cpu())
    finally:
        net.train(mode)
    return {name: torch.cat(rows) for name, rows in parts.items()}
