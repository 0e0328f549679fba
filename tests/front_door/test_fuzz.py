"""Every parser of what strangers write, on 2,000 seeded inputs each: whatever goes wrong is an error of ours.

Inputs are pieces that the parser knows put together at random, valid texts with a few characters changed, and any
characters at all. The seed is fixed, so that a failure can be repeated; the failing input is in the message.
"""

from __future__ import annotations

import base64
import io
import json
import random

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato import cards, files, masks
from sfumato.app import JobBatch, JobOptions, like
from sfumato.app.cli import flags
from sfumato.app.prompts_file import read_prompts
from sfumato.bench.folder import Folder
from sfumato.dialects import a1111_text, parse_a1111, parse_comfy, parse_json
from sfumato.errors import SfumatoError
from sfumato.text.dialects import adapter_tags, read_composition, warn_of_plain_words
from sfumato.text.phrases import nested_phrases, noun_phrases
from sfumato.text.weights import read_weights
from sfumato.toybox.oracle.caption_check import requested

N = 2000
ANY = [
    *"abcXYZ 019.,:;|=[](){}<>'\"\\/-+*#&%$@!?~^_\n\t\r\0",
    *"\ud800\udcffé日🎈\u202e\ufeff²٣",
]
NUMBERS = [
    "0",
    "-1",
    "1.5",
    "1e999",
    "-0",
    "9" * 30,
    "9" * 400,
    "nan",
    "inf",
    "٣",
    "1_0",
    "0x1",
    ".",
    "-",
    "1e-400",
    "",
]
WORDS = [
    "a red cube",
    "and",
    "AND",
    "BREAK",
    "two blue balls on the grass",
    "cube",
    "<lora:ink:0.8>",
    "<rex>",
    "left of",
]


def mixed(draw: random.Random, pieces: list[str], longest: int = 25) -> str:
    """Pieces, any characters and numbers in a row, or a piece with some characters changed."""
    kind = draw.random()
    if kind < 0.01:
        return draw.choice(pieces) + "9" * 5000
    if kind < 0.25:
        return "".join(draw.choice(ANY) for _ in range(draw.randrange(60)))
    if kind < 0.5:
        chars = list(draw.choice(pieces))
        for _ in range(draw.randrange(1, 5)):
            at = draw.randrange(len(chars) + 1)
            chars[at : at + draw.randrange(3)] = draw.choice(ANY)
        return "".join(chars)
    parts = [
        draw.choice([draw.choice(pieces), draw.choice(ANY), draw.choice(NUMBERS)])
        for _ in range(draw.randrange(longest))
    ]
    return "".join(parts)


def jsonish(draw: random.Random, keys: list[str], depth: int = 3):
    """A value that JSON or Python could hold."""
    kind = draw.randrange(9 if depth else 6)
    if kind < 6:
        scalars = [None, True, 0, -1, 3, 2.5, 10**40, 10**400, float("nan"), float("inf"), "", draw.choice(keys)]
        return draw.choice([draw.choice(scalars), mixed(draw, keys, 4), draw.choice(NUMBERS)])
    if kind == 6:
        return [jsonish(draw, keys, depth - 1) for _ in range(draw.randrange(5))]
    return {draw.choice(keys) if draw.random() < 0.9 else mixed(draw, keys, 3): jsonish(draw, keys, depth - 1)
            for _ in range(draw.randrange(5))}  # fmt: skip


def dumped(value) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # whole numbers of more than 4300 digits
        return "9" * 5000


def none_but_ours(parse, inputs):
    """Runs ``parse`` on all inputs; returns how many it took without an error."""
    taken = 0
    for given in inputs:
        try:
            parse(given)
            taken += 1
        except SfumatoError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, f"{str(error)!r:.300}; of {given!r:.300}"
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}; of {given!r:.500}") from error
    return taken


def texts(seed: int, pieces: list[str], longest: int = 25):
    draw = random.Random(seed)
    return [mixed(draw, pieces, longest) for _ in range(N)]


PROMPTS = [*WORDS, "(red:1.2)", "[blue]", "((", "))", "\\(", ":", " AND ", "(a:", ")", " :0.7", "<lora:", ">"]


def test_weights_of_prompts():
    def parse(text):
        found = read_weights(text)
        assert len(found.text) == len(found.weights) and all(abs(weight) <= 1e5 for weight in found.weights)

    assert none_but_ours(parse, texts(1, PROMPTS)) == N


def test_prompts_of_other_programs():
    def parse(text):
        plain, _ = adapter_tags(text)
        warn_of_plain_words([text])
        read_composition(plain)

    assert none_but_ours(parse, texts(2, PROMPTS)) > N / 2


def test_prompts_as_options():
    def parse(text):
        JobOptions(prompt=text, negative=text).prompt.encode()

    assert N / 4 < none_but_ours(parse, texts(3, PROMPTS)) < N


WITH = ["daam", ":", "words=", "[red cube|ball]", ",", "heads=[0|3]", "'", '"', "|", "[", "]", "=", "none",
        "mask=m.png", "blend:mask=m.png,box=[0|0|1|1]", "attend_excite:words=[cube|ball],steps=3", "self=",
        "prompt_to_prompt", "experts:models=toy-sd", "mgad:images=x.png:0.5", "strength=", "1.5",
        "window=0|1"]  # fmt: skip


def test_with_texts():
    assert none_but_ours(cards.parse_with, texts(4, WITH)) > N / 10


def test_systems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = list(cards.methods())
    draw = random.Random(5)
    given = []
    for text in texts(5, WITH, 6):
        key = draw.choice(keys)
        names = list(cards.method(key).Params.model_fields)
        given.append(f"{key}:{draw.choice(names)}={draw.choice([text, draw.choice(NUMBERS), '[a|b]', '[[0|1]]'])}")
    assert none_but_ours(cards.build, given) > N / 20


def test_recipes_of_systems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(6)
    keys, given = list(cards.methods()), []
    for _ in range(N):
        key = draw.choice(keys)
        names = [*cards.method(key).Params.model_fields, "self", "x"]
        params = {draw.choice(names): jsonish(draw, names, 2) for _ in range(draw.randrange(3))}
        given.append(
            {"method": key, "params": params} if draw.random() < 0.95 else jsonish(draw, ["method", key, "params"])
        )
    assert none_but_ours(cards.from_recipe, given) > N / 20


def test_sizes():
    pieces = ["64x64", "x", "X", "512", " x ", "0x0", "64", "8192x8192", "-64x64"]
    assert none_but_ours(flags.pixels, texts(7, pieces, 5)) > N / 60

    def parse(size):
        JobOptions(prompt="a cube", size=size)

    draw = random.Random(8)
    assert none_but_ours(parse, [jsonish(draw, ["64", "x"], 2) for _ in range(N)]) > 0


A1111 = ["a red cube\n", "Steps: 4", ", ", "\n", "Negative prompt: blue", "Sampler: DPM++ 2M Karras", '"', "\\",
         "Seed: ", "Size: 9x9", "CFG scale: ", "Schedule type: Karras", "Clip skip: 2", "Model: x", "Version: v1",
         "a cube\nNegative prompt: x\nSteps: 4, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x48"]  # fmt: skip
KEYS = {"prompt", "negative", "steps", "guidance", "seed", "size", "scheduler", "named_model", "dropped", "clip_skip"}


def test_texts_of_a1111():
    def parse(text):
        found = parse_a1111(text)
        assert set(found) <= KEYS
        a1111_text(found)

    assert none_but_ours(parse, texts(9, A1111)) == N


KINDS = ["KSampler", "CLIPTextEncode", "SaveImage", "EmptyLatentImage"]
NODES = ["1", "2", "3", "text", "steps", "cfg", "seed", "positive", "negative", "sampler_name", "scheduler", "denoise",
         "width", "height", "class_type", "inputs", "KSampler", "CLIPTextEncode", "SaveImage", "EmptyLatentImage",
         "lora_name"]  # fmt: skip


def comfy(draw: random.Random) -> str:
    if draw.random() < 0.2:
        return dumped(jsonish(draw, NODES, 4))
    graph = {}
    for key in "123":
        inputs = {
            name: draw.choice([[draw.choice("123"), 0], jsonish(draw, NODES, 1)]) for name in draw.sample(NODES, 6)
        }
        graph[key] = {"class_type": draw.choice(KINDS), "inputs": {**inputs, "positive": ["2", 0]}}
    return dumped(graph)


def test_graphs_of_comfyui():
    def parse(text):
        found = parse_comfy(text)
        assert found is None or set(found) <= KEYS

    draw = random.Random(10)
    assert none_but_ours(parse, [comfy(draw) for _ in range(N)]) == N


FLAT = ["prompt", "positive_prompt", "negative_prompt", "steps", "cfg_scale", "guidance_scale", "seed", "resolution",
        "width", "height", "sampler", "scheduler", "model", "name", "sui_image_params"]  # fmt: skip


def test_flat_json():
    draw = random.Random(18)

    def parse(text):
        found = parse_json(text)
        assert found is None or set(found) <= KEYS
        return found

    def inputs():
        for _ in range(N):
            whole = {"prompt": "a red cube", "steps": 4} if draw.random() < 0.8 else {}
            yield dumped({**whole, **{draw.choice(FLAT): jsonish(draw, FLAT) for _ in range(4)}})

    given = list(inputs())
    assert none_but_ours(parse, given) == N
    assert sum(parse(text) is not None for text in given) > N / 4


def png(**chunks: str) -> io.BytesIO:
    info, stream = PngInfo(), io.BytesIO()
    for name, text in chunks.items():
        info.add_itxt(name, text)
    Image.new("RGB", (2, 2)).save(stream, "PNG", pnginfo=info)
    return stream


OURS = ["prompt", "negative", "seed", "steps", "guidance", "size", "model", "scheduler", "with", "compose", "edit",
        "image", "latents", "dtype", "toy-sd", "hash", "versions", "method", "params", "daam", "words", "blend",
        "mask"]  # fmt: skip


def test_recipes_of_all_three_programs_in_pictures(tmp_path):
    draw = random.Random(11)
    path = tmp_path / "a.png"

    def parse(given):
        name, text = given
        path.write_bytes(png(**{name: text}).getvalue())
        like(path, {}, JobBatch([]))

    inputs = []
    for i in range(N):
        if i % 3 == 0:
            whole = {"prompt": "a red cube", "model": "toy-sd"} if draw.random() < 0.7 else {}
            inputs.append(("sfumato", dumped({**whole, **{draw.choice(OURS): jsonish(draw, OURS) for _ in range(3)}})))
        elif i % 3 == 1:
            text = mixed(draw, A1111)
            inputs.append(("parameters", text.encode("utf-8", "replace").decode()))
        else:
            inputs.append(("prompt", comfy(draw)))
    with pytest.warns(UserWarning):
        assert none_but_ours(parse, inputs) > N / 20


def test_bytes_of_pictures(tmp_path):
    """A sound picture with some bytes changed, cut or doubled."""
    draw = random.Random(12)
    whole = png(
        sfumato=json.dumps({"prompt": "a red cube", "model": "toy-sd"}), parameters="x\nSteps: 4, Seed: 5"
    ).getvalue()
    path = tmp_path / "a.png"

    def parse(data):
        path.write_bytes(data)
        for read in (files.read_recipe, files.read_picture, masks.read_mask):
            try:
                read(path)
            except SfumatoError as error:
                assert "\n" not in str(error)

    none_but_ours(parse, [changed(draw, whole) for _ in range(N)])


def changed(draw: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(draw.randrange(1, 6) if len(out) > 1 else 0):
        at = draw.randrange(len(out))
        kind = draw.randrange(4)
        if kind == 0:
            out[at] = draw.randrange(256)
        elif kind == 1:
            del out[at + 1 : at + draw.randrange(1, 40)]
        elif kind == 2:
            out[at:at] = out[at : at + draw.randrange(1, 40)]
        else:
            out = out[: at + 1]
    return bytes(out)


def test_masks_as_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(13)
    stream = io.BytesIO()
    Image.new("L", (4, 4), 255).save(stream, "PNG")
    inputs: list = [masks.EMBEDDED + base64.b64encode(changed(draw, stream.getvalue())).decode() for _ in range(N // 2)]
    inputs += [mixed(draw, [masks.EMBEDDED, "data:", "m.png", "/", ".."], 5) for _ in range(N // 2)]
    none_but_ours(masks.read_mask, inputs)


def test_masks_as_arrays():
    import numpy as np

    draw = random.Random(14)
    kinds = ["u1", "i2", "u2", "i8", "f2", "f4", "f8", "?", "c8", "U3", "S2", "O", "M8[s]", "m8[s]"]

    def array(_):
        shape = tuple(draw.choice([0, 1, 2, 3, 4, 5]) for _ in range(draw.randrange(5)))
        values = np.array([draw.choice([0, 1, 2, 255, 256]) for _ in range(int(np.prod(shape)))])
        made = values.astype(draw.choice(kinds)).reshape(shape)
        return made * np.nan if made.dtype.kind == "f" and draw.random() < 0.2 else made

    assert N / 50 < none_but_ours(masks.read_mask, map(array, range(N))) < N


CAPTIONS = [
    *WORDS,
    "three",
    "a small green striped ring",
    "to the right of",
    "with a shadow",
    ",",
    ".",
    "the",
    "on sand",
    "-",
]


def test_captions():
    def parse(text):
        requested(text)
        noun_phrases(text)
        nested_phrases(text)

    assert none_but_ours(parse, texts(15, CAPTIONS, 12)) > N / 2


LINE = ["prompt", "negative", "seed", "steps", "n", "task", "tag", "id", "size", "self", "compose", "file_name", "text"]


def lines(seed: int) -> list[bytes]:
    draw = random.Random(seed)
    found = []
    for _ in range(N):
        row = {"prompt": "a cube", **{draw.choice(LINE): jsonish(draw, LINE, 2) for _ in range(draw.randrange(3))}}
        text = dumped(row) if draw.random() < 0.8 else mixed(draw, [*LINE, '{"prompt": "a cube"}', "{", "}", ":"])
        found.append(text.encode("utf-8", "surrogatepass").replace(b"\n", b" ") + b"\n")
    return found


def test_lines_of_prompts(tmp_path):
    """Every line is read or named; none stops the others."""
    path = tmp_path / "p.jsonl"
    given = lines(16)
    path.write_bytes(b"".join(given))
    read = list(read_prompts(path, {}))
    assert len(read) == sum(1 for line in given if line.strip())
    assert N / 10 < sum(line.job is not None for line in read) < N
    for line in read:
        assert (line.job is None) == bool(line.wrong) and "\n" not in line.wrong and len(line.wrong) < 1000
        json.dumps(line.about, allow_nan=False, ensure_ascii=False).encode()


def test_lines_of_captions(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")

    def parse(line):
        (tmp_path / "metadata.jsonl").write_bytes(line)
        folder = Folder(tmp_path)
        folder.about(folder.names[0])

    given = [line.replace(b'"prompt": "a cube"', b'"file_name": "a.png", "text": "a cube"') for line in lines(17)]
    assert none_but_ours(parse, given) > N / 10
