"""The toy-cnn objective, and the stages that a recipe keeps of a training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, ResNetForImageClassification

from sfumato.models.readers import is_reader, load_net
from sfumato.toybox.cues import CUE_TEXTURES, CUES
from sfumato.training import run
from sfumato.training.draw import Draw
from sfumato.training.objective import build_objective
from sfumato.training.recipe import Recipe

RECIPE = """
name = "tiny-cnn"
objective = "cnn"
[data]
train = 24
val = 12
size = 32
[model]
stem = 8
widths = [8, 12]
depths = [1, 1]
[loss]
shape = 0.5
texture = 1.0
[train]
steps = 4
batch = 8
warmup = 1
ema = 0.0
stages = [0.0, 0.5]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(home))
        stopped = run(home / "tiny.toml", on_progress=None, minutes=1e-9)  # stops after its first step
        assert not stopped.finished
        return run(home / "tiny.toml", resume=True).exported


def test_labels_and_pictures_belong_together(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    values = {"name": "x", "objective": "cnn", "loss": {"shape": 0.5, "texture": 1.0, "shift": 0, "tint": 0.0}}
    objective = build_objective(
        Recipe(**values, data={"train": 16, "val": 4, "size": 32}, train={"steps": 1, "batch": 6})
    )
    objective.setup(torch.device("cpu"))
    draw = Draw(0, 3)
    batch = objective.batch(draw)
    rows = draw.indices(16, 6).tolist()
    for image, label, row in zip(batch["images"], batch["labels"], rows, strict=True):
        toy = objective.train_data.scenes[row].toys[0]
        assert CUE_TEXTURES.index(toy.pattern) == int(label)
        true = torch.from_numpy(np.array(objective.train_data.images[row])).permute(2, 0, 1) / 127.5 - 1
        assert min((image - true).abs().max(), (image - true.flip(2)).abs().max()) < 1e-6
    assert torch.equal(objective.batch(draw)["images"], batch["images"])
    loss, logs = objective.loss(batch, draw)
    logits = objective.cnn.train()(pixel_values=batch["images"]).logits.detach()
    own = -logits.log_softmax(1)[torch.arange(6), batch["labels"]].mean()
    assert float(loss) == pytest.approx(float(own), rel=1e-4) and 0 <= float(logs["accuracy"]) <= 1


def test_the_export_is_plain_transformers_with_its_stages(exported):
    net = ResNetForImageClassification.from_pretrained(exported)
    assert net.config.id2label == {i: shape for i, (shape, _) in enumerate(CUES)}
    card = json.loads((exported / "sfumato.json").read_text())
    assert set(card["quality"]) == {"shape_accuracy", "texture_accuracy", "shape_bias"}
    stages = sorted(path.name for path in (exported / "stages").iterdir())
    assert stages == ["step_000000", "step_000002"]
    weights = [ResNetForImageClassification.from_pretrained(exported / "stages" / each).state_dict() for each in stages]
    name = "classifier.1.weight"
    assert not torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[1][name], net.state_dict()[name])
    # the first stage is the net before its first step, also when the run was stopped and went on
    recipe = Recipe(**json.loads((exported / "sfumato.json").read_text())["recipe"])
    fresh = build_objective(recipe).modules["cnn"].state_dict()[name]
    torch.testing.assert_close(weights[0][name].float(), fresh, rtol=0, atol=1e-3)


def test_the_loaded_net_normalises_and_keeps_its_layer_names(exported):
    net = load_net(exported)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    plain = ResNetForImageClassification.from_pretrained(exported, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(pixels).logits, plain(pixels).logits, rtol=1e-5, atol=1e-5)
    assert "resnet.encoder.stages.1" in dict(net.named_modules()) and not net.training
    assert is_reader(exported) and not is_reader("toy-sd") and not is_reader("a red cube")
    assert AutoConfig.from_pretrained(exported).model_type == "resnet"
