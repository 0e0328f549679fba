"""Files and folders with several processes, killed ones and signals; what -o means; pictures that are brought along."""

from __future__ import annotations

import errno
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sfumato import app, files, locks, writing
from sfumato.app import JobBatch, make, make_prompts, read_prompts
from sfumato.errors import BadInput, Conflict
from sfumato.protocol import Work
from sfumato.teach.learning import opened
from sfumato.toybox.oracle.prompts import write_prompts
from sfumato.training import checkpoint
from sfumato.training.runs import RunResult, TrainingRun
from tests.tiny import tiny_model


def process(code: str, folder: Path) -> subprocess.Popen:
    """A Python of its own in ``folder``, which loads no torch; it says a line when it is ready."""
    script = "import sys, time\nfrom pathlib import Path\nfrom sfumato import files, writing\n" + code
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


# --- several processes -----------------------------------------------------------------------------------------------


def test_pictures_of_many_processes_do_not_overwrite_each_other(tmp_path):
    code = """
from PIL import Image
print("ready", flush=True)
sys.stdin.readline()
for i in range(12):
    image = Image.new("RGB", (4, 4))
    write = lambda path, new: files.save_png(path, image, {"process": sys.argv, "prompt": "a"}, new)
    print(writing.create(Path("."), "a-cube-0", ".png", write), flush=True)
"""
    started = [process(code, tmp_path) for _ in range(3)]
    for each in started:
        assert each.stdout.readline() == "ready\n"
    said = []
    for each in started:
        each.stdin.write("go\n")
        each.stdin.flush()
    for each in started:
        said += each.communicate()[0].split()
        assert each.returncode == 0
    assert len(set(said)) == 36 and sorted(said) == sorted(os.listdir(tmp_path))


HOLD = """
with writing.reserved(Path("out"), "this"):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_run_of_prompts_refuses_a_folder_where_another_is_at_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("p.jsonl").write_text('{"prompt": "a cube"}\n')
    other = process(HOLD, tmp_path)
    assert other.stdout.readline() == "ready\n"

    def run():
        lines = read_prompts(Path("p.jsonl"), {"steps": 1})
        return list(make_prompts(lines, JobBatch([]), Path("out"), model=tiny_model("sd")))

    with pytest.raises(Conflict, match="another process is at work in 'out', so a run of prompts there would mix"):
        run()
    assert os.listdir("out") == []
    other.kill()  # a kill frees the folder
    other.wait()
    assert [each.paths[0].name for each in run()] == ["a-cube-0.png"]
    assert sorted(os.listdir("out")) == ["a-cube-0.png", "metadata.jsonl"]


WRITE = """
with writing.atomic_write("x.png") as file, writing.atomic_folder("folder") as folder:
    file.write(b"half")
    (folder / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path):
    alive, killed = process(WRITE, tmp_path), process(WRITE, tmp_path)
    for each in (alive, killed):
        assert each.stdout.readline() == "ready\n"
    killed.kill()
    killed.wait()
    assert len(os.listdir(tmp_path)) == 4
    (tmp_path / ".mine.partial").write_text("not ours")
    os.mkfifo(tmp_path / ".x.0123abcd.partial")
    with writing.output_folder(tmp_path):
        left = sorted(os.listdir(tmp_path))
    assert len(left) == 4 and ".mine.partial" in left and ".x.0123abcd.partial" in left  # two of the one that writes
    alive.terminate()
    alive.wait()


WAYS = {
    "a file": lambda at: files.save_tensors(at / "rex.safetensors", {}),
    "a picture": lambda at: files.save_png(at / "x.png", Image.new("RGB", (2, 2)), {}),
    "a new picture": lambda at: files.save_png(at / "y.png", Image.new("RGB", (2, 2)), {}, new=True),
    "a record": lambda at: write_prompts(at / "prompts.jsonl", []),
}


@pytest.mark.parametrize("way", WAYS)
def test_whoever_writes_a_file_sweeps_its_folder(tmp_path, way):
    (tmp_path / ".rex.safetensors.0123abcd.partial").write_text("left by a kill")
    (tmp_path / ".step_1.89abcdef.partial").mkdir()
    WAYS[way](tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_where_nothing_can_be_locked_only_what_is_old_is_swept(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=1, LOCK_NB=2))
    young, old = tmp_path / ".a.0123abcd.partial", tmp_path / ".b.0123abcd.partial"
    for path in (young, old):
        path.write_text("half")
    os.utime(old, (1, 1))
    with writing.atomic_write(tmp_path / "x") as file:  # its own is spared as well
        writing.remove_partial(tmp_path)
        file.write(b"whole")
    assert sorted(os.listdir(tmp_path)) == [".a.0123abcd.partial", "x"]


@pytest.mark.parametrize("when", [0, 1], ids=["before the old one is away", "before the new one is there"])
def test_a_folder_that_is_replaced_is_the_old_or_the_new_one(tmp_path, monkeypatch, when):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a").write_text("old")
    rename, calls = Path.rename, []

    def stopped(path, to):
        calls.append(path)
        if len(calls) == when + 1:
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), writing.atomic_folder(tmp_path / "model", replace=True) as folder:
        (folder / "a").write_text("new")
    assert os.listdir(tmp_path) == ["model"] and (tmp_path / "model/a").read_text() == "old"
    with writing.atomic_folder(tmp_path / "model", replace=True) as folder:
        (folder / "a").write_text("new")
    assert os.listdir(tmp_path) == ["model"] and (tmp_path / "model/a").read_text() == "new"


def test_checkpoints_are_whole_and_swept(tmp_path):
    import torch

    (tmp_path / ".step_00000009.0123abcd.partial").mkdir()
    (tmp_path / ".step_00000009.0123abcd.partial" / "tensors.safetensors").write_text("half")
    for step in (1, 2, 2, 3):
        checkpoint.save(tmp_path, step, {"a": torch.ones(2) * step}, {})
    assert sorted(os.listdir(tmp_path)) == ["step_00000002", "step_00000003"]
    assert checkpoint.load_latest(tmp_path)[1]["step"] == 3


def test_a_resumed_log_has_no_step_twice(tmp_path):
    steps = [1, 20, 40, 40, 60]
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in steps]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 8']))
    TrainingRun.truncate_log(SimpleNamespace(main=True, folder=tmp_path, trainer=SimpleNamespace(step=40)))
    kept = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept == [1, 20, 40, 40]  # loss and quality of step 40
    TrainingRun.truncate_log(SimpleNamespace(main=True, folder=tmp_path, trainer=SimpleNamespace(step=0)))
    assert (tmp_path / "log.jsonl").read_text() == ""


# --- signals ---------------------------------------------------------------------------------------------------------

COMMANDS = {
    "make": (["a cube"], "sfumato.app.batch.load_found"),
    "explain": (["a cube"], "sfumato.app.batch.load_found"),
    "edit": (["x.png", "a ball"], "sfumato.app.editing.edit_file"),
    "segment": (["ball"], "sfumato.app.segmenting.segment_files"),
    "judge": (["."], "sfumato.app.judging.judge"),
    "compare": (["a", "b"], "sfumato.app.judging.compare"),
    "models": ([], "sfumato.app.jobs.models"),
    "methods": ([], "sfumato.cards.methods"),
    "adapters": (["x"], "sfumato.app.adapting.adapters"),
    "train": (["toy-vae"], "sfumato.app.teaching.train"),
    "teach": (["toybox", "-o", "x.safetensors"], "sfumato.app.teaching.teach"),
    "toybox": (["sample"], "sfumato.toybox.export_imagefolder"),
    "toybox genome": ([], "sfumato.toybox.genome.export_genome"),
    "toybox prompts": ([], "sfumato.toybox.oracle.prompts.prompt_set"),
    "adapters convert": (["x", "y", "--to", "kohya"], "sfumato.app.convert"),
    "models toy-vae": (["--export", "x"], "sfumato.registry.export"),
    "make --prompts": (["p.jsonl"], "sfumato.app.read_prompts"),
    "claims": ([], "claims.core.Context"),
}


@pytest.mark.parametrize("which", [signal.SIGHUP, signal.SIGTERM], ids=lambda which: which.name)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_stops_by_signals(sfumato, monkeypatch, command, which):
    args, place = COMMANDS[command]
    module, _, name = place.rpartition(".")

    def killed(*_, **__):
        os.kill(os.getpid(), which)
        time.sleep(5)
        raise AssertionError("it went on")

    monkeypatch.setattr(importlib.import_module(module), name, killed)
    before = signal.signal(which, signal.SIG_DFL)  # whatever the tests themselves were started under
    try:
        outcome = sfumato(*command.split(), *args)
        assert outcome.code == 130 and "interrupted" in outcome.err and outcome.err.count("\n") == 1
        assert signal.getsignal(which) is signal.SIG_DFL
    finally:
        signal.signal(which, before)


def test_a_command_under_nohup_goes_on(sfumato, monkeypatch):
    import sfumato.app.jobs as jobs

    monkeypatch.setattr(jobs, "models", lambda: os.kill(os.getpid(), signal.SIGHUP) or {})
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert sfumato("models").code == 0
    finally:
        signal.signal(signal.SIGHUP, old)


PROGRAMS = {
    "sfumato.training": (["toy-vae"], "sfumato.training.run"),
    "claims": (["--stale"], "claims.core.Context"),
    "benchmarks": (["imports"], "benchmarks.imports.run"),
}


@pytest.mark.parametrize("which", [signal.SIGHUP, signal.SIGTERM], ids=lambda which: which.name)
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_of_their_own_stop_by_signals(monkeypatch, capsys, program, which):
    arguments, place = PROGRAMS[program]
    module, _, name = place.rpartition(".")

    def killed(*_, **__):
        os.kill(os.getpid(), which)
        time.sleep(5)
        raise AssertionError("it went on")

    monkeypatch.setattr(importlib.import_module(module), name, killed)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    before = signal.signal(which, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as left:
            runpy.run_module(program, run_name="__main__")
        assert left.value.code == 130 and "interrupted" in capsys.readouterr().err
        assert signal.getsignal(which) is signal.SIG_DFL
    finally:
        signal.signal(which, before)


def test_a_training_that_was_stopped_leaves_with_130(monkeypatch, tmp_path):
    result = RunResult("toy-vae", tmp_path, 3, False, True, 1.0)
    monkeypatch.setattr("sfumato.training.run", lambda *_, **__: result)
    monkeypatch.setattr(sys, "argv", ["training", "toy-vae"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("sfumato.training", run_name="__main__")
    assert left.value.code == 130


# --- what -o means ---------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(sfumato):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save("photo.png")
    return "photo.png"


WRITERS = {
    "make": (["make", "a red cube", "--steps", 1], ["x.png"]),
    "make several": (["make", "a red cube", "--steps", 1, "-n", 2], ["x-1.png", "x-2.png"]),
    "make with a system": (["make", "a red cube", "--steps", 1, "--with", "daam"], ["x.heat.png", "x.png"]),
    "explain a prompt": (["explain", "a red cube", "--steps", 1], ["x.heat.png", "x.png"]),
    "explain a picture": (["explain", "photo.png", "--prompt", "a red cube", "--steps", 1], ["x.png"]),
    "edit": (["edit", "photo.png", "a cube", "--from", "a ball", "--steps", 2, "--inner", 0], ["x.png"]),
    "edit to several": (["edit", "photo.png", "a cube", "a cone", "--from", "a ball", "--steps", 2, "--inner", 0],
                        ["x-1.png", "x-2.png"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITERS)
def test_o_names_a_picture(sfumato, photo, tiny_sd, case):
    args, expected = WRITERS[case]
    outcome = sfumato(*args, "--model", tiny_sd, "-o", "to/x.png")
    assert outcome.code == 0, outcome.err
    assert sorted(os.listdir("to")) == expected and sorted(outcome.lines) == [f"to/{name}" for name in expected]


@pytest.mark.parametrize("args", [case[0] for name, case in WRITERS.items() if "several" not in name])
def test_o_names_a_picture_of_another_kind(sfumato, photo, tiny_sd, args):
    outcome = sfumato(*args, "--model", tiny_sd, "-o", "to/x.jpg")
    assert outcome.code == 2 and "'x.jpg'" in outcome.err and ".png" in outcome.err and not os.path.exists("to")


@pytest.mark.parametrize(
    "args",
    [
        ["make", "--prompts", "p.jsonl"],
        ["segment", "ball"],
        ["judge", "."],
        ["train", "toy-vae"],
        ["teach", "toybox", "--by", "robust_vit", "--model", "toy-vit"],
        ["toybox", "sample"],
        ["models", "toy-vae", "--export", "x.png"],
    ],
)
def test_o_of_commands_that_fill_a_folder(refused, photo, args):
    Path("p.jsonl").write_text('{"prompt": "a cube"}\n')
    out = [] if "--export" in args else ["-o", "x.png"]
    refused(*args, *out, says=["x.png", "folder"] if args[0] != "teach" else ["x.png"])


@pytest.mark.parametrize("name", ["x.pdf", "x.JSON", "x.safetensors", "x.avif", "x.html", "x.zip"])
def test_o_makes_no_folder_called_like_a_file(tmp_path, name):
    with pytest.raises(BadInput, match=f"-o is '{name}'"), writing.output(tmp_path / name):
        pass
    with pytest.raises(BadInput, match=f"-o is '{name}', the name of a file, but masks fill a folder"):
        writing.only_folder(tmp_path / name, "masks")
    assert not list(tmp_path.iterdir())
    (tmp_path / name).mkdir()  # whoever has such a folder means it
    for folder in (tmp_path / name, tmp_path / "out.v2"):
        with writing.output(folder) as (where, named):
            assert (where, named) == (folder, None)


def test_a_damaged_record_of_a_run(tmp_path):
    run, settings = tmp_path / "run", {"lr": 1}
    with opened(Work(run), settings) as checkpoints:
        checkpoints.mkdir()
    (run / "run.json").write_text("{")
    with pytest.raises(Conflict, match="so its run cannot be resumed; remove .*run to begin anew"):
        with opened(Work(run, resume=True), settings):
            pass
    shutil.rmtree(run)
    with opened(Work(run), settings) as checkpoints:
        assert checkpoints == run / "checkpoints" and (run / "run.json").is_file()


def test_compare_writes_pairs(sfumato):
    for side in "ab":
        os.mkdir(side)
        for i, shade in enumerate("red blue".split()):
            files.save_png(
                f"{side}/{i}.png", Image.new("RGB", (40, 30), shade), {"prompt": f"a {shade} cube", "seed": i}
            )
    outcome = sfumato("compare", "a", "b", "-o", "to/x.png")
    assert outcome.code == 0, outcome.err
    assert sorted(os.listdir("to")) == ["x-1.png", "x-2.png", "x.html", "x.json"]
    assert Image.open("to/x-1.png").width >= 80
    assert outcome.lines[-4:] == ["to/x-1.png", "to/x-2.png", "to/x.json", "to/x.html"]
    assert "-o is 'x.jpg'" in sfumato("compare", "a", "b", "-o", "x.jpg").err


# --- pictures that are brought along ---------------------------------------------------------------------------------


def test_a_photograph_is_fitted_to_the_model(sfumato, tiny_sd):
    shades = np.linspace(0, 255, 4032).astype(np.uint8)
    Image.fromarray(np.broadcast_to(shades, (3024, 4032)).copy()).save("photo.jpg")
    base = ["make", "a cube", "--model", tiny_sd, "--steps", 2, "--image", "photo.jpg"]
    fitted = app.fitting_size(tiny_model("sd"), (4032, 3024))
    assert fitted == (40, 24)
    for said, size in (([], fitted), (["--size", "64x48"], (64, 48))):
        outcome = sfumato(*base, *said, "-o", "x.png")
        assert outcome.code == 0 and Image.open("x.png").size == size, outcome.err
    Path("p.jsonl").write_text('{"prompt": "a cube", "steps": 2}\n')
    outcome = sfumato("make", "--prompts", "p.jsonl", "--model", tiny_sd, "--image", "photo.jpg")
    assert outcome.code == 0 and Image.open(outcome.lines[0]).size == fitted


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (Image.new("RGB", (400, 300)), (40, 24)),
        (np.zeros((300, 400, 3), np.uint8), (40, 24)),
        (np.zeros((300, 400), np.uint8), (40, 24)),
        ([Image.new("RGB", (300, 400))], (24, 40)),
        (Image.new("RGB", (1, 1)), (32, 32)),
    ],
    ids="PIL array grey list dot".split(),
)
def test_pictures_of_every_kind_are_fitted(image, size):
    result = make("a cube", model=tiny_model("sd"), image=image, steps=2)
    assert result.images[0].size == size
    assert make("a cube", model=tiny_model("sd"), image=image, steps=2, size=(48, 16)).images[0].size == (48, 16)


def test_a_turned_photograph_has_the_size_that_is_seen():
    image = Image.new("RGB", (400, 300))
    image.getexif()[0x0112] = 6
    assert app.make("a cube", model=tiny_model("sd"), image=image, steps=2).images[0].size == (24, 40)


def test_pictures_that_are_too_large_are_refused_before_they_are_numbers(monkeypatch):
    monkeypatch.setattr(files, "MOST_PIXELS", 1000)
    for image in (Image.new("RGB", (40, 30)), np.zeros((40, 30), np.uint8)):
        with pytest.raises(BadInput, match="the most is 1000 pixels"):
            make("a cube", model=tiny_model("sd"), image=image, steps=2)


# --- where the system has no locks of folders ------------------------------------------------------------------------


@pytest.fixture
def windows(monkeypatch):
    """As on Windows: no flock, and nothing that is open can be renamed or removed."""

    def closed(path):
        held = {os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")[:-1] if os.path.lexists(
            f"/proc/self/fd/{each}")}  # fmt: skip
        place = os.path.abspath(path)
        if any(each == place or each.startswith(f"{place}/") for each in held):
            raise PermissionError(13, "being used by another process", str(path))

    def guarded(function):
        return lambda path, *args, **given: closed(path) or function(path, *args, **given)

    monkeypatch.setattr(locks, "fcntl", None)
    for name in ("replace", "rename", "link", "unlink"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))


def test_windows_writes_and_locks_all_the_same(windows, tmp_path):
    for text in (b"old", b"new"):
        with writing.atomic_write(tmp_path / "x.png") as file:
            file.write(text)
            writing.remove_partial(tmp_path)  # spares what is being written
    with writing.atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("whole")
        writing.remove_partial(tmp_path)
    with pytest.raises(FileExistsError), writing.atomic_write(tmp_path / "x.png", new=True) as file:
        file.write(b"other")
    with writing.reserved(tmp_path, "this"), pytest.raises(Conflict, match="another process is at work"):
        with writing.reserved(tmp_path, "that"):
            raise AssertionError("both are in")
    (tmp_path / ".y.png.0123abcd.partial").write_text("left by a kill")
    with writing.reserved(tmp_path, "this"):
        writing.remove_partial(tmp_path)
    assert (tmp_path / "x.png").read_bytes() == b"new" and (tmp_path / "folder" / "a").read_text() == "whole"
    assert sorted(os.listdir(tmp_path)) == ["folder", "x.png"]
