"""The parts of the teaching claims run from end to end on a tiny model; an interrupted run teaches nothing twice."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from claims import children, custom_diffusion, discriminative_tokens, dreambooth, subjects, textual_inversion
from claims.core import Context
from sfumato.teach.custom_diffusion import CustomDiffusion
from sfumato.teach.discriminative_tokens import DiscriminativeTokens
from sfumato.teach.dreambooth import DreamBooth
from sfumato.teach.textual_inversion import TextualInversion
from tests.tiny import tiny_model

ROWS = {textual_inversion: 5, dreambooth: 5, custom_diffusion: 5, discriminative_tokens: 5}
TEACHERS = (CustomDiffusion, DiscriminativeTokens, DreamBooth, TextualInversion)


READERS = ("judge", "identity reader", "validation reader", "guide", "trust")


def test_what_is_kept_of_a_child_goes_by_the_name_of_its_model(tmp_path):
    context = Context(quick=True)
    context.count = lambda full, quick: min(quick, 2)
    context.shared = lambda file, models: tmp_path / "-".join([context.folder(each).name for each in models])
    child = children.world(context, "toy-sd")
    assert child.name == "toy-sd"
    with subjects.at_work(context, child, "ball") as work:
        (work.folder / "prior.safetensors").touch()
    with subjects.at_work(context, child, "ball") as work:
        assert [each.name for each in work.folder.iterdir()] == ["prior.safetensors"]
    assert [each.name for each in tmp_path.iterdir()] == ["toy-sd"]


def test_a_child_whose_lesson_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    errors, stop_at = children.Denoising.errors, [2]

    def stopping(self, latents, condition, step, where, **given):
        if stop_at[0] is not None and step + 1 == stop_at[0]:
            os.kill(os.getpid(), signal.SIGINT)
        return errors(self, latents, condition, step, where, **given)

    def learnt(part):
        context = Context(quick=True)
        context.count = lambda full, quick: min(full, 3)
        context.shared = lambda file, models: tmp_path / part
        model = tiny_model("sd")
        with torch.no_grad():
            before = {key: value.clone() for key, value in model.pipe.unet.state_dict().items()}
        try:
            return children.learnt(context, model, "looks", lambda: children.looks(10), 8)
        finally:
            assert all(torch.equal(value, before[key]) for key, value in model.pipe.unet.state_dict().items())

    monkeypatch.setattr(children.Denoising, "errors", stopping)
    with pytest.raises(KeyboardInterrupt):
        learnt("a")
    stop_at[0] = None
    assert list((tmp_path / "a" / "learning looks").iterdir())
    went_on, whole = learnt("a"), learnt("b")
    assert whole and all(torch.equal(went_on[key], each) for key, each in whole.items())
    assert not (tmp_path / "a" / "learning looks").exists()  # its caller keeps the weights


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def readers():
    """Those that one run has made serve the next."""
    return {}


@pytest.mark.parametrize("claim", ROWS, ids=lambda claim: claim.EXPERIMENT.key)
def test_an_interrupted_run_teaches_nothing_twice(claim, tmp_path, monkeypatch, readers):
    lessons, stop_at = [], [2]

    def counted(teach):
        def teaches(self, *given, **options):
            if len(lessons) == stop_at[0]:
                raise Killed
            taught = teach(self, *given, **options)
            lessons.append(self.CARD.key)
            return taught

        return teaches

    for each in TEACHERS:
        monkeypatch.setattr(each, "teach", counted(each.teach))

    def run(part):
        context = Context(quick=True)
        context.pictures, context.halfway = tmp_path / "pictures", tmp_path / part
        context.count = lambda full, quick: min(quick, 2)
        context.cache |= readers | dict.fromkeys(("tiny with every hue", "tiny with homonyms"), tiny_model("sd"))
        rows = claim.measured(context, "tiny")
        readers.update({key: made for key, made in context.cache.items() if key in READERS})
        return json.dumps([{**row.to_json(), "baseline": ""} for row in rows]), len(rows)  # a baseline may tell a time

    with pytest.raises(Killed):
        run("a")
    stop_at[0] = None
    went_on, rows = run("a")
    once = len(lessons)
    assert rows == ROWS[claim] and once > 2
    assert run("a")[0] == went_on and len(lessons) == once  # nor of what was finished
    if claim is textual_inversion:  # as a run that nobody killed; of the others it would take too long
        assert run("b")[0] == went_on and len(lessons) == 2 * once
