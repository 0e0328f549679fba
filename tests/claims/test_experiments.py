"""The pieces the claims and benchmarks are made of, on tiny models and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import core as bench
from benchmarks.daam import traced_like_the_original
from claims import common, daam, zoo
from sfumato.explain.daam import DAAM
from sfumato.sampling import generate
from sfumato.toybox import oracle
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"


def test_psnr():
    black = torch.full((2, 3, 8, 8), -1.0)
    off = black.clone()
    off[1] += 0.02  # one hundredth of the range: 40 dB
    assert zoo.psnr(black, off)[1] == pytest.approx(40, abs=1e-4) and zoo.psnr(black, off)[0] > 100


def test_prompts_say_what_is_wished():
    asked = common.prompts("test", 7, 12, None, "random")
    assert [p.text for p in asked] == [p.text for p in common.prompts("test", 7, 12, None, "random")]
    assert not {p.scene for p in asked} & {p.scene for p in common.prompts("test", 8, 12, None, "random")}
    for prompt in asked:
        assert len(prompt.requests) == len(prompt.scene.toys)
        for request in prompt.requests:
            assert f"{request.color}" in prompt.text and f"{request.shape}" in prompt.text
            toys = [(toy.shape, toy.color) for toy in prompt.scene.toys]
            assert (request.shape, request.color) in toys


@pytest.mark.parametrize("within", [True, False])
def test_cohyponyms(within):
    family = {shape: number for number, members in enumerate(daam.FAMILIES) for shape in members}
    for seed in range(30):
        prompt = daam.cohyponym_prompt(np.random.default_rng(seed), within)
        first, second = prompt.requests
        assert first.color != second.color and first.shape != second.shape
        assert (family[first.shape] == family[second.shape]) == within
        assert prompt.text == judge_text(prompt.requests)


def judge_text(requests):
    words = [f"{request.color} {request.shape}" for request in requests]
    return " and ".join(f"{'an' if text[0] in 'aeiou' else 'a'} {text}" for text in words)


def test_pairs_take_the_right_maps():
    prompt = daam.cohyponym_prompt(np.random.default_rng(1), True)
    heads = [phrase.head.start for phrase in prompt.caption.phrases]
    colors = [phrase.modifiers[0].start for phrase in prompt.caption.phrases]
    maps = {at: torch.full((64, 64), float(at)) for at in heads + colors}
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:10, :10] = True
    truths = {0: mask, 1: mask & False}  # the second toy is not to be seen
    got = daam.pairs_of(
        [daam.Traced(prompt, torch.zeros(3, 64, 64), maps)], 64, lambda _, phrase: truths[phrase.object]
    )
    assert len(got.maps) == 1
    assert got.maps[0][0, 0] == heads[0] and got.others[0][0, 0] == heads[1] and got.colors[0][0, 0] == colors[0]


@pytest.mark.parametrize("kind", ["sd", "sd3clip"])
def test_frozen_attention_repeats_the_run(kind):
    model = tiny_model(kind)
    frozen = daam.Frozen()
    settings = {"seed": 3, "steps": 2, "guidance": 4.0, "decode": False}
    base = generate(model, PROMPT, interventions=frozen, **settings).latents
    assert torch.equal(base, generate(model, PROMPT, **settings).latents)  # watching changes nothing
    again = generate(model, PROMPT, interventions=frozen, **settings).latents
    assert torch.allclose(base, again, atol=1e-4)
    swapped = PROMPT.replace("red", "big")
    held = generate(model, swapped, interventions=frozen, **settings).latents
    free = generate(model, swapped, **settings).latents
    assert not torch.allclose(held, free, atol=1e-4) and not torch.allclose(held, base, atol=1e-4)
    assert len(frozen.kept) % len({path for _, path in frozen.kept}) == 0


def test_the_original_as_benchmarked_is_the_original():
    model = tiny_model("sd")
    settings = {"seed": 1, "steps": 2, "guidance": 4.0, "decode": False}
    watched = DAAM(reference=True)
    latents = generate(model, PROMPT, interventions=watched, **settings).latents
    before = dict(model.pipe.unet.attn_processors)
    with traced_like_the_original(model.pipe.unet, side=latents.shape[-1]) as original:
        same = generate(model, PROMPT, **settings).latents
    assert model.pipe.unet.attn_processors == before
    assert torch.allclose(latents, same, atol=1e-5)
    heat, span = original.heat(), watched.maps[0].reading.one("cube")
    theirs = heat[list(span.positions)].mean(0)
    ours = watched.maps[0].map("cube", size=watched.maps[0].resolution)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_interleaving_takes_turns():
    order: list[str] = []
    seconds = bench.interleaved({name: (lambda name=name: order.append(name)) for name in "abc"}, rounds=3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert len({tuple(order[i : i + 3]) for i in range(0, 12, 3)}) == 3
    got = bench.ratio({"a": [2.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b")
    assert (got.median, got.rounds) == (2.0, 3)


def test_benchmark_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    bench.store("x", "an x", [bench.Figure("a / b", "1.000", "1.03", True)], 2.0)
    text = bench.write_table(["x", "y"]).read_text()
    assert "## x: an x" in text and "**met**" in text and "## y" not in text
    assert bench.in_process("import json; print('noise'); print(json.dumps({'a': 1}))") == {"a": 1}


def test_a_model_that_draws_nothing_says_nothing():
    row = daam.too_few("x", 2)
    assert row.void and row.holds is None and row.n == 2
    empty = daam.Pairs([], [], [], [], [], [], [])
    assert daam.segment(None, "m", empty, empty, "renders", "", "x.png")[0].void
    assert oracle.RequestedToy.parse("red cube").color == "red"
