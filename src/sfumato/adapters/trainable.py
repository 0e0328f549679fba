"""New adapters that are to be trained: which modules of a model they change, and how they begin."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sfumato.adapters.layers import AdaptedModule, Scaling, adapt_module
from sfumato.adapters.weight_sets import swapped_weights
from sfumato.errors import BadInput, NoMatch, nearest
from sfumato.models import Model
from sfumato.rng import stream

__all__ = ["CROSS", "ATTENTION", "TEXT", "adapting", "copies", "new_lora", "substituted_weights", "matching"]

ATTENTION = r"(.*\.)?(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
"""The projections of every attention, as diffusers' training scripts choose."""
CROSS = r"(.*\.)?(attn2\.(to_k|to_v)|add_k_proj|add_v_proj)"
"""Keys and values of the text: of cross-attention, or in joint attention of the text's own tokens."""
TEXT = r"(.*\.)?(q_proj|k_proj|v_proj|out_proj)"
"""The projections of a CLIP text encoder."""


def matching(model: Model, component: str, pattern: str) -> list[str]:
    """Paths of a component's linear maps and convolutions that a regular expression fits as a whole. Raises NoMatch,
    with the nearest."""
    network = model.modules[component]
    paths = [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    found = [path for path in paths if re.fullmatch(pattern, path)]
    if not found:
        close = nearest(pattern, paths) or paths[:3]
        raise NoMatch(f"{pattern!r} fits no module of {component} of {model.name}, such as {', '.join(close)}.")
    return found


def new_lora(
    model: Model,
    targets: Mapping[str, str],
    rank: int = 4,
    alpha: float | None = None,
    *,
    dora: bool = False,
    rslora: bool = False,
    seed: int = 0,
) -> dict[str, AdaptedModule]:
    """A LoRA that changes nothing yet: ways down are drawn (normal, deviation 1 / rank, as diffusers' scripts have it),
    ways up are zero, in full precision whatever the model's; a DoRA's lengths are those of the weights' rows.

    Args:
        targets: component -> regular expression of the paths of its modules.
        alpha: None: equal to the rank.

    Raises NoMatch where an expression fits nothing.
    """
    out: dict[str, AdaptedModule] = {}
    for component, pattern in targets.items():
        for path in matching(model, component, pattern):
            module = model.modules[component].get_submodule(path)
            weight = module.weight
            assert isinstance(weight, Tensor)
            generator = stream(f"adapters.fresh.{component}.{path}", seed)
            parts = {
                "down": torch.randn((rank, *weight.shape[1:]), generator=generator) / rank,
                "up": torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2)),
            }
            if dora:
                parts["magnitude"] = weight.detach().float().flatten(1).norm(dim=1)
            out[f"{component}.{path}"] = adapt_module(
                module, parts, Scaling(alpha, rslora), f"{component}.{path}", dtype=torch.float32
            )
    for each in out.values():
        for parameter in each.parameters().values():
            parameter.requires_grad_(True)
    return out


@contextmanager
def adapting(adapted: Mapping[str, AdaptedModule]) -> Iterator[None]:
    """While it lasts, the model works with these adapters, and gradients reach them."""
    handles = []

    def hook(each: AdaptedModule):  # noqa: ANN202
        return lambda _, args, output: each.added(args[0], output, 1.0)

    try:
        for each in adapted.values():
            handles.append(each.module.register_forward_hook(hook(each)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def copies(model: Model, targets: Mapping[str, str]) -> dict[str, nn.Parameter]:
    """Copies of a model's parameters that are to learn, by ``component.path``: those whose path the regular
    expression of their component fits as a whole. Raises NoMatch; BadInput for a model in half precision, in which the
    small steps of a fine-tune are rounded away."""
    out: dict[str, nn.Parameter] = {}
    for component, pattern in targets.items():
        network = model.modules[component]
        paths = [path for path, _ in network.named_parameters() if re.fullmatch(pattern, path)]
        if not paths:
            raise NoMatch(f"{pattern!r} fits no parameter of {component} of {model.name}.")
        for path in paths:
            own = network.get_parameter(path).detach()
            if own.dtype in (torch.bfloat16, torch.float16):
                raise BadInput(
                    f"{model.name} is in {str(own.dtype).removeprefix('torch.')}, in which steps as small as those of "
                    "whole weights are rounded away: load it with dtype=float32, or teach a LoRA."
                )
            out[f"{component}.{path}"] = nn.Parameter(own.clone(memory_format=torch.preserve_format))
    return out


@contextmanager
def substituted_weights(model: Model, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """While it lasts, these parameters stand in the place of the model's own."""
    by_component: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in weights.items():
        component, _, path = name.partition(".")
        by_component.setdefault(component, {})[path] = parameter
    with swapped_weights(model.modules, by_component):
        yield
