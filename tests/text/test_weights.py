"""Weights in prompts: the notation, what it does to embeddings of every family, and that word tools never see it."""

from __future__ import annotations

import json

import pytest
import torch

from sfumato.explain.daam import DAAM
from sfumato.sampling import generate, recipe_args
from sfumato.text import Words
from sfumato.text.weights import encode_weighted, read_weights
from tests.tiny import tiny_model

FAMILIES = ["sd", "sdxl", "sd3", "sd3clip", "flux", "pixart"]
UP, DOWN = 1.1, round(1 / 1.1, 6)

READINGS = {
    "a red cube": [("a red cube", 1)],
    "a (red) cube": [("a ", 1), ("red", UP), (" cube", 1)],
    "a (red:1.3) cube": [("a ", 1), ("red", 1.3), (" cube", 1)],
    "a ( red : 1.3 ) cube": [("a ", 1), (" red", 1.3), (" cube", 1)],
    "a [red] cube": [("a ", 1), ("red", DOWN), (" cube", 1)],
    "a ((red)) [[cube]]": [("a ", 1), ("red", 1.21), (" ", 1), ("cube", round(1 / 1.21, 6))],
    "a (big (red:1.5) cube:2)": [("a ", 1), ("big ", 2), ("red", 3), (" cube", 2)],
    "([red])": [("red", 1)],
    "(red:0) (dog:-.5) (cat:+2.)": [("red", 0), (" ", 1), ("dog", -0.5), (" ", 1), ("cat", 2)],
    r"a cube \(red\) \[a\] \\": [("a cube (red) [a] \\", 1)],
    r"(a cube \(red\):1.2)": [("a cube (red)", 1.2)],
    r"C:\dir": [("C:\\dir", 1)],
    "a (red cube": [("a (red cube", 1)],
    "a red) cube] :) :(": [("a red) cube] :) :(", 1)],
    "a (red [cube) dog": [("a ", 1), ("red [cube", UP), (" dog", 1)],
    "a [red (cube] dog)": [("a ", 1), ("red (cube", DOWN), (" dog)", 1)],
    "main() [ ] (:2)": [("main() [ ] (:2)", 1)],
    "a (red:blue) (12:30:2)": [("a ", 1), ("red:blue", UP), (" ", 1), ("12:30", 2)],
    "(red)cube s(cat)s (a)(b)": [("red", UP), (" cube s ", 1), ("cat", UP), (" s ", 1), ("a", UP), (" ", 1), ("b", UP)],
    "(red), (cube).": [("red", UP), (", ", 1), ("cube", UP), (".", 1)],
    "": [],
}


@pytest.mark.parametrize("prompt", READINGS)
def test_notation(prompt):
    read, expected = read_weights(prompt), READINGS[prompt]
    assert read.text == "".join(text for text, _ in expected)
    assert read.weights == tuple(float(weight) for text, weight in expected for _ in text)
    assert read.plain == all(weight == 1 for _, weight in expected)


@pytest.mark.parametrize("prompt", ["(" * 3000 + "a" + ")" * 3000, "([" * 500, "\\", "(\\", "a\\)", "🐱(猫:1.2)é"])
def test_nothing_makes_it_fail(prompt):
    read = read_weights(prompt)
    assert len(read.text) == len(read.weights)


def test_weights_of_stretches_leave_blanks_out():
    read = read_weights("a (red:2) cube")
    assert read.weight(1, 5) == 2 and read.weight(0, 5) == pytest.approx((1 + 3 * 2) / 4)
    assert read.weight(1, 2) == read.weight(0, 0) == 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_tokens_move_along_the_line_from_the_empty_prompt(kind):
    model = tiny_model(kind)
    plain = model.encode_text(["a red cube", "a green dog"], ["a ball", "a ball"])
    given = encode_weighted(model, ["a (red:1.5) cube", "a (green dog:0.25)"], ["a [ball]", "a ball"])
    empty = model.encode_text("", guidance=False).cond["embeds"][0]
    assert given.prompts == plain.prompts and given.negatives == plain.negatives
    words = Words(model)
    for branch, row, phrase, weight in (
        ("cond", 0, "red", 1.5), ("cond", 1, "green dog", 0.25), ("uncond", 0, "ball", DOWN), ("uncond", 1, "", 1.0),
    ):  # fmt: skip
        text = (given.prompts if branch == "cond" else given.negatives)[row]
        positions = words.one(text, phrase).positions if phrase else ()
        ours, theirs = given.branch(branch)["embeds"][row], plain.branch(branch)["embeds"][row]
        for t in range(model.text_length):
            if t in positions:
                by_hand = (1 - weight) * empty[t].double() + weight * theirs[t].double()
                torch.testing.assert_close(ours[t].double(), by_hand, rtol=1e-5, atol=1e-6)
                assert not torch.equal(ours[t], theirs[t])
            else:
                assert torch.equal(ours[t], theirs[t])
        for key in set(plain.cond) - {"embeds"}:
            assert torch.equal(given.branch(branch)[key], plain.branch(branch)[key])


@pytest.mark.parametrize("kind", FAMILIES)
def test_weight_one_is_the_plain_prompt_bit_for_bit(kind):
    model = tiny_model(kind)
    options = {"steps": 1, "decode": False, "seed": 3}
    if not model.embeds_guidance:
        options |= {"guidance": 3.0}
    negative = {} if model.embeds_guidance else {"negative": "(a dog:1)"}
    plain_negative = {} if model.embeds_guidance else {"negative": "a dog"}
    one = generate(model, ["(a (red:1.0) cube:1)", r"a cube \(red\)"], **options, **negative).latents
    plain = generate(model, ["a red cube", r"a cube \(red\)"], **options, **plain_negative).latents
    assert torch.equal(one, plain)
    heavy = generate(model, ["a (red:1.4) cube", r"a cube \(red\)"], **options, **plain_negative).latents
    assert not torch.equal(heavy[0], plain[0]) and torch.allclose(heavy[1], plain[1], atol=1e-5)


def test_brackets_reach_the_encoder_only_escaped_or_unpaired():
    model = tiny_model("sd")
    options = {"steps": 1, "decode": False, "guidance": 1.0}
    literal = model.encode_text("a cube (red)", guidance=False).cond["embeds"]
    assert torch.equal(encode_weighted(model, [r"a cube \(red\)"], guidance=False).cond["embeds"], literal)
    unpaired = model.encode_text("a (red cube :)", guidance=False).cond["embeds"]
    assert not torch.equal(unpaired, literal)
    for prompt in ("a (red cube", "a red] cube)", ":(", "(", "[]"):
        read = encode_weighted(model, [prompt], guidance=False)
        assert read.prompts == (prompt,)
        assert torch.equal(read.cond["embeds"], model.encode_text(prompt, guidance=False).cond["embeds"])
        assert torch.isfinite(generate(model, prompt, **options).latents).all()


def test_weight_zero_is_what_the_empty_prompt_has_there():
    model = tiny_model("sd")
    embeds = encode_weighted(model, ["a (red cube:0)"], guidance=False).cond["embeds"][0]
    empty = model.encode_text("", guidance=False).cond["embeds"][0]
    torch.testing.assert_close(embeds[2:4], empty[2:4])
    assert not torch.allclose(embeds[1], empty[1])


def test_word_tools_see_the_plain_text_and_recipes_the_weights():
    model, prompt = tiny_model("sd"), "a (red:1.3) cube and a [blue ball]"
    daam = DAAM(words=["red cube", "ball"])
    options = {"steps": 2, "seed": 3, "guidance": 3.0, "negative": "a (dog)", "decode": False}
    result = generate(model, prompt, interventions=daam, **options)
    assert daam.maps[0].prompt == "a red cube and a blue ball" and daam.maps[0].words == ("red cube", "ball")
    assert result.recipe["prompt"] == prompt and result.recipe["negative"] == "a (dog)" and result.prompts == [prompt]
    again = generate(model, **recipe_args(json.loads(json.dumps(result.recipe))), decode=False)
    assert torch.equal(again.latents, result.latents)
    assert not torch.equal(generate(model, "a red cube and a blue ball", **options).latents, result.latents)


def test_samples_with_different_weights_share_a_batch():
    model = tiny_model("sdxl")
    prompts = ["a (red:1.5) cube", "a red cube", "a (red:1.5) cube", "a [red] cube"]
    options = {"steps": 1, "decode": False, "guidance": 3.0}
    together = generate(model, prompts, seed=[3, 3, 3, 3], **options).latents
    assert torch.allclose(together[0], together[2], atol=1e-5)
    for i in (0, 1, 3):
        alone = generate(model, prompts[i], seed=3, **options).latents[0]
        torch.testing.assert_close(alone, together[i], rtol=1e-3, atol=1e-4)


def test_composed_texts_have_weights_too():
    model = tiny_model("sd")
    options = {"steps": 1, "decode": False, "guidance": 3.0}
    one, two = (generate(model, "a cube", compose=[(t, 2.0)], **options).latents for t in ("a dog", "a (dog:1.0)"))
    heavy = generate(model, "a cube", compose=[("a (dog:1.5)", 2.0)], **options).latents
    assert torch.equal(one, two) and not torch.equal(one, heavy)


def test_half_precision_stays_half():
    model = tiny_model("sd3", fresh=True).to(dtype=torch.bfloat16)
    embeds = encode_weighted(model, ["a (red:1.5) cube"], guidance=False).cond["embeds"]
    assert embeds.dtype == torch.bfloat16 and torch.isfinite(embeds).all()


def test_deep_and_long_prompts_are_read_in_proportion_to_their_length():
    deep = read_weights("(" * 20_000 + "a" + ")" * 20_000)
    assert deep.text.count("(") == 19_900 and max(deep.weights) == pytest.approx(1.1**100, rel=1e-3)
    assert read_weights("(" * 100 + "a" + ")" * 100).text == "a"
    many = read_weights("(a:1.2) " * 5_000)
    assert many.text == ("a " * 5_000) and set(many.weights) == {1.0, 1.2}
