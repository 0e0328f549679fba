"""Whole weights: exchanged and restored to the bit, at any scale, alone or in sets."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

from sfumato.adapters.weight_sets import WeightSets, parameter_like, swapped_weights
from sfumato.adapters.weights import Weights
from sfumato.errors import BadWeights, Conflict, NoMatch
from sfumato.sampling import generate
from tests.helpers import fingerprint
from tests.tiny import tiny_model


def latents(model, systems=()):
    given = {"steps": 1, "seed": 5, "guidance": 1.0, "scheduler": "ddim", "decode": False}
    return generate(model, "a red cube", interventions=systems, **given).latents


@pytest.fixture
def child(tmp_path):
    """A fine-tuned U-Net and its folder."""
    network = copy.deepcopy(tiny_model("sd").denoiser)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    network.save_pretrained(tmp_path / "unet")
    return network, tmp_path / "unet"


def test_at_scale_1_it_is_the_fine_tuned_model(child):
    network, folder = child
    model, other = tiny_model("sd"), tiny_model("sd", fresh=True)
    other.pipe.unet = network
    before, bare = fingerprint(model), latents(model)
    assert torch.equal(latents(model, Weights(file=str(folder))), latents(other))
    assert fingerprint(model) == before and torch.equal(latents(model), bare)
    assert torch.equal(latents(model, Weights(file=str(folder), scale=0)), bare)


def test_scales_are_shares_of_the_way(child):
    network, folder = child
    model = tiny_model("sd")
    (weights,) = Weights(file=str(folder)).weights(model, -0.5).values()
    own, theirs = dict(model.denoiser.named_parameters()), dict(network.named_parameters())
    for path, value in weights.items():
        torch.testing.assert_close(value, own[path] - 0.5 * (theirs[path] - own[path]))
    largest = next(iter(Weights(file=str(folder)).diff(model, 1.0)))
    assert largest.startswith("unet.")


def test_some_parameters_and_custom_diffusions_names(tmp_path):
    model = tiny_model("sd")
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    value = torch.randn_like(model.denoiser.get_parameter(path))
    save_file({f"unet.{path}": value}, tmp_path / "a.safetensors")
    save_file({path.replace(".to_k.", ".processor.to_k_custom_diffusion."): value.clone()}, tmp_path / "b.safetensors")
    with swapped_weights(model.modules, {"unet": {path: parameter_like(model.denoiser.get_parameter(path), value)}}):
        expected = latents(model)
    for name in ("a", "b"):
        assert torch.equal(latents(model, Weights(file=str(tmp_path / f"{name}.safetensors"))), expected)
    assert Weights(file=str(tmp_path / "b.safetensors")).contents.dialects == ("Custom Diffusion",)


def test_refusals(tmp_path, child):
    model, path = tiny_model("sd"), "mid_block.attentions.0.proj_in.weight"
    own = model.denoiser.get_parameter(path)

    def given(tensors, **params):
        save_file(tensors, tmp_path / "x.safetensors")
        return latents(model, Weights(file=str(tmp_path / "x.safetensors"), **params))

    with pytest.raises(NoMatch, match="fits 1 of 2 parameters of tiny-sd; it has no unet.mid_block.attention.*nearest"):
        given({f"unet.{path}": own + 1, "unet.mid_block.attentions.9.proj_in.weight": own.clone()})
    with pytest.raises(NoMatch, match="changes nothing"):
        given({f"unet.{path}": own.clone()})
    with pytest.raises(BadWeights, match="instead of"):
        given({f"unet.{path}": own[:3].clone()})
    with pytest.raises(BadWeights, match="no finite numbers"):
        given({f"unet.{path}": own * float("nan")})
    with pytest.raises(Conflict, match="only one set can be in place"):
        save_file({f"unet.{path}": own + 1}, tmp_path / "y.safetensors")
        latents(model, [Weights(file=str(child[1])), Weights(file=str(tmp_path / "y.safetensors"))])


def test_sets_are_whole_parameters_and_graphs_keep_theirs():
    network = torch.nn.Linear(2, 1, bias=False)
    own = network.weight
    sets = WeightSets(network, {"a": {"weight": torch.nn.Parameter(torch.tensor([[3.0, 0.0]]))}, "b": {}})
    x = torch.tensor([[1.0, 1.0]], requires_grad=True)
    sets.use("a")
    y = network(x)
    sets.use("b")
    assert network.weight is own
    sets.use(None)
    y.sum().backward()
    assert x.grad.tolist() == [[3.0, 0.0]] and network.weight is own
