"""Reading models: their kinds, their pictures, their refusals."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as t

from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName
from sfumato.models.readers import is_reader, load_reader, wrap
from tests.readers import tiny

KINDS = {
    "vit": "classifier", "clip": "matcher", "siglip": "matcher", "bert": "texts", "visual_bert": "answerer",
    "lxmert": "answerer", "detr": "detector",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_told_by_what_a_model_does(kind):
    assert wrap(tiny(kind)[0]).kind == KINDS[kind]


def test_what_answers_nothing_is_refused():
    with pytest.raises(NotSupported, match="ViTModel gives no scores"):
        wrap(t.ViTModel(t.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)))


def test_built_in_and_folders():
    assert is_reader("toy-clip") and not is_reader("toy-sd") and not is_reader("toy-judge") and not is_reader("nothing")
    reader = load_reader("toy-clip")
    assert reader.kind == "matcher" and reader.preprocessing.size == (64, 64) and reader.dtype == torch.float32
    assert not reader.module.training and not any(p.requires_grad for p in reader.module.parameters())
    assert len(reader.weight_hash) == 64
    pixels = reader.pixels(torch.full((1, 3, 32, 48), 0.5))
    assert pixels.shape == (1, 3, 64, 64) and torch.allclose(pixels, torch.tensor(0.5), atol=1e-5)
    with pytest.raises(BadInput, match="shape"):
        reader.pixels(torch.zeros(3, 8, 8))
    with pytest.raises(BadInput, match="32 tokens"):
        reader.tokens(["a " * 40])
    with pytest.raises(UnknownName, match="toy-clip"):
        load_reader("toy-clop")


def test_damage_is_found(tmp_path):
    model = tiny("vit")[0]
    model.save_pretrained(tmp_path)
    assert load_reader(tmp_path).label("LABEL_1") == 1
    with pytest.raises(UnknownName, match="LABEL_1"):
        load_reader(tmp_path).label("LABEL_11")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(NotSupported, match="NoSuchModel"):
        load_reader(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(BadWeights, match="lacks"):
        load_reader(tmp_path)


def test_features_of_a_detector_of_its_own_are_refused_by_name():
    model = tiny("lxmert")[0]
    assert wrap(model).cells == 2  # 3 * 2 * 2 numbers are pixels
    model.config.visual_feat_dim = 2048
    with pytest.raises(NotSupported, match="2048 numbers"):
        _ = wrap(model, "lxmert").cells
