"""What is wrong with what is given, for every system that teaches: named in one line before anything slow, and after a
kill, a full disk or another run in the same place nothing is lost."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification

from sfumato import app, writing
from sfumato.app import teaching
from sfumato.errors import BadInput, Conflict, NotSupported
from sfumato.locks import lock
from sfumato.models.readers.reader import wrap
from sfumato.models.text_towers import text_towers
from sfumato.teach import concepts, discriminative_tokens, taught
from sfumato.teach.scorers import scorer_of
from sfumato.teach.word_vectors import bare, refuse_word
from tests.tiny import tiny_model

COMMON = {"class_noun": "ball", "steps": 3, "checkpoint_every": 1}
SYSTEMS = {
    "textual_inversion": {"name": "<rex>", "batch": 1, "probe_every": 1, "patience": 2, "lr": 1e-9},  # over after 2
    "dreambooth": {"name": "<rex>", "batch": 1, "mode": "pivotal", "prior": 2},
    "custom_diffusion": {"name": "<rex>", "batch": 1, "prior": 2, "augment": False},
    "discriminative_tokens": {"target": "cat", "noises": 1, "draw_steps": 1, "enough": 0.01, "patience": 1},
}


@pytest.fixture(scope="module")
def vit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            patch_size=4, id2label={0: "cat", 1: "dog", 2: "cone"}, initializer_range=0.3,
        )  # fmt: skip
        return wrap(ViTForImageClassification(config).eval(), "tiny-vit")


@pytest.fixture
def teach(photos, vit, tmp_path):
    def run(by, file="x", **more):
        given = {**COMMON, **SYSTEMS[by], **more}
        data = vit if by == "discriminative_tokens" else photos
        return app.teach(
            data, by=by, model=tiny_model("sd3clip"), out=tmp_path / "out" / f"{file}.safetensors", **given
        )

    (tmp_path / "out").mkdir()
    return run


class Killed(BaseException):
    pass


@pytest.mark.parametrize("by", SYSTEMS)
def test_a_killed_run_and_a_full_disk_at_the_end_lose_nothing(teach, tmp_path, monkeypatch, by):
    more = {"target": ["cat", "cone"]} if by == "discriminative_tokens" else {}
    whole = teach(by, "whole", **more)

    def kill(step, steps, log):
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        teach(by, on_progress=kill, **more)
    save_word, count = taught.save_word, len(whole.files)

    def full(path, **given):
        if path.name == whole.files[-1].name.replace("whole", "x"):
            raise OSError(28, "No space left on device", str(path))
        return save_word(path, **given)

    monkeypatch.setattr(taught, "save_word", full)
    with pytest.raises(OSError, match="No space"):
        teach(by, resume=True, **more)
    assert not list((tmp_path / "out").glob("x*.safetensors")) or count == 1
    monkeypatch.setattr(taught, "save_word", save_word)
    again = teach(by, resume=True, **more)
    assert again.log == whole.log and again.step == whole.step
    keys = ("probe_first", "probe_best", "updates", "hits")
    assert [again.facts.get(key) for key in keys] == [whole.facts.get(key) for key in keys]
    for one, other in zip(whole.files, again.files, strict=True):
        before, now = load_file(one), load_file(other)
        assert before.keys() == now.keys() and all(torch.equal(now[key], value) for key, value in before.items())
    assert not list((tmp_path / "out").glob("*.training"))


@pytest.fixture
def nothing_slow(monkeypatch):
    def slow(*_, **__):
        raise AssertionError("pictures were drawn")

    monkeypatch.setattr(concepts, "generate", slow)
    monkeypatch.setattr(discriminative_tokens, "generate", slow)


@pytest.mark.parametrize("by", SYSTEMS)
def test_what_is_in_the_way_is_said_before_anything_is_drawn(teach, tmp_path, monkeypatch, nothing_slow, by):
    out = tmp_path / "out"
    cases = [
        ({"name": "BALL"}, "is a word of text_encoder already"),
        ({"name": "<a> <b>"}, "cannot be a word of a prompt"),
        ({"name": "a(b"}, "cannot be a word of a prompt"),
        ({"resume": True}, "there is nothing to resume"),
    ]
    cases += [({"class_noun": " "}, "class_noun")] if by in ("dreambooth", "custom_diffusion") else []
    for more, says in cases:
        with pytest.raises(BadInput) as raised:
            teach(by, **more)
        assert says in str(raised.value) and not list(out.iterdir()), str(raised.value)
    (out / "x.safetensors.training").mkdir()
    with writing.reserved(out / "x.safetensors.training", "another"), pytest.raises(Conflict, match="at work"):
        teach(by)
    (out / "x-word.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match=r"x-word.safetensors exists"):
        teach(by)
    (out / "x-word.safetensors").unlink()
    look = teaching.fresh

    def ended_meanwhile(target):  # another run has written the file and taken its folder away since the first look
        found = look(target)
        shutil.rmtree(out / "x.safetensors.training", ignore_errors=True)
        target.write_bytes(b"theirs")
        return found

    monkeypatch.setattr(teaching, "fresh", ended_meanwhile)
    with pytest.raises(BadInput, match=r"x.safetensors exists; name a new file"):
        teach(by)
    assert [each.name for each in out.iterdir()] == ["x.safetensors"]
    assert (out / "x.safetensors").read_bytes() == b"theirs"


def test_a_folder_that_its_run_takes_away_is_made_anew(tmp_path, monkeypatch):
    from sfumato import locks

    flock, calls = locks.fcntl.flock, []

    def taken_away(handle, how):
        if not calls:
            (tmp_path / "run").rmdir()
        calls.append(handle)
        flock(handle, how)

    monkeypatch.setattr(locks.fcntl, "flock", taken_away)
    with writing.reserved(tmp_path / "run", "teaching", make=True):
        assert len(calls) == 2 and lock(tmp_path / "run") is None  # it is the folder that is there which is held
    calls.clear()
    with pytest.raises(FileNotFoundError):
        lock(tmp_path / "run")


def test_words_of_every_kind_of_vocabulary():
    assert [bare(token) for token in ("ball</w>", "▁ball", "Ġball", "ball")] == ["ball"] * 4
    refuse_word(text_towers(tiny_model("sd3")), "<ball>")
    with pytest.raises(BadInput, match="is a word of text_encoder_3"):
        refuse_word(text_towers(tiny_model("sd3"))[2:], "Ball")


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (lambda x: x.mean((1, 2, 3)) * float("nan"), "noise 0 a score that is not finite"),
        (lambda x: x.mean((1, 2, 3)) / 0, "not finite"),
        (lambda x: x.detach().mean(), "without a gradient"),
        (lambda x: 0.5, "gave float"),
        (lambda x: None, "gave NoneType"),
        (lambda x: x, "of shape (1, 3, 4, 4)"),
        (lambda x: x.mean((1, 2, 3)) > 0, "gave torch.bool"),
    ],
)
def test_functions_that_are_no_scorers(score, says):
    with pytest.raises(BadInput) as raised:
        scorer_of(score, "light")(torch.rand(1, 3, 4, 4, requires_grad=True), 0)
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"target": []}, BadInput, "at least 1 item"),
        ({"target": ["cat", "dog", "cat"]}, BadInput, "names 'cat' twice"),
        ({"target": "cat", "shares": ["cat=inf", "dog=1"]}, BadInput, "write class=share"),
        ({"target": "cat", "shares": ["cat=-1", "dog=2"]}, BadInput, "write class=share"),
        ({"target": "cat", "shares": ["cat=1", "cat=2"]}, BadInput, "shares names 'cat' twice"),
        ({"target": "cat", "shares": ["cat=1", "dog=1"]}, BadInput, "none of 1 noises is for 'dog'"),
        ({"target": "cat", "rivals": ["dog"]}, BadInput, "rivals are texts for a CLIP; tiny-vit is a classifier"),
    ],
)
def test_targets_that_cannot_be_met(teach, tmp_path, more, error, says):
    with pytest.raises(error) as raised:
        teach("discriminative_tokens", **more)
    assert says in str(raised.value) and not list((tmp_path / "out").iterdir())


def test_readers_that_score_no_pictures_and_those_that_learn(vit):
    with pytest.raises(NotSupported, match="toy-vqa scores no pictures"):
        scorer_of("toy-vqa", "no class of it")
    with pytest.raises(BadInput, match="data is a function"):
        scorer_of(torch.sum, "x", ["a=1"])
    vit.module.train()
    with scorer_of(vit, "cat").frozen():
        assert not vit.module.training
    assert vit.module.training
    vit.module.eval()
