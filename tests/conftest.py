"""Settings for the whole suite: one thread per test process, fixed seeds, and no network."""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of NumPy's linear algebra, and in the processes that tests start

import pytest

from tests.folders import clip_folder, others, renders  # noqa: F401  (fixtures)

# torch itself says so, on machines without the instruction set it asks about
warnings.filterwarnings("ignore", message=".*mkldnn.*", category=UserWarning)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test has one thread and draws the same random numbers, whichever ran before it."""
    import numpy as np  # here: the process that deals tests out to others needs neither
    import torch

    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # there is no other device to seed


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """The libraries stay: the collector of reference cycles need not look through them again and again, neither while
    they are imported nor later; the few cycles among them that could go are not worth looking through it all once. What
    tests leave is looked through more rarely than usual, which takes a twentieth of the time otherwise."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(100_000, 20, 100)
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts processes of its own, and waits for them, comes first, so that others fill the time; then the longest
    files, so that none is left over at the end."""
    first = ("test_scale", "test_second_device", "test_adding", "test_packaging", "test_contract", "test_composition",
             "test_parts_run", "test_prompt_to_prompt", "test_objectives", "test_trainer", "zoo/test_inpaint",
             "test_together", "test_textual_inversion", "test_vital_signs")  # fmt: skip
    items.sort(key=lambda item: next((i for i, name in enumerate(first) if name in item.nodeid), len(first)))
