"""Attention relevance: whole models against the paper's rules in a loop; every method; every refusal."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as t

from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.explain.attention_relevance import AttentionRelevance, explain_image
from sfumato.explain.attention_relevance.words import word_maps
from sfumato.explain.relevance_maps import RelevanceMaps, paint_regions
from sfumato.relevance import attention
from sfumato.relevance.attention import METHODS, attention_relevance
from sfumato.relevance.capture import captured
from tests.readers import KINDS, tiny
from tests.tiny import tiny_model

PLAIN = [method for method in METHODS if method not in ("partial_lrp", "transformer_attribution", "relevance_lrp")]


def maps_and_slopes(model, inputs, target):
    with captured(model) as calls:
        y = target(model(**inputs))
    slopes = torch.autograd.grad(y.sum(), [c.probs for c in calls], allow_unused=True)
    slopes = [torch.zeros_like(c.probs) if s is None else s for c, s in zip(calls, slopes, strict=True)]
    return {f"{c.path}:{c.index}": (c.probs.detach(), s) for c, s in zip(calls, slopes, strict=True)}


def fused(pair):
    return (pair[0] * pair[1]).clamp(min=0).mean(1)


def norm(r):
    eye = torch.eye(r.shape[-1])
    gained = r - eye
    return torch.nan_to_num(gained / gained.sum(-1, keepdim=True)) + eye


def test_vit_by_hand():
    model, inputs, target = tiny("vit")
    r = torch.eye(17).expand(2, 17, 17)
    for pair in maps_and_slopes(model, inputs, target).values():
        r = r + fused(pair) @ r
    found = attention_relevance(model, inputs, target)
    assert torch.allclose(found["tokens", "tokens"], r, atol=1e-7)
    assert float((found.row("tokens", 0)[:, 1:]).max()) > 0
    with torch.no_grad():
        assert torch.allclose(found.scores, target(model(**inputs)), atol=1e-5)


def test_detr_by_hand():
    """Encoder by rule 6; each decoder layer by rules 6 and 7, then 10: the paper's section 3.3, encoder-decoder."""
    model, inputs, target = tiny("detr")
    maps = {name.rpartition(":")[0]: fused(pair) for name, pair in maps_and_slopes(model, inputs, target).items()}
    ii, qq, qi = torch.eye(16).expand(2, -1, -1), torch.eye(3).expand(2, -1, -1), torch.zeros(2, 3, 16)
    for k in range(2):
        ii = ii + maps[f"model.encoder.layers.{k}.self_attn"] @ ii
    for k in range(2):
        a = maps[f"model.decoder.layers.{k}.self_attn"]
        qq, qi = qq + a @ qq, qi + a @ qi
        qi = qi + norm(qq).transpose(1, 2) @ maps[f"model.decoder.layers.{k}.encoder_attn"] @ norm(ii)
    found = attention_relevance(model, inputs, target)
    assert torch.allclose(found["queries", "image"], qi, atol=1e-7)
    assert float(qi[:, 1].max()) > 0 and not found["image", "queries"].any()


def test_lxmert_by_hand():
    """Words, regions, then per cross layer: both co-attentions from the old matrices, then both self-attentions."""
    model, inputs, target = tiny("lxmert")
    maps = {name: fused(pair) for name, pair in maps_and_slopes(model, inputs, target).items()}
    tt, ii = torch.eye(5).expand(2, -1, -1), torch.eye(4).expand(2, -1, -1)
    ti, it = torch.zeros(2, 5, 4), torch.zeros(2, 4, 5)
    for k in range(2):
        tt = tt + maps[f"lxmert.encoder.layer.{k}.attention.self:0"] @ tt
    ii = ii + maps["lxmert.encoder.r_layers.0.attention.self:0"] @ ii
    for k in range(2):
        base = f"lxmert.encoder.x_layers.{k}"
        a, c = maps[f"{base}.visual_attention.att:0"], maps[f"{base}.visual_attention.att:1"]
        new_ti, new_it = norm(tt).transpose(1, 2) @ a @ norm(ii), norm(ii).transpose(1, 2) @ c @ norm(tt)
        new_tt, new_ii = a @ it, c @ ti
        ti, it, tt, ii = ti + new_ti, it + new_it, tt + new_tt, ii + new_ii
        s, v = maps[f"{base}.lang_self_att.self:0"], maps[f"{base}.visn_self_att.self:0"]
        tt, ti, ii, it = tt + s @ tt, ti + s @ ti, ii + v @ ii, it + v @ it
    found = attention_relevance(model, inputs, target)
    for pair, matrix in {("text", "text"): tt, ("text", "image"): ti, ("image", "text"): it}.items():
        assert torch.allclose(found[pair], matrix, atol=1e-6), pair
    # the answer is read from the words: the regions' last layer has no part in it
    last = maps_and_slopes(model, inputs, target)["lxmert.encoder.x_layers.1.visn_self_att.self:0"][1]
    assert not last.any() and float(ti[:, 0].max()) > 0


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_samples(kind, method):
    model, inputs, target = tiny(kind, 2)
    whole = attention_relevance(model, inputs, target, method=method)
    for i in range(2):
        one = attention_relevance(model, {k: v[i : i + 1] for k, v in inputs.items()}, target, method=method)
        for pair, matrix in whole.matrices.items():
            assert torch.allclose(one[pair][0], matrix[i], atol=1e-4, rtol=1e-3), pair
    assert all(m.isfinite().all() and (m >= 0).all() for m in whole.matrices.values())


def test_baselines_by_hand():
    model, inputs, target = tiny("vit")
    pairs = list(maps_and_slopes(model, inputs, target).values())
    probs, slopes = pairs[-1]
    assert torch.allclose(attention_relevance(model, inputs, target, method="raw")["tokens", "tokens"], probs.mean(1))
    cam = (slopes.mean((2, 3), keepdim=True) * probs).mean(1).clamp(min=0)
    assert torch.allclose(attention_relevance(model, inputs, target, method="gradcam")["tokens", "tokens"], cam)
    r = torch.eye(17)
    for each, _ in pairs:
        mixed = each.mean(1) + torch.eye(17)
        r = mixed / mixed.sum(-1, keepdim=True) @ r
    assert torch.allclose(
        attention_relevance(model, inputs, target, method="rollout")["tokens", "tokens"], r, atol=1e-6
    )


def test_input_gradient_by_hand():
    model, inputs, target = tiny("vit")
    seen = {}
    handle = model.vit.layers[0].attention.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    y = target(model(**inputs))
    handle.remove()
    slope = torch.autograd.grad(y.sum(), seen["x"])[0]
    weight = (slope * seen["x"]).sum(-1).abs()
    raw = attention_relevance(model, inputs, target, method="raw")["tokens", "tokens"]
    found = attention_relevance(model, inputs, target, method="input_gradient")["tokens", "tokens"]
    assert torch.allclose(found, raw * weight[:, None], atol=1e-6)


def test_rollout_ignores_the_question_and_relevance_does_not():
    model, inputs, _ = tiny("vit", 1)
    rows = {}
    for method in ("rollout", "relevance"):
        found = [attention_relevance(model, inputs, lambda o, k=k: o.logits[:, k], method=method) for k in (0, 1)]
        rows[method] = [each.row("tokens", 0) for each in found]
    assert torch.equal(*rows["rollout"])
    first, second = rows["relevance"]
    assert float(torch.cosine_similarity(first[0, 1:], second[0, 1:], dim=0)) < 0.9


def test_propagated_relevance_takes_the_place_of_maps(monkeypatch):
    model, inputs, target = tiny("vit")
    pairs = list(maps_and_slopes(model, inputs, target).values())
    given = [torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) - 0.3 for i, (p, _) in enumerate(pairs)]
    seen = []

    def propagated(module, run, of):
        seen.append((module is model, tuple(of(run()).shape)))
        return given

    monkeypatch.setattr(attention, "map_relevances", propagated)

    def ask(method):
        return attention_relevance(model, inputs, target, method=method)["tokens", "tokens"]

    assert torch.allclose(ask("partial_lrp"), given[-1].clamp(min=0).mean(1))
    r = torch.eye(17)
    for a, (_, s) in zip(given, pairs, strict=True):
        r = r + (a * s).clamp(min=0).mean(1) @ r
    assert torch.allclose(ask("transformer_attribution"), r, atol=1e-6)
    assert torch.allclose(ask("relevance_lrp"), r, atol=1e-6) and seen == [(True, (2,))] * 3
    given.pop()
    with pytest.raises(NotSupported, match="propagation sees 1"):
        ask("partial_lrp")


def test_start_layer():
    model, inputs, target = tiny("vit")
    last = fused(list(maps_and_slopes(model, inputs, target).values())[-1])
    for start in (1, -1):
        found = attention_relevance(model, inputs, target, start_layer=start)["tokens", "tokens"]
        assert torch.allclose(found, torch.eye(17) + last, atol=1e-7)
    with pytest.raises(BadInput, match="start_layer is 2"):
        attention_relevance(model, inputs, target, start_layer=2)


def test_relevance_can_be_a_loss():
    model, inputs, target = tiny("vit")
    found = attention_relevance(model, inputs, target, second_order=True)
    loss = found.row("tokens", 0)[:, 1:].sum()
    loss.backward()
    first = model.vit.layers[0].attention
    weight = next(p for n, p in first.named_parameters() if n.endswith("weight"))
    slope = weight.grad[0, 0].item()
    values = []
    for step in (1e-3, -1e-3):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            next(p for n, p in moved.vit.layers[0].attention.named_parameters() if n.endswith("weight"))[0, 0] += step
        values.append(float(attention_relevance(moved, inputs, target).row("tokens", 0)[:, 1:].sum()))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.05, abs=1e-5)


def test_the_model_is_left_as_it_was():
    model, inputs, target = tiny("bert")
    model.train().requires_grad_(False)
    model.bert.encoder.layer[1].eval()
    before = [(part.training, len(part._forward_hooks)) for part in model.modules()]
    for method in ("relevance", "input_gradient"):
        attention_relevance(model, inputs, target, method=method)
    assert before == [(part.training, len(part._forward_hooks)) for part in model.modules()]
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_points_to_the_same_tokens(dtype):
    model, inputs, target = tiny("vit")
    full = attention_relevance(model, inputs, target).row("tokens", 0)[:, 1:]
    half = copy.deepcopy(model).to(dtype)
    # a small score: its gradients would vanish in float16
    found = attention_relevance(
        half, {"pixel_values": inputs["pixel_values"].to(dtype)}, lambda out: target(out) * 1e-3
    )
    row = found.row("tokens", 0)[:, 1:]
    assert row.dtype == torch.float32 and row.isfinite().all()
    assert float(torch.cosine_similarity(row, full).min()) > 0.95


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"method": "rolout"}, UnknownName, "rollout"),
        ({"target": lambda out: out.logits}, BadInput, r"shape \(2,\)"),
        ({"target": lambda out: out.logits[:, 0].detach()}, BadInput, "does not depend"),
        ({"target": lambda out: out.logits[:, 0] * float("nan")}, BadInput, "not finite"),
        ({"read": ["text"]}, UnknownName, "tokens"),
    ],
)
def test_bad_input(change, error, said):
    model, inputs, target = tiny("vit")
    with pytest.raises(error, match=said):
        attention_relevance(model, inputs, **{"target": target, **change})


def test_a_convolutional_network_is_refused():
    model = t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).eval()
    with pytest.raises(NotSupported, match="ResNetForImageClassification computed no softmax attention"):
        attention_relevance(model, {"pixel_values": torch.randn(1, 3, 32, 32)}, lambda out: out.logits[:, 0])


@pytest.mark.parametrize("kind", ["sd", "sd3", "sd35", "flux", "pixart"])
def test_models_that_draw(kind):
    """Maps of words, finite, of the picture's own grid, the same in a batch; a word that is not there is named."""
    model = tiny_model(kind)
    wide = 48 if kind != "pixart" else 32
    images = torch.rand(2, 3, 32, wide, generator=torch.Generator().manual_seed(0)) * 2 - 1
    both = word_maps(model, images, ["a red cube and a ball", "a green cone"], steps=2, seed=5)
    alone = word_maps(model, images[1:], ["a green cone"], steps=2, seed=6)[0]
    assert [answer.label for answer in alone.answers] == ["a", "green", "cone"]
    for label in ("green", "cone"):
        heat = both[1].map(label)
        assert heat.shape == (32, wide) and heat.isfinite().all() and float(heat.max()) > 0
        assert torch.allclose(both[1].answer(label).cells, alone.answer(label).cells, rtol=2e-3, atol=1e-6)
    one = explain_image(model, images[:1], "a red cube and a ball", steps=2, seed=5, words=["red cube"])
    joined = (both[0].answer("red").cells + both[0].answer("cube").cells) / 2
    assert torch.allclose(one.answer("red cube").cells, joined, rtol=2e-3, atol=1e-6)
    assert one.map(0, (10, 7)).shape == (10, 7)


def test_words_of_a_drawing_must_be_in_the_prompt():
    from sfumato.errors import NoMatch

    with pytest.raises(NoMatch, match="zebra"):
        explain_image(tiny_model("sd"), torch.zeros(1, 3, 32, 32), "a red cube", words=["zebra"], steps=1)
    with pytest.raises(BadInput, match="prompt"):
        explain_image(tiny_model("sd"), torch.zeros(1, 3, 32, 32), None)


def test_maps_survive_the_disk(tmp_path):
    from sfumato.explain.relevance_maps import Answer

    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 1.0, 1.0]])
    values = torch.tensor([1.0, 3.0])
    painted = paint_regions(boxes, values, (4, 4))
    assert painted[0].tolist() == [1, 1, 0, 0] and painted[1].tolist() == [1, 3, 3, 3]
    answers = (
        Answer("yes", 0.5, painted, ("a", "cube"), (0.25, 0.75), boxes, values, (0.1, 0.2, 0.3, 0.4)),
        Answer("words only", 1.0, None, ("a",), (1.0,)),
    )
    maps = RelevanceMaps(answers, (8, 8), "relevance", {"query": "is there a cube ?"})
    again = RelevanceMaps.load(maps.save(tmp_path / "maps.safetensors"))
    assert torch.equal(again.map("yes"), maps.map("yes")) and again.words("yes") == [("a", 0.25), ("cube", 0.75)]
    assert torch.equal(again.answer(0).regions, boxes) and again.facts == maps.facts and again.answer(0).box[2] == 0.3
    from PIL import Image

    assert maps.grid(Image.new("RGB", (8, 8))).width > 256
    with pytest.raises(UnknownName, match="words only"):
        maps.answer("words onyl")
    with pytest.raises(BadInput, match="no picture map"):
        maps.map(1)
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(BadInput):
        RelevanceMaps.load(tmp_path / "other.safetensors")


def test_parameters_are_checked():
    assert AttentionRelevance(method="gradcam").params.method == "gradcam"
    with pytest.raises(BadInput, match="method"):
        AttentionRelevance(method="grad")
