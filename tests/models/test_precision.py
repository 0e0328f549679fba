"""Which number format is fast is the processor's own answer, not that of the moment."""

from __future__ import annotations

import platform

import pytest
import torch

from sfumato.models.precision import fast_bf16
from sfumato.training.precision import wants_bf16


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_an_x86_processor_is_asked_for_its_instructions(monkeypatch, avx512, amx):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert fast_bf16("cpu") == wants_bf16("auto", "cpu") == (avx512 or amx)
    assert wants_bf16("bf16", "cpu") and not wants_bf16("fp32", "cpu")


def test_other_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert fast_bf16("cuda") and not fast_bf16("mps")
