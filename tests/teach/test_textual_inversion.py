"""Textual inversion: the gradient of a plain training script, nothing else touched, resumed to the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from sfumato import app, writing
from sfumato.adapters.word import Word
from sfumato.errors import BadInput, BadWeights, Conflict, NotSupported, UnknownName, WorkInterrupted
from sfumato.models.text_towers import text_towers
from sfumato.protocol import Work
from sfumato.sampling import generate
from sfumato.teach import denoising
from sfumato.teach.subject import Subject, bucket
from sfumato.teach.textual_inversion import TextualInversion, _WordTraining
from sfumato.teach.word_vectors import WordVectors
from sfumato.training import BestTensors, Draw
from sfumato.training.processes import processes
from tests.helpers import fingerprint
from tests.tiny import tiny_model

GIVEN = {"name": "<rex>", "class_noun": "ball", "steps": 2, "batch": 2, "lr": 0.05, "probe_every": 1, "length": "free"}


def taught(model, photos, work=None, **more):
    return TextualInversion(**{**GIVEN, **more}).teach(model, photos, work=work)


@pytest.mark.parametrize(
    ("kind", "towers"),
    [("sd", 1), ("sdxl", 2), ("sd3", 3), ("flux", 2)],
)
def test_every_encoder_learns_and_the_model_is_what_it_was(photos, tmp_path, kind, towers):
    model = tiny_model(kind)
    before = fingerprint(model)
    found = taught(model, photos, steps=1)
    assert fingerprint(model) == before
    rows = found.words["<rex>"]
    assert len(rows) == towers and found.facts["probe_best"] <= found.facts["probe_first"]
    (file,) = found.save(tmp_path / "rex.safetensors")
    read = Word(file=str(file))
    assert read.words == ["<rex>"] and read.vectors(model)["<rex>"].keys() == rows.keys()
    for name, each in read.vectors(model)["<rex>"].items():
        assert torch.equal(each, rows[name])


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_the_loss_falls_along_its_gradient_in_every_encoder(photos, kind):
    model = tiny_model(kind)
    p = TextualInversion(**GIVEN).params
    lesson = _WordTraining(model, Subject(model, photos), p, text_towers(model))
    loss, _ = lesson.loss(Draw(0, 0))
    gradients = torch.autograd.grad(loss, list(lesson.parameters.values()))
    for parameter, gradient in zip(lesson.parameters.values(), gradients, strict=True):
        assert gradient.norm() > 0
        with torch.no_grad():
            parameter -= 0.1 * gradient / gradient.norm()
            assert lesson.loss(Draw(0, 0))[0] < loss
            parameter += 0.1 * gradient / gradient.norm()


def plain_gradient(model, lesson, step):
    """What the training script of diffusers computes: a longer table, its own noise schedule, mean squared error."""
    pipe, p, n = model.pipe, lesson.p, len(lesson.subject)
    rows = Draw(p.seed, step).indices(n, p.batch).tolist()
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
    ids = tokenizer(["a ball"] * p.batch, padding="max_length", max_length=77, return_tensors="pt").input_ids
    vector = lesson.rows.start["text_encoder"][0].clone().requires_grad_(True)
    ball = tokenizer("ball", add_special_tokens=False).input_ids[0]

    def put(module, args, output):
        return torch.where((args[0] == ball)[..., None], vector, output)

    handle = encoder.get_input_embeddings().register_forward_hook(put)
    try:
        hidden = encoder(ids)[0]
    finally:
        handle.remove()
    x0 = torch.stack([lesson.subject.latents(i) for i in rows])
    drawn = [lesson.denoising.drawn(tuple(x0[0].shape), step, place) for place in range(p.batch)]
    noise, t = torch.stack([each[0] for each in drawn]), torch.stack([each[1] for each in drawn])
    alpha = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    target = noise
    if pipe.scheduler.config.prediction_type == "v_prediction":
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
    loss = F.mse_loss(pipe.unet(noisy, t, hidden).sample, target)
    return loss, torch.autograd.grad(loss, vector)[0]


@pytest.mark.parametrize("kind", ["sd", "sd2"])
def test_loss_and_gradient_are_those_of_a_plain_script(photos, kind):
    model = tiny_model(kind)
    p = TextualInversion(**{**GIVEN, "templates": ["a {}"], "flip": False}).params
    lesson = _WordTraining(model, Subject(model, photos), p, text_towers(model))
    loss, _ = lesson.loss(Draw(p.seed, 3))
    (gradient,) = torch.autograd.grad(loss, lesson.rows.parameters["text_encoder"])
    plain, wanted = plain_gradient(model, lesson, 3)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[0], wanted, rtol=1e-3, atol=1e-6)


def test_flow_models_learn_the_velocity_at_shifted_levels(photos):
    model = tiny_model("sd3clip")
    p = TextualInversion(**{**GIVEN, "templates": ["a {}"], "flip": False, "timesteps": "uniform"}).params
    lesson = _WordTraining(model, Subject(model, photos), p, text_towers(model))
    u = torch.tensor([0.25, 0.5])
    assert torch.allclose(lesson.denoising.level(u), 1000 * 3 * u / (1 + 2 * u))  # its scheduler's shift is 3
    rows = Draw(p.seed, 0).indices(3, 2).tolist()
    x0 = torch.stack([lesson.subject.latents(i) for i in rows])
    drawn = [lesson.denoising.drawn(tuple(x0[0].shape), 0, place) for place in range(2)]
    noise, t = torch.stack([each[0] for each in drawn]), torch.stack([each[1] for each in drawn])
    sigma = (t / 1000).view(-1, 1, 1, 1)
    with torch.no_grad():
        condition = model.encode_text(["a ball"] * 2, guidance=False)
        out = model.predict((1 - sigma) * x0 + sigma * noise, t, condition)
        torch.testing.assert_close(lesson.loss(Draw(p.seed, 0))[0], F.mse_loss(out, noise - x0), rtol=1e-5, atol=1e-5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("more", [{}, {"vectors": 2, "progressive": 2, "per_picture": 0.5, "regularise": 0.1}])
def test_a_killed_run_goes_on_to_the_same_bits(photos, tmp_path, more):
    model = tiny_model("sd3clip")
    given = {"steps": 4, "checkpoint_every": 2, "probe_every": 2, **more}
    whole = taught(model, photos, **given)

    def kill(step, steps, log):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        taught(model, photos, Work(tmp_path / "run", on_progress=kill), **given)
    (tmp_path / "run" / "checkpoints" / ".writing_00000003_1").mkdir()  # a checkpoint that was half-written
    with pytest.raises(Conflict, match="--resume"):
        taught(model, photos, Work(tmp_path / "run"), **given)
    with pytest.raises(Conflict, match="another lr"):
        taught(model, photos, Work(tmp_path / "run", resume=True), **{**given, "lr": 0.01})
    again = taught(model, photos, Work(tmp_path / "run", resume=True), **given)
    assert [(entry["loss"], entry.get("probe")) for entry in again.log] == [
        (entry["loss"], entry.get("probe")) for entry in whole.log
    ]
    assert all(torch.equal(again.words["<rex>"][name], rows) for name, rows in whole.words["<rex>"].items())


def test_two_runs_do_not_share_a_folder(photos, tmp_path):
    (tmp_path / "run").mkdir()
    with writing.reserved(tmp_path / "run", "another"), pytest.raises(Conflict, match="another process is at work"):
        taught(tiny_model("sd3clip"), photos, Work(tmp_path / "run"))


def _process(rank: int, port: int, photos, target) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # a test before may have trained alone
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    found = taught(tiny_model("sd3clip"), photos)
    if rank == 0:
        save_file(found.words["<rex>"], target, {"losses": json.dumps([entry["loss"] for entry in found.log])})


def test_two_processes_have_the_losses_of_one(photos, tmp_path):
    one = taught(tiny_model("sd3clip"), photos)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_process, args=(rank, port, photos, tmp_path / "x")) for rank in (0, 1)]
    for each in both:
        each.start()
    for each in both:
        each.join(120)
    assert [each.exitcode for each in both] == [0, 0]
    with safe_open(tmp_path / "x", "pt") as file:
        losses, rows = json.loads(file.metadata()["losses"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert losses == pytest.approx([entry["loss"] for entry in one.log], rel=1e-5)
    for name, each in one.words["<rex>"].items():
        torch.testing.assert_close(rows[name], each, rtol=1e-4, atol=1e-5)


def test_a_launch_of_one_process_in_place_of_several_is_refused(photos, tmp_path, monkeypatch):
    """``accelerate launch --cpu --num_processes 2`` sets an address for several processes and starts one."""
    given = {"by": "textual_inversion", "model": tiny_model("sd3clip"), "out": tmp_path / "rex.safetensors", **GIVEN}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    app.teach(photos, **{**given, "steps": 1})  # one process that was asked for
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(BadInput, match="use torchrun --nproc_per_node 2 -m sfumato"):
        app.teach(photos, **{**given, "out": tmp_path / "more.safetensors"})
    assert {path.name for path in tmp_path.iterdir()} == {"rex.safetensors"}
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun says it
    assert processes() == 2


def test_parts_of_a_batch_add_up(photos):
    model = tiny_model("sd3clip")
    whole, parts = (taught(model, photos, accumulate=n, steps=1).log[0]["loss"] for n in (1, 2))
    assert whole == pytest.approx(parts, rel=1e-5)


def test_it_ends_on_the_plateau_and_keeps_the_best(photos):
    found = taught(tiny_model("sd3clip"), photos, steps=30, lr=1e-9, patience=2)
    assert found.step == 2 and not found.interrupted
    rows = torch.nn.Parameter(torch.zeros(2))
    best = BestTensors({"x": rows})
    for step, (figure, value) in enumerate([(3.0, 0.0), (1.0, 1.0), (0.999, 2.0), (2.0, 3.0), (1.5, 4.0)]):
        with torch.no_grad():
            rows.fill_(value)
        best.measured(step, figure)
    assert best.over(3) and best.over(2) and not best.over(4)  # 0.999 is no progress over 1
    best.measured(9, float("nan"))
    assert best.lowest == (0.999, 2) and best.step == 2
    best.take()
    assert rows.tolist() == [2.0, 2.0]
    unlucky = BestTensors({"x": rows})
    assert not unlucky.measured(1, float("nan")) and unlucky.measured(2, 5.0) and unlucky.step == 2


def test_sentences(photos):
    model = tiny_model("sd")
    subject = Subject(model, photos)

    def prompts(**more):
        lesson = _WordTraining(model, subject, TextualInversion(**{**GIVEN, **more}).params, text_towers(model))
        return lesson, [lesson.prompt(i % 3, step, 0) for i in range(3) for step in range(20)]

    _, said = prompts()
    assert len(set(said)) > 10 and all("<rex>" in text for text in said)
    assert all("style of <rex>" in text for text in prompts(kind="style")[1])
    assert all("ball <rex>" in text for text in prompts(with_class=True)[1])
    lesson, said = prompts(per_picture=0.5, templates=["a {}"])
    assert set(said[:20]) == {"a <rex>", "a <rex> with <rex-picture-0>"}
    assert "<rex>.text_encoder" in lesson.parameters and "<rex-picture-2>.text_encoder" in lesson.parameters
    lesson, _ = prompts(vectors=3, progressive=10)
    assert [lesson.length(step) for step in (0, 9, 10, 25, 90)] == [1, 1, 2, 3, 3]
    subject.captions = ["<rex> in the sand", "", ""]
    assert prompts()[1][0] == "<rex> in the sand"


def test_vectors_are_held_to_the_length_of_words():
    tower = text_towers(tiny_model("sd"))[0]
    rows = WordVectors([tower], "<rex>", "ball", 2)
    (vectors,) = rows.parameters.values()
    most = tower.table.norm(dim=1).max()
    with torch.no_grad():
        vectors.mul_(torch.tensor([[100.0], [1.0]]))
    rows.constrain("clamp")
    torch.testing.assert_close(vectors[0].norm(), most)
    assert torch.equal(vectors[1], rows.start["text_encoder"][1])
    with torch.no_grad():
        vectors[0].mul_(50)
    before = vectors.std(1)
    rows.constrain("pull")
    torch.testing.assert_close(vectors.std(1), before * (tower.table.std() / before) ** 0.1)


def test_pictures_are_upright_and_may_keep_their_aspect(photos):
    model = tiny_model("sd")
    cut, kept = Subject(model, photos), Subject(model, photos, keep_aspect=True)
    assert [tuple(cut.pixels(i).shape) for i in range(3)] == [(3, 32, 32)] * 3
    assert tuple(kept.pixels(0).shape) == (3, 40, 24)  # 40 x 60, turned
    assert bucket((9000, 100), (512, 512), 8) == (728, 360)
    found = taught(model, photos, keep_aspect=True, steps=1)
    assert found.log[0]["loss"] > 0


def test_more_latents_than_memory_are_made_again(photos, monkeypatch):
    import sfumato.teach.subject as module

    model = tiny_model("sd")
    whole = Subject(model, photos)
    kept = [whole.latents(i, mirrored) for i in range(3) for mirrored in (False, True)]
    monkeypatch.setattr(module, "BUDGET", 2 * kept[0].nbytes)
    small = Subject(model, photos)
    for _ in range(2):
        again = [small.latents(i, mirrored) for i in range(3) for mirrored in (False, True)]
        assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True)) and len(small._cache) == 2


def test_more_texts_than_memory_are_encoded_again(monkeypatch):
    model, one = tiny_model("sd"), 77 * 16 * 4
    encode_text, encoded = model.encode_text, []
    monkeypatch.setattr(denoising, "BUDGET", 2 * one)
    monkeypatch.setattr(model, "encode_text", lambda text, **more: (encoded.append(text), encode_text(text, **more))[1])
    encode = denoising.frozen_conditions(model)
    for prompts in (["a"], ["a"], ["a", "b", "c", "a"], ["c"], ["a"]):
        found = encode(prompts)
        assert torch.equal(found.cond["embeds"], torch.cat([encode_text(p, guidance=False).cond["embeds"]
                                                            for p in prompts]))  # fmt: skip
    assert encoded == ["a", "b", "c", "a"]  # the oldest of three was dropped, and is made again


def test_pictures_of_every_kind_and_damaged_ones_before_anything_is_learnt(tmp_path):
    model = tiny_model("sd")
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    deep = Image.fromarray(np.asarray(whole.convert("L")).astype(np.uint16) * 257)
    kinds = {"one": whole, "grey": whole.convert("L"), "alpha": whole.convert("LA"), "palette": whole.convert("P"),
             "bits": whole.convert("1"), "deep": deep}  # fmt: skip
    for name, each in kinds.items():
        each.save(tmp_path / f"{name}.png")
    whole.convert("CMYK").save(tmp_path / "cmyk.jpg")
    whole.save(tmp_path / "gps.JPG")
    (tmp_path / "gps.JPG").write_bytes((tmp_path / "gps.JPG").read_bytes() + b"\0" * 100)  # phones append things
    whole.save(tmp_path / "w.webp")
    subject = Subject(model, tmp_path)
    assert len(subject) == 9 and all(subject.pixels(i).shape == (3, 32, 32) for i in range(9))
    for name, content in (("x.png", b"\0" * 9), ("y.jpg", (tmp_path / "cmyk.jpg").read_bytes()[:-40]), ("z.webp", b"")):
        (tmp_path / name).write_bytes(content)
    content = (tmp_path / "deep.png").read_bytes()
    (tmp_path / "deep.png").write_bytes(content[:-60] + bytes(60))
    with pytest.raises(BadInput, match=r"deep.png cannot be read as a picture.* So are 3 others"):
        Subject(model, tmp_path)
    some = tmp_path / "some"
    some.mkdir()
    for i in range(101):
        whole.resize((8, 8)).save(some / f"{i}.png")
    with pytest.raises(BadInput, match="at most 100; there are 101"):
        taught(model, some, per_picture=0.25)


def test_stock_diffusers_reads_it(photos, tmp_path):
    model = tiny_model("sd", fresh=True)
    (file,) = taught(model, photos, vectors=2).save(tmp_path / "rex.safetensors")
    with Word(file=str(file)).attach(model):
        ours = model.encode_text("a <rex> in the sand", guidance=False).cond["embeds"]
    model.pipe.load_textual_inversion(str(file))
    theirs = model.pipe.encode_prompt("a <rex> in the sand", "cpu", 1, False)[0]
    assert torch.equal(ours, theirs)
    other = tiny_model("sd", seed=1)
    with (
        pytest.raises(BadInput, match="was taught on tiny-sd with weights .*any_base=true"),
        Word(file=str(file)).attach(other),
    ):
        pass
    with Word(file=str(file), any_base=True).attach(other):
        other.encode_text("a <rex>")


def test_refusals(photos, tmp_path):
    model = tiny_model("sd")
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"")
    out = tmp_path / "rex.safetensors"
    cases = [
        ({"data": empty}, BadInput, "holds no picture"),
        ({"data": tmp_path / "nowhere"}, BadInput, "is no folder of pictures"),
        ({"data": broken}, BadInput, "a.png cannot be read as a picture"),
        ({"name": "ball"}, BadInput, "is a word of text_encoder already; take one that is none, such as <ball>"),
        ({"name": "re x"}, BadInput, "blanks"),
        ({"steps": 0}, BadInput, "steps of textual_inversion is 0"),
        ({"templates": ["a photo"]}, BadInput, "must hold {} once"),
        ({"encoders": ["text_encoder_2"]}, UnknownName, "text_encoder"),
        ({"size": 33}, BadInput, "33"),
        ({"out": there}, BadInput, "exists"),
        ({"out": tmp_path / "rex.pt"}, BadInput, "must end in .safetensors"),
        ({"out": tmp_path / "no" / "rex.safetensors"}, BadInput, "there is no folder"),
        ({"resume": True}, BadInput, "nothing to resume"),
        ({"minutes": 0}, BadInput, "minutes"),
        ({"nam": "x"}, UnknownName, "parameter of textual_inversion 'nam'"),
        ({"model": tiny_model("inpaint")}, NotSupported, "redraws regions"),
        ({"model": tiny_model("animatediff")}, NotSupported, "single pictures"),
        ({"dtype": "bfloat16"}, BadInput, "this one was loaded before"),
        ({"device": "cuda"}, BadInput, "this one was loaded before"),
        ({"model": tiny_model("animatediff")}, NotSupported, "has none; it works with the families "),
    ]
    for more, error, says in cases:
        given = {"data": photos, "model": model, "out": out, **GIVEN, **more}
        with pytest.raises(error) as raised:
            app.teach(given.pop("data"), by="textual_inversion", **given)
        assert says in str(raised.value) and "\n" not in str(raised.value), str(raised.value)
        assert not list(tmp_path.glob("*.training")), more
    with pytest.raises(BadInput, match="name of textual_inversion must be given"):
        app.teach(photos, by="textual_inversion", model=model)


def test_files_for_other_encoders_and_damaged_ones(photos, tmp_path):
    (file,) = taught(tiny_model("sd3"), photos, steps=1, encoders=["text_encoder_3"]).save(tmp_path / "rex.safetensors")
    with pytest.raises(BadWeights, match="width 32"):
        generate(tiny_model("sd"), "a <rex>", steps=1, interventions=Word(file=str(file), any_base=True))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadWeights):
        Word(file=str(cut))


def test_a_full_disk_loses_nothing(photos, tmp_path, monkeypatch):
    model = tiny_model("sd3clip")
    from sfumato.training import checkpoint

    given = {"steps": 3, "checkpoint_every": 1}
    whole, written = taught(model, photos, **given), []
    save_file = checkpoint.save_file

    def full(tensors, path):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        taught(model, photos, Work(tmp_path / "run"), **given)
    again = taught(model, photos, Work(tmp_path / "run", resume=True), **given)
    assert [entry["loss"] for entry in again.log] == [entry["loss"] for entry in whole.log]


def test_ctrl_c_keeps_a_checkpoint(photos, tmp_path):
    import signal

    def stop(step, steps, log):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "rex.safetensors"
    given = {"by": "textual_inversion", "model": tiny_model("sd3clip"), "out": out, **GIVEN}
    with pytest.raises(WorkInterrupted, match="stopped after step 1"):
        app.teach(photos, on_progress=stop, **given)
    found = app.teach(photos, resume=True, **given)
    assert found.step == 2 and out.is_file() and Image.open(photos / "a.jpg").size == (60, 40)
    assert not list(tmp_path.glob("*.training"))


def test_what_a_card_advises_serves_where_nothing_else_is_asked_for(photos):
    model = tiny_model("sd3clip")
    model.card["teaching"] = {"textual_inversion": {"vectors": 3, "steps": 1}, "dreambooth": {"steps": 7}}
    given = {"model": model, "name": "<rex>"}
    assert app.teach(photos, **given).facts["vectors"] == 3
    assert app.teach(photos, by="textual_inversion:vectors=2", **given).facts["vectors"] == 2
    found = app.teach(photos, steps=2, **given)
    assert (found.facts["vectors"], found.step) == (3, 2)
