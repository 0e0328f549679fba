"""Which number format is fast here."""

from __future__ import annotations

import functools
import time

import torch


@functools.cache
def fast_bf16(device_type: str) -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones on this device, by a short measurement."""
    device = torch.device(device_type)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, device=device, dtype=dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(3):
            a @ a
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]
