"""The pieces of the Prompt-to-Prompt claims: changes, judgements, choices, and a run through on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from claims import prompt_to_prompt as claim
from claims.core import Context
from sfumato.toybox.oracle.toy_judge import ObjectReading, SceneReading
from tests.tiny import tiny_model


def test_changes_change_one_word_and_the_scene_alike():
    asked = claim.changes("test", 3, 24)
    assert [each.kind for each in asked] == list(claim.KINDS) * 6
    for each in asked:
        old, new = each.prompt.text.split(), each.text.split()
        differing = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        assert differing == [(each.old, each.new)]
        if each.toy is None:
            assert each.scene.ground == each.new and each.scene.toys == each.prompt.scene.toys
            assert each.requests == each.prompt.requests
        else:
            assert getattr(each.scene.toys[each.toy], each.kind) == each.new
            assert getattr(each.requests[claim._at(each)], each.kind) == each.new
            others = [i for i in range(len(each.requests)) if i != claim._at(each)]
            assert all(each.requests[i] == each.prompt.requests[i] for i in others)


def toy(request, mask):
    return ObjectReading(request.shape, request.color, request.pattern or "plain", "large", mask, (0, 0, 1, 1), 1.0)


def test_judgement_of_an_edit():
    each = next(c for c in claim.changes("test", 3, 8) if c.kind == "color")
    at = claim._at(each)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 10:20, 10:20] = masks[1, 40:50, 40:50] = True
    source = SceneReading(tuple(toy(w, m) for w, m in zip(each.prompt.requests, masks, strict=True)), "grass", "day")
    edited = SceneReading(tuple(toy(w, m) for w, m in zip(each.requests, masks, strict=True)), "grass", "day")
    before = torch.zeros(3, 64, 64)
    after = before + 0.02  # one hundredth of the range: 40 dB
    after[:, masks[at]] = 1.0  # the toy itself does not count
    success, kept, background = claim.judged(each, source, edited, before, after)
    assert success and kept == 1.0 and background == pytest.approx(40, abs=1e-3)
    assert claim.judged(each, source, source, before, after)[0] is False
    gone = SceneReading(tuple(o for i, o in enumerate(edited.objects) if i == at), "grass", "day")
    assert claim.judged(each, source, gone, before, after)[1] == 0.0
    assert claim.judged(each, gone, edited, before, after) is None  # the source is not what it should be


def test_words_that_act_where_the_change_belongs():
    for each in claim.changes("test", 3, 24):
        assert all(word in f"{each.prompt.text} {each.text}".split() for word in each.where)
        if each.kind in ("shape", "ground"):
            assert each.where == [each.old, each.new]
        else:
            assert each.where == [each.prompt.scene.toys[each.toy].shape]
        for setting in (claim.ALONE[0], claim.BLENDED[0]):
            assert ("blend" in setting.plan(each)) == (setting.threshold is not None)


def test_choice_of_settings():
    def outcome(changes_of_10, kept, background):
        success = [i < changes_of_10 for i in range(10)]
        return claim.Outcome(success, [kept] * 10, [background] * 10)

    for settings in (claim.ALONE, claim.BLENDED):
        assert len({str(each) for each in settings}) == len(settings)
        tuned = {str(each): outcome(10, 0.6, 21.0) for each in settings} | {"no injection": outcome(10, 0.5, 20.0)}
        tuned[str(settings[1])] = outcome(9, 0.8, 28.0)  # above each bar
        tuned[str(settings[2])] = outcome(5, 0.95, 40.0)  # keeps more, but the change is not made
        assert claim.choose(tuned, settings) == settings[1]
        assert claim.choose({}, settings) == settings[0]  # no picture shows what it should


def test_measures():
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 4, 4)
    everywhere = torch.ones(4, 4, dtype=torch.bool)
    more, gray = claim.colourful(red, everywhere, "red"), claim.colourful(torch.zeros(3, 4, 4), everywhere, "red")
    assert more > 0.9 and gray == pytest.approx(0, abs=1e-6) and claim.colourful(-red, everywhere, "red") < -0.9
    assert claim.colourful(red, everywhere, "green") < 0  # another hue is no step towards the word's
    half = everywhere.clone()
    half[:2] = False
    assert claim.iou(everywhere, half) == 0.5
    assert claim.psnr_where(red, red, half) > 100
    assert claim.by_chance(5) == pytest.approx(5 / 120)


class Stub:
    """A judge that reads the pictures of a change as its prompt's requests, whatever they show."""

    def __init__(self, asked):
        self.asked = iter(asked)

    def read(self, pictures):
        masks = torch.zeros(2, *pictures.shape[-2:], dtype=torch.bool)
        masks[0, :8, :8] = masks[1, 20:28, 20:28] = True
        prompt = next(self.asked).prompt
        toys = tuple(toy(w, m) for w, m in zip(prompt.requests, masks, strict=True))
        return [SceneReading(toys, prompt.scene.ground, "day")] * len(pictures)


def test_edits_run_through_on_a_tiny_model(monkeypatch):
    monkeypatch.setattr(claim, "STEPS", 2)
    monkeypatch.setattr(claim, "STRENGTHS", (0.6, 0.8))  # fewer leave no step of two
    asked = claim.changes("test", 3, 2)
    context = Context(quick=True)
    context.cache["model tiny"], context.cache["judge"] = tiny_model("sd"), Stub(asked)
    found = claim.edit_all(context, "tiny", asked, 0, [*claim.ALONE[:2], claim.BLENDED[0]], "x", (0.6, 0.8))
    methods = ["no injection", "p2p 0.4/0.2", "p2p 0.6/0.4", "p2p 0.2/0.2, blend 0.5", "SDEdit 0.6", "SDEdit 0.8"]
    assert set(found) == set(methods)
    assert all(len(each.success) == 2 and np.isfinite(each.background).all() for each in found.values())
    assert all(len(each.sources) == len(each.pictures) == 2 for each in found.values())
    changed = claim.edit_renders(context, "tiny", asked, 0, [claim.BLENDED[0], claim.ALONE[0]], True, "x")
    own = [claim.ours(setting) for setting in (claim.BLENDED[0], claim.ALONE[0])]
    assert list(changed)[:4] == ["picture", "re-render", *own] and "p2p without null-text" in changed
    assert all(np.isfinite([*each.inside, *each.outside, *each.whole]).all() for each in changed.values())


def test_the_widest_setting_needs_all_that_the_others_do():
    widest = claim.Setting.widest([claim.Setting(0.8, 0.2), claim.Setting(0.2, 0.6, 0.5)])
    assert widest == claim.Setting(0.8, 0.6, 0.5) and claim.Setting.widest(claim.ALONE).threshold is None
