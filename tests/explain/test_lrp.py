"""Relevance propagation against a slow reference, the authors' numbers, known theorems and conservation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.explain.lrp import LRP, explain_image
from sfumato.relevance.lrp import METHODS, conservation, lrp, map_relevances, on_grid, traced
from sfumato.relevance.propagation_rules import Rules


def vit(layers: int = 2, cls=ViTForImageClassification, config=ViTConfig, seed: int = 0, **more) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
        options |= {"image_size": 12, "patch_size": 4, "num_labels": 3, "initializer_range": 0.2, **more}
        model = cls(config(**options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():  # class tokens of DeiT start as zeros, from which relevance cannot go on
                    parameter.normal_(0, 0.2)
        return model


def bert() -> BertForSequenceClassification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=30,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=3,
            initializer_range=0.2,
        )
        return BertForSequenceClassification(config).eval()


def pictures(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(5))


# -- the mathematics ---------------------------------------------------------------------------------------------------


def shared(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    """Deep Taylor through y = w x, one output at a time: positive contributions only, in proportion."""
    out = torch.zeros_like(x)
    for o in range(len(w)):
        parts = x * w[o]
        parts = torch.where(parts > 0, parts, torch.zeros_like(parts))
        out += parts / parts.sum() * r[o]
    return out


def test_one_attention_layer_equals_a_slow_reference() -> None:
    """Everything between the logits and the attention map of a one-layer ViT, token by token, in float64."""
    model = vit(1).double()
    x = pictures(1).double()
    seen: dict[str, Tensor] = {}
    for name, part in model.named_modules():
        part.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: out, f"{name}.in": args and args[0]})
        )
    found = traced(model, x, 1)
    layer, p = model.vit.layers[0], "vit.layers.0"
    final = seen["vit.layernorm"][0]
    r = torch.zeros_like(final)
    r[0] = shared(final[0], model.classifier.weight, torch.eye(3).double()[1])
    after = seen[f"{p}.layernorm_after.in"][0]  # the first sum
    mlp = seen[f"{p}.mlp"][0]

    def parted(u: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        a, b = u / (u + v) * r, v / (u + v) * r
        whole = a.sum().abs() + b.sum().abs()
        return a * (a.sum().abs() / whole * r.sum() / a.sum()), b * (b.sum().abs() / whole * r.sum() / b.sum())

    to_mlp, to_skip = parted(mlp, after, r)
    hidden = seen[f"{p}.mlp.activation_fn"][0]
    to_hidden = torch.stack([shared(hidden[i], layer.mlp.fc2.weight, to_mlp[i]) for i in range(10)])
    normed = seen[f"{p}.layernorm_after"][0]
    back = torch.stack([shared(normed[i], layer.mlp.fc1.weight, to_hidden[i]) for i in range(10)])
    r = to_skip + back
    projected, start = seen[f"{p}.attention.o_proj"][0], seen[f"{p}.layernorm_before.in"][0]
    to_attention, _ = parted(projected, start, r)
    mixed = seen[f"{p}.attention.o_proj.in"][0]
    to_mixed = torch.stack([shared(mixed[i], layer.attention.o_proj.weight, to_attention[i]) for i in range(10)])
    values = seen[f"{p}.attention.v_proj"][0].view(10, 2, 8)
    want = torch.zeros(2, 10, 10).double()
    for k in range(2):
        for i in range(10):
            for d in range(8):
                s = to_mixed[i, 8 * k + d] / mixed[i, 8 * k + d]
                want[k, i] += found.maps[0][0, k, i] * values[:, k, d] * s / 2
    torch.testing.assert_close(found.relevances[0][0], want, rtol=1e-4, atol=1e-8)


def test_numbers_of_the_authors_code() -> None:
    """Weights and picture from formulas; the numbers were printed once by the authors' published ViT."""
    model = vit(2, intermediate_size=64, layer_norm_eps=1e-6).double()
    with torch.no_grad():
        for k, (name, p) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 0.7 + k).reshape(p.shape)
            p.copy_(1 + 0.1 * wave if "norm" in name and name.endswith("weight") else 0.1 * wave)
    x = torch.cos(torch.arange(432, dtype=torch.float64) * 0.37).reshape(1, 3, 12, 12)
    attribution = [4.572037681944122e-4, 5.844235360940358e-4, 1.5146261705473957e-4, 5.0108663408459266e-5]
    attribution += [1.1464286551690011e-4, 5.310197283561851e-4, 5.661878864075173e-4, 8.594253469467879e-5]
    attribution += [3.913361278585372e-5]
    row = lrp(model, x, 1)[0]
    assert row[0] == 0
    assert row[1:].tolist() == pytest.approx(attribution, rel=1e-4)
    full = [-4.1622e-04, -1.9856e-04, -2.9735e-04, -4.0487e-04, 4.2398e-01, -6.2264e-04, -1.5665e-04, -1.0762e-04]
    assert lrp(model, x, 1, "lrp")[0, 1:9].tolist() == pytest.approx(full, rel=1e-3)


def test_epsilon_rule_on_a_relu_net_without_bias_is_gradient_times_input() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)
    )
    x = torch.randn(4, 6)
    found = traced(net, x, 1, Rules(linear="epsilon", eps=1e-12), gradients=False, to_inputs=True, attention=False)
    leaf = x.clone().requires_grad_()
    out = net(leaf)[:, 1]
    [gradient] = torch.autograd.grad(out.sum(), leaf)
    # relevance starts at 1, gradient times input at the score
    torch.testing.assert_close(found.inputs * out.detach()[:, None], gradient * x, rtol=1e-3, atol=1e-5)


def test_alpha_beta_splits_support_and_opposition() -> None:
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -1.0, 3.0]]))
    x = torch.tensor([[1.0, 4.0, -1.0]])  # contributions 2, -4, -3
    for alpha, want in ((1.0, [1.0, 0, 0]), (2.0, [2.0, -4 / 7, -3 / 7])):
        found = traced(layer, x, 0, Rules(alpha=alpha), gradients=False, to_inputs=True, attention=False)
        assert found.inputs[0].tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("kind", ["vit", "deit", "bert"])
def test_every_function_conserves_relevance(kind: str) -> None:
    if kind == "bert":
        model, inputs = bert(), {"input_ids": torch.tensor([[2, 5, 7, 9], [3, 4, 8, 1]])}
    else:
        classes = {"vit": (ViTForImageClassification, ViTConfig), "deit": (DeiTForImageClassification, DeiTConfig)}[
            kind
        ]
        model, inputs = vit(2, *classes), pictures()
    records = conservation(model.double(), inputs.double() if isinstance(inputs, Tensor) else inputs)
    kinds = {record.op for record in records}
    assert {"linear", "matmul", "softmax", "add", "layer_norm", "gelu"} <= kinds
    assert {"tanh"} <= kinds if kind == "bert" else {"conv2d"} <= kinds
    for record in records:
        assert record.error < 1e-5, record
        assert torch.isfinite(record.given).all() and 0 <= record.negative <= 1 and record.peak >= 0
    assert records[0].path == "classifier" and records[0].given.tolist() == [1.0] * len(records[0].given)
    total = max(float(record.given.abs().max()) for record in records)
    assert total <= 1 + 1e-6  # normalised sums never hand on more than came


def test_without_normalisation_relevance_may_grow() -> None:
    records = conservation(vit(4).double(), pictures().double(), rules=Rules(normalise=False))
    assert all(record.error < 1e-4 for record in records)
    assert max(float(record.given.abs().max()) for record in records) > 1.5


# -- what it promises --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_samples(method: str) -> None:
    model, x = vit(), pictures()
    rows = lrp(model, x, [0, 1, 2], method)
    near = 1e-5 if method == "lrp" else 1e-7  # of both signs, and summed over a token's inputs: rounding stays
    for i in range(3):
        torch.testing.assert_close(rows[i : i + 1], lrp(model, x[i : i + 1], i, method), rtol=1e-4, atol=near)


def test_scores_and_model_are_left_as_they_were() -> None:
    model, x = vit(), pictures()
    model.train()
    model.vit.layers[0].eval()
    model.classifier.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    modes = [part.training for part in model.modules()]
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]  # noqa: E731
    before = hooks()
    found = traced(model, x, 2, to_inputs=True)

    def broken(_: object) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        traced(model, x, broken)
    assert flags == [p.requires_grad for p in model.parameters()] and modes == [m.training for m in model.modules()]
    assert hooks() == before and all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(found.scores, model.eval()(x).logits[:, 2], rtol=1e-5, atol=1e-5)


def test_frozen_or_not_eager_or_fused_relevance_is_the_same() -> None:
    x = pictures()
    model = vit()
    want = [lrp(model, x, 0, method) for method in METHODS]
    model.requires_grad_(False)
    eager = vit(attn_implementation="eager")
    for method, row in zip(METHODS, want, strict=True):
        torch.testing.assert_close(lrp(model, x, 0, method), row, rtol=0, atol=0)
        torch.testing.assert_close(lrp(eager, x, 0, method), row, rtol=1e-3, atol=1e-6)


def test_padding_gets_nothing_and_does_not_change_the_rest() -> None:
    model = bert()
    short = {"input_ids": torch.tensor([[2, 5, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    padded = {"input_ids": torch.tensor([[2, 5, 7, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    for method in METHODS:
        row = lrp(model, padded, 1, method)
        assert row[0, 3:].abs().max() < 1e-9
        torch.testing.assert_close(row[:, :3], lrp(model, short, 1, method), rtol=1e-3, atol=1e-7)


def test_targets_by_number_name_default_and_function() -> None:
    model, x = vit(id2label={0: "cat", 1: "dog", 2: "owl"}), pictures()
    torch.testing.assert_close(lrp(model, x, "dog"), lrp(model, x, 1), rtol=0, atol=0)
    best = model(x).logits.argmax(1)
    torch.testing.assert_close(lrp(model, x), lrp(model, x, best), rtol=0, atol=0)
    by_function = lrp(model, x, lambda out: out.logits[:, 1])
    torch.testing.assert_close(by_function, lrp(model, x, 1), rtol=0, atol=0)


def test_partial_lrp_is_the_last_layers_plain_relevance() -> None:
    model, x = vit(), pictures()
    last = traced(model, x, 0, Rules(normalise=False), gradients=False).relevances[-1]
    torch.testing.assert_close(lrp(model, x, 0, "partial_lrp")[:, 1:], last.mean(1)[:, 0, 1:].clamp_min(0))


def test_relevance_of_each_map_for_other_methods() -> None:
    model, x = vit(), pictures()
    given = map_relevances(model, lambda: model(pixel_values=x), lambda out: out.logits[:, 1])
    for one, other in zip(given, traced(model, x, 1).relevances, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_grid_and_size() -> None:
    row = torch.arange(11.0)[None]
    assert on_grid(row).shape == (1, 3, 3) and on_grid(row)[0, 0, 0] == 2  # class and distillation token dropped
    assert on_grid(row[:, :7], (2, 3), (8, 12)).shape == (1, 8, 12)
    with pytest.raises(BadInput, match="4 x 4"):
        on_grid(row, (4, 4))


# -- bad input ---------------------------------------------------------------------------------------------------------


class LinearAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x) @ (F.elu(x).mT @ x)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.cumsum(1))


def test_bad_input_is_refused_in_one_line() -> None:
    model, x = vit(), pictures()
    cases = [
        (BadInput, r"target 7 is not a label of this model, which has 3", lambda: lrp(model, x, 7)),
        (BadInput, "-1 is not a label", lambda: lrp(model, x, -1)),
        (UnknownName, "LABEL_1", lambda: lrp(model, x, "LABEL_9")),
        (BadInput, "2 targets for 3 samples", lambda: lrp(model, x, [0, 1])),
        (UnknownName, "partial_lrp", lambda: lrp(model, x, 0, "partial")),
        (BadInput, "start_layer=2", lambda: lrp(model, x, 0, start_layer=2)),
        (BadInput, "half precision.*bfloat16", lambda: lrp(vit().bfloat16(), x, 0)),
        (BadInput, "half precision.*float16", lambda: lrp(model, x.half(), 0)),
        (BadInput, "one number per sample", lambda: lrp(model, x, lambda out: out.logits)),
        (BadInput, "alpha", lambda: Rules(alpha=0.5)),
        (BadInput, "epsilon", lambda: Rules(linear="gamma")),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_models_without_softmax_attention_are_refused_by_name() -> None:
    plain = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(NotSupported, match="Sequential computed no softmax attention"):
        lrp(plain, torch.randn(2, 4), 0)
    linear = nn.Sequential(LinearAttention(), nn.Flatten(), nn.Linear(20, 2))
    with pytest.raises(NotSupported, match="linear attention .LinearAttention at 0"):
        map_relevances(linear, lambda: linear(torch.randn(2, 5, 4)), lambda out: out[:, 0])
    with pytest.raises(NotSupported, match="no relevance rule for cumsum in Odd"):
        traced(Odd(), torch.randn(2, 4), 0, attention=False, gradients=False, to_inputs=True)


# -- the system --------------------------------------------------------------------------------------------------------


def test_explaining_a_picture_gives_a_map_per_label() -> None:
    from sfumato.models.readers import wrap

    reader = wrap(vit(id2label={0: "cat", 1: "dog", 2: "owl"}), "tiny")
    found = explain_image(reader, pictures(1).clamp(-1, 1), "owl", labels=["dog"], method="partial_lrp")
    assert [answer.label for answer in found.answers] == ["owl", "dog"] and found.method == "partial_lrp"
    want = lrp(reader.module, pictures(1).clamp(-1, 1), "dog", "partial_lrp")
    torch.testing.assert_close(found.answer("dog").cells, on_grid(want)[0])
    with pytest.raises(BadInput, match="alpha"):
        LRP(alpha=0.2)
    with pytest.raises(UnknownName, match="dog"):
        explain_image(reader, pictures(1).clamp(-1, 1), "dogg")
