"""Figures of the bench against torchmetrics' on the same features.

torch-fidelity's are compared in ``tests/judge/test_distances.py`` where it is installed: it needs torchvision, which
this package does not.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.metrics.clip_score import clip_scores
from sfumato.metrics.frechet import Moments, frechet
from sfumato.metrics.kernel import kernel_distance
from sfumato.models.features import feature_net

D = 24


@pytest.fixture(scope="module", autouse=True)
def _torchmetrics() -> None:
    """It takes a second to import: only where these tests run, not wherever they are collected."""
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install 'sfumato[dev]'")


class Given(nn.Module):
    """Stands where Inception would: the "pictures" (b 3 h w) are features already."""

    num_features = D

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.flatten(1)[:, :D].double()


def sample(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, D)) @ np.random.default_rng(9).normal(size=(D, D)) / 5 + shift).astype(np.float32)


def as_pictures(features: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(features).view(len(features), 3, 2, 4)


def test_frechet():
    from torchmetrics.image.fid import FrechetInceptionDistance

    x, y = sample(300, 1), sample(200, 2, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = FrechetInceptionDistance(feature=Given(), normalize=True, input_img_size=(3, 2, 4)).set_dtype(
            torch.float64
        )
    for real, features in ((True, x), (False, y)):
        for part in np.array_split(features, 3):
            theirs.update(as_pictures(part), real=real)
    mine = frechet(*(Moments(D).add(each) for each in (x, y)))
    assert mine == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_kernel_distance_over_all_pairs():
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = sample(60, 3), sample(60, 4, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=60, normalize=True)
    theirs.update(as_pictures(x), real=True)
    theirs.update(as_pictures(y), real=False)
    # one subset that holds every picture: nothing is left to the draw
    assert kernel_distance(x, y).value == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_clip_score():
    """With toy-clip as the model, through torchmetrics' own path from pictures and texts to the score."""
    from torchmetrics.multimodal.clip_score import CLIPScore

    net = feature_net("toy-clip")
    rng = np.random.default_rng(5)
    pictures = [_picture(rng) for _ in range(4)]
    texts = ["a red ball on the grass", "a blue cube", "two green rings", "a large striped cone in the snow"]
    mine = clip_scores(net.features(pictures), net.text_features(texts))

    def model_and_processor():
        return _Model(net.model), _Processor(net)

    theirs = CLIPScore(model_name_or_path=model_and_processor)
    for picture, text, score in zip(pictures, texts, mine, strict=True):  # it cuts the mean off at 0, we every picture
        theirs.reset()
        theirs.update(torch.from_numpy(np.array(picture)).permute(2, 0, 1), text)
        assert score == pytest.approx(float(theirs.compute()), abs=1e-3)


def _picture(rng):
    from PIL import Image

    return Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))


class _Model(nn.Module):
    """torchmetrics 1.9 expects embeddings where transformers 5 answers with a record that holds them."""

    def __init__(self, clip):
        super().__init__()
        self.clip, self.config = clip, clip.config

    def get_image_features(self, pixel_values):
        return self.clip.get_image_features(pixel_values).pooler_output

    def get_text_features(self, input_ids, attention_mask):
        return self.clip.get_text_features(input_ids, attention_mask).pooler_output


class _Processor:
    """What torchmetrics asks of a CLIP processor, from the folder's own tokenizer and statistics."""

    def __init__(self, net):
        self.net = net

    def __call__(self, text=None, images=None, return_tensors="pt", padding=True, **_):
        out = {}
        if text is not None:
            out |= dict(self.net.tokenizer(text, return_tensors="pt", padding="max_length", truncation=True))
        if images is not None:
            pixels = torch.stack([torch.as_tensor(np.asarray(each)) for each in images]).float() / 255
            mean, std = (
                torch.tensor(part)[:, None, None] for part in (self.net.preprocessing.mean, self.net.preprocessing.std)
            )
            out["pixel_values"] = (pixels - mean) / std
        return out


def test_read_outs():
    from torchmetrics.classification import MulticlassJaccardIndex

    from sfumato.explain.shape_texture import mean_iou, train_readout

    rng = torch.Generator().manual_seed(1)
    maps, truth = torch.randn(6, 5, 4, 4, generator=rng), torch.randint(-1, 4, (6, 16, 16), generator=rng)
    head = train_readout(maps, truth, 4, depth=1, epochs=2)
    theirs = MulticlassJaccardIndex(4, average="macro", ignore_index=-1)(head(maps, (16, 16)).argmax(1), truth)
    assert mean_iou(head, maps, truth, 4) == pytest.approx(float(theirs), abs=1e-6)
