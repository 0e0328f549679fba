"""`sfumato explain` with models that read: what is written, and one line for everything that cannot be asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t
from PIL import Image

import sfumato as package
from sfumato import registry
from sfumato.explain.relevance_maps import RelevanceMaps
from sfumato.models.quiet import quiet
from sfumato.toybox import Scene, Toy, render
from tests.readers import PICTURE, SMALL

BY = ("--by", "attention_relevance")


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vit"
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        config = t.ViTConfig(id2label={0: "ball", 1: "cube"}, label2id={"ball": 0, "cube": 1}, **SMALL, **PICTURE)
        t.ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def picture(sfumato) -> str:
    render([Scene((Toy("ball", "red", x=-0.8), Toy("cube", "blue", x=0.8)))], 64).pil().save("toys.png")
    return "toys.png"


def test_a_match(sfumato, picture):
    done = sfumato("explain", picture, *BY, "--model", "toy-clip", "--prompt", "a red ball", "--maps")
    assert done.code == 0, done.err
    assert done.lines == ["out/toys.heat.png", "out/toys.heat.safetensors"]
    maps = RelevanceMaps.load(done.lines[1])
    assert maps.size == (64, 64) and [word for word, _ in maps.words()] == ["a", "red", "ball"]
    heat = maps.map()
    assert float(heat[:, :32].mean()) > 3 * float(heat[:, 32:].mean())  # the ball is on the left
    again = package.explain(Path(picture), "a red ball", model="toy-clip", by="attention_relevance").maps[0]
    assert torch.allclose(again.map(), heat)
    other = package.explain(Path(picture), "a blue cube", model="toy-clip", by="attention_relevance").maps[0].map()
    assert float(other[:, 32:].mean()) > 3 * float(other[:, :32].mean())


def test_a_class(sfumato, picture, vit):
    done = sfumato("explain", picture, *BY, "--model", vit, "--maps")
    assert done.code == 0, done.err
    assert RelevanceMaps.load(done.lines[1]).answers[0].label in ("ball", "cube")
    named = sfumato("explain", picture, *BY, "--model", vit, "--prompt", "cube", "--maps", "-o", "two")
    assert RelevanceMaps.load(named.lines[1]).answers[0].label == "cube"
    assert Image.open(named.lines[0]).width > 256


def test_words_of_a_drawing(sfumato, picture, tiny_sd):
    given = (*BY, "--model", tiny_sd, "--prompt", "a red ball and a cube", "--words", "ball|cube", "--steps", 2)
    done = sfumato("explain", picture, *given, "--maps")
    assert done.code == 0, done.err
    assert [answer.label for answer in RelevanceMaps.load(done.lines[1]).answers] == ["ball", "cube"]


def test_a_text(sfumato, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "toy"]
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
        config = t.BertConfig(vocab_size=len(words), **labels, **SMALL)
        t.BertForSequenceClassification(config).save_pretrained(folder)
        t.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    done = sfumato("explain", "a good toy", *BY, "--model", folder, "--maps")
    assert done.code == 0, done.err
    maps = RelevanceMaps.load(done.lines[1])
    assert [word for word, _ in maps.words()] == ["a", "good", "toy"] and maps.answers[0].label in ("yes", "no")


@pytest.mark.skipif(
    registry.find("toy-vqa") is None or registry.find("toy-detr") is None, reason="weights are not here"
)
def test_boxes_and_an_answer(sfumato, picture):
    done = sfumato("explain", picture, *BY, "--model", "toy-detr", "--maps")
    assert done.code == 0, done.err
    found = RelevanceMaps.load(done.lines[1])
    assert {answer.label.split()[0] for answer in found.answers} == {"ball", "cube"}
    asked = ("--model", "toy-vqa", "--prompt", "what color is the ball ?")
    done = sfumato("explain", picture, *BY, *asked, "--maps", "-o", "b")
    assert done.code == 0, done.err
    answer = RelevanceMaps.load(done.lines[1]).answer()
    x = float(answer.regions[answer.region_values.argmax(), [0, 2]].mean())
    assert answer.label == "red" and x < 0.5


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--model", "toy-clip"), ("toy-clip", "prompt")),
        (("--model", "toy-clip", "--prompt", " "), ("toy-clip", "prompt")),
        (("--model", "toy-clip", "--prompt", "a " * 60), ("32 tokens", "toy-clip")),
        (("--model", "toy-clip", "--prompt", "a ball", "--words", "ball"), ("words", "toy-clip")),
        (("--model", "toy-clip", "--prompt", "a ball", "--size", "32x32"), ("size", "toy-clip")),
        (("--model", "toy-clip", "--prompt", "a ball", "--steps", 3), ("steps", "toy-clip")),
        (("--model", "toy-judge", "--prompt", "a ball"), ("toy-judge",)),
    ],
)
def test_what_cannot_be_asked(refused, picture, more, says):
    refused("explain", picture, *BY, *more, says=says)


def test_refusals_by_name(refused, picture, vit):
    refused("explain", picture, *BY, "--model", vit, "--prompt", "cubes", says=["cubes", "cube"])
    refused("explain", picture, "--by", "attention_relevance:method=rolout", "--model", vit, says=["rolout", "method"])
    refused("explain", picture, "--by", "attention_relevance:method=partial_lrp,start_layer=9", "--model", vit, says=[])
    refused("explain", "a red ball", *BY, "--model", vit, says=["looks at pictures"])
    refused("explain", picture, "--by", "daam", "--model", vit, "--prompt", "a ball", says=[])
