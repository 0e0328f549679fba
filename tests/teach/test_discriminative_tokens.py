"""Discriminative tokens: the gradient through the last steps, when to stop, which scorers, the same bits again."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from sfumato import app
from sfumato.adapters.word import Word
from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models.readers.reader import wrap
from sfumato.models.text_towers import text_towers
from sfumato.protocol import Work
from sfumato.sampling import generate
from sfumato.teach.discriminative_tokens import DiscriminativeTokens, _WordTraining
from sfumato.teach.scorers import _labels, scorer_of
from sfumato.teach.word_vectors import WordVectors
from sfumato.text.placeholders import placeholders
from sfumato.training import Draw
from tests.helpers import fingerprint
from tests.tiny import tiny_model

GIVEN = {"target": "cat", "class_noun": "ball", "steps": 2, "noises": 2, "draw_steps": 2, "guidance": 2.0, "lr": 0.05}


@pytest.fixture(scope="module")
def vit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            patch_size=4, id2label={0: "cat", 1: "dog", 2: "cone"}, initializer_range=0.3,
        )  # fmt: skip
        return wrap(ViTForImageClassification(config).eval(), "tiny-vit")


def lesson(model, scorer, **more):
    p = DiscriminativeTokens(**{**GIVEN, **more}).params
    return _WordTraining(model, WordVectors(text_towers(model), "<c>", "a", p.vectors, p.seed), "ball", scorer, p)


@pytest.mark.parametrize("kind", ["sd", "sd3clip", "flux"])
def test_a_word_is_learnt_and_the_model_is_what_it_was(vit, tmp_path, kind):
    model = tiny_model(kind)
    before, own = fingerprint(model), fingerprint(vit.module)
    found = DiscriminativeTokens(**GIVEN).teach(model, vit)
    assert fingerprint(model) == before and fingerprint(vit.module) == own
    assert found.step == 2 and found.facts["<c>"]["updates"] == 2
    (file,) = found.save(tmp_path / "c.safetensors")
    assert Word(file=str(file)).words == ["<c>"]


def test_the_picture_is_that_of_the_sampler_and_the_gradient_that_of_its_last_step(vit):
    model = tiny_model("sd")
    one = lesson(model, scorer_of(vit, "cat", [], []))
    pixels = one.drawn(0, 35)
    with placeholders(model, one.words()):
        plain = generate(model, "a photo of <c> ball", steps=2, seed=35, guidance=2.0, scheduler="ddim")
    assert torch.equal(pixels.detach(), plain.pixels)
    (vectors,) = one.rows.parameters.values()
    (gradient,) = torch.autograd.grad(pixels.mean(), vectors)
    # by hand: the last step alone, from the latents that the first one left
    steps = []
    with placeholders(model, one.words()):
        generate(model, "a photo of <c> ball", steps=2, seed=35, guidance=2.0, scheduler="ddim", decode=False,
                 on_step=lambda step: steps.append((step.t, step.x)))  # fmt: skip
    x, t = steps[0][1], steps[1][0]
    scheduler = model.make_scheduler("ddim")
    model.timesteps(scheduler, 2)
    with placeholders(model, {"<c>": {"text_encoder": vectors}}):
        condition = model.encode_text("a photo of <c> ball")
    uncond, cond = model.predict(x, t, condition).chunk(2)
    x = scheduler.step(uncond + 2.0 * (cond - uncond), t, x).prev_sample
    (wanted,) = torch.autograd.grad(model.decode(x).mean(), vectors)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)
    more = lesson(model, one.scorer, through=2)
    (longer,) = torch.autograd.grad(more.drawn(0, 35).mean(), more.rows.parameters["text_encoder"])
    assert not torch.allclose(longer, wanted, rtol=1e-2)


def test_noises_come_back_and_sentences_take_turns(vit):
    one = lesson(tiny_model("sd"), scorer_of(vit, "cat", [], []), noises=3)
    losses = [float(one.loss(Draw(0, 0, rank, 3))[0]) for rank in range(3)]
    again = [float(one.loss(Draw(0, 1, rank, 3))[0]) for rank in range(3)]
    assert losses == again and len(set(losses)) == 3
    one.after(1)
    assert float(one.past.losses[0]) == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_it_stops_when_most_are_right_twice_or_nothing_gets_better(vit):
    one = lesson(tiny_model("sd"), scorer_of(vit, "cat", [], []), steps=30, patience=3, enough=0.7)

    def after(losses, hits):
        one.past.losses[:] = float("nan")
        one.past.losses[: len(losses)], one.past.hits[: len(hits)] = torch.tensor(losses), torch.tensor(hits)
        return one.over(len(losses))

    assert not after([1.0, 0.9], [0.6, 0.8]) and after([1.0, 0.9, 0.8], [0.6, 0.8, 0.8])
    assert not after([1.0, 1.1, 1.2], [0.0] * 3) and after([1.0, 1.1, 1.2, 1.0], [0.0] * 4)
    assert not after([1.0, 1.1, 1.2, 0.9], [0.0] * 4)
    assert one._again(4) == 0
    one.past.losses[:3] = torch.tensor([1.0, 2.5, 1.5])
    assert one._again(3) == 1  # it collapsed once: other noises from then on


def test_the_best_vectors_are_those_that_the_lowest_loss_was_measured_with(vit):
    one = lesson(tiny_model("sd"), scorer_of(vit, "cat", [], []), steps=5)
    (vectors,) = one.rows.parameters.values()
    for step, loss in enumerate([3.0, 1.0, 2.0], 1):
        with torch.no_grad():
            vectors.fill_(step)
        one._before = {"text_encoder": vectors.detach().clone()}
        one._sums = [loss, 0.0]
        with torch.no_grad():
            vectors.add_(0.5)  # the update
        one.after(step)
    one.best.take()
    assert bool((vectors == 2).all())


def test_a_stopped_run_goes_on_to_the_same_bits(vit, tmp_path):
    given = {**GIVEN, "steps": 3, "checkpoint_every": 1}
    whole = DiscriminativeTokens(**given).teach(tiny_model("sd3clip"), vit)

    class Killed(BaseException):
        pass

    def kill(step, steps, log):
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        DiscriminativeTokens(**given).teach(tiny_model("sd3clip"), vit, work=Work(tmp_path / "run", on_progress=kill))
    again = DiscriminativeTokens(**given).teach(tiny_model("sd3clip"), vit, work=Work(tmp_path / "run", resume=True))
    assert [each["loss"] for each in again.log] == [each["loss"] for each in whole.log]
    assert all(torch.equal(again.words["<c>"][k], v) for k, v in whole.words["<c>"].items())


def test_several_classes_and_shares(vit):
    found = DiscriminativeTokens(**{**GIVEN, "target": ["cat", "cone"], "steps": 1}).teach(tiny_model("sd3clip"), vit)
    assert list(found.words) == ["<c-1>", "<c-2>"] and found.facts["<c-2>"]["target"] == "cone"
    assert _labels(vit, "cat", ["cat=0.75", "cone=0.25"], 8) == [0, 0, 2, 0, 0, 0, 2, 0]
    assert _labels(vit, "cat", ["cat=1", "dog=1"], 4) == [0, 1, 0, 1]


def test_clips_detectors_and_functions_score_too(monkeypatch):
    pixels = torch.zeros(1, 3, 64, 64, requires_grad=True)
    clip = scorer_of("toy-clip", "a red ball", [], ["a blue cube"])
    loss, _ = clip(pixels, 0)
    assert torch.autograd.grad(loss, pixels)[0].any() and 0 < float(loss) < 40
    detector = scorer_of("toy-detr", "ball", [], [])
    assert torch.autograd.grad(detector(pixels, 0)[0], pixels)[0].any()
    dark = scorer_of(lambda x: -x.mean((1, 2, 3)), "dark", [], [])
    assert float(dark(torch.ones(1, 3, 4, 4), 0)[0]) == 1


def test_refusals(vit, tmp_path, monkeypatch):
    model = tiny_model("sd3clip")
    cases = [
        ({"target": "owl"}, UnknownName, "class of tiny-vit 'owl'"),
        ({"name": "ball"}, BadInput, "is a word of text_encoder already"),
        ({"through": 5}, BadInput, "through is 5, and there are 2 steps"),
        ({"templates": ["x"]}, BadInput, "must hold {} once"),
        ({"shares": ["cat"]}, BadInput, "write class=share"),
        ({"target": ["cat", "dog"], "shares": ["cat=1"]}, BadInput, "shares are for one word"),
        ({"steps": 0}, BadInput, "steps"),
    ]
    for more, error, says in cases:
        with pytest.raises(error) as raised:
            app.teach(vit, by="discriminative_tokens", model=model, out=tmp_path / "c.safetensors", **{**GIVEN, **more})
        assert says in str(raised.value) and not list(tmp_path.iterdir()), str(raised.value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NotSupported, match="run it in one process"):
        DiscriminativeTokens(**GIVEN).teach(model, vit)
