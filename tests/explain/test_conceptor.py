"""Pseudo-words against the table itself, the training step against a slow reference, use, files, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.adapters.word import Word
from sfumato.errors import BadInput, NoMatch, UnknownName
from sfumato.explain.conceptor import Conceptor, Decomposition, balance, decompose, dictionary, explain_seed
from sfumato.explain.conceptor.decomposition import effective_number
from sfumato.explain.conceptor.learning import Coefficients
from sfumato.explain.conceptor.pseudo_word import mixture_vectors, read_mixture
from sfumato.explain.conceptor.vocabulary import usual_norms
from sfumato.explain.conceptor.word_cloud import word_cloud
from sfumato.models import Model
from sfumato.models.text_towers import pseudo_word, text_towers, token_of, tokens_of
from sfumato.sampling import generate
from tests.helpers import fingerprint
from tests.tiny import WHOLE_WORDS, tiny_model, tiny_pipeline

PROMPT = "a red cube and a blue ball"
QUICK = dict(images=2, checked=2, iterations=2, every=1, batch=2, steps=2, keep=4)
FAMILIES = ("sd", "sdxl", "sd3", "flux", "pixart", "sana", "z_image")


def planted(model: Model, word: str, vectors) -> None:
    """Writes vectors into the tables themselves."""
    for tower in text_towers(model):
        with torch.no_grad():
            tower.table[list(tokens_of(tower, word))] = vectors[tower.name]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_pseudo_word_is_as_if_the_table_held_it(kind):
    model, other = tiny_model(kind), tiny_model(kind, fresh=True)
    vectors = mixture_vectors(model, {"red": 0.7, "ball": 0.3})
    planted(other, "cube", vectors)
    before = fingerprint(model)
    with torch.no_grad(), pseudo_word(model, "cube", vectors):
        ours = model.encode_text(PROMPT)
    assert fingerprint(model) == before
    with torch.no_grad():
        truth, plain = other.encode_text(PROMPT), model.encode_text(PROMPT)
    for name in truth.cond:
        assert torch.equal(ours.cond[name], truth.cond[name])
    assert any(not torch.equal(plain.cond[name], truth.cond[name]) for name in truth.cond)
    drawn = generate(
        model, PROMPT, steps=2, seed=3, decode=False,
        interventions=Conceptor(word="cube", mixture=["red=0.7", "ball=0.3"]),
    )  # fmt: skip
    assert torch.equal(drawn.latents, generate(other, PROMPT, steps=2, seed=3, decode=False).latents)


def test_mixtures_have_the_usual_length_and_direction():
    model = tiny_model("sdxl")
    vectors, norms = mixture_vectors(model, {"red": 3.0, "ball": 1.0}), usual_norms(model)
    words = [word for word in WHOLE_WORDS if len(word) > 1]
    for tower in text_towers(model):
        rows = [tower.table[token_of(tower, word)] for word in ("red", "ball")]
        expected = 0.75 * rows[0] + 0.25 * rows[1]
        assert torch.cosine_similarity(vectors[tower.name], expected, dim=0).item() == pytest.approx(1, abs=1e-5)
        mean = sum(float(tower.table[token_of(tower, word)].norm()) for word in words) / len(words)
        assert vectors[tower.name].norm().item() == pytest.approx(mean, rel=1e-4) == pytest.approx(norms[tower.name])


def test_half_strength_is_half_way():
    model = tiny_model("sd")
    [tower] = text_towers(model)
    own = tower.table[token_of(tower, "cube")]
    half = torch.lerp(own, mixture_vectors(model, {"red": 1.0})["text_encoder"], 0.5)
    ours = generate(
        model, PROMPT, steps=1, decode=False, interventions=Conceptor(word="cube", mixture={"red": 1}, strength=0.5)
    )
    given = generate(model, PROMPT, steps=1, decode=False, interventions=Conceptor({"text_encoder": half}, word="cube"))
    assert torch.equal(ours.latents, given.latents)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_dictionary_is_what_every_encoder_has_as_one_token(kind):
    model = tiny_model(kind)
    found = dictionary(model)
    assert set(WHOLE_WORDS) - {"a"} <= set(found.names)
    for tower in text_towers(model):
        for name, token in zip(found.names, found.ids[tower.name].tolist(), strict=True):
            assert token_of(tower, name) == token
        assert torch.equal(found.tables[tower.name], tower.table[found.ids[tower.name]])


def test_pieces_are_the_rest_of_the_vocabulary():
    model = tiny_model("sd")
    all_, words = dictionary(model, pieces=True), dictionary(model)
    assert set(words.names) < set(all_.names) and "cub+" in all_.names and "cub+" not in words.names
    vector = mixture_vectors(model, {"cub+": 1.0})["text_encoder"]
    [tower] = text_towers(model)
    row = tower.table[tower.tokenizer.convert_tokens_to_ids("cub")]
    assert torch.cosine_similarity(vector, row, dim=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["sd", "sd2", "sd3"])
def test_one_step_of_learning_against_a_slow_reference(kind, monkeypatch):
    """Loss and first update by hand, from what the denoiser was shown: with one picture its noise is known from the
    latents. The vector is written into the table, alphas and their sum are made in loops."""
    model, other = tiny_model(kind), tiny_model(kind, fresh=True)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    words, b = ["red", "blue", "ball", "dog", "cat"], 4
    shown, predict = [], model.predict

    def spy(x, t, condition, *rest):
        shown.append((x.detach().clone(), t.clone()))
        return predict(x, t, condition, *rest)

    monkeypatch.setattr(model, "predict", spy)
    before = fingerprint(model)
    found = decompose(
        model,
        pictures=picture,
        iterations=1,
        checked=0,
        flip=False,
        batch=b,
        keep=3,
        dictionary=words,
        seed=11,
        steps=1,
    )
    assert fingerprint(model) == before
    x, t = shown[0]
    assert [int((each - 1) // (999 / b)) for each in t.tolist()] == list(range(b))  # one level of each quarter
    known = dictionary(other)
    rows = [known.names.index(word) for word in words]
    tables = {name: table[rows] for name, table in known.tables.items()}
    inputs = torch.cat(list(tables.values()), 1)
    network = Coefficients(inputs.shape[1], "network", 5, 11)
    alphas = torch.stack([network.layers(row).abs()[0] for row in inputs])
    vectors = {}
    for name, table in tables.items():
        mixed = sum(alphas[i] * table[i] for i in range(5))
        vectors[name] = mixed / mixed.norm() * usual_norms(other)[name]
    with torch.no_grad():
        x0 = other.encode_image(picture).float()
    if kind == "sd3":
        level = (t / 1000).view(-1, 1, 1, 1)
        noise = (x - (1 - level) * x0) / level
        target = noise - x0
    else:
        kept = other.make_scheduler("ddim").alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = (x - kept.sqrt() * x0) / (1 - kept).sqrt()
        target = noise if kind == "sd" else kept.sqrt() * noise - (1 - kept).sqrt() * x0
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1 and len({float(each[0, 0, 0]) for each in noise}) == b
    word = next(name for name in known.names if len(name) > 2)
    with pseudo_word(other, word, vectors):
        condition = other.encode_text(f"a {word}", guidance=False)
    guess = torch.cat([other.predict(x[i : i + 1], t[i], condition) for i in range(b)])
    loss = F.mse_loss(guess, target)
    largest = sorted(range(5), key=lambda i: -float(alphas[i].detach()))[:3]
    cosines = [
        torch.cosine_similarity(sum(alphas[i] * table[i] for i in largest), vectors[name], dim=0)
        for name, table in tables.items()
    ]
    sparse = 1 - sum(cosines) / len(cosines)
    assert found.history[0][1] == pytest.approx(float(loss.detach()), rel=2e-4)
    assert found.history[0][2] == pytest.approx(float(sparse.detach()), abs=1e-5)
    (loss + 0.001 * sparse).backward()
    torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2).step()
    torch.testing.assert_close(found.alphas, network(inputs).detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "sana"])
def test_every_kind_of_family_is_decomposed(kind, tmp_path):
    model = tiny_model(kind, fresh=True)
    before = fingerprint(model)
    found = decompose(model, "red cube", **QUICK)
    assert fingerprint(model) == before
    assert not {"red", "cube"} & set(found.names) and len(found.shares()) == 4
    assert sum(share for _, share in found.shares()) == pytest.approx(1, abs=1e-5)
    assert [k for k, _ in found.checks] == [1, 2] and len(found.history) == 2
    if kind == "sd":  # that the second time gives the same does not depend on the family
        assert decompose(model, "red cube", **QUICK).alphas.equal(found.alphas)
    paths = found.save(tmp_path)
    assert [path.suffix for path in paths] == [".json", ".html", ".safetensors"]
    page = (tmp_path / "conceptor-red-cube.html").read_text()
    assert found.shares()[0][0] in page and page.count("<img") >= 1 + 2 + 2 and "http" not in page
    back = Decomposition.load(paths[0])
    assert [name for name, _ in back.shares()] == [name for name, _ in found.shares()]
    drawn = back.draw(model, [4], steps=2)
    assert (drawn - found.draw(model, [4], steps=2)).abs().max() < 0.05  # six digits are kept


def test_a_saved_pseudo_word_is_a_textual_inversion(tmp_path):
    """Parity: diffusers reads the file and encodes the same, and the adapter for taught words draws the same."""
    model = tiny_model("sd")
    found = decompose(model, "dog", **QUICK)
    path = found.save(tmp_path)[-1]
    pipe = tiny_pipeline("sd", fresh=True)
    pipe.load_textual_inversion(str(path), token="<dog>")
    with torch.no_grad():
        theirs = Model(pipe, card={"sampling": {"size": [32, 32]}}).encode_text("a <dog> on the left").cond["embeds"]
        with pseudo_word(model, "cat", found.vectors):
            ours = model.encode_text("a cat on the left").cond["embeds"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    options = dict(steps=2, seed=3, decode=False)
    drawn = generate(model, "a <dog> on the left", interventions=Word(file=str(path)), **options)
    taught = generate(model, "a cat on the left", interventions=Conceptor(found.vectors, word="cat"), **options)
    torch.testing.assert_close(drawn.latents, taught.latents)


def test_free_coefficients_take_the_first_step_of_adamw():
    """Which is the learning rate long for each, after the decay, whatever the gradient's size."""
    model = tiny_model("sd")
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    found = decompose(
        model, pictures=pictures, dictionary=["red", "blue"], coefficients="free", iterations=1, learning_rate=0.05,
        checked=0, flip=False, batch=1, steps=1,
    )  # fmt: skip
    assert (found.alphas - 0.5 * (1 - 0.05 * 0.01)).abs().tolist() == pytest.approx([0.05, 0.05], abs=1e-4)


def hand_made(**alphas: float) -> Decomposition:
    names = tuple(alphas)
    return Decomposition("thing", "a {}", "tiny", names, torch.tensor([float(a) for a in alphas.values()]), keep=3)


def test_shares_ranks_and_changes():
    found = hand_made(red=0.5, blue=2.0, dog=0.25, cat=1.25)
    assert [name for name, _ in found.shares()] == ["blue", "cat", "red"]
    assert [share for _, share in found.shares()] == pytest.approx([2 / 3.75, 1.25 / 3.75, 0.5 / 3.75])
    assert found.mixture(1) == ["blue=1"] and found.rank("blue") == 1 and found.rank("dog") == 4
    less = found.changed(blue=0.0, red=4)
    assert [name for name, _ in less.shares()] == ["red", "cat", "dog"]
    assert [share for _, share in less.shares()] == pytest.approx([2 / 3.5, 1.25 / 3.5, 0.25 / 3.5])
    assert found.rank("blue") == 1
    assert effective_number(torch.ones(7)) == pytest.approx(7) and effective_number(torch.eye(3)[0]) == pytest.approx(1)


def test_balance_finds_the_factor():
    model, asked = tiny_model("sd"), []
    found = hand_made(red=3.0, blue=1.0)

    class Fake(Decomposition):
        def changed(self, **factors):
            asked.append(factors["red"])
            return self

        def draw(self, model, seeds, **options):
            return torch.zeros(len(seeds), 3, 8, 8)

    fake = Fake(*(getattr(found, name) for name in ("concept", "template", "model", "names", "alphas", "keep")))
    result = balance(model, fake, ["red"], lambda _: min(1.0, 0.1 + 0.9 * asked[-1]), seeds=[0], tolerance=0.02)
    assert result.share == pytest.approx(0.5, abs=0.02) and result.factor == pytest.approx(0.44, abs=0.05)
    with pytest.raises(NoMatch, match="other words"):
        balance(model, fake, ["red"], lambda _: 0.9, seeds=[0])


def test_explain_seed_keeps_what_the_picture_needs():
    model = tiny_model("sd")
    found = hand_made(red=3.0, blue=1.0, dog=0.01)
    all_ = explain_seed(model, found, 3, enough=-1.0, alike=1.1, steps=2)
    assert [name for name, _ in all_.shares()] == ["red"]  # the least go first, one word stays
    none = explain_seed(model, found, 3, enough=1.1, alike=1.1, steps=2)
    assert none.shares() == found.shares() and len(none.pictures) == len(none.drawn) == 1


def test_the_cloud_shows_large_shares_large():
    one = np.asarray(word_cloud([("red", 0.9), ("blue", 0.1)]))
    dark = (one < 200).any(-1)
    assert dark[120:240, 200:440].sum() > 200 and one.shape == (360, 640, 3)


def test_reading_mixtures():
    assert read_mixture(["red=0.7", "big ball=2"]) == {"red": 0.7, "big ball": 2.0}
    for bad, match in ((["red"], "word=weight"), (["red=x"], "word=weight"), (["red=nan"], "word=weight"),
                       (["red=1", "red=2"], "twice"), (["red=0"], "all its weights")):  # fmt: skip
        with pytest.raises(BadInput, match=match):
            read_mixture(bad)


def test_bad_input(tmp_path):
    model = tiny_model("sd")
    with pytest.raises(BadInput, match="give word and mixture"):
        generate(model, PROMPT, steps=1, interventions=Conceptor())
    with pytest.raises(NoMatch, match="cubes"):
        generate(model, PROMPT, steps=1, interventions=Conceptor(word="cubes", mixture=["red=1"]))
    with pytest.raises(BadInput, match="single|one token"):
        generate(model, "a zorp", steps=1, interventions=Conceptor(word="zorp", mixture=["red=1"]))
    with pytest.raises(BadInput, match="one token"):
        generate(model, PROMPT, steps=1, interventions=Conceptor(word="cube", mixture=["zorp=1"]))
    with pytest.raises(BadInput, match="concept, or pictures"):
        decompose(model)
    with pytest.raises(UnknownName, match="rde"):
        decompose(model, "cube", dictionary=["rde"])
    with pytest.raises(NoMatch, match="own words"):
        decompose(model, "cube", dictionary=["cube"], **QUICK)
    with pytest.raises(UnknownName, match="network"):
        decompose(model, "cube", coefficients="netwrok")
    with pytest.raises(BadInput, match="template"):
        Conceptor(template="a photo")
    with pytest.raises(BadInput, match="explain finds"):
        Conceptor(word="cube", mixture=["red=1"]).explain_concept(model, "cube")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no picture"):
        Conceptor().explain_concept(model, tmp_path / "empty")
    (tmp_path / "x.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(BadInput, match="damaged"):
        Decomposition.load(tmp_path / "x.json")
    with pytest.raises(UnknownName, match="rde"):
        hand_made(red=1.0).changed(rde=2)


def test_a_mixture_that_no_encoder_reads_is_no_silent_no_op():
    """Language models tell "Cube" from "cube", though Words does not."""
    with pytest.raises(NoMatch, match="conceptor"):
        generate(
            tiny_model("z_image"), "a red Cube", steps=1, decode=False,
            interventions=Conceptor(word="cube", mixture=["red=0.7", "ball=0.3"]),
        )  # fmt: skip
