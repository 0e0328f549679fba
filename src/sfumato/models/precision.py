"""Which number format is fast here."""

from __future__ import annotations

import platform

import torch


def fast_bf16(device_type: str) -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones on this kind of device.

    A CPU is asked for its instructions, never for its speed: a measurement falls now this way, now that on a busy
    machine, and equal runs end with other bits.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device_type != "cpu":
        return False
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
