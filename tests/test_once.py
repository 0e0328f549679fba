"""Networks are loaded once, and as they are whoever asks first."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from sfumato import cards, registry
from sfumato.models.readers.clip import load_clip
from sfumato.once import once, shown_as
from sfumato.sampling.footprint import Footprint, adds, drawn
from tests.sampling.test_footprint import SIZE, without_weights
from tests.test_imports import FILES, SOURCE
from tests.tiny import tiny_model

MODES = {
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "another device": lambda: torch.device("meta"),
    "without numbers": Footprint,
}


@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_same_network_whoever_asks_first(mode: str):
    @once(1)
    def load(name: str = "net") -> nn.Module:
        return nn.Linear(2, 2)

    with MODES[mode]():
        load()
    net = load()
    assert net is load() and net.weight.device.type == "cpu" and not net.weight.is_inference()
    assert net(torch.ones(1, 2)).requires_grad
    load("other")
    assert load() is not net  # the last one stays, and no more


def test_errors_are_those_of_the_loader():
    @once(1)
    def load(name: str) -> nn.Module:
        raise ValueError(f"no {name} here")

    for _ in range(2):
        with pytest.raises(ValueError, match="no net here"):
            load("net")


def test_what_is_shown_meanwhile_does_not_stay():
    load = once(1)(lambda: [1])
    with pytest.raises(KeyError), shown_as(lambda loaded: (*loaded, 2)):
        assert load() == (1, 2)
        raise KeyError
    assert load() == [1]


def test_a_clip_that_guides_networks_without_numbers_keeps_its_own(tmp_path: Path):
    """Its memory is counted each time, and its features are what they were."""
    folder = shutil.copytree(registry.find("toy-clip"), tmp_path / "clip")
    model, texts = without_weights("sd", tmp_path / "model"), ["a red cube", "a blue ball"]
    adds(model, [])  # the schedule is on the CPU from here on
    noise = torch.empty(1, *model.latent_shape(*SIZE), device="meta")
    first, again = (drawn(model, cards.build(f"clip_guidance:clip={folder}"), latents=noise) for _ in range(2))
    assert first == again
    clip, own = load_clip(folder), load_clip("toy-clip")
    real = drawn(tiny_model("sd"), cards.build(f"clip_guidance:clip={folder}"), latents=torch.randn(noise.shape))
    assert real.peak == pytest.approx(first.peak, rel=0.2)
    assert first.begun > sum(x.nbytes for x in own.model.parameters())
    assert torch.equal(clip.text(texts), own.text(texts))


def test_networks_are_kept_by_nothing_else():
    """A cache around a loader hands on what was loaded under the modes of whoever asked first."""
    loads = re.compile(r"from_pretrained|from_config|\bload_\w+\(|\w\.load\(|-> \w*(Net|Model|Module)\b")
    kept = [
        f"{path.relative_to(SOURCE)}: {node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and any("cache" in ast.unparse(each) for each in node.decorator_list)
        and loads.search(ast.unparse(node))
    ]
    assert kept == []
