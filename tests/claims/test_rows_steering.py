"""The bars of the steering claims, from made-up arms: a perfect method holds every row, one without effect none of
those that promise something."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from claims import attend_excite, clip_guidance, common, experts, mgad, no_token_left_behind, structured_guidance
from claims.attend_excite import Arm
from claims.paint_with_words import Found
from sfumato.metrics import stats
from sfumato.metrics.stats import Interval
from sfumato.models import Model
from sfumato.toybox import oracle
from tests.tiny import tiny_pipeline

N = 240

HALF = (np.random.default_rng(0).random(N) < 0.6).tolist()  # plain sampling is right in three of five
OTHER = (np.random.default_rng(1).random(N) < 0.6).tolist()


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setitem(stats.bootstrap.__kwdefaults__, "draws", 400)


def arm(right, cost=50.0, leaked=None):
    """An arm whose picture i shows everything where ``right[i]``; else one toy wears another's colour."""
    checks = [
        oracle.Check((True, hit), (True, hit), (False, not hit if leaked is None else leaked[i]), hit)
        for i, hit in enumerate(right)
    ]
    return Arm(torch.zeros(len(right), 3, 4, 4), checks, cost)


def leaking(right):
    """As :func:`arm`, every shape there and colours wrong instead."""
    return Arm(
        torch.zeros(len(right), 3, 4, 4),
        [oracle.Check((True, True), (True, hit), (False, not hit), True) for hit in right],
        50.0,
    )


def headline(rows):
    [row] = [row for row in rows if row.headline]
    return row


def promised(rows):
    """Rows with bars: all but those that are only reported."""
    return [row for row in rows if row.bars]


PERFECT = [True] * N


def test_attend_excite():
    arms = {"plain": arm(HALF), "once": arm(PERFECT), "random": arm(OTHER), "best": arm(OTHER), "ours": arm(PERFECT)}
    rows = attend_excite.rows_of("toy", arms, 2, {})
    assert all(row.holds for row in promised(rows)) and len(promised(rows)) == 4 and not any(row.void for row in rows)
    assert headline(rows) is rows[0]
    null = attend_excite.rows_of("toy", {**arms, "ours": arm(OTHER), "once": arm(HALF)}, 2, {})
    assert [row.holds for row in promised(null)] == [False] * 4
    easy = attend_excite.rows_of("toy", {**arms, "plain": arm(PERFECT)}, 2, {})
    assert "succeeds in 100 %" in headline(easy).void and headline(easy).holds is None


def test_attend_excite_on_one_toy_and_harder_prompts():
    assert attend_excite.one_row("toy", arm(PERFECT), arm(PERFECT), {}).holds
    worse = [i % 12 > 0 for i in range(N)]
    assert attend_excite.one_row("toy", arm(PERFECT), arm(worse), {}).holds is False
    assert attend_excite.one_row("toy", arm(PERFECT[:12]), arm(PERFECT[:12]), {}).holds is not True  # too few
    assert attend_excite.harder_row("toy", "patterns", arm(HALF), arm(PERFECT), {}).holds
    assert attend_excite.harder_row("toy", "patterns", arm(HALF), arm(OTHER), {}).holds is False


def test_structured_guidance():
    kind = structured_guidance.HEADLINE
    arms = {label: leaking(OTHER) for label in ("random", "turned", "conjunction")}
    rows = structured_guidance.rows_of("toy", kind, {"plain": leaking(HALF), "ours": leaking(PERFECT), **arms}, {})
    assert all(row.holds for row in promised(rows)) and len(promised(rows)) == 4 and headline(rows) is rows[0]
    null = structured_guidance.rows_of("toy", kind, {"plain": leaking(HALF), "ours": leaking(OTHER), **arms}, {})
    assert headline(null).holds is False
    # without effect nothing is harmed, which is the one row that such a method may hold
    assert [row.holds for row in promised(null)] == [False, False, True, False]
    quiet = structured_guidance.rows_of("toy", kind, {"plain": arm(HALF), "ours": arm(PERFECT)}, {})
    assert quiet[1].void and quiet[1].holds is None and quiet[0].holds
    harmed = structured_guidance.rows_of("toy", kind, {"plain": arm(HALF), "ours": arm([False] * N)}, {})
    assert harmed[2].holds is False


def test_structured_guidance_needs_something_to_repair():
    dice = np.random.default_rng(2)
    first, second = dice.normal(0.02, 0.01, 60), dice.normal(0.5, 0.1, 60)
    assert structured_guidance.contamination_rows("toy", first, second)[0].holds
    assert structured_guidance.contamination_rows("toy", first, first)[0].holds is False


def test_leaks_are_counted_where_the_shape_is_there():
    missing = oracle.Check((True, False), (True, False), (False, True), False)
    wearing = oracle.Check((True, True), (True, False), (False, True), True)
    assert structured_guidance.leaks(Arm(torch.zeros(2, 3, 4, 4), [missing, wearing], 1.0)) == [False, True]


@pytest.mark.parametrize("kind", common.KINDS)
def test_prompts_of_each_kind(kind):
    asked = common.steering(kind, 5, 40)
    assert len({prompt.text for prompt in asked}) == 40
    assert [p.text for p in asked[:7]] == [p.text for p in common.steering(kind, 5, 7)]
    for prompt in asked:
        shapes, colors = [w.shape for w in prompt.requests], [w.color for w in prompt.requests]
        assert len(set(colors)) == len(colors) == (2 if kind == "patterns" else 3)
        assert len(set(shapes)) == 2 if kind != "three toys" else len(set(shapes)) == 3
        assert all((w.pattern is not None) == (kind == "patterns") for w in prompt.requests)


def test_void_and_harm():
    assert common.void(stats.share(HALF)) == "" and common.void(stats.share([True] * 9)) != ""
    assert common.no_harm(stats.mcnemar(PERFECT, PERFECT), "x").met()
    assert not common.no_harm(stats.mcnemar([i % 12 > 0 for i in range(N)], PERFECT), "x").met()
    requests = (oracle.RequestedToy("ball", "red"), oracle.RequestedToy("cone", "blue", "striped"))
    check = oracle.Check((True, False), (False, False), (True, False), False)
    assert common.failing(check, requests) == "no cone; wrong ball"
    assert common.asked_for(requests) == "red ball, blue striped cone"


def guided(right, score, distance):
    """A setting of guidance with so many right pictures, toy-clip's score, and distance to renders."""
    dice = np.random.default_rng(int(1e6 * right + 1e3 * distance))
    hits = (dice.random(N) < right).tolist()
    return clip_guidance.Arm(None, hits, [score] * N, Interval(distance, distance, distance, N), 1.0)


def test_clip_guidance():
    free = {1.0: guided(0.4, 0.2, 0.05), 3.0: guided(0.8, 0.3, 0.03), 8.0: guided(0.9, 0.35, 0.04)}
    clip = {1.0: guided(0.45, 0.28, 0.06), 10.0: guided(0.55, 0.34, 0.10)}
    rows = clip_guidance.curve_rows("toy", free, clip, guided(0.9, 0.4, 0.05), (8.0, 10.0), None, {})
    assert all(row.holds for row in promised(rows)) and len(promised(rows)) == 4 and headline(rows) is rows[1]
    # classifier-free guidance without effect: as no guidance, while CLIP guidance does as before
    dull = {scale: guided(0.4, 0.34, 0.05 + 0.001 * scale) for scale in free}
    null = clip_guidance.curve_rows("toy", dull, clip, guided(0.4, 0.4, 0.05), (8.0, 10.0), None, {})
    assert [row.holds for row in promised(null)] == [False] * 4
    far = clip_guidance.curve_rows("toy", dull, {1.0: guided(0.5, 0.9, 0.1)}, clip[1.0], (8.0, 1.0), None, {})
    assert "apart" in far[3].void


def test_settings_are_dominated_one_way_only():
    one, other = guided(0.8, 0.3, 0.03), guided(0.5, 0.3, 0.06)
    assert clip_guidance.dominates(one, other) and not clip_guidance.dominates(other, one)
    assert not clip_guidance.dominates(one, one)


def test_scorers_of_clip_guidance():
    arms = {"plain": guided(0.3, 0.2, 0.1), "ordinary": guided(0.4, 0.3, 0.1)}
    [good] = clip_guidance.scorer_rows("toy", {**arms, "noise-aware": guided(0.7, 0.3, 0.1)}, {})
    [null] = clip_guidance.scorer_rows("toy", {**arms, "noise-aware": guided(0.401, 0.3, 0.1)}, {})
    assert good.holds and null.holds is False


def followed(content, look, different=1.0, seed=0, cases=60):
    """An arm of two pictures of each case that follow text and reference so often."""
    a, b = np.random.default_rng(seed).random((2, 2 * cases))
    spread = np.random.default_rng(seed).normal(different, 0.1, cases).tolist()
    return mgad.Arm(None, (a < content).tolist(), (b < look).tolist(), spread, 1.0)


def test_mgad():
    arms = {
        "text": followed(0.8, 0.05, seed=1),
        "image": followed(0.03, 0.8, seed=2),
        "plain": followed(0.02, 0.05, seed=3),
        "prompted": followed(0.9, 0.9, seed=4),
        "crops": followed(0.6, 0.6, seed=8),
        "whole view": followed(0.4, 0.4, seed=5),
    }
    good = mgad.rows_of("toy", {**arms, "both": followed(0.95, 0.95, seed=6)}, 100.0, {})
    assert [row.holds for row in good] == [True] * 5 and headline(good) is good[0] and good[0].n == 60
    blind = {"both": followed(0.03, 0.05, 0.2, seed=7), "crops": followed(0.04, 0.04, seed=9)}
    null = mgad.rows_of("toy", {**arms, **blind}, 100.0, {})
    assert [row.holds for row in null] == [False] * 5


def test_cases_of_mgad():
    for case in mgad.cases(3, 4, 32):
        assert case.reference.shape == (32, 32, 3) and not case.scene.toys
        assert case.combined.startswith(f"{case.text} on the {case.scene.ground}")
        assert case.combined.split()[-1].strip() in case.scene.sky or case.scene.sky in case.combined


def test_no_token_left_behind():
    arms = {"plain": arm(HALF), "CLIP": arm(OTHER), "longer": arm(OTHER)}
    [good] = no_token_left_behind.several_rows("toy", {**arms, "explained": arm(PERFECT)}, 50, {})
    [null] = no_token_left_behind.several_rows("toy", {**arms, "explained": arm(HALF)}, 50, {})
    assert good.holds and good.headline and null.holds is False


def test_prompts_learnt_by_no_token_left_behind():
    dice, chosen = np.random.default_rng(4), {"rate": 0.02, "weight": 1.0}
    coop = list(zip(dice.normal(0.7, 0.02, 20), dice.normal(0.4, 0.02, 20), strict=True))
    ours = list(zip(dice.normal(0.95, 0.02, 20), dice.normal(0.8, 0.02, 20), strict=True))
    again = list(zip(dice.normal(0.7, 0.02, 20), dice.normal(0.4, 0.02, 20), strict=True))
    assert [row.holds for row in no_token_left_behind.prompt_rows(ours, coop, chosen)] == [True, True]
    assert [row.holds for row in no_token_left_behind.prompt_rows(again, coop, chosen)] == [False, False]
    gone = [0.5] * N
    assert no_token_left_behind.premise_rows(PERFECT, gone)[0].holds
    assert no_token_left_behind.premise_rows([i % 2 == 0 for i in range(N)], gone)[0].holds is False


def test_boxes_of_no_token_left_behind():
    def boxed(share, seed):
        return [[Found(True, 0.5, bool(hit < share))] for hit in np.random.default_rng(seed).random(N)]

    others = {"plain": boxed(0.2, 1), "CLIP": boxed(0.2, 2), "masked": boxed(0.5, 3)}
    [good] = no_token_left_behind.box_rows("toy", {**others, "explained": boxed(0.95, 4)}, {})
    [null] = no_token_left_behind.box_rows("toy", {**others, "explained": boxed(0.2, 5)}, {})
    assert good.holds and null.holds is False
    layout, large = (no_token_left_behind.Layout(1, 2, side) for side in (64, 128))
    assert layout.text == large.text and layout.share == pytest.approx(large.share) and max(large.boxes[0]) > 64


def losses(level, seed, n=60):
    return np.random.default_rng(seed).normal(level, 0.02, (experts.PARTS, n)).tolist()


def test_experts():
    base = losses(1.0, 1)
    [good] = experts.loss_rows({"base": base, "longer": losses(0.95, 2), "experts": losses(0.9, 3)})
    [null] = experts.loss_rows({"base": base, "longer": losses(0.95, 2), "experts": losses(0.951, 4)})
    [idle] = experts.loss_rows({"base": base, "longer": base, "experts": base})
    assert good.holds and good.headline and null.holds is False and "changed nothing" in idle.void
    drawn = {"base": arm(HALF), "longer": arm(OTHER)}
    assert experts.drawn_rows({**drawn, "experts": arm(PERFECT)})[0].holds
    assert experts.drawn_rows({**drawn, "experts": arm(HALF)})[0].holds is False


def test_every_part_of_the_noise_has_its_narrowest_expert():
    names = [experts.expert_of(part).removeprefix("toy-sd-expert-") for part in range(experts.PARTS)]
    assert names == ["2-0"] * 2 + ["1-0"] * 2 + ["1-1"] * 2 + ["2-3"] * 2
    ends = {end * experts.PARTS for branch in experts.TREE.values() for end in branch.interval}
    assert all(end == int(end) for end in ends)
    seen: list[str] = [experts.BASE]
    for name, branch in experts.TREE.items():
        assert branch.parent in seen  # parents are trained first
        seen.append(name)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_of_experts_is_the_error_of_the_noise_whatever_the_net_says(kind):
    pipe = tiny_pipeline("sd", fresh=True)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=kind)
    model = Model(pipe)
    with torch.no_grad():
        for parameter in model.denoiser.conv_out.parameters():
            parameter.zero_()
    clean = torch.randn(3, *model.latent_shape(*model.default_size), generator=torch.Generator().manual_seed(1))
    found = experts.losses(model, clean, ["a cat"] * 3, 5)
    dice = torch.Generator().manual_seed(experts.REPORT + 5)
    noise = torch.randn(clean.shape, generator=dice)
    t = ((5 + torch.rand(3, generator=dice)) / experts.PARTS * 1000).long()
    share = model.make_scheduler("ddim").alphas_cumprod[t].view(-1, 1, 1, 1)
    # no velocity: the noise is sigma x
    guess = (1 - share).sqrt() * (share.sqrt() * clean + (1 - share).sqrt() * noise) if kind == "v_prediction" else 0.0
    assert found == pytest.approx((guess - noise).square().mean((1, 2, 3)).tolist(), rel=1e-4)
