"""What a layer cannot tell apart, where that is known: pictures of two halves, and a net that sees the left one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from sfumato import app
from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.explain.cnn_invariances import CnnInvariances, InvarianceExplorer, default_layers, fgsm, variance_ratios
from sfumato.explain.cnn_invariances.explorer import as_condition
from sfumato.explain.iin import Interpretation
from sfumato.models.nets.vector_ae import VectorAutoencoder
from sfumato.models.readers import load_net
from sfumato.translation.networks import Network
from sfumato.translation.translator import FlowParams, Translator, load_translator

FLOW = FlowParams(blocks=3, hidden=32, depth=1, steps=120, batch=96, lr=1e-2)
SIDE = 8


def halves(colours: torch.Tensor) -> torch.Tensor:
    """Pictures (b 3 8 8) whose halves have the colours (b 6)."""
    left, right = colours.unflatten(1, (2, 3)).unbind(1)
    return torch.cat([each[:, :, None, None].expand(-1, -1, SIDE, SIDE // 2) for each in (left, right)], 3)


def colours_of(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[..., : SIDE // 2].mean((2, 3)), x[..., SIDE // 2 :].mean((2, 3))], 1)


AUTOENCODER = Network("halves", "code", SIDE, lambda x: (colours_of(x), torch.full((len(x), 6), 0.01)), halves)


class Left(nn.Module):
    """Classifies the left half: red or green or blue."""

    def __init__(self):
        super().__init__()
        self.left, self.wide = nn.Identity(), nn.Identity()
        self.config = type("Config", (), {"num_labels": 3})()

    def forward(self, x):
        self.wide(x)
        return 6 * self.left(x[..., : SIDE // 2].mean((2, 3)))


@pytest.fixture(scope="module")
def explorer():
    rng = torch.Generator().manual_seed(0)
    pixels = halves(torch.rand(1000, 6, generator=rng) * 1.6 - 0.8)
    found = InvarianceExplorer(Left(), "left", AUTOENCODER)
    record = found.fit(pixels, FLOW)
    return found, pixels, record


def test_samples_keep_what_the_layer_sees_and_vary_in_what_it_does_not(explorer):
    found, pixels, record = explorer
    x = pixels[:60]
    drawn = colours_of(found.pictures(found.samples(x, 12, seed=1)).flatten(0, 1)).unflatten(0, (60, 12))
    assert (drawn[..., :3].mean(1) - colours_of(x)[:, :3]).abs().mean() < 0.1
    assert drawn[..., :3].std(1).mean() < 0.12 < 0.35 < drawn[..., 3:].std(1).mean()
    fidelity = found.fidelity(x, 4)
    assert fidelity["cosine"] > 0.9 and fidelity["cosine_reconstruction"] > 0.99 and fidelity["cosine_others"] < 0.5
    assert fidelity["decision"] > 0.75 and fidelity["decision_reconstruction"] == 1
    assert record.facts["inverse_error"] < 1e-4


def test_exchange_takes_the_representation_of_one_and_the_rest_of_the_other(explorer):
    found, pixels, _ = explorer
    seen, rest = pixels[:80], pixels[80:160]
    out = found.exchange(seen, rest)
    assert (out[:, :3] - colours_of(seen)[:, :3]).abs().mean() < 0.1
    assert (out[:, 3:] - colours_of(rest)[:, 3:]).abs().mean() < 0.15
    assert torch.allclose(found.exchange(seen, seen), colours_of(seen), atol=1e-4)


def test_an_attack_is_seen_through_the_layer_alone(explorer):
    found, pixels, _ = explorer
    x = pixels[:40]
    attacked = fgsm(found.net, x, 0.3)
    assert float((attacked - x).abs().max()) == pytest.approx(0.3, abs=1e-6)
    assert torch.equal(attacked[..., SIDE // 2 :], x[..., SIDE // 2 :])  # no gradient there
    answers = found.net(x).softmax(1).amax(1)
    own = found.net(x).argmax(1)
    assert (found.net(attacked).softmax(1)[torch.arange(40), own] <= answers + 1e-6).all()
    view = found.attack_view(x, attacked)
    assert (view[:, :3] - colours_of(attacked)[:, :3]).abs().mean() < 0.12
    assert (view[:, 3:] - colours_of(x)[:, 3:]).abs().mean() < 0.12
    with pytest.raises(BadInput, match="eps"):
        fgsm(found.net, x, -1)


def test_variance_ratios_are_0_for_what_is_known_and_1_for_what_is_lost():
    torch.manual_seed(0)
    translator = Translator(4, blocks=1, hidden=4).train()
    translator.flow(torch.randn(500, 4))
    reader = Interpretation(translator.eval(), {"kept": 1, "lost": 2, "residual": 1})
    v = torch.randn(2000, 4)
    drawn = v[:200, None].repeat(1, 30, 1)
    drawn[..., 1:3] = torch.randn(200, 30, 2)
    data = reader.vectors(v)
    ratios = variance_ratios(reader, reader.vectors(drawn.flatten(0, 1)).unflatten(0, (200, 30)), data)
    assert ratios["kept"] < 0.01 and ratios["lost"] == pytest.approx(1, abs=0.1)


def test_tokens_keep_their_places_and_the_class_token():
    tokens = torch.randn(2, 10, 5)
    maps = as_condition(tokens)
    assert maps.shape == (2, 10, 3, 3)
    assert torch.equal(maps[:, :5, 1, 2], tokens[:, 1 + 5]) and torch.equal(maps[:, 5:, 0, 0], tokens[:, 0])
    assert torch.equal(as_condition(tokens[:, 1:])[:, :, 0, 1], tokens[:, 2])
    assert as_condition(torch.randn(2, 7, 5)).shape == (2, 35)
    with pytest.raises(NotSupported):
        as_condition(torch.randn(2))


def test_probabilities_say_what_is_decided_and_logits_how_surely_too():
    torch.manual_seed(0)
    pixels = halves(torch.rand(50, 6) * 1.6 - 0.8)
    sure = Left()
    sure.left.register_forward_hook(lambda m, a, out: 400 * out)
    says = {
        layer: InvarianceExplorer(sure, layer, AUTOENCODER).condition(pixels) for layer in ("logits", "probabilities")
    }
    torch.testing.assert_close(says["logits"].exp(), says["probabilities"])
    torch.testing.assert_close(says["probabilities"].sum(1), torch.ones(50))
    assert (says["probabilities"].amax(1) > 0.999).float().mean() > 0.9  # saturated, where the others still vary
    assert says["logits"].amin(1).std() > 10
    several = Left()
    several.config.problem_type = "multi_label_classification"
    each = InvarianceExplorer(several, "probabilities", AUTOENCODER).condition(pixels)
    torch.testing.assert_close(each, several(pixels).sigmoid())


def test_an_unknown_layer_is_answered_with_the_modules_and_what_a_classifier_says():
    pixels = halves(torch.rand(4, 6))
    with pytest.raises(UnknownName, match="Did you mean 'probabilities'.*stages.0.*logits, probabilities"):
        InvarianceExplorer(load_net("toy-cnn"), "probability", AUTOENCODER).condition(pixels)
    with pytest.raises(UnknownName) as told:  # one that classifies nothing
        InvarianceExplorer(nn.Sequential(nn.Identity()), "logit", AUTOENCODER).condition(pixels)
    assert told.value.candidates == ["0"]


def test_nets_and_autoencoders_that_do_not_do_are_refused(explorer):
    found, pixels, _ = explorer
    with pytest.raises(NotSupported, match="decodes nothing"):
        InvarianceExplorer(Left(), "left", Network("n", "l", SIDE, AUTOENCODER.read))
    with pytest.raises(BadInput, match="no flow yet"):
        InvarianceExplorer(Left(), "left", AUTOENCODER).samples(pixels[:2])
    with pytest.raises(UnknownName):
        InvarianceExplorer(Left(), "right", AUTOENCODER).fit(pixels, FLOW)
    noisy = Left()
    noisy.left = nn.Dropout(0.5)
    noisy.left.eval = lambda: noisy.left  # stays random
    noisy.left.register_forward_hook(lambda m, a, out: out + torch.randn_like(out))
    with pytest.raises(BadInput, match="other values for the same pictures"):
        InvarianceExplorer(noisy, "left", AUTOENCODER).condition(pixels[:8])
    broken = Left()
    broken.left.register_forward_hook(lambda m, a, out: out / 0)
    with pytest.raises(BadInput, match="not finite for 8"):
        InvarianceExplorer(broken, "left", AUTOENCODER).condition(pixels[:8])
    with pytest.raises(NotSupported, match="draws"):
        CnnInvariances().explain_net(object())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ae") / "ae"
    VectorAutoencoder(16, (8, 8), 10).save_pretrained(folder)
    return folder


def test_a_classifier_is_explained_from_start_to_files(tiny, tmp_path):
    by = f"cnn_invariances:autoencoder={tiny},pictures=48,blocks=1,hidden=8,steps=2,batch=16,samples=2"
    table = app.explain("toy-cnn", by=f"{by},layers=[resnet.encoder.stages.0|logits],concepts=[shape|color]")
    assert [row.layer for row in table.layers] == ["resnet.encoder.stages.0", "logits"]
    assert set(table.layers[0].ratios) == {"shape", "color"} and len(table.lines()) == 4
    written = table.save(tmp_path, "toy-cnn")
    assert [path.suffix for path in written] == [".json", ".png", "", ""]
    assert load_translator(written[-1]).about["layer"] == "logits"
    picture = tmp_path / "toy.png"
    Image.new("RGB", (40, 40), "red").save(picture)
    again = app.explain(picture, model="toy-cnn", by=f"{by},flow={written[-1]},attack=0.1")
    sheet = again.maps[0].grid(again.images[0])
    assert again.maps[0].rows[0][0] == "logits" and sheet.width > 4 * 16
    with pytest.raises(BadInput, match="through a model that reads"):
        app.explain(picture, by=by)
    with pytest.raises(BadInput, match="asks nothing"):
        app.explain(picture, "a ball", model="toy-cnn", by=by)
    with pytest.raises(NotSupported, match="matcher"):
        app.explain(picture, model="toy-clip", by=by)


def test_the_layers_of_a_classifier_end_with_its_answer():
    assert default_layers(load_net("toy-cnn"))[-2:] == ["resnet.encoder.stages.3", "logits"]
