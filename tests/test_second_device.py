"""Runs :mod:`tests.second_device_cases` in an interpreter of its own: torch counts the devices that its autograd engine
serves at the first backward pass of a process, so the pretended one must be there before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch._C._acc", reason="this torch lets nobody write a backend in Python")


def test_the_cases_of_a_second_device() -> None:
    cases = Path(__file__).with_name("second_device_cases.py")
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(run, cwd=cases.parents[1], env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
