"""The checks bite: a well-behaved system passes all of them, and each kind of misbehaviour is caught by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image

from sfumato import cards
from sfumato.attention import Tap
from sfumato.cards import Card, Field, Params, register
from sfumato.errors import Conflict, NoMatch
from sfumato.sampling import Intervention
from sfumato.text import Words
from tests.contract import checks, covering
from tests.tiny import tiny_model


def card(key):
    return Card(
        key=key,
        title=key,
        authors="nobody",
        year=2026,
        verb="steer",
        needs=("linear_text_values",),
        defaults_from="nowhere",
        cost="none",
        summary="A system for tests.",
    )


class Nudge(Intervention):
    """A well-behaved steerer: moves latents by a fixed pattern."""

    CARD = card("test_nudge")
    role = "steerer"

    class Params(Params):
        strength: float = Field(0.1, ge=0, description="how far")

    def __init__(self, **given):
        self.params = self.Params(**given)

    def after_step(self, step):
        if self.params.strength:
            step.x = step.x + self.params.strength * torch.ones_like(step.x).cumsum(-1) / step.x.shape[-1]
            self.mark(step)


class Watcher(Intervention):
    """A well-behaved observer: averages the attention that words receive."""

    CARD = card("test_watcher")
    role = "observer"

    class Params(Params):
        words: list[str] = Field([], description="words to watch; empty: all")

    def __init__(self, **given):
        self.params = self.Params(**given)

    def start(self, run):
        words = Words(run.model)
        for prompt in run.prompts:
            for word in self.params.words:
                words.find(prompt, word)
        self.seen = {}

    def taps(self):
        return [Tap(lambda site: site.text is not None, observe=self.look)]

    def look(self, call):
        probs = call.branch("cond").probs().float().mean(dim=(1, 2))
        for row, mean in enumerate(probs[:, : call.text.stop][:, call.text].argmax(-1).tolist()):
            self.seen[row] = self.seen.get(row, 0) + mean
        self.mark(call.step, sites=[call.site.path])

    def pictures(self, result, index):
        return {"seen": Image.new("L", (1, 1), self.seen[index] % 255)}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(cards, "_registered", dict(cards._registered))
    register(Nudge)
    register(Watcher)


@pytest.fixture
def model():
    return tiny_model("sd", fresh=True)


@pytest.mark.parametrize("make", [Nudge, Watcher])
@pytest.mark.parametrize(
    "check",
    [
        checks.check_detaches,
        checks.check_detaches_when_the_denoiser_fails,
        checks.check_acts,
        checks.check_deterministic,
        checks.check_batch_independent,
        checks.check_wide_pictures,
        checks.check_without_guidance,
        checks.check_recipe,
    ],
)
def test_good_systems_pass(make, check, model):
    check(make, model)


def test_good_systems_pass_the_rest(model):
    checks.check_identity(Nudge, model, lambda: Nudge(strength=0))
    checks.check_identity(Watcher, model, None)
    checks.check_composes([Nudge, Watcher], model)
    checks.check_composes([Nudge, Nudge], model)
    checks.check_neutral(Watcher, [lambda: Nudge(strength=0)] * 2, model)
    assert checks.check_guidance(Nudge, "negative", model) == "" == checks.check_guidance(Watcher, "compose", model)
    checks.check_unknown_words(lambda words: Watcher(words=words), model)
    half = tiny_model("sd", fresh=True).to(dtype=torch.bfloat16)
    for system in (Watcher, Nudge):
        checks.check_half_precision(system, half, model)
    checks.check_refuses(Nudge, tiny_model("sd3"), "linear_text_values")


def test_a_file_that_loses_something_is_caught(model, tmp_path):
    class Kept:
        def __init__(self, value):
            self.value = value

        def grid(self, image):
            return Image.new("L", (1, 1), self.value)

        def save(self, path):
            path.write_bytes(bytes(40))
            return path

        @classmethod
        def load(cls, path):
            return cls(path.read_bytes()[0])

    class Saves(Watcher):
        def finish(self, run):
            self.maps = [Kept(7)]

    _fails(checks.check_saves, Saves, model, tmp_path)


def _fails(check, *args):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(*args)


def test_a_hook_left_behind_is_caught(model):
    class LeavesHook(Nudge):
        def start(self, run):
            run.model.denoiser.register_forward_hook(lambda *_: None)

    _fails(checks.check_detaches, LeavesHook, model)


def test_a_changed_weight_is_caught(model):
    class ChangesWeight(Nudge):
        def start(self, run):
            with torch.no_grad():
                next(run.model.denoiser.parameters()).mul_(1.5)

    _fails(checks.check_detaches, ChangesWeight, model)


def test_a_hook_that_only_a_clean_end_removes_is_caught(model):
    class ForgetsOnError(Nudge):
        def start(self, run):
            self.handle = run.model.denoiser.register_forward_hook(lambda *_: None)

        def finish(self, run):
            self.handle.remove()

    _fails(checks.check_detaches, ForgetsOnError, model)
    _fails(checks.check_detaches_when_the_denoiser_fails, ForgetsOnError, tiny_model("sd", fresh=True))


def test_an_observer_that_touches_the_picture_is_caught(model):
    class Clumsy(Watcher):
        def after_step(self, step):
            step.x = step.x * 1.0000002

    _fails(checks.check_identity, Clumsy, model, None)


def test_a_strength_of_zero_that_acts_is_caught(model):
    class Stubborn(Nudge):
        def after_step(self, step):
            step.x = step.x + 1e-3
            self.mark(step)

    _fails(checks.check_identity, Stubborn, model, lambda: Stubborn(strength=0))


def test_a_silent_no_op_is_caught(model):
    class DoesNothing(Nudge):
        def after_step(self, step):
            self.mark(step)

    class SaysNothing(Nudge):
        def after_step(self, step):
            pass

    _fails(checks.check_acts, DoesNothing, model)
    with pytest.raises(NoMatch, match="did nothing"):
        checks.check_acts(SaysNothing, model)


def test_hidden_randomness_is_caught(model):
    class Dice(Nudge):
        def after_step(self, step):
            step.x = step.x + torch.rand(())
            self.mark(step)

    counter = itertools.count()

    class Memory(Nudge):
        def after_step(self, step):
            step.x = step.x + 1e-3 * next(counter)
            self.mark(step)

    _fails(checks.check_deterministic, Memory, model)
    _fails(checks.check_deterministic, Dice, model)


def test_neighbours_that_mix_are_caught(model):
    class Mixes(Nudge):
        def after_step(self, step):
            step.x = step.x + 0.1 * step.x.mean(dim=0, keepdim=True)
            self.mark(step)

    _fails(checks.check_batch_independent, Mixes, model)


def test_tensors_in_cycles_are_caught(model):
    class Loops(Nudge):
        def after_step(self, step):
            super().after_step(step)
            ring = [step.x]
            ring.append(ring)

    _fails(checks.check_frees, Loops, model)


def test_a_system_that_gives_up_elsewhere_is_caught(model):
    class Square(Nudge):
        def after_step(self, step):
            if step.x.shape[-1] == step.x.shape[-2]:
                super().after_step(step)
            self.mark(step)

    class Guided(Nudge):
        def after_step(self, step):
            if "uncond" in step.outputs:
                super().after_step(step)
            self.mark(step)

    class Precise(Nudge):
        def after_step(self, step):
            super().after_step(step)
            if step.x.dtype == torch.bfloat16:
                step.x = 2 * step.x

    _fails(checks.check_wide_pictures, Square, model)
    _fails(checks.check_without_guidance, Guided, model)
    _fails(checks.check_half_precision, Precise, tiny_model("sd", fresh=True).to(dtype=torch.bfloat16), model)


def test_a_refusal_for_another_reason_is_caught(model):
    class Picky(Nudge):
        def start(self, run):
            raise NoMatch("no words.")

    _fails(checks.check_refuses, Picky, model, "linear_text_values")


def test_a_conflict_in_one_order_only_is_caught(model):
    class First(Nudge):
        CARD = card("test_first")

        def start(self, run):
            if run.parts[0] is self and len(run.parts) > 1:
                raise Conflict("test_first will not come first.")

    _fails(checks.check_conflicts, First, Nudge, model)


def test_groups_cover_every_pair_once_told_which_go_together():
    items = list("abcdefgh")
    apart = {("a", "b"), ("c", "h")}
    found = covering.groups(items, lambda one, other: (one, other) not in apart, size=4)
    pairs = {pair for group in found for pair in itertools.combinations(group, 2)}
    assert pairs == set(itertools.combinations(items, 2)) - apart and max(map(len, found)) == 4
    assert len(found) <= 8  # 26 pairs, 6 a group


def test_words_taken_for_granted_are_caught(model):
    class Gullible(Watcher):
        def start(self, run):
            self.seen = {}

    _fails(checks.check_unknown_words, lambda words: Gullible(words=words), model)


def test_a_system_that_forgets_a_parameter_is_caught(model):
    class Forgets(Nudge):
        CARD = card("test_forgets")

        class Params(Params):
            strength: float = Field(0.1, description="how far")

        def __init__(self, **given):
            self.params = self.Params(strength=given.get("strength", 0.1) * 2)

    register(Forgets)
    _fails(checks.check_recipe, Forgets, model)


def test_an_effect_that_gets_lost_beside_another_system_is_caught(model):
    class Overrules(Nudge):
        role = "guider"  # behind the steerers

        def after_predict(self, step):
            self.mark(step)

        def after_step(self, step):
            step.x = torch.ones_like(step.x)

    class GivesUp(Nudge):
        def start(self, run):
            self.alone = len(run.parts) == 1

        def after_step(self, step):
            if self.alone or step.i == 0:
                super().after_step(step)

    _fails(checks.check_composes, [Overrules, Nudge], model)
    _fails(checks.check_composes, [GivesUp, Watcher], model)
    _fails(checks.check_guidance, Overrules, "negative", model)


def test_a_system_of_strength_0_that_meddles_is_caught(model):
    class Meddles(Nudge):
        def on_text(self, run, condition):
            run.generators[0].manual_seed(0)
            run.parts[0].params = run.parts[0].params.model_copy(update={"strength": 0.2})
            return condition

    checks.check_neutral(Nudge, [lambda: Nudge(strength=0)], model)
    _fails(checks.check_neutral, Nudge, [lambda: Nudge(strength=0), lambda: Meddles(strength=0)], model)
