"""Shape and texture dimensions: the estimator against planted units, layers, read-outs, silencing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from sfumato import cards
from sfumato.errors import BadInput, NoMatch, UnknownName
from sfumato.explain import shape_texture as st
from sfumato.explain.shape_texture import ShapeTexture, dimensions_of, estimate
from tests.tiny import tiny_model


def planted(n: int = 1500, d: int = 100, shape: int = 20, texture: int = 10, seed: int = 0):
    """Units of pairs: the first ``shape`` ones are shared in shape pairs, the next ``texture`` ones in texture
    pairs."""
    rng = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, own in (("shape", slice(0, shape)), ("texture", slice(shape, shape + texture))):
        a, b = torch.randn(n, d, generator=rng), torch.randn(n, d, generator=rng)
        b[:, own] = a[:, own]
        pairs[name] = (a, b)
    return pairs


def slow(pairs):
    """The score as section 3.1 and the authors' code have it, with loops."""
    rows = [row for a, b in pairs.values() for side in (a, b) for row in side.double().tolist()]
    d = len(rows[0])
    mean = [sum(row[i] for row in rows) / len(rows) for i in range(d)]
    total = sum(sum((row[i] - mean[i]) ** 2 for row in rows) / len(rows) for i in range(d))
    out = {}
    for name, (a, b) in pairs.items():
        a, b = a.double().tolist(), b.double().tolist()
        score = 0.0
        for i in range(d):
            m = (sum(row[i] for row in a) + sum(row[i] for row in b)) / (2 * len(a))
            score += sum((x[i] - m) * (y[i] - m) for x, y in zip(a, b, strict=True)) / len(a)
        out[name] = score / total
    return out


def test_scores_are_those_of_the_definition():
    pairs = planted(40, 6, 2, 1)
    found = estimate(pairs, draws=0)
    for name, value in slow(pairs).items():
        assert found.scores[name].value == pytest.approx(value, abs=1e-10)
        assert float(found.units[name].sum()) == pytest.approx(value, abs=1e-5)
    a, b = pairs["shape"]
    rho = np.array([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(6)])
    assert found.correlations["shape"].value == pytest.approx(rho.mean(), abs=1e-6)
    kept = np.clip(rho**2, 0, 1 - 1e-12)
    assert found.information["shape"].value == pytest.approx((-0.5 * np.log1p(-kept)).mean(), rel=1e-3)


def test_planted_units_are_counted_and_ranked():
    truth, scores = [], []
    for shape in (0, 5, 10, 20, 40, 80):
        found = estimate(planted(shape=shape), draws=10)
        truth.append(shape / 100)
        scores.append(found.scores["shape"].value)
        assert found.scores["shape"].low - 0.03 <= shape / 100 <= found.scores["shape"].high + 0.03
        assert set(found.ranked("shape")[:shape]) == set(range(shape))
        assert found.correlations["shape"].value == pytest.approx(shape / 100, abs=0.03)
    assert np.corrcoef(truth, scores)[0, 1] > 0.99


@pytest.mark.parametrize(
    ("scores", "percent"), [((0, 0), (21.2, 21.2, 57.6)), ((1, 1), (33.3, 33.3, 33.3)), ((1, 0), (42.2, 15.5, 42.2))]
)
def test_the_softmax_keeps_to_its_narrow_band(scores, percent):
    found = dimensions_of(10_000, dict(zip(("shape", "texture"), scores, strict=True)))
    assert list(found) == ["shape", "texture", "residual"] and sum(found.values()) == 10_000
    assert [100 * value / 10_000 for value in found.values()] == pytest.approx(percent, abs=0.06)


def test_dead_units_count_for_nothing_and_none_alive_is_refused():
    pairs = planted(200, 10, 4, 2)
    wide = {
        name: tuple(torch.cat([side, torch.full((200, 5), 7.1)], 1) for side in both) for name, both in pairs.items()
    }
    bare, found = estimate(pairs, draws=0), estimate(wide, draws=0)
    assert found.dead == 5 and found.d == 15
    assert found.scores["shape"].value == pytest.approx(bare.scores["shape"].value, abs=1e-9)
    assert found.correlations["shape"].value == pytest.approx(bare.correlations["shape"].value, abs=1e-9)
    assert not found.units["shape"][10:].any()
    with pytest.raises(BadInput, match="none of the 3 units varies"):
        estimate({"shape": (torch.ones(5, 3), torch.ones(5, 3))})


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ({}, "at least one factor"),
        ({"shape": (torch.zeros(2, 3), torch.zeros(2, 3))}, "3 or more"),
        ({"shape": (torch.zeros(5, 3), torch.zeros(4, 3))}, "3 or more rows each"),
        ({"shape": (torch.full((5, 3), math.nan), torch.zeros(5, 3))}, "not finite"),
    ],
)
def test_bad_pairs_are_refused(pairs, says):
    with pytest.raises(BadInput, match=says):
        estimate(pairs)


# --- layers ---------------------------------------------------------------------------------------------------------


def tiny_resnet() -> ResNetForImageClassification:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNetForImageClassification(config).eval()


def test_stages_are_found():
    assert st.stages(tiny_resnet())[:3] == ["resnet.embedder", "resnet.encoder.stages.0", "resnet.encoder.stages.1"]
    unet = st.stages(tiny_model("sd").denoiser)
    blocks = [name for name in unet if name.split("_")[0] in ("down", "mid", "up")]
    assert blocks == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1", "mid_block"]
    assert "transformer_blocks.0" in st.stages(tiny_model("sd3").denoiser)
    assert st.stages(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())) == ["0", "1"]


def test_features_are_what_the_layers_put_out_and_no_hook_stays():
    net, images = tiny_resnet(), torch.rand(5, 3, 32, 32)
    layers = ["resnet.embedder", "resnet.encoder.stages.1"]
    got = st.features(net, images, layers, batch=2)
    with torch.no_grad():
        hidden = net.resnet(images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(got[layers[0]], hidden[0].mean((2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[layers[1]], hidden[2].mean((2, 3)), rtol=1e-5, atol=1e-6)
    assert st.features(net, images, layers, pool=None)[layers[1]].shape == hidden[2].shape
    with pytest.raises(UnknownName, match="resnet.encoder.stages.1"):
        st.features(net, images, ["resnet.encoder.stage.1"])
    with pytest.raises(ValueError, match="channel dimension"):  # the net's own complaint
        st.features(net, torch.rand(2, 4, 32, 32), layers)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_net_in_training_stays_so_and_its_statistics_too():
    net = tiny_resnet().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    st.features(net, torch.rand(4, 3, 32, 32), ["resnet.embedder"])
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_silenced_units_are_zero_and_come_back():
    net, images = tiny_resnet(), torch.rand(2, 3, 32, 32)
    layer = "resnet.encoder.stages.0"
    with torch.no_grad():
        whole = net(images).logits
        with st.ablated(net, layer, [1, 3]):
            got, seen = net(images).logits, st.features(net, images, [layer], pool=None)[layer]
            last = net.resnet.encoder.stages[1](seen).mean((2, 3))  # what follows sees the zeros
        assert not seen[:, [1, 3]].any() and seen[:, [0, 2]].abs().sum() > 0
        torch.testing.assert_close(got, net.classifier(last[..., None, None]), rtol=1e-4, atol=1e-5)
        with pytest.raises(BadInput, match="0 to 7, got 8"), st.ablated(net, layer, [8]):
            net(images)
        assert torch.equal(net(images).logits, whole)
    assert not net.get_submodule(layer)._forward_hooks


def test_the_picture_half_of_a_joint_block_is_the_one_read():
    model = tiny_model("sd3")
    forward = st.noised_forward(model, 0.5)
    with torch.no_grad(), st.layer_outputs(model.denoiser, ["transformer_blocks.0"]) as seen:
        forward(torch.zeros(1, 3, 32, 32))
    patch = model.denoiser.config.patch_size
    assert seen["transformer_blocks.0"].shape[1] == (model.latent_shape(32, 32)[1] // patch) ** 2


# --- read-outs ------------------------------------------------------------------------------------------------------


def test_a_readout_finds_what_is_there_and_only_that():
    rng = torch.Generator().manual_seed(1)
    truth = (torch.rand(40, 4, 4, generator=rng) < 0.5).long().repeat_interleave(4, 1).repeat_interleave(4, 2)
    informative = torch.randn(40, 6, 4, 4, generator=rng)
    informative[:, 2] += 4 * truth[:, ::4, ::4]
    empty = torch.randn(40, 6, 4, 4, generator=rng)
    for depth in (1, 3):
        options = {"depth": depth, "widths": (16, 8), "epochs": 15, "batch": 8, "learning_rate": 0.1}
        scores = []
        for maps in (informative, empty):
            head = st.train_readout(maps[:30], truth[:30], 2, **options)
            scores.append(st.mean_iou(head, maps[30:], truth[30:], 2))
        assert scores[0] > 0.6 > 0.45 > scores[1]
    again, twice = (st.train_readout(informative[:30], truth[:30], 2, **options | {"epochs": 2}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), twice.state_dict().values(), strict=True))


def test_mean_iou_is_that_of_sets():
    rng = torch.Generator().manual_seed(2)
    maps, truth = torch.randn(3, 4, 5, 5, generator=rng), torch.randint(-1, 3, (3, 10, 10), generator=rng)
    head = st.train_readout(maps, truth, 3, depth=1, epochs=1)
    said = head(maps, (10, 10)).argmax(1)
    each = []
    for k in range(3):
        a = {tuple(p) for p in ((said == k) & (truth >= 0)).nonzero().tolist()}
        b = {tuple(p) for p in (truth == k).nonzero().tolist()}
        each.append(len(a & b) / len(a | b))
    assert st.mean_iou(head, maps, truth, 3) == pytest.approx(np.mean(each), abs=1e-6)


@pytest.mark.parametrize(
    ("maps", "truth", "classes", "says"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, 8, 8), 2, "must be"),
        (torch.zeros(2, 3, 4, 4), torch.full((2, 8, 8), 5), 2, "-1 to 1 are allowed"),
        (torch.zeros(2, 3, 4, 4), torch.full((2, 8, 8), -2), 2, "-1 to 1 are allowed"),
    ],
)
def test_labels_out_of_range_are_refused(maps, truth, classes, says):
    with pytest.raises(BadInput, match=says):
        st.train_readout(maps, truth, classes)
    with pytest.raises(BadInput, match="1 or 3"):
        st.ReadOut(3, 2, depth=2)


# --- the system -----------------------------------------------------------------------------------------------------


class MeanColor(nn.Module):
    """Its units are the mean colours of a picture: they know the scenery and next to nothing of shape."""

    def __init__(self):
        super().__init__()
        self.eye = nn.Identity()

    def forward(self, x):
        return self.eye(x)


def test_a_net_that_sees_mean_colours_knows_the_scenery():
    system = ShapeTexture(factors=["shape", "scenery"], layers=["eye"], pairs=40, draws=50)
    table = system.explain_net(MeanColor(), "mean colour", size=32)
    found = table.layers["eye"]
    assert found.d == 3 and found.scores["scenery"].low > 0.6 and found.scores["shape"].high < 0.4
    assert table.lines()[0].startswith("eye: 3 units: shape ")
    few = ShapeTexture(factors=["shape"], layers=["eye"], pairs=4, draws=5)
    once, again = (few.explain_net(MeanColor(), "mean colour", size=32).to_json() for _ in range(2))
    assert once == again


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_denoisers_are_looked_into_through_the_family(kind):
    model = tiny_model(kind)
    system = cards.build("shape_texture:pairs=4,draws=0,factors=[shape|texture|pose]")
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    table = system.explain_net(model, size=32)
    assert len(table.layers) >= 2
    for found in table.layers.values():
        assert sum(found.dimensions.values()) == found.d and set(found.scores) == {"shape", "texture", "pose"}
    assert all(torch.equal(value, before[name]) for name, value in model.denoiser.state_dict().items())
    if kind == "sd":
        assert system.explain_net(model, size=32).to_json() == table.to_json()


def test_shared_noise_is_a_shared_factor():
    model = tiny_model("sd")
    layer = ["down_blocks.0"]
    score = {
        noise: ShapeTexture(pairs=12, draws=0, layers=layer, noise=noise, progress=0.1)
        .explain_net(model, size=32)
        .layers[layer[0]]
        .scores["texture"]
        .value
        for noise in ("independent", "shared")
    }
    assert score["shared"] > score["independent"] + 0.3


def test_wrong_parameters_are_refused():
    with pytest.raises(UnknownName, match="'color'"):
        ShapeTexture(factors=["colour"])
    with pytest.raises(BadInput, match="pairs"):
        ShapeTexture(pairs=2)
    with pytest.raises(UnknownName, match="layer 'stages.9'"):
        ShapeTexture(layers=["stages.9"], pairs=3).explain_net(tiny_resnet())
    with pytest.raises(NoMatch, match="puts out nothing for each picture"):
        ShapeTexture(layers=["time_embedding.cond_proj"], pairs=3).explain_net(_silent())


def _silent() -> nn.Module:
    net = MeanColor()
    net.time_embedding = nn.ModuleDict({"cond_proj": nn.Linear(2, 2)})  # never runs
    return net
