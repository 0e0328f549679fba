"""What the toybox knows, as training targets: against slow references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.toybox import ToyboxDataset, caption
from sfumato.zoo.objectives import labels
from sfumato.zoo.tokenizer import build_tokenizer


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


def test_word_targets_name_the_toys_attributes_at_their_nouns(scenes: ToyboxDataset) -> None:
    tokenizer = build_tokenizer()
    told = [caption(scene, np.random.default_rng(i), "random") for i, scene in enumerate(scenes.scenes)]
    spans = tokenizer([one.text for one in told], return_offsets_mapping=True, padding="longest", return_tensors="pt")
    places, targets = labels.word_targets(told, scenes.scenes, spans.offset_mapping)
    expected = []
    for row, one in enumerate(told):
        for phrase in one.phrases:
            if phrase.object is not None:
                toy = scenes.scenes[row].toys[phrase.object]
                unsaid = labels.UNSAID
                expected.append(
                    (
                        row,
                        toy.shape,
                        labels.SHAPES.index(toy.shape),
                        labels.COLORS.index(toy.color),
                        labels.PATTERNS.index(toy.pattern) if toy.pattern in phrase.text.split() else unsaid,
                        labels.SIZES.index(toy.size) if toy.size in phrase.text.split() else unsaid,
                    )
                )
    words = [tokenizer.decode(spans.input_ids[row, token]).strip() for row, token in places.tolist()]
    found = [(r, w, *t) for (r, _), w, t in zip(places.tolist(), words, targets.tolist(), strict=True)]
    assert found == expected and len(found) > 6


def test_word_loss_reads_fixed_directions_and_leaves_out_what_was_not_said() -> None:
    readout = labels.fixed_readout(32)
    torch.testing.assert_close(readout @ readout.T, torch.eye(labels.WORD_CLASSES))
    assert torch.equal(readout, labels.fixed_readout(32))
    hidden = torch.zeros(1, 3, 32)
    hidden[0, 1] = readout[2] + readout[6 + 4]  # third shape, fifth colour
    places, said = torch.tensor([[0, 1]]), torch.tensor([[2, 4, labels.UNSAID, labels.UNSAID]])
    right = labels.word_loss(hidden, readout, places, said)
    wrong = labels.word_loss(hidden, readout, places, torch.tensor([[1, 4, labels.UNSAID, labels.UNSAID]]))
    assert float(right) < 0.3 and float(wrong) > 3
    nothing = labels.word_loss(hidden, readout, places, torch.full((1, 4), labels.UNSAID))
    assert float(nothing) == 0
