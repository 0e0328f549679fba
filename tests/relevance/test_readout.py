"""From which tokens an answer is read: distilled, averaging and mixed heads of genuine models, for both methods."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from sfumato.errors import NotSupported
from sfumato.relevance.attention import attention_relevance
from sfumato.relevance.lrp import lrp, traced
from sfumato.relevance.readout import read_weights
from sfumato.relevance.rules import fuse_heads, rollout
from tests.readers import PICTURE, SMALL, _ids, _lively, _pixels

HEADS = {
    "class token": (t.ViTConfig, t.ViTForImageClassification, {}),
    "two tokens": (t.DeiTConfig, t.DeiTForImageClassificationWithTeacher, {}),
    "mean": (t.BeitConfig, t.BeitForImageClassification, {"use_mean_pooling": True}),
    "mean of data2vec": (t.Data2VecVisionConfig, t.Data2VecVisionForImageClassification, {}),
    "both": (t.Dinov2Config, t.Dinov2ForImageClassification, {}),
}
CELLS = 16


def classifier(kind):
    config, cls, more = HEADS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config(num_labels=3, initializer_range=0.2, **SMALL, **PICTURE, **more))
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():  # tokens that start as zeros, from which relevance cannot go on
                    parameter.normal_(0, 0.2)
        return _lively(model)


def read_by(kind, weights):
    """Whether weights (b n) are on the tokens that the head of this kind reads."""
    special, cells = weights[:, :-CELLS], weights[:, -CELLS:]
    assert torch.allclose(weights.sum(1), torch.ones(len(weights)), atol=1e-5)
    if kind == "class token":
        return torch.equal(special, torch.ones_like(special)) and not cells.any()
    if kind == "two tokens":
        return special.shape[1] == 2 and bool((special > 0.05).all()) and not cells.any()
    even = torch.allclose(cells, cells[:, :1].expand_as(cells), rtol=0.8)  # layer norm sees each token by itself
    if kind == "both":
        return bool((special > 0.05).all() and (cells > 0).all()) and even
    return not special.any() and bool((cells > 0).all()) and even


@pytest.mark.parametrize("kind", HEADS)
def test_rows_are_those_that_the_head_reads(kind):
    model, pixels = classifier(kind), _pixels(2)
    target = lambda out: out.logits[:, 1]  # noqa: E731
    found = attention_relevance(model, {"pixel_values": pixels}, target, read=["tokens"])
    assert read_by(kind, found.weights["tokens"])
    row = found.read("tokens")
    truth = torch.stack([w @ m for w, m in zip(found.weights["tokens"], found["tokens", "tokens"], strict=True)])
    torch.testing.assert_close(row, truth)
    guessed = found.row("tokens", 0)  # the class token's, which is what a count of tokens suggests
    assert torch.equal(row, guessed) == (kind == "class token")
    one = attention_relevance(model, {"pixel_values": pixels[1:]}, target, read=["tokens"])
    torch.testing.assert_close(one.read("tokens"), row[1:], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_lrp_weighs_the_same_rows(kind):
    model, pixels = classifier(kind), _pixels(2)
    found = traced(model, pixels, 1)
    weights = read_weights(found.hidden)
    assert read_by(kind, weights)
    matrix = rollout([fuse_heads(r, g) for r, g in zip(found.relevances, found.gradients, strict=True)], False)
    row = lrp(model, pixels, 1)
    truth = torch.stack([w @ m for w, m in zip(weights, matrix, strict=True)])
    torch.testing.assert_close(row[:, -CELLS:], truth[:, -CELLS:])
    by_class_token = lrp(model, pixels, 1, token=0)[:, -CELLS:]
    assert torch.equal(row[:, -CELLS:], by_class_token) == (kind == "class token")
    partial = lrp(model, pixels, 1, "partial_lrp")[:, -CELLS:]
    assert partial.abs().max() > 0


def test_a_text_is_read_where_its_classifier_reads():
    config = t.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _lively(t.GPT2ForSequenceClassification(config))
    inputs = {"input_ids": _ids(2), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    found = attention_relevance(model, inputs, lambda out: out.logits[:, 1], read=["tokens"])
    assert torch.equal(found.weights["tokens"], torch.eye(5)[[4, 4]])


def test_what_reads_no_token_is_refused():
    with pytest.raises(NotSupported, match="does not read"):
        read_weights(torch.zeros(1, 3, 4))
    with pytest.raises(NotSupported, match="does not read"):
        read_weights(None)


@pytest.mark.parametrize("batch", [1, 2])
def test_windows_are_refused_by_reason(batch):
    config = t.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    model = t.SwinForImageClassification(config).eval()
    pixels = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for method in ("transformer_attribution", "partial_lrp", "lrp"):
        with pytest.raises(NotSupported, match="windowed attention .Swin and the like., which is not global"):
            lrp(model, pixels, 0, method)
    small = t.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[1], window_size=4)
    one = t.SwinForImageClassification(small).eval()
    for net in (model, one):  # also where every layer has as many windows as the others
        with pytest.raises(NotSupported, match="windowed attention .Swin and the like., which is not global"):
            attention_relevance(net, {"pixel_values": pixels}, lambda out: out.logits[:, 0], read=["tokens"])


def test_lrp_says_what_hides_attention():
    model, pixels = classifier("class token"), _pixels(1)
    with torch.inference_mode(), pytest.raises(NotSupported, match="inference mode"):
        lrp(model, pixels, 0)
    with pytest.raises(NotSupported, match="compiled"):
        lrp(torch.compile(model), pixels, 0)
