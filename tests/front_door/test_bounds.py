"""Bombs are refused before anything is loaded, in one line; running out of memory is an error with a remedy."""

from __future__ import annotations

import io
import json
import re
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import cards, errors, files, masks, valid
from sfumato.app import JobBatch, JobOptions, like, make
from sfumato.app.pictures import fitting_size
from sfumato.dialects import parse_comfy
from sfumato.errors import BadInput, OutOfMemory, SfumatoError
from sfumato.models import Model, memory
from sfumato.sampling import Options, generate
from sfumato.text.weights import read_weights
from sfumato.training.recipe import load_recipe
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch, request):
    if "memory" not in request.node.name:
        monkeypatch.setattr(Model, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": (8192, 8192)}, "most is 16777216 pixels"),
        ({"size": (8192, 4096)}, "most is 16777216 pixels"),
        ({"size": (10**9, 1)}, "between 1 and 8192"),
        ({"size": (4096, 4096), "frames": 4096}, "4096 frames"),
        ({"frames": 10**6}, "4096"),
        ({"steps": 10**5}, "1000"),
        ({"n": 10**9}, "100000"),
        ({"prompt": ["a"] * 1000, "n": 1000}, "make more than 100000 samples"),
        ({"compose": [("a dog", 1.0)] * 20_000}, "100"),
        ({"seed": 10**5000}, "300 digits"),
        ({"seed": 10**400}, "300 digits"),
        ({"seed": 10**40}, "below 2"),
        ({"guidance": 10**400}, "300 digits"),
        ({"seed": [0] * 200_000}, "200000 entries"),
        ({"sigmas": [1.0] * 5000}, "1000"),
        ({"prompt": "a " * 200_000}, "characters"),
        ({"prompt": "a (cube:" + "9" * 5000 + ")"}, "more than any text encoder takes"),
        ({"negative": "a (cube: 1000.0)"}, "more than any text encoder takes"),
        ({"prompt": " AND ".join(["a"] * 5000)}, "at most 100 texts are composed"),
        ({"prompt": "<lora:a:1>" * 3000}, "adapters named"),
        ({"prompt": [["a"] * 3] * 3}, "prompt"),
    ],
)
def test_options_are_bounded(options, says):
    with pytest.raises(BadInput, match=says) as caught:
        Options(**{"prompt": "a cube", **options})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(BadInput):
        make(**{"prompt": "a cube", **options}, model="toy-sd")


@pytest.mark.parametrize(
    ("system", "says"),
    [
        ("attend_excite:words=[" + "|".join("ab" for _ in range(5000)) + "]", "5000 entries"),
        ("paint_with_words:box=[" + "|".join("[0|0|1|1]" for _ in range(500)) + "]", "64"),
        ("blend:mask=[" + "|".join("m.png" for _ in range(500)) + "]", "64"),
        ("blend:box=" + "[" * 20_000, "nested deeper"),
        ("daam:heads=" + "9" * 5000, "heads"),
        ("shape_guided:words=" + "x" * 200_000, "200000 characters"),
    ],
)
def test_parameters_of_systems_are_bounded(system, says):
    with pytest.raises(BadInput, match=says) as caught:
        cards.build(system)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


COUNTED = [
    (key, name)
    for key in cards.methods()
    for name, field in cards.method(key).Params.model_fields.items()
    if "int" in re.findall(r"\w+", str(field.annotation))
]


@pytest.mark.parametrize(("key", "name"), COUNTED)
def test_every_number_of_every_system_is_bounded(key, name):
    """2**63 is more steps, pictures, directions, layers or seeds than anything takes."""
    schema = cards.method(key).Params
    others = {each: "x" for each, field in schema.model_fields.items() if field.is_required() and each != name}
    with pytest.raises(BadInput, match=f"{name}.*(less than|the most is|between|must be|no layer|should)"):
        schema(**{name: 2**63}, **others)


@pytest.mark.parametrize(
    "args",
    [
        ["sample", "--size", 10**6], ["sample", "--size", 0], ["sample", "-n", 10**9], ["sample", "--seed", 2**64],
        ["genome", "--size", 10**6], ["genome", "-n", 10**9], ["genome", "--seed", 2**64],
        ["prompts", "-n", 10**9], ["prompts", "--seed", 2**64],
    ],
    ids=lambda args: " ".join(map(str, args))[:24],
)  # fmt: skip
def test_scenes_and_prompts_are_bounded(refused, args):
    refused("toybox", *args, says=["must be from", args[1].lstrip("-")])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("lr = inf", "train.lr"), ("lr = nan", "train.lr"), (f"steps = {10**30}", "train.steps"),
        ("beta1 = -inf", "beta1"),
        (f"batch = {10**9}", "train.batch"), (f"warmup = {10**12}", "warmup"), (f"steps = {'9' * 5000}", "TOML"),
        (f"stages = {'[' * 5000}{']' * 5000}", "TOML"), ("[data]\ntrain = 1000000000", "data.train"),
        ("[model]\nchannels = [8, 1000000000000]", "channels is 1000000000000"),
        ("[model]\ndeep = {a = {b = [1.0, nan]}}", "deep a b is nan"),
        ('[model]\nvae = "a\\u0000b"', "zero byte"), ('[loss]\nperceptual = inf', "perceptual is inf"),
    ],
    ids=lambda value: value[:24],
)  # fmt: skip
def test_recipes_of_training_are_bounded(tmp_path, change, says):
    text = change if "steps =" in change and "[" not in change else f"steps = 1\n{change}"
    text = text if "batch =" in text else f"batch = 1\n{text}"
    path = tmp_path / "x.toml"
    path.write_text(f'name = "x"\nobjective = "vae"\n[train]\n{text}\n')
    with pytest.raises(BadInput, match=says) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (8192, 3), (1, 1)], ids=str)
def test_strips_are_fitted_to_sides_that_a_model_draws(size):
    w, h = fitting_size(tiny_stub_of(64), size)
    assert 64**2 / 1.3 <= w * h <= 64**2 * 1.3 and max(w, h) <= 64 * 3 and (w >= h) == (size[0] >= size[1])


def tiny_stub_of(side):
    return SimpleNamespace(default_size=(side, side), size_multiple=8)


def test_systems_are_counted(tmp_path):
    many = ["daam:words=cube"] * 3000
    with pytest.raises(BadInput, match="3000 systems are given; the most is 100"):
        make("a cube", with_=many)
    with pytest.raises(BadInput, match="3000 systems are given"):
        generate(tiny_stub(), "a cube", interventions=[cards.build("daam") for _ in range(3000)])
    files.save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), {"prompt": "a", "model": "toy-sd", "with": many})
    with pytest.raises(BadInput, match="it has 3000 systems"):
        like(tmp_path / "a.png", {}, JobBatch([]))


def tiny_stub():
    return object()  # it is never asked


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"size": [8192, 8192]}, "16777216"),
        ({"compose": [["a", 1]] * 20_000}, "compose"),
        ({"seed": 10**400}, "damaged"),
        ({"steps": "9" * 5000}, "steps"),
        ({"guidance": "Infinity"}, "guidance"),
        ({"prompt": "a\ud800"}, "not valid text"),
        ({"prompt": "a" * 90_000}, "at most 1000 words"),
        ({"with": [{"method": "blend", "params": {"box": [[0, 0, 1, 1]] * 900}}]}, "64"),
    ],
)
def test_recipes_are_bounded(tmp_path, recipe, says):
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt("sfumato", json.dumps({"prompt": "a cube", "model": "toy-sd", **recipe}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(BadInput, match=says) as caught:
        like(tmp_path / "a.png", {}, JobBatch([]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("text", ["[" * 20_000, '{"a":' * 20_000, "9" * 5000, "NaN", "[1e999]", '"\\ud800"'])
def test_json_is_bounded(text):
    with pytest.raises(ValueError):
        valid.parsed_json(text)


@pytest.mark.parametrize(
    "text",
    ["(" * 20_000 + "a" + ")" * 20_000, "(" * 100 + " " * 10_000 + "a:1.1)" * 100, "a" + " " * 100_000 + "b",
     "[(" * 10_000, "(a:" + "9" * 5000 + ")", "(a" + ":1" * 20_000 + ")"],
    ids="deep blanks gap open digits colons".split(),
)  # fmt: skip
def test_weights_are_read_in_proportion_to_their_length(text):
    start = time.process_time()
    assert all(abs(weight) <= 1e5 for weight in read_weights(text).weights)
    assert time.process_time() - start < 5


def test_large_graphs_are_read_in_proportion_to_their_length():
    nodes = {str(i): {"class_type": "SaveImage", "inputs": {f"k{j}": [str((i + j) % 2000), 0] for j in range(15)}}
             for i in range(1000)}  # fmt: skip
    nodes |= {str(i): {"class_type": "KSampler", "inputs": {"positive": [str(i - 1), 0], "steps": 1}}
              for i in range(1000, 2000)}  # fmt: skip
    start = time.process_time()
    assert parse_comfy(json.dumps(nodes)) is None
    assert time.process_time() - start < 5


def bomb(width, height):
    """A PNG of a few hundred bytes that says it is larger."""

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    head = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0])
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_pictures_that_say_they_are_large(tmp_path):
    (tmp_path / "a.png").write_bytes(bomb(100_000, 100_000))
    for read in (files.read_picture, files.read_upright, masks.read_mask):
        with pytest.raises(BadInput, match="pixels"):
            read(tmp_path / "a.png")
    import base64

    for width, height in ((100_000, 100_000), (8000, 8000)):
        with pytest.raises(BadInput, match="pixels|cannot be read"):
            masks.read_mask(masks.EMBEDDED + base64.b64encode(bomb(width, height)).decode())
    with pytest.raises(BadInput, match="pixels|cannot be read"):
        files.read_picture(named(io.BytesIO(bomb(100_000, 100_000))))


def named(stream):
    stream.name = "x.png"
    return stream


# --- memory ---------------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """As torch's own is called."""


OUT = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
]


@pytest.mark.parametrize("error", OUT, ids=lambda error: type(error).__name__ + str(error)[:12])
def test_memory_that_runs_out_while_drawing(error, monkeypatch):
    model = tiny_model("sd")
    calls = []

    def fails(*args, **options):
        calls.append(1)
        if len(calls) > 1:
            raise error
        return decode(*args, **options)

    decode = model.decode
    monkeypatch.setattr(model, "decode", fails)
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    with pytest.raises(
        OutOfMemory, match="2 samples at once of 32x32 does not fit into memory.*batch_size=1"
    ) as caught:
        generate(model, "a cube", n=4, batch_size=2, steps=1, seed=0)
    assert len(caught.value.result) == 2 and "first 2 of 4 samples are finished" in str(caught.value)
    assert error.__traceback__ is None  # its frames would hold the memory
    assert all(torch.equal(value, before[name]) for name, value in model.denoiser.state_dict().items())


def test_memory_of_other_errors_is_left_alone():
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        BadInput("x"),
    ):
        with pytest.raises(type(error)), errors.within_memory("x", "y"):
            raise error
    with errors.within_memory("x", "y"):
        pass


def test_memory_that_is_not_there_at_all(monkeypatch):
    """A real allocation that no machine grants."""
    with pytest.raises(OutOfMemory, match="the thing does not fit"), errors.within_memory("the thing", "buy more"):
        torch.empty(2**50)
    with pytest.raises(OutOfMemory), errors.within_memory("the thing", "buy more"):
        np.empty(2**60, np.uint8)
    assert issubclass(OutOfMemory, SfumatoError) and issubclass(OutOfMemory, MemoryError)


def test_what_is_large_and_right_is_taken():
    assert JobOptions(prompt="a cube", size=(4096, 4096)).size == (4096, 4096)
    assert Options(prompt=["a"] * 1000, n=100).n == 100
    assert Options(prompt="a (cube:1.5) (ball:-2) f(x):12345", compose=[("a", 1)] * 100)


@pytest.mark.parametrize("command", [("make", "a cube"), ("explain", "a cube")])
def test_sizes_that_do_not_fit_are_told_before_anything_is_loaded(sfumato, monkeypatch, command):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    done = sfumato(*command, "--size", "4096x4096")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "at least 4.0 GiB in the autoencoder of toy-sd, and 1.0 GiB are free" in done.err
    width, height = map(int, re.search(r"such as size (\d+)x(\d+)", done.err).groups())
    memory.refuse_unaffordable({"block_out_channels": [16, 32, 96]}, (width, height), 1, 4, "cpu", "toy-sd")


def test_sizes_that_do_not_fit_into_memory_with_a_loaded_model(monkeypatch):
    model = tiny_model("sd")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    with pytest.raises(OutOfMemory, match="4 of 64x64 at once .* draw fewer at once, or make it smaller"):
        generate(model, "a cube", n=4, size=(64, 64), steps=1)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)  # nobody says
    generate(model, "a cube", size=(64, 64), steps=1, decode=False)
    assert memory.decoder_bytes({"block_out_channels": [8]}, 64, 64) == 0


def test_free_memory_is_that_of_the_machine_or_of_its_group(tmp_path, monkeypatch):
    assert 0 < memory.free_bytes("cpu") < 2**44 and memory.free_bytes("mps") is None
    for name, number in (("max", 10**6), ("current", 4 * 10**5)):
        (tmp_path / name).write_text(str(number))
    monkeypatch.setattr(memory, "_GROUPS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert memory.free_bytes() == 600_000
    (tmp_path / "max").write_text("max")
    assert memory.free_bytes() > 600_000
