"""The pieces of the Attend-and-Excite claims and benchmark, on tiny models and by hand."""

from __future__ import annotations

import torch

from benchmarks.attend_excite import contestants
from claims import attend_excite as claim
from claims import common
from sfumato.sampling import Intervention, generate
from sfumato.steer.attend_excite import AttendExcite
from sfumato.toybox import oracle
from tests.tiny import tiny_model


class Watch(Intervention):
    def on_noise(self, run, x):
        self.noise = x.clone()
        return x

    def after_predict(self, step):
        self.seen = step.x.clone()
        self.mark(step)


def moved(system, model):
    watch = Watch()
    generate(
        model, ["a red cube and a blue ball", "a dog on a cat"], steps=1, interventions=[system, watch], decode=False
    )
    return watch.seen - watch.noise


def test_the_control_moves_as_far_in_another_direction():
    model = tiny_model("sd")
    ours = moved(AttendExcite(thresholds=[], strength=500.0), model).flatten(1)
    random = moved(claim.RandomDirection(thresholds=[], strength=500.0), model).flatten(1)
    torch.testing.assert_close(random.norm(dim=1), ours.norm(dim=1), rtol=1e-2, atol=1e-6)
    assert torch.nn.functional.cosine_similarity(ours, random).abs().max() < 0.2


def test_pairs_differ_in_shape_and_colour():
    prompts = common.pair_prompts(3, 20)
    assert [p.text for p in prompts] == [p.text for p in common.pair_prompts(3, 20)]
    for prompt in prompts:
        first, second = prompt.requests
        assert first.shape != second.shape and first.color != second.color
        assert prompt.text.count(f"{first.color} {first.shape}") == prompt.text.count(f"{second.color} {second.shape}")
    assert len({p.text for p in prompts}) > 15


def test_the_best_of_several_is_taken_picture_by_picture(monkeypatch):
    def arm(value):
        check = oracle.Check((value == 1,), (value == 1,), (False,), True)
        return claim.Arm(torch.full((2, 3, 4, 4), float(value)), [check, check], 10.0)

    def scores(context, pixels, texts):
        value = float(pixels[0, 0, 0, 0])
        return [value, -value]

    monkeypatch.setattr(common, "clip_scores", scores)
    best = claim.best_of(None, [arm(0), arm(1)], ["a", "b"])
    assert best.pixels[:, 0, 0, 0].tolist() == [1, 0] and best.there == [True, False] and best.cost == 20


def test_both_contestants_of_the_benchmark_take_the_same_step():
    model = tiny_model("sd", fresh=True)
    made, before = contestants(model, 16, 8), dict(model.pipe.unet.attn_processors)
    plain, ours, theirs = (made[name]() for name in ("plain", "ours", "pipeline"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours, plain)
    refined, theirs_refined = made["ours refined"](), made["pipeline refined"]()
    torch.testing.assert_close(refined, theirs_refined, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(refined, ours, rtol=1e-4, atol=1e-4)
    assert dict(model.pipe.unet.attn_processors) == before
