"""What the toybox knows, as training targets: against slow references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sfumato.toybox import ToyboxDataset
from sfumato.zoo.objectives import labels


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> ToyboxDataset:
    return ToyboxDataset("val", 6, 64, cache=Path(tmp_path_factory.mktemp("toybox")))


def test_place_labels_are_the_shares_of_the_pixels(scenes: ToyboxDataset) -> None:
    indices = torch.tensor([4, 0, 5])
    found = labels.place_labels(scenes, indices, 8)
    assert found.shape == (3, labels.PLACE_CLASSES, 8, 8)
    for row, i in enumerate(indices.tolist()):
        for y in range(8):
            for x in range(8):
                cell = scenes.masks[i, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].ravel()
                expected = []
                for name, words in labels.PLACES.items():
                    own = [getattr(toy, name) for toy in scenes.scenes[i].toys]
                    seen = [own[k] if k >= 0 else None for k in cell]
                    expected += [seen.count(word) / 64 for word in (None, *words)]
                assert found[row, :, y, x].tolist() == pytest.approx(expected, abs=1e-6)


def test_place_loss_is_a_weighted_cross_entropy_that_the_truth_minimises(scenes: ToyboxDataset) -> None:
    truth = labels.place_labels(scenes, torch.arange(2), 4)
    logits = torch.randn(2, labels.PLACE_CLASSES, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = []
    for b in range(2):
        top, bottom = 0.0, 0.0
        for y in range(4):
            for x in range(4):
                weight = 1 + 4 * (1 - truth[b, 0, y, x])
                start, one = 0, 0.0
                for words in labels.PLACES.values():
                    part = slice(start, start + len(words) + 1)
                    one -= (truth[b, part, y, x] * F.log_softmax(logits[b, part, y, x], 0)).sum()
                    start = part.stop
                top, bottom = top + weight * one, bottom + weight
        expected.append(float(top / bottom))
    assert labels.place_loss(logits, truth, 5.0).tolist() == pytest.approx(expected, rel=1e-5)
    best = labels.place_loss((truth + 1e-9).log(), truth)
    assert (best < labels.place_loss((truth + 1e-9).log() + 0.3 * logits, truth)).all()
