"""Arrays reach torch by one aligned copy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import sfumato
from sfumato.arrays import to_tensor


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8, np.int64, np.bool_])
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_wherever_an_array_lies_its_copy_is_aligned(dtype, axes) -> None:
    room = np.zeros(2 * 3 * 5 * 7 * np.dtype(dtype).itemsize + 64, np.uint8)
    starts = set()
    for offset in range(0, 64, np.dtype(dtype).itemsize):
        array = room[offset : offset + 210 * np.dtype(dtype).itemsize].view(dtype).reshape(2, 3, 5, 7)
        array[:] = np.arange(210).reshape(2, 3, 5, 7)
        starts.add(torch.from_numpy(array).data_ptr() % 64)
        array = array.transpose(axes)
        found = to_tensor(array)
        assert found.data_ptr() % 64 == 0 and torch.equal(found, torch.from_numpy(array))
        assert found.stride() == torch.from_numpy(array).stride()  # kernels are chosen by the order of axes
    assert len(starts) > 1
    found[:] = 0
    assert array.any()  # a copy


def test_no_other_way_leads_from_numpy_to_torch() -> None:
    files = [path for path in Path(sfumato.__file__).parent.rglob("*.py") if path.name != "arrays.py"]
    named = [path.name for path in files if re.search(r"from_numpy|frombuffer|as_tensor\(np\.", path.read_text())]
    assert named == []
