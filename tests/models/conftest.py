"""Saved folders of the tiny models, made once per session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sfumato.models import quiet
from tests.tiny import tiny_pipeline


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline in the standard format; read-only."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            with quiet():
                tiny_pipeline(kind).save_pretrained(root / kind)
        return root / kind

    return folder


@pytest.fixture
def broken(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Stable Diffusion folder that a test may damage."""
    return Path(shutil.copytree(saved("sd"), tmp_path / "model"))
