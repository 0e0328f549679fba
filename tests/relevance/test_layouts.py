"""Which tokens attend to which, read off genuine architectures."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from sfumato.errors import NotSupported
from sfumato.relevance.capture import captured
from sfumato.relevance.layouts import layout
from tests.readers import tiny
from tests.tiny import tiny_model

SELF = ("self", "tokens", "tokens")
EXPECTED = {
    "vit": ({"tokens": 17}, [SELF] * 2),
    "deit": ({"tokens": 18}, [SELF] * 2),
    "bert": ({"tokens": 5}, [SELF] * 2),
    "visual_bert": ({"tokens": 9}, [SELF] * 2),
    "clip": ({"image": 17, "text": 5}, [("self", "image", "image")] * 2 + [("self", "text", "text")] * 2),
    "siglip": ({"image": 16, "text": 5}, [("self", "image", "image")] * 2 + [("self", "text", "text")] * 2),
    "lxmert": (
        {"text": 5, "image": 4},
        [("self", "text", "text")] * 2
        + [("self", "image", "image")]
        + [("both", "text", "image"), ("self", "text", "text"), ("self", "image", "image")] * 2,
    ),
    "detr": (
        {"image": 16, "queries": 3},
        [("self", "image", "image")] * 2 + [("self", "queries", "queries"), ("cross", "queries", "image")] * 2,
    ),
    "t5": (
        {"encoder": 5, "decoder": 3},
        [("self", "encoder", "encoder")] * 2 + [("self", "decoder", "decoder"), ("cross", "decoder", "encoder")] * 2,
    ),
}


def plan(kind):
    model, inputs, _ = tiny(kind)
    with captured(model) as calls:
        model(**inputs)
    return layout(model, calls), calls


@pytest.mark.parametrize("kind", EXPECTED)
def test_transformers(kind):
    found, calls = plan(kind)
    sizes, moves = EXPECTED[kind]
    assert found.sizes == sizes
    assert [(m.kind, m.rows, m.columns) for m in found.moves] == moves
    used = [m.call for m in found.moves] + [m.back for m in found.moves if m.back >= 0]
    assert sorted(used) == list(range(len(calls)))


def test_co_attention_with_as_many_words_as_regions():
    model, inputs, _ = tiny("lxmert")
    inputs["visual_feats"], inputs["visual_pos"] = torch.randn(2, 5, 12), torch.rand(2, 5, 4)
    with captured(model) as calls:
        model(**inputs)
    assert [(m.kind, m.rows, m.columns) for m in layout(model, calls).moves] == EXPECTED["lxmert"][1]


def test_a_u_net_changes_its_grid():
    model = tiny_model("sd")
    condition = model.encode_text(["a red cube"])
    with captured(model.denoiser) as calls:
        model.predict(torch.randn(1, *model.latent_shape(32, 32)), 500.0, condition, "cond")
    sites = model.sites(32, 32)
    found = layout(model.denoiser, calls, sites)
    grids = [(m.old, m.new) for m in found.moves if m.kind == "grid"]
    first, last = sites[0].grid, sites[-1].grid
    assert grids[0][0] == first and grids[-1][1] == last == found.grids["image"]
    assert all(a[1] == b[0] for a, b in zip(grids, grids[1:], strict=False))
    assert found.sizes == {"image": first[0] * first[1], "text": calls[1].keys}


@pytest.mark.parametrize(("kind", "parts"), [("sd3", True), ("sd35", True), ("pixart", False)])
def test_transformers_that_draw(kind, parts):
    model = tiny_model(kind)
    condition = model.encode_text(["a red cube"])
    with captured(model.denoiser) as calls:
        model.predict(torch.randn(1, *model.latent_shape(32, 32)), 500.0, condition, "cond")
    found = layout(model.denoiser, calls, model.sites(32, 32))
    assert len([m for m in found.moves if m.kind != "grid"]) == len(calls)
    if not parts:
        assert set(found.sizes) == {"image", "text"}
        return
    assert set(found.parts) == {"image", "text"} and set(found.sizes) == {"tokens"}
    some = [m for m in found.moves if m.part is not None]
    assert len(some) == (1 if kind == "sd35" else 0) and all(m.part == found.parts["image"] for m in some)


def test_windows_are_refused_by_name():
    config = t.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    model = t.SwinForImageClassification(config).eval()
    with captured(model) as calls:
        model(torch.randn(1, 3, 16, 16))
    with pytest.raises(NotSupported, match="windows"):
        layout(model, calls)


def test_last():
    found, _ = plan("lxmert")
    assert found.last("text", "image").call == found.moves[-3].call
    assert found.last("image", "text").call == found.moves[-3].back
    assert plan("detr")[0].last("image", "queries") is None
