"""Pictures with labels, pairs that agree, and what a network's vectors must be."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import nn

from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models.nets.vector_ae import VectorAutoencoder, is_autoencoder, load_autoencoder
from sfumato.toybox import concept_of, cue_scenes
from sfumato.translation.examples import agreeing, folder_examples
from sfumato.translation.networks import Network, network_of
from tests.tiny import tiny_model


def test_pairs_agree_differ_and_are_as_frequent_as_their_values():
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2, 3])
    pairs = agreeing(labels, 6000, seed=0)
    assert (labels[pairs[:, 0]] == labels[pairs[:, 1]]).all() and (pairs[:, 0] != pairs[:, 1]).all()
    counts = torch.bincount(labels[pairs[:, 0]], minlength=4) / 6000
    assert torch.allclose(counts, torch.tensor([0, 2 / 6, 4 / 6, 0]), atol=0.03)
    partners = torch.bincount(pairs[pairs[:, 0] == 3, 1], minlength=8).float()
    assert partners[4:7].min() > 0.8 * partners[4:7].max() and partners.sum() == partners[4:7].sum()
    assert torch.equal(pairs, agreeing(labels, 6000, seed=0))


@pytest.mark.parametrize(
    ("labels", "told"), [(torch.zeros(9).long(), "all pictures agree"), (torch.arange(9), "no two")]
)
def test_a_concept_needs_pairs_that_agree_and_some_that_do_not(labels, told):
    with pytest.raises(BadInput, match=told):
        agreeing(labels, 5, 0)


def folder(path, n, **columns):
    rows = []
    for i in range(n):
        Image.new("RGB", (20, 20), (i % 7 * 30, 90, i % 3 * 80)).save(path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"picture {i}", **{k: v(i) for k, v in columns.items()}})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_folders_bring_labels_from_their_metadata(tmp_path):
    found = folder_examples(folder(tmp_path, 40, hue=lambda i: "ab"[i % 2]), 16, ["hue"])
    assert found.pixels.shape == (40, 3, 16, 16) and found.names == {"hue": ["a", "b"]}
    assert found.labels["hue"].tolist() == [i % 2 for i in range(40)] and found.texts[3] == "picture 3"
    assert len(found.rows([1, 5])) == 2 and found.rows([1, 5]).texts == ["picture 1", "picture 5"]
    with pytest.raises(UnknownName, match="hue"):
        folder_examples(tmp_path, 16, ["hut"])


def test_folders_that_are_too_small_or_say_too_little_are_refused(tmp_path):
    with pytest.raises(BadInput, match="holds 10 pictures"):
        folder_examples(folder(tmp_path, 10, hue=lambda i: "a"), 16, ["hue"])
    with pytest.raises(BadInput, match="7.png says nothing about 'hue'"):
        folder_examples(folder(tmp_path, 40, hue=lambda i: None if i == 7 else "a"), 16, ["hue"])


def test_concepts_are_words_of_the_scene():
    [scene], _ = cue_scenes(1)
    toy = scene.toys[0]
    assert (
        concept_of(scene, "texture") == toy.pattern and concept_of(scene, "scenery") == f"{scene.ground}, {scene.sky}"
    )
    far = scene.replace(0, x=0.6, z=0.0).replace(camera=type(scene.camera)(0, 10, 1.5))
    assert concept_of(far, "place") == "right" and concept_of(far.replace(0, x=0.0), "place") == "middle"
    with pytest.raises(UnknownName):
        concept_of(scene, "colour")


class Net(nn.Module):
    """Pooled colours of the picture, and noise of ``wild``."""

    def __init__(self, wild: float = 0.0, broken: bool = False):
        super().__init__()
        self.stage, self.wild, self.broken = nn.Sequential(nn.Identity()), wild, broken

    def forward(self, x):
        x = x + self.wild * torch.randn_like(x)
        return self.stage(x * float("nan") if self.broken else x)


def test_networks_give_one_vector_for_each_picture():
    pixels = torch.rand(5, 3, 16, 16)
    z, spread = network_of(Net(), "stage").vectors(pixels)
    assert torch.allclose(z, pixels.mean((2, 3))) and spread is None
    maps, _ = network_of(Net(), "stage", pool=None).vectors(pixels)
    assert torch.equal(maps, pixels)
    ae = VectorAutoencoder(16, (8, 8), 6).eval()
    network = network_of(ae, name="tiny")
    z, spread = network.vectors(pixels)
    assert z.shape == spread.shape == (5, 6) and network.pictures(z).shape == (5, 3, 16, 16)
    model = tiny_model("sd")
    mid, _ = network_of(model).vectors(torch.rand(2, 3, *model.default_size) * 2 - 1)
    vae, _ = network_of(model, "vae").vectors(torch.rand(2, 3, *model.default_size) * 2 - 1)
    assert mid.shape[0] == vae.shape[0] == 2 and vae.shape[1] == 4


def test_networks_that_cannot_be_read_are_refused():
    pixels = torch.rand(4, 3, 16, 16)
    with pytest.raises(BadInput, match="other vectors for the same pictures"):
        network_of(Net(wild=1.0), "stage").vectors(pixels)
    with pytest.raises(BadInput, match="not finite for 4 pictures"):
        network_of(Net(broken=True), "stage").vectors(pixels)
    with pytest.raises(UnknownName):
        network_of(Net(), "stag").vectors(pixels)
    with pytest.raises(NotSupported, match="decodes no vectors"):
        Network("net", "stage", 16, lambda x: (x, None)).pictures(torch.rand(2, 3))
    with pytest.raises(BadInput, match="net decodes 2 of 3 vectors to pictures that are not numbers"):
        decode = lambda z: (z * z - z * z)[..., None, None]  # noqa: E731  inf - inf where it overflows
        Network("net", "code", 1, lambda x: (x, None), decode).pictures(
            torch.tensor([[1e30] * 3, [1.0] * 3, [1e30] * 3])
        )
    with pytest.raises(UnknownName):
        network_of(VectorAutoencoder(16, (8, 8), 6), "stage")
    for childless in (nn.Flatten(), nn.ModuleDict({"head": nn.Linear(4, 2)})):
        with pytest.raises(NotSupported, match="no layers to read"):
            network_of(childless)


def test_autoencoders_of_any_size_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    for side in (16, 32):
        ae = VectorAutoencoder(side, (8, 8), 6).eval()
        ae.save_pretrained(tmp_path / str(side))
        again = load_autoencoder(tmp_path / str(side))
        x = torch.rand(2, 3, 40, 40)
        assert torch.equal(again.encode(x).latent_dist.mean, ae.encode(x).latent_dist.mean)
        assert again.decode(torch.zeros(1, 6)).sample.shape == (1, 3, side, side)
    assert is_autoencoder(tmp_path / "16") and not is_autoencoder("toy-sd")
    with pytest.raises(UnknownName):
        load_autoencoder("toy-vae")
    with pytest.raises(BadInput):
        VectorAutoencoder(48)
    with pytest.raises(BadInput):
        ae.decode(torch.zeros(2, 5))
