"""bfloat16 where it is fast, and attention that is fast in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sfumato.models.precision import fast_bf16


def wants_bf16(precision: str, device: str) -> bool:
    """Whether "auto", "fp32" or "bf16" means bfloat16 on this kind of device."""
    return precision == "bf16" or (precision == "auto" and fast_bf16(device))


@contextlib.contextmanager
def autocast(device: str, enabled: bool) -> Iterator[None]:
    """Within: matrix products in bfloat16 if ``enabled``."""
    explicit = ExplicitAttention() if enabled and device == "cpu" else contextlib.nullcontext()
    with torch.autocast(device, torch.bfloat16, enabled=enabled), explicit:
        yield


class ExplicitAttention(TorchFunctionMode):
    """Within: attention as two products and a softmax.

    In bfloat16 on a CPU the backward pass of the fused kernel takes four times as long as that of this one.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and not self._special(kwargs):
            query, key, value = args
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            return ((query * scale) @ key.transpose(-1, -2)).softmax(-1).to(value.dtype) @ value
        return func(*args, **kwargs)

    def _special(self, kwargs: dict[str, Any]) -> bool:
        mask, dropout, causal = (kwargs.get(key) for key in ("attn_mask", "dropout_p", "is_causal"))
        return mask is not None or bool(dropout) or bool(causal) or bool(kwargs.get("enable_gqa"))
