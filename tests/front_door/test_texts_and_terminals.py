"""Texts that no file can hold, files with marks, names that are no text, terminals that know few letters, users without
a home: each an error of ours in one line, or no matter at all."""

from __future__ import annotations

import codecs
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from sfumato import cards, files, masks, registry, valid, writing
from sfumato.app import BadPrompts, EditOptions, JobBatch, cli, explain, make, make_prompts, read_prompts, segment
from sfumato.bench.folder import Folder
from sfumato.bench.journal import Journal
from sfumato.bench.judge import read_attributes
from sfumato.bench.options import CompareOptions, JudgeOptions
from sfumato.errors import BadInput, Conflict, SfumatoError
from sfumato.protocol import Work
from sfumato.sampling import Options
from sfumato.teach.learning import opened
from sfumato.training.objective import build_objective
from sfumato.training.recipe import Recipe, load_recipe
from sfumato.training.samples import open_samples
from tests.tiny import tiny_model

BAD = ["a \ud800 cube", "a\0cube", "\udcff"]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "entrance",
    [
        lambda bad: Options(prompt=bad),
        lambda bad: Options(prompt=["a", bad]),
        lambda bad: Options(prompt="a", negative=bad),
        lambda bad: Options(prompt="a", compose=[(bad, 1.0)]),
        lambda bad: Options(prompt="a", scheduler=bad),
        lambda bad: EditOptions(prompt=[bad]),
        lambda bad: EditOptions(prompt=["a"], from_=bad),
        lambda bad: JudgeOptions(template=bad),
        lambda bad: JudgeOptions(attributes=[bad]),
        lambda bad: CompareOptions(names=(bad, "b")),
        lambda bad: make(bad, model="toy-sd"),
        lambda bad: make("a", with_=f"daam:words={bad}"),
        lambda bad: make("a", with_={"method": "daam", "params": {"words": [bad]}}),
        lambda bad: make("a", with_={"method": bad}),
        lambda bad: make("a", model=bad),
        lambda bad: explain(bad),
        lambda bad: explain("x.png", bad),
        lambda bad: explain("a", words=[bad]),
        lambda bad: explain(bad, by="conceptor"),
        lambda bad: segment(bad),
        lambda bad: cards.build(f"paint_with_words:phrases=[{bad}]"),
        lambda bad: cards.build(bad),
        lambda bad: masks.read_mask(bad),
        lambda bad: cards.method(bad),
    ],
)
def test_every_entrance_has_the_same_check(entrance, bad):
    with pytest.raises((SfumatoError, FileNotFoundError)) as caught:
        entrance(bad)
    str(caught.value).encode()
    assert "\n" not in str(caught.value)


def test_one_bad_line_stops_no_run(tmp_path, monkeypatch):
    """Half pairs, zero bytes, not-a-number, annotations of any kind: named, and the others are drawn."""
    good = [b'\xef\xbb\xbf{"prompt": "a cube", "task": "one"}', b'{"prompt": "a ball", "tag": {"a": [1, null]}}']
    bad = [b'{"prompt": "a \\ud800"}', b'{"prompt": "a\\u0000"}', b'{"prompt": "a", "task": NaN}',
           b'{"prompt": "\xff"}',
           b'{"prompt": "a", "id": "\\udfff"}', b'{"prompt": "a", "tag": 1e999}', b'{"prompt": "a", "self": 1}',
           b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b"[" * 20_000]  # fmt: skip
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join([good[0], *bad, good[1]]))
    made = []
    with pytest.raises(
        BadPrompts, match="9 of 11 lines could not be followed: line 2: .* line 3: .* line 4: "
    ) as caught:
        for each in make_prompts(
            read_prompts(path, {"steps": 1}), JobBatch([]), tmp_path / "out", model=tiny_model("sd")
        ):
            made += each.paths
    assert [each.name for each in made] == ["a-cube-0.png", "a-ball-0.png"] and "\n" not in str(caught.value)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "out" / "metadata.jsonl").open()]
    assert [row.get("task", row.get("tag")) for row in rows] == ["one", {"a": [1, None]}]


def through_a_pipe(path, content):
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: path.write_bytes(content), daemon=True)
    thread.start()
    return path


def test_prompts_and_captions_from_a_pipe(tmp_path):
    pipe = through_a_pipe(tmp_path / "pipe", b'{"prompt": "a cube"}\n{"prompt": "a ball"}\n')
    assert [line.job.prompt for line in read_prompts(pipe, {})] == ["a cube", "a ball"]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "ab":
        Image.new("RGB", (4, 4)).save(pictures / f"{name}.png")
    pipe = through_a_pipe(tmp_path / "captions", b'{"text": "a cube"}\n{"text": "a ball"}\n')
    folder = Folder(pictures, pipe)
    assert [folder.about(name)["text"] for name in folder.names * 2] == ["a cube", "a ball"] * 2


def test_byte_order_marks_are_read_over(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"file_name": "a.png", "text": "a cube"}\n')
    folder = Folder(tmp_path)
    assert folder.about("a.png")["text"] == "a cube"
    (tmp_path / "attributes.txt").write_bytes(codecs.BOM_UTF8 + b"red cube\n")
    assert read_attributes(tmp_path / "attributes.txt") == ["red cube"]
    toml = tmp_path / "r.toml"
    toml.write_bytes(codecs.BOM_UTF8 + registry.recipes()["toy-vae"].read_bytes())
    assert load_recipe(toml).name == "toy-vae"
    (tmp_path / "wide.jsonl").write_bytes('{"prompt": "a"}'.encode("utf-16"))
    with pytest.raises(BadInput, match="not UTF-8 text but UTF-16"):
        list(read_prompts(tmp_path / "wide.jsonl", {}))
    toml.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="not UTF-8"):
        load_recipe(toml)


def test_names_that_are_no_text(tmp_path):
    """Undecodable bytes in the names of files are legal on Linux: such pictures are read, written and told of."""
    name = os.fsdecode(b"p\xff.png")
    path = files.save_png(tmp_path / name, Image.new("RGB", (4, 4)), {"prompt": "a cube", "picture": name})
    assert files.read_recipe(path)[0]["prompt"] == "a cube"
    folder = Folder(tmp_path)
    assert folder.names == [name] and folder.picture(name).size == (4, 4)
    line = valid.json_line({"file_name": name, "text": "日"})
    assert json.loads(line) == {"file_name": name, "text": "日"} and "日".encode() in line
    assert valid.shown(path).encode() and writing.slug(name) == "p-png"


def test_a_circle_of_links_is_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "c.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "b.png")
    folder = Folder(tmp_path)
    assert folder.names == ["a.png"] and [each.split(":")[0] for each in sorted(folder.skipped)] == ["b.png", "c.png"]


@pytest.mark.parametrize(
    "array",
    [np.array([["a", "b"]]), np.full((4, 4, 3), "a"), np.full((4, 4), None), np.array([[1 + 2j]]),
     np.zeros((2, 2), "M8[s]"), np.array("x"), np.full((1, 4, 4), b"x")],
    ids=str,
)  # fmt: skip
def test_arrays_that_are_no_masks(array):
    with pytest.raises(BadInput, match="^mask is an array of [^\n]*finite numbers[^\n]*$"):
        masks.read_mask(array)


@pytest.mark.parametrize("channels", [[0, 8], [7, 9], [8, -1], [], [10**7], ["a"]], ids=str)
def test_recipes_of_no_network(channels):
    recipe = load_recipe("toy-vae")
    broken = Recipe.model_validate({**recipe.model_dump(), "model": {**recipe.model, "channels": channels}})
    with pytest.raises(BadInput, match="^recipe [^\n]*$"):
        build_objective(broken)


def test_a_user_without_a_home(monkeypatch, tmp_path):
    import pwd

    def nobody(_):
        raise KeyError("uid not found")

    for name in ("HOME", "SFUMATO_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(pwd, "getpwnam", nobody)
    assert registry.trained() == {} and registry.in_cache("adapters") == []
    for entrance in (
        registry.cache_folder,
        lambda: cards.build("lora:file=~/x"),
        lambda: cards.build("lora:file=ink"),
        lambda: make("a", model="~/x"),
    ):
        with pytest.raises(BadInput, match="home"):
            entrance()


# --- streams that are closed, files that are nested deep --------------------------------------------------------------


@pytest.mark.parametrize("closed", [("stdin",), ("stdout",), ("stderr",), ("stdin", "stdout", "stderr")], ids=" ".join)
def test_closed_streams_are_those_of_nowhere(closed, monkeypatch):
    seen = {}
    monkeypatch.setattr(cli, "app", lambda: seen.update({name: getattr(sys, name) for name in closed}))
    monkeypatch.setattr(cli, "import_on_use", lambda *_: None)
    monkeypatch.setattr(cli, "skip_final_collection", lambda: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", ""))
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    cli.main()
    assert all(stream.name == os.devnull for stream in seen.values()) and list(seen) == list(closed)
    for stream in seen.values():
        stream.close()


def test_a_command_whose_streams_are_closed():
    script = f"{sys.executable} -m sfumato methods >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", script], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize("text", ["[" * 20_000, "{", "[]", "null", "9" * 5000])
def test_a_damaged_record_of_a_run_that_taught(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(Conflict, match="^[^\n]*run.json is damaged[^\n]*remove"):
        with opened(Work(tmp_path, resume=True), {"steps": 1}):
            raise AssertionError("it went on")


# --- what stands beside pictures --------------------------------------------------------------------------------------


def beside(folder, name, text):
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / name).write_text(text, encoding="utf-8")
    return open_samples(folder, (8, 8))


def test_a_caption_may_hold_any_end_of_a_line(tmp_path):
    text = "a cube\u2028on the\x85grass\x0bhere"
    data = beside(tmp_path, "metadata.jsonl", json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False))
    assert len(data) == 1 and data.sample(0).caption == text


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("metadata.csv", "file_name,text\na.png," + "x" * 200_000, "field larger"),
        ("metadata.csv", "file_name,text\na.png,a\0cube", "zero byte"),
        ("metadata.csv", "file_name,text\na\0.png,a cube", "not there"),
        ("metadata.csv", "file_name,text\n../a.png,a cube", "outside the folder"),
        ("metadata.jsonl", '{"file_name": "/etc/passwd"}', "outside the folder"),
        ("metadata.jsonl", '{"file_name": "a.png", "mask": "in/../../b.png"}', "outside the folder"),
        ("a.txt", "a\0cube", "zero byte"),
        ("a.txt", "x" * 200_000, "200000 characters"),
    ],
    ids=["long field", "zero", "zero in a name", "above", "absolute", "mask", "zero in a file", "long file"],
)
def test_captions_that_no_encoder_takes(tmp_path, name, text, says):
    with pytest.raises(BadInput, match=says) as caught:
        beside(tmp_path, name, text).sample(0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("numbers", ["0..999999999999", f"0..{'9' * 5000}"])
def test_shards_are_counted(numbers):
    with pytest.raises(BadInput, match="^[^\n]{,160}the most is a million"):
        open_samples(f"x-{{{numbers}}}.tar", (8, 8))


@pytest.mark.parametrize("name", ["../x.png", "/tmp/x.png", "in/x.png", ".."])
def test_a_list_of_pictures_that_leads_out_of_its_folder(tmp_path, name):
    """The list came with the folder; a picture that it says was lost is made again in the folder, or nowhere."""
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "key": "k"}) + "\n")
    assert Journal(tmp_path).begin("k", "a", {}) == tmp_path / "a.png"


def test_a_named_circle_of_links(tmp_path):
    (tmp_path / "b.png").symlink_to(tmp_path / "c.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a cube"}\n')
    with pytest.raises((BadInput, OSError)):
        folder = Folder(tmp_path)
        folder.picture(folder.names[0])


@pytest.mark.parametrize("error", [MemoryError(), ValueError("\n \n"), KeyError("a\nb")])
def test_errors_that_say_nothing(error):
    assert valid.first_line(error) and "\n" not in valid.first_line(error)
