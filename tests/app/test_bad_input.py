"""Everything a user can get wrong: one line on stderr that names the remedy, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile

import pytest

from sfumato import cards
from sfumato.sampling import Intervention


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), ["nothing to make", 'sfumato make "a red cube"']),
        (("",), ["prompt", "must say something"]),
        (("  \n ",), ["prompt", "must say something"]),
        (("word " * 10_000,), ["10000 words", "at most 1000 words are read"]),
        (("x" * 50_000,), ["prompt", "1 words"]),
        (("a", "--steps", 0), ["steps", "is 0", "greater than or equal to 1"]),
        (("a", "--steps", 5000), ["steps", "less than or equal to 1000"]),
        (("a", "--steps", "many"), ["--steps", "integer"]),
        (("a", "--seed=-1"), ["seed", "-1", "0 or above"]),
        (("a", "--seed", 2**70), ["seed", "below 2**62"]),
        (("a", "--guidance", "nan"), ["guidance", "nan", "finite"]),
        (("a", "--guidance", "inf"), ["guidance", "finite"]),
        (("a", "--guidance=-2"), ["guidance", "greater than or equal to 0"]),
        (("a", "-n", 0), ["n of make is 0"]),
        (("a", "--size", "64"), ["--size is '64'", "64x64"]),
        (("a", "--size", "axb"), ["--size is 'axb'"]),
        (("a", "--size=-64x64"), ["--size"]),
        (("a", "--size", "0x64"), ["size", "between 1 and 8192"]),
        (("a", "--size", "99999x64"), ["size", "between 1 and 8192"]),
        (("a", "--strength", 2), ["strength", "less than or equal to 1"]),
        (("a", "--frobnicate", 3), ["--frobnicate", "Try --help"]),
        (("a", "--with", "daam:words"), ["name=value"]),
        (("a", "--with", "daam:words=[a"), ["']'"]),
        (("a", "--like", "x.png", "--prompts", "y.jsonl"), ["cannot be given together"]),
        (("a", "--prompts", "y.jsonl"), ["not both"]),
        (("--like", "missing.png"), ["missing.png", "No such file", "check the path"]),
        (("--prompts", "missing.jsonl"), ["missing.jsonl", "No such file"]),
        (("a", "--image", "missing.png"), ["missing.png", "No such file"]),
        (("a", "--model", "toy-ds"), ["unknown model 'toy-ds'"]),
        (("a", "--model", "./no/such/folder"), ["no file or folder './no/such/folder'"]),
        (("a", "--model", "no-such-owner/no-such-model"), ["no-such-owner/no-such-model"]),
        (("a", "--with", "no_such_system:strength=1"), ["unknown method 'no_such_system'"]),
    ],
)
def test_make_refuses(refused, args, says):
    refused("make", *args, says=says)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--size", "33x32"), ["33x32", "multiples", "Nearest: 32x32"]),
        (("--scheduler", "eulr"), ["'eulr'", "'euler'"]),
        (("--scheduler", "flow_euler"), ["flow_euler"]),
        (("--dtype", "float99"), ["float99"]),
        (("--device", "abacus"), ["abacus"]),
        (("--guidance", "1e30"), ["finite"]),
    ],
)
def test_make_refuses_what_the_model_cannot(refused, tiny_sd, args, says):
    refused("make", "a cube", "--model", tiny_sd, "--steps", 2, *args, says=says)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("mak", "a"), ["'mak'", "Did you mean 'make'"]),
        (("methods", "no_such"), ["unknown method 'no_such'"]),
        (("methods", "--verb", "explian"), ["unknown verb 'explian'", "'explain'"]),
        (("models", "no-such"), ["unknown built-in model 'no-such'"]),
        (("train", "no-such"), ["unknown recipe 'no-such'"]),
        (("train", "toy-judge", "--minutes", 0), ["minutes"]),
        (("toybox", "sample", "-n", 0), ["-n"]),
        (("toybox", "sample", "--seed=-1"), ["--seed"]),
        (("toybox", "sample", "--size", 0), ["size"]),
        (("toybox", "sample", "--split", "trian"), ["unknown split 'trian'", "'train'"]),
        (("toybox", "sampel"), ["'sampel'", "'sample'"]),
    ],
)
def test_other_commands_refuse(refused, args, says):
    refused(*args, says=says)


def test_places_that_cannot_be_written(refused, tmp_path, tiny_sd):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    make = ("make", "a cube", "--model", tiny_sd, "-o")
    refused(*make, tmp_path / "file", says=["is a file", "name a folder"])
    refused(*make, tmp_path / "file" / "below", says=["Not a directory"])
    refused(*make, "/proc/sfumato", says=["/proc/sfumato", "check the path"])
    refused(*make, "x" * 300, says=["File name too long"])
    refused("toybox", "sample", "-o", tmp_path / "full", says=["is not empty"])
    refused("toybox", "sample", "-o", tmp_path / "file" / "below", says=["check"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not json", ["line 2", "not a JSON object"]),
        ('["a"]', ["line 2", "not a JSON object"]),
        ('{"prompt": ""}', ["line 2", "must say something"]),
        ('{"prompt": "a", "stepz": 3}', ["line 2", "unknown parameter", "'steps'"]),
        ('{"seed": 3}', ["line 2", "prompt"]),
        ("[" * 100_000, ["line 2", "not a JSON object"]),
    ],
)
def test_a_damaged_line_of_prompts_is_named_and_loses_no_other(sfumato, tmp_path, tiny_sd, line, says):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cube"}\n' + line + '\n{"prompt": "a ball"}\n')
    done = sfumato("make", "--prompts", "p.jsonl", "--model", tiny_sd, "--steps", 1)
    assert done.code == 2 and done.lines == ["out/a-cube-0.png", "out/a-ball-0.png"]
    assert done.err.count("\n") == 1 and len(done.err) < 700
    for part in [*says, "1 of 3 lines could not be followed", "The 2 pictures of the others are in out"]:
        assert part in done.err


def test_prompts_that_are_all_damaged_need_no_model(refused, tmp_path):
    (tmp_path / "p.jsonl").write_text("damaged\n" * 5)
    refused("make", "--prompts", "p.jsonl", "--model", "no-such", says=["5 of 5 lines", "line 1:", "And 2 more"])


def test_a_model_that_is_not_there_is_not_the_fault_of_the_lines(refused, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cube"}\n' * 2)
    refused("make", "--prompts", "p.jsonl", "--model", "no-such", says=["unknown model 'no-such'"])


def test_empty_and_binary_files_of_prompts(refused, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    refused("make", "--prompts", "empty.jsonl", says=["holds no prompts"])
    refused("make", "--prompts", "binary.jsonl", says=["not UTF-8"])


# --- weights -------------------------------------------------------------------------------------------------


class _Evil:
    def __reduce__(self):
        return (open, ("canary", "w"))


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _corrupt_header(path):
    data = bytearray(path.read_bytes())
    data[12:40] = b"#" * 28
    path.write_bytes(data)


def _pickle(path):
    path.write_bytes(pickle.dumps(_Evil()))


def _torch_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Evil()))


def _wrong_shapes(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = max(tensors, key=lambda key: tensors[key].numel())
    save_file({**tensors, name: tensors[name][:1].clone()}, path)


def _missing_tensor(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors.pop(max(tensors, key=lambda key: tensors[key].numel()))
    save_file(tensors, path)


def _not_a_number(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)


def _empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [_truncate, _corrupt_header, _pickle, _torch_zip, _wrong_shapes, _missing_tensor, _not_a_number, _empty],
)
def test_damaged_weights(refused, tmp_path, tiny_sd, damage):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    damage(folder / "unet" / "diffusion_pytorch_model.safetensors")
    refused("make", "a cube", "--model", folder, "--steps", 1)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".safetensors", ".SAFETENSORS", ".png"])
@pytest.mark.parametrize("damage", [_pickle, _torch_zip])
def test_single_files_that_are_pickles(refused, tmp_path, suffix, damage):
    damage(tmp_path / f"model{suffix}")
    refused("make", "a cube", "--model", f"./model{suffix}", says=["model"])
    assert not (tmp_path / "canary").exists()


def test_a_family_that_is_not_known(refused, tmp_path, tiny_sd):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "AudioLDMPipeline"}))
    refused("make", "a cube", "--model", folder, says=["AudioLDM"])


# --- systems -------------------------------------------------------------------------------------------------

SYSTEMS = sorted(cards.methods())


@pytest.mark.parametrize("key", SYSTEMS)
def test_parameters_of_systems_are_checked(refused, tiny_sd, key):
    make = ("make", "a red cube", "--model", tiny_sd, "--steps", 2, "--with")
    refused(*make, f"{key}:no_such_parameter=1", says=[f"unknown parameter of {key}", "Known:"])
    if len(key) > 3:
        refused(*make, key[:-1], says=[f"unknown method '{key[:-1]}'", f"'{key}'"])


@pytest.mark.parametrize("key", [key for key in SYSTEMS if "words" in cards.method(key).Params.model_fields])
def test_words_that_are_not_in_the_prompt(refused, tiny_sd, key):
    make = ("make", "a red cube", "--model", tiny_sd, "--steps", 2, "--with")
    drawing = issubclass(cards.method(key), Intervention)
    says = ["cubes", "cube"] if drawing else [f"{key} takes no part in drawing", f"sfumato methods {key}"]
    refused(*make, f"{key}:words=[cubes|red]", says=says)


# --- errors that nobody foresaw -------------------------------------------------------------------------------


def test_debug_shows_the_traceback(sfumato, tmp_path):
    from typer.testing import CliRunner

    from sfumato.app.cli import app
    from sfumato.errors import BadInput

    for args in (["make", "a", "--steps", "0", "--debug"], ["--debug", "make", "a", "--steps", "0"]):
        done = CliRunner().invoke(app, args)
        assert isinstance(done.exception, BadInput)


def test_an_unexpected_error_is_one_line_with_exit_code_1(sfumato, monkeypatch):
    monkeypatch.setattr("sfumato.app.JobOptions", lambda **_: 1 / 0)
    outcome = sfumato("make", "a cube")
    assert (
        outcome.code == 1 and outcome.err.startswith("error: unexpected ZeroDivisionError") and "--debug" in outcome.err
    )
    assert outcome.err.count("\n") == 1
