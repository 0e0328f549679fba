"""The explained loss against slow references, guidance, direct optimisation, learnt prompts, bad input."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadInput, NoMatch, UnknownName
from sfumato.metrics.geometry import spherical_distance
from sfumato.models.readers import load_clip
from sfumato.relevance.clip import ClipExplainer
from sfumato.sampling import generate
from sfumato.steer.no_token_left_behind import (
    ExplainedLoss,
    LearnedPrompt,
    NoTokenLeftBehind,
    Region,
    Target,
    cut_outs,
    diagnose,
    learn_prompt,
    optimise,
)
from sfumato.steer.no_token_left_behind.class_prompts import ClassPrompts, image_embeds
from sfumato.steer.no_token_left_behind.explained_loss import overlap
from sfumato.toybox import Scene, Toy, render
from tests.helpers import fingerprint
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"


@pytest.fixture(scope="module")
def explainer():
    return ClipExplainer(load_clip())


@pytest.fixture(scope="module")
def toys():
    """Both toys, and the cube alone."""
    cube, ball = Toy("cube", "red", x=-0.8), Toy("ball", "blue", x=0.8)
    return render([Scene((cube, ball)), Scene((cube,))], 64).image


def seeds(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def target(explainer, text, words, regions=()):
    reading = explainer.read(text)
    return Target(text, tuple(reading.one(word).tokens["clip"] for word in words), tuple(regions))


def test_words_term_is_one_less_the_mean_relative_relevance(explainer, toys):
    loss = ExplainedLoss(explainer, cutouts=1, augment=0)
    with torch.no_grad():
        parts = loss(toys, [target(explainer, PROMPT, ["cube", "ball"])] * 2, seeds(2))
    for i in range(2):
        looked = explainer.explain(toys[i : i + 1], [PROMPT], text=True)
        row = looked.tokens()[0].detach()
        ids = explainer.tokenizer(PROMPT).input_ids
        at = [ids.index(explainer.tokenizer(word, add_special_tokens=False).input_ids[0]) for word in ("cube", "ball")]
        shares = [float(row[k] / row.max()) for k in at]
        assert parts.words[i].item() == pytest.approx(1 - sum(shares) / 2, abs=2e-3)
        assert parts.relevance[i] == pytest.approx(shares, abs=2e-3)
        angle = math.acos(float(looked.similarity.detach()))
        assert parts.similarity[i].item() == pytest.approx(angle**2 / 2, abs=5e-3)  # 2 arcsin(|a - b| / 2)^2
        assert parts.total[i].item() == pytest.approx(float(parts.similarity[i] + parts.words[i]), abs=1e-5)


def test_a_missing_toy_is_a_neglected_word(toys):
    both, alone = diagnose(toys, [PROMPT] * 2, ["cube", "ball"])
    assert max(both.values()) > 0.5 and min(both.values()) > 0.2
    assert alone["cube"] == 1 and alone["ball"] < 0.1


def test_overlap_by_hand():
    patches = torch.zeros(2, 4, 4)
    patches[0, :, :2] = 1.0  # looks left
    patches[1, :, 2:] = 1.0
    mask = torch.zeros(2, 8, 8)
    mask[:, :, :4] = 1
    found = overlap(patches, mask)
    assert found[0] > 0.85 and found[1] < 0.45
    large = F.interpolate(patches[:1, None], size=(8, 8), mode="bicubic")[0, 0].clamp_min(0)
    looks = torch.sigmoid(20 * (large / large.max() - 0.1))
    inside = sum(float(looks[i, j]) for i in range(8) for j in range(4))
    outside = sum(float(looks[i, j]) for i in range(8) for j in range(4, 8))
    assert found[0].item() == pytest.approx(2 * inside / (2 * inside + outside), abs=1e-5)
    assert spherical_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == pytest.approx(
        2 * (math.pi / 4) ** 2, abs=1e-4
    )


def test_regions_prefer_the_toy_inside(explainer, toys):
    left, right = torch.zeros(64, 64), torch.zeros(64, 64)
    left[:, :32], right[:, 32:] = 1, 1
    loss = ExplainedLoss(explainer, cutouts=1, augment=0, explain=0)
    here = loss(toys[:1], [Target(PROMPT, (), (Region("a red cube", left), Region("a blue ball", right)))], seeds(1))
    there = loss(toys[:1], [Target(PROMPT, (), (Region("a red cube", right), Region("a blue ball", left)))], seeds(1))
    assert here.regions.item() < there.regions.item() - 0.1


def test_views_move_picture_and_mask_alike():
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 40, 40)
    mask[:, 10:25, 8:30] = 1
    image = torch.where(mask > 0, 1.0, -1.0).expand(3, -1, -1)
    generator = torch.Generator().manual_seed(3)
    seen, cover = cut_outs(image, mask, 16, 40, 0.6, generator)
    assert seen.shape == (16, 3, 40, 40) and cover.shape == (16, 1, 40, 40)
    agree = ((seen.mean(1) > 0) == (cover[:, 0] > 0.5)).float().mean((1, 2))
    assert agree.median() > 0.95  # up to what is erased
    assert len({tuple(view.flatten()[:50].tolist()) for view in seen}) == 16
    plain, same = cut_outs(image, mask, 2, 40, 0.0, generator)
    torch.testing.assert_close(plain, image.expand(2, -1, -1, -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(same[0], mask)
    wide, _ = cut_outs(torch.ones(3, 8, 16), None, 1, 16, 0.0, generator)
    assert wide.shape == (1, 3, 16, 16) and wide.min() > 0.99


@pytest.mark.parametrize("through", ["denoiser", "picture"])
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_the_step_goes_down_the_gradient_by_the_length_asked_for(kind, through):
    model, moves = tiny_model(kind), []

    class Watch(NoTokenLeftBehind):
        def after_predict(self, step):
            before = step.x0.detach()
            super().after_predict(step)
            alpha, sigma = step.path.alpha_sigma(step.t)
            moves.append((step.x0.detach() - before, min(1.0, sigma / alpha if alpha else 1.0)))

    system = Watch(words=["cube", "ball"], cutouts=2, strength=0.05, through=through)
    before = fingerprint(model)
    generate(model, PROMPT, steps=3, guidance=3.0, seed=1, interventions=system, decode=False)
    assert fingerprint(model) == before
    for moved, level in moves:
        assert moved.square().mean().sqrt().item() == pytest.approx(0.05 * level, rel=0.05)
    assert sorted(system.guided[0].losses) == list(range(len(moves))) and system.guided[0].words == ("cube", "ball")


def test_the_gradient_is_that_of_finite_differences(explainer, toys):
    loss = ExplainedLoss(explainer, cutouts=2, augment=0.3)
    left = torch.zeros(64, 64)
    left[:, :32] = 1
    asked = [target(explainer, PROMPT, ["cube", "ball"], [Region("a red cube", left)])]
    x = toys[:1].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(x, asked, seeds(1)).total.sum(), x)
    step = 0.02 * gradient / gradient.norm()
    with torch.no_grad():
        rise = (loss(x + step, asked, seeds(1)).total - loss(x - step, asked, seeds(1)).total).item() / 2
    assert rise == pytest.approx((gradient * step).sum().item(), rel=0.1)


def test_optimising_latents_lowers_the_loss():
    model = tiny_model("sd", fresh=True)
    before = fingerprint(model)
    done = optimise(model, [PROMPT] * 2, steps=6, learning_rate=0.2, cutouts=2, augment=0.0, seed=3)
    assert fingerprint(model) == before
    assert done.losses.shape == (6, 2) and (done.losses[-1] < done.losses[0]).all()
    assert done.latents.abs().max() <= 3 and len(done.images) == 2
    alone = optimise(model, PROMPT, steps=6, learning_rate=0.2, cutouts=2, augment=0.0, seed=4)
    torch.testing.assert_close(done.latents[1:], alone.latents, atol=2e-3, rtol=0)
    picture = done.pixels[:1].clamp(-1, 1)
    near = optimise(model, PROMPT, image=picture, steps=4, learning_rate=0.05, anchor=50.0, cutouts=2)
    far = optimise(model, PROMPT, image=picture, steps=4, learning_rate=0.05, anchor=0.0, cutouts=2)
    start = model.encode_image(picture)
    assert (near.latents - start).norm() < (far.latents - start).norm()


def tiny_task(n=1, seed=0):
    rng, scenes, labels = np.random.default_rng(seed), [], []
    for c, shape in enumerate(("ball", "cube", "cone")):
        for _ in range(n):
            color = str(rng.choice(["red", "green", "blue"]))
            scenes.append(Scene((Toy(shape, color, x=float(rng.uniform(-0.6, 0.6))),)))
            labels.append(c)
    return render(scenes, 64).image, labels


def test_a_prompt_is_learnt(tmp_path):
    images, labels = tiny_task()
    classes = ["ball", "cube", "cone"]
    options = dict(epochs=15, context=4, learning_rate=0.05, seed=1, flip=False)
    turned = [(label + 1) % 3 for label in labels]  # names that are wrong on purpose, so that there is much to learn
    coop = learn_prompt(images, turned, classes, explain=0, **{**options, "learning_rate": 0.5})
    assert coop.losses[-1] < 0.8 * coop.losses[0] and coop.shares.abs().sum() == 0
    # here CLIP is certain from the start: what falls is the relevance of wrong names less that of the right one
    kept = learn_prompt(images, labels, classes, explain=1.0, **options)
    assert kept.losses[-1] < kept.losses[0] - 0.05
    again = learn_prompt(images, labels, classes, explain=1.0, **options)
    assert torch.equal(again.context, kept.context)
    test, truth = tiny_task(4, seed=5)
    guesses = kept.classify(test)
    assert np.mean([classes.index(g) == t for g, t in zip(guesses, truth, strict=True)]) > 0.5
    back = LearnedPrompt.load(kept.save(tmp_path / "prompt.safetensors"))
    assert torch.equal(back.logits(test), kept.logits(test)) and back.classes == tuple(classes)
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(BadInput, match="damaged"):
        LearnedPrompt.load(tmp_path / "bad")


def test_class_name_relevance_against_one_pair_at_a_time(explainer):
    """The batched relevance of names equals that of each image and class alone, whatever the names' lengths."""
    images, _ = tiny_task()
    classes = ["ball", "small red cone", "blue cube"]
    slots = ClassPrompts(explainer, classes, 5)
    context = 0.2 * torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        seen = image_embeds(explainer, images)
        cosines, shares = slots.relevance(context, seen)
        torch.testing.assert_close(cosines, seen @ slots.embeds(context).T, atol=1e-5, rtol=1e-4)
        for c, name in enumerate(classes):
            lone = ClassPrompts(explainer, [name], 5)
            for i in range(3):
                _, share = lone.relevance(context, seen[i : i + 1])
                assert share.item() == pytest.approx(shares[i, c].item(), abs=1e-5)
    assert (shares > 0).all() and (shares <= 1).all()


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"phrases": ["cube"]}, BadInput, "1 phrases for 0 regions"),
        ({"box": [0, 0, 1, 1]}, BadInput, "0 phrases for 1 regions"),
        ({"template": "a photo"}, BadInput, "template"),
        ({"window": (0.5, 0.2)}, BadInput, "window"),
        ({"cutouts": 0}, BadInput, "cutouts"),
        ({"explian": 1}, UnknownName, "explain"),
    ],
)
def test_bad_parameters(given, error, match):
    with pytest.raises(error, match=match):
        NoTokenLeftBehind(**given)


def test_bad_input_of_a_run():
    model = tiny_model("sd")
    with pytest.raises(NoMatch, match="cubes"):
        generate(model, PROMPT, steps=1, interventions=NoTokenLeftBehind(words=["cubes"]))
    with pytest.raises(UnknownName, match="toy-clip"):
        generate(model, PROMPT, steps=1, interventions=NoTokenLeftBehind(clip="toy-clpi"))
    with pytest.raises(BadInput, match="beyond|box"):
        generate(model, PROMPT, steps=1, interventions=NoTokenLeftBehind(phrases=["cube"], box=[0, 0, 99, 1]))
    with pytest.raises(BadInput, match="labels run"):
        learn_prompt(torch.zeros(1, 3, 64, 64), [3], ["a", "b"])
    with pytest.raises(BadInput, match="reads 32"):
        learn_prompt(torch.zeros(1, 3, 64, 64), [0], ["cube", "ball"], context=31)


def test_boxes_act_and_are_recorded():
    model = copy.copy(tiny_model("sd"))
    system = NoTokenLeftBehind(phrases=["red cube"], box=[0, 0.2, 0.5, 1], cutouts=2)
    made = generate(model, PROMPT, steps=2, seed=2, interventions=system)
    assert made.coverage["no_token_left_behind"]["tokens"] == ["red cube"] and system.guided[0].words == ()
    assert not system.pictures(made, 0)
