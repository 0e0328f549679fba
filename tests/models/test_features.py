"""Feature nets, CLIPScore and the perceptual distance on genuine, tiny, randomly initialised models."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPModel

from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName
from sfumato.metrics.clip_score import clip_scores
from sfumato.models import TruncatedPrompt, features, quiet
from sfumato.models.perceptual import Perceptual, load_perceptual
from sfumato.models.readers import load_clip
from sfumato.models.readers.preprocessing import as_tensor, square
from tests.tiny import tiny_pipeline


def pictures(n, seed=0, size=(32, 32)):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(n)]


def test_clip_features_are_the_models_own(clip_folder):
    net = load_clip(clip_folder)
    looked, told = pictures(3), ["a red cube", "a ball and a cone", "grass"]
    with quiet():
        model = CLIPModel.from_pretrained(clip_folder).eval()
        processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
    tokens = net.tokenizer(told, padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = model(**processor(looked, return_tensors="pt"), **tokens)
    images, texts = net.features(looked), net.text_features(told)
    assert images.shape == (3, 12) and np.linalg.norm(images, axis=1).std() > 0  # not normalised
    assert np.allclose(images / np.linalg.norm(images, axis=1, keepdims=True), whole.image_embeds, atol=1e-6)
    assert np.allclose(texts / np.linalg.norm(texts, axis=1, keepdims=True), whole.text_embeds, atol=1e-6)
    scale = float(model.logit_scale.detach().exp())
    expected = (100 * whole.logits_per_image.diagonal() / scale).clamp_min(0).numpy()
    assert np.allclose(clip_scores(images, texts), expected, atol=1e-4)
    assert net.distance == "FD(tiny-clip)" and len(net.hash) == 64


def test_square_pictures_are_prepared_as_clip_prepares_them(clip_folder):
    with quiet():
        processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
    large = pictures(1, size=(80, 80))[0]
    theirs = processor(large, return_tensors="pt")["pixel_values"][0]
    ours = as_tensor([square(large, 32)])[0] / 2 + 0.5 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    assert torch.allclose(ours / torch.tensor(processor.image_std).view(3, 1, 1), theirs, atol=1e-5)


def test_the_middle_square_is_what_is_seen():
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste(Image.new("RGB", (30, 30), "blue"), (30, 0))
    assert (np.asarray(square(wide, 15)) == (0, 0, 255)).all()
    assert square(wide.rotate(90, expand=True), 15).size == (15, 15)
    same = pictures(1)[0]
    assert np.array_equal(np.asarray(square(same, 32)), np.asarray(same))
    assert square(Image.new("L", (32, 32)), 32).mode == "RGB"


def test_long_texts_are_told_of(clip_folder):
    net = load_clip(clip_folder)
    with pytest.warns(TruncatedPrompt, match="tiny-clip reads 16 tokens: 1 of 2 texts"):
        assert net.text_features(["a red cube", "red " * 40]).shape == (2, 12)


def test_half_precision_gives_nearly_the_same(clip_folder):
    full, half = load_clip(clip_folder), load_clip(clip_folder, "bfloat16")
    a, b = full.features(pictures(4)), half.features(pictures(4))
    assert b.dtype == np.float32 and np.allclose(a, b, atol=0.05 * np.abs(a).max())
    with pytest.raises(UnknownName, match="float99"):
        load_clip(clip_folder, "float99")


def test_nets_that_are_not_there(tmp_path, clip_folder, monkeypatch):
    with pytest.raises(UnknownName, match="unknown feature net 'toy-clp'.*'toy-clip'"):
        features.feature_net("toy-clp")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadWeights, match="holds no weights"):
        features.feature_net(str(tmp_path / "empty"))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(BadWeights, match="only as pickles"):
        features.feature_net(str(tmp_path / "pickled"))
    with pytest.raises(UnknownName, match="unknown autoencoder"):
        load_perceptual("nowhere")
    with pytest.raises(BadWeights, match="cannot be read as an autoencoder"):
        load_perceptual(str(clip_folder))


def test_inception_needs_its_package_and_its_weights(tmp_path, monkeypatch):
    real = features.importlib.util.find_spec
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None if "fidelity" in name else real(name))
    with pytest.raises(NotSupported, match="needs the package torch-fidelity"):
        features.feature_net("inception")
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(NotSupported, match="nothing is downloaded"):
        features.feature_net("inception")
    with pytest.raises(BadInput, match="float32"):
        features.feature_net("inception", "bfloat16")

    class Extractor(torch.nn.Module):  # the interface of torch-fidelity's, with a feature that can be checked
        def __init__(self, name, features_list, weights):
            super().__init__()
            assert (name, features_list) == ("inception-v3-compat", ["2048"]) and weights.endswith(".pth")

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.float().mean((2, 3)),)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / features.INCEPTION_FILE).write_bytes(b"")
    net = features.feature_net.__wrapped__("inception")  # it is not to stay
    mixed = [*pictures(2), *pictures(1, 5, (20, 40)), *pictures(1, 6)]
    assert np.allclose(net.features(mixed), [np.asarray(p).mean((0, 1)) for p in mixed], rtol=1e-5)
    assert net.distance == "FID"


def test_clip_scores_are_never_negative():
    assert clip_scores(np.eye(2), -np.eye(2)).tolist() == [0, 0]
    assert clip_scores(2 * np.eye(2), 3 * np.eye(2)).tolist() == [100, 100]
    with pytest.raises(BadInput, match="must both be"):
        clip_scores(np.eye(2), np.eye(3))


# --- perceptual ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perceptual():
    return Perceptual(tiny_pipeline("sd").vae, "tiny", 32)


def test_perceptual_against_loops(perceptual):
    a, b = as_tensor(pictures(2)), as_tensor(pictures(2, 1))
    got = perceptual.distances(a, b)
    for row in range(2):
        expected = 0.0
        for x, y in zip(perceptual.layers(a), perceptual.layers(b), strict=True):
            x, y = x[row].double(), y[row].double()
            places = [
                float(
                    (functional.normalize(x[:, i, j], dim=0) - functional.normalize(y[:, i, j], dim=0)).square().sum()
                )
                for i in range(x.shape[1])
                for j in range(x.shape[2])
            ]
            expected += np.mean(places)
        assert float(got[row]) == pytest.approx(expected, rel=1e-6)


def test_the_layers_are_those_of_the_encoder(perceptual):
    seen = []
    vae = tiny_pipeline("sd").vae
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append(out))
        for block in [*vae.encoder.down_blocks, vae.encoder.mid_block]
    ]
    pixels = as_tensor(pictures(1))
    with torch.no_grad():
        vae.encode(pixels)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(x, y) for x, y in zip(seen, perceptual.layers(pixels), strict=True))


def test_perceptual_axioms(perceptual):
    a, b = as_tensor(pictures(2)), as_tensor(pictures(2, 1))
    layers = len(perceptual.layers(a))
    assert torch.equal(perceptual.distances(a, a), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(perceptual.distances(a, b), perceptual.distances(b, a))
    assert (perceptual.distances(a, b) > 0).all() and (perceptual.distances(a, b) <= 4 * layers).all()
    nearer = perceptual.distances(a, torch.lerp(a, b, 0.2))
    assert (nearer < perceptual.distances(a, torch.lerp(a, b, 0.8))).all()
    sizes = perceptual.between(pictures(1, size=(64, 48)), pictures(1, 1))
    assert sizes.shape == (1,)
    with pytest.raises(BadInput, match="share one shape"):
        perceptual.distances(a, b[:1])
