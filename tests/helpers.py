"""Helpers shared by the tests."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def fingerprint(*owners: Any) -> dict[str, Any]:
    """Everything that an attached and detached intervention must leave as it was; compare two of them with ``==``.

    Takes modules, pipelines or `Model`s. Holds, per module: bytes of parameters and buffers and where they live, sizes
    of the hook dictionaries, identity and type of the attention processor, an instance's own ``forward``, training
    mode and ``requires_grad``. Besides: torch's global generator, gradient mode, and the pipeline's scheduler.
    """
    found: dict[str, Any] = {
        "rng": hashlib.sha256(torch.random.get_rng_state().numpy().tobytes()).hexdigest(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }
    for i, owner in enumerate(owners):
        pipe = getattr(owner, "pipe", owner)
        if isinstance(pipe, nn.Module):
            found[f"{i}"] = _module(pipe)
            continue
        for name, part in pipe.components.items():
            found[f"{i}.{name}"] = _module(part) if isinstance(part, nn.Module) else id(part)
        if (scheduler := pipe.components.get("scheduler")) is not None:
            found[f"{i}.scheduler.config"] = repr(sorted(scheduler.config.items()))
    return found


def _module(root: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for path, module in root.named_modules():
        own = vars(module)
        processor = own.get("processor", module._modules.get("processor"))
        facts[path] = (
            id(module),
            type(module).__name__,
            module.training,
            tuple(len(own[hooks]) for hooks in _HOOK_DICTS),
            (id(processor), type(processor).__name__),
            sorted(key for key in ("forward", "__call__", "_diffusers_hook") if key in own),
            tuple(_tensor(name, value) for name, value in module._parameters.items() if value is not None),
            tuple(_tensor(name, value) for name, value in module._buffers.items() if value is not None),
        )
    return facts


def _tensor(name: str, value: torch.Tensor) -> tuple[Any, ...]:
    data = value.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return name, value.data_ptr(), value.requires_grad, value.grad is None, hash(data.tobytes())
