"""Net2Net between experts whose answers are known: labels of the left half of a picture, and codes of both halves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

import sfumato
from sfumato.edit.net2net import Net2Net, NetExpert, expert, fit_translation, load_translation
from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName
from sfumato.models.nets.vector_ae import VectorAutoencoder
from sfumato.translation.examples import LabelledVectors
from sfumato.translation.translator import FlowParams, fit_translator

FLOW = FlowParams(blocks=3, hidden=32, depth=1, steps=120, batch=96, lr=1e-2)
SIDE = 8
HUES = {"blue": (-0.7, -0.7, 0.7), "green": (-0.7, 0.7, -0.7), "red": (0.7, -0.7, -0.7)}


def halves(colours: torch.Tensor) -> torch.Tensor:
    """Pictures (b 3 8 8) whose halves have the colours (b 6)."""
    left, right = colours.unflatten(1, (2, 3)).unbind(1)
    return torch.cat([each[:, :, None, None].expand(-1, -1, SIDE, SIDE // 2) for each in (left, right)], 3)


def colours_of(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[..., : SIDE // 2].mean((2, 3)), x[..., SIDE // 2 :].mean((2, 3))], 1)


def world(n: int, seed: int) -> LabelledVectors:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=rng)
    left = torch.tensor(list(HUES.values()))[labels] + 0.1 * torch.randn(n, 3, generator=rng)
    pixels = halves(torch.cat([left, 1.6 * torch.rand(n, 3, generator=rng) - 0.8], 1))
    return LabelledVectors(pixels, {"hue": labels}, {"hue": list(HUES)}, [], [list(HUES)[i] for i in labels.tolist()])


CODES = NetExpert("halves", "picture", colours_of, halves, side=SIDE)


@pytest.fixture(scope="module")
def translation():
    return fit_translation(expert("label:hue", list(HUES)), CODES, world(1000, 0), FLOW)


def hue_of(pictures: torch.Tensor) -> list[str]:
    left = colours_of(pictures)[:, :3]
    return [list(HUES)[i] for i in torch.cdist(left, torch.tensor(list(HUES.values()))).argmin(1).tolist()]


def test_translations_say_what_the_condition_says_and_vary_in_the_rest(translation):
    drawn = translation.translate(["red", "blue"], n=40, seed=1)
    assert drawn.shape == (2, 40, 3, SIDE, SIDE)
    assert hue_of(drawn[0]).count("red") >= 38 and hue_of(drawn[1]).count("blue") >= 38
    rest = colours_of(drawn.flatten(0, 1))[:, 3:]
    assert rest.std(0).mean() == pytest.approx(1.6 / 12**0.5, abs=0.12)
    assert torch.equal(drawn[:, :3], translation.translate(["red", "blue"], n=40, seed=1)[:, :3])
    calm = translation.translate(["red"], n=40, seed=1, temperature=0.2)
    assert colours_of(calm[0])[:, 3:].std(0).mean() < 0.4 * rest.std(0).mean()


def test_an_exchange_changes_what_is_said_and_keeps_the_rest(translation):
    shown = world(60, 5)
    out = translation.exchange(shown.pixels, shown.texts, ["green"] * 60)
    assert hue_of(out).count("green") >= 57
    assert (colours_of(out)[:, 3:] - colours_of(shown.pixels)[:, 3:]).abs().mean() < 0.12
    same = translation.exchange(shown.pixels, shown.texts, shown.texts)
    assert torch.allclose(same, shown.pixels, atol=1e-4)


def test_scores_are_low_where_text_and_picture_fit(translation):
    shown = world(60, 6)
    other = [list(HUES)[(list(HUES).index(word) + 1) % 3] for word in shown.texts]
    assert (translation.score(shown.pixels, shown.texts) < translation.score(shown.pixels, other)).float().mean() > 0.95


def test_shared_bits_are_those_of_two_normals():
    rng = torch.Generator().manual_seed(4)
    pixels = halves(torch.randn(1200, 6, generator=rng))
    shown = LabelledVectors(pixels, {}, {})
    left = NetExpert("left", "picture", lambda x: colours_of(x)[:, :3])
    mixed = NetExpert("mixed", "picture", lambda x: colours_of(x)[:, :3] + 0.5 * colours_of(x)[:, 3:])
    quick = FlowParams(blocks=2, hidden=24, depth=1, steps=100, batch=96, lr=1e-2)
    bits = fit_translation(left, mixed, shown, quick).bits_shared(shown, quick)
    assert bits == pytest.approx(1.5 * math.log2(1 + 1 / 0.25), abs=0.5)


def test_both_ways_where_both_decode():
    mirrored = NetExpert("mirror", "picture", lambda x: colours_of(x).flip(1), lambda z: halves(z.flip(1)), side=SIDE)
    quick = FlowParams(blocks=2, hidden=24, depth=1, steps=80, batch=96, lr=1e-2)
    there = fit_translation(CODES, mirrored, world(600, 1), quick)
    back = fit_translation(mirrored, CODES, world(600, 1), quick)
    x = world(20, 9).pixels
    for way in (there, back):
        assert (colours_of(way.translate(x)[:, 0]) - colours_of(x)).abs().mean() < 0.25


def test_experts_by_name():
    assert expert("label:hue", ["b", "a"]).encode(["b", "a"]).tolist() == [[0, 1], [1, 0]]
    assert expert("pixels:16").encode(torch.rand(2, 3, 64, 64)).shape == (2, 3, 16, 16)
    assert expert("toy-clip").encode(["a red ball"] * 3).shape[0] == 3
    for name, kind, told in (
        ("label:", BadInput, "needs the name"),
        ("pixels:zero", BadInput, "no size"),
        ("toy-clop", UnknownName, "toy-clip"),
    ):
        with pytest.raises(kind, match=told):
            expert(name)
    with pytest.raises(UnknownName, match="value of hue"):
        expert("label:hue", ["a"]).encode(["c"])


def test_what_cannot_be_translated_is_refused(translation, tmp_path):
    shown = world(40, 2)
    silent = LabelledVectors(shown.pixels, shown.labels, shown.names, [], ["red"] * 39 + [""])
    with pytest.raises(BadInput, match="picture 39 has no caption"):
        expert("toy-clip").of(silent)
    with pytest.raises(UnknownName, match="concept of the pictures"):
        expert("label:form", ["x"]).of(shown)
    with pytest.raises(BadInput, match="must give vectors"):
        fit_translation(CODES, expert("pixels:16"), shown, FLOW)
    with pytest.raises(BadInput, match="deaf says the same of all 40 pictures; give captions"):
        fit_translation(NetExpert("deaf", "picture", lambda x: torch.ones(len(x), 3)), CODES, shown, FLOW)
    blind = fit_translation(
        CODES, NetExpert("blind", "picture", colours_of), world(64, 3), FlowParams(steps=1, blocks=1)
    )
    with pytest.raises(NotSupported, match="makes no pictures"):
        blind.translate(shown.pixels[:1])
    with pytest.raises(NotSupported, match="autoencoder of vectors"):
        Net2Net().teach(object())
    fit_translator(torch.randn(64, 4), steps=1, blocks=1).translator.save(tmp_path / "plain")
    with pytest.raises(BadWeights, match="names no experts"):
        load_translation(tmp_path / "plain")


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny autoencoder and a flow taught on a folder with captions, by the public face."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("net2net")
    VectorAutoencoder(16, (8, 8), 10).save_pretrained(home / "ae")
    (home / "toys").mkdir()
    rows = []
    for i in range(36):
        Image.new("RGB", (20, 20), ["red", "blue"][i % 2]).save(home / "toys" / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"a {['red', 'blue'][i % 2]} ball"})
    (home / "toys" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    steps = []
    sfumato.teach(
        home / "toys", by="net2net:blocks=1,hidden=8,steps=4,batch=16", model=home / "ae", out=home / "flow",
        on_progress=lambda *given: steps.append(given[0]),
    )  # fmt: skip
    assert steps[-1] == 4
    return home / "ae", home / "flow"


def test_a_picture_is_edited_by_its_words_from_the_public_face(taught, tmp_path):
    ae, flow = taught
    Image.new("RGB", (30, 20), "red").save(tmp_path / "toy.png")
    found = sfumato.edit(
        tmp_path / "toy.png", ["a blue ball", "a red ball"], from_="a red ball", model=ae, by=f"net2net:flow={flow}"
    )
    assert [image.size for image in found.images] == [(16, 16)] * 2
    assert found.recipes[0]["prompt"] == "a blue ball" and found.recipes[0]["edit"]["from"] == "a red ball"
    assert found.images[1].tobytes() == found.original.rebuilt.tobytes()  # the same words change nothing
    with pytest.raises(BadInput, match="what it shows now"):
        sfumato.edit(tmp_path / "toy.png", "a blue ball", model=ae, by=f"net2net:flow={flow}")
    with pytest.raises(NotSupported, match="whole picture"):
        mask = Image.new("L", (30, 20), 255)
        sfumato.edit(
            tmp_path / "toy.png", "a blue ball", from_="a red ball", mask=mask, model=ae, by=f"net2net:flow={flow}"
        )
    with pytest.raises(UnknownName, match="autoencoder of vectors"):
        sfumato.edit(tmp_path / "toy.png", "a blue ball", from_="a red ball", model="toy-sd", by=f"net2net:flow={flow}")


def test_teaching_refuses_options_that_it_does_not_have(taught):
    with pytest.raises(UnknownName, match="per_class"):
        sfumato.teach("toybox", by="net2net", model=taught[0], per_class=3)
