"""A stranger's picture opens nothing of this computer, and nothing that is no ordinary file is opened at all."""

from __future__ import annotations

import contextlib
import json
import os
import signal

import pytest
from PIL import Image

from sfumato import cards, checkpoints, files, masks
from sfumato.app import JobBatch, edit_like, like, make
from sfumato.cards.paths import allowed, marked
from sfumato.errors import BadInput, NotAllowed, SfumatoError
from sfumato.hspace.basis import Directions
from sfumato.models import load
from sfumato.models.readers import load_clip, load_reader
from sfumato.sampling import recipe_args

SYSTEMS = {key: cards.method(key) for key in cards.methods()}
FILES = [(key, name) for key, cls in SYSTEMS.items() for name in marked(cls.Params)]
#: parameters that speak of pictures or files, and are texts
TEXTS = """background class_noun concepts content encoder exclude from_prompt hash layers name outside phrases prompt
source source_outside template templates texts word words"""


def picture(path, recipe):
    files.save_png(path, Image.new("RGB", (8, 8)), recipe)
    return path


def like_recipe(**more):
    return {"prompt": "a red cube", "model": "toy-sd", "seed": 1, **more}


@contextlib.contextmanager
def at_once(seconds=20):
    """Waiting for ever becomes an error."""

    def late(*_):
        raise AssertionError("it waits")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def test_the_systems_that_open_files():
    """At least these; others are found by what they say."""
    assert {f"{key}:{name}" for key, name in FILES} >= {
        "attention_relevance:detector", "blend:mask", "clip_guidance:clip", "conceptor:clip", "experts:models",
        "inject_fusion:content_image", "inject_fusion:mask", "inpaint:mask", "lora:file", "mgad:clip", "mgad:images",
        "no_token_left_behind:clip", "no_token_left_behind:mask", "paint_with_words:map", "paint_with_words:mask",
        "pullback:directions", "shape_guided:mask", "weights:file", "word:file",
    }  # fmt: skip


@pytest.mark.parametrize("key", SYSTEMS)
def test_whatever_sounds_like_a_file_is_marked(key):
    """A parameter that is a text and speaks of files, folders or pictures is marked, or known to be a text."""
    schema = SYSTEMS[key].Params
    properties = json.dumps(schema.model_json_schema())
    assert properties.count('"format": "path"') >= len(marked(schema))
    for name, field in schema.model_fields.items():
        kinds = str(field.annotation)
        speaks = any(word in (field.description or "") for word in ("file", "folder", "picture", "built-in"))
        if "str" in kinds and speaks and "Literal" not in kinds and name not in marked(schema):
            assert name in TEXTS.split(), f"{key}:{name} may open files: mark it as FilePath"


@pytest.mark.parametrize(("key", "name"), FILES)
@pytest.mark.parametrize("value", ["secret.png", ["secret.png"], {"a": ["secret.png:0.5"]}, ["toy-sd", "secret.png"]])
def test_no_recipe_opens_a_file(key, name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("secret.png")  # opening it would wait for ever
    recipe = {"method": key, "params": {name: value}}
    path = picture(tmp_path / "stranger.png", like_recipe(**{"with": [recipe]}))
    with at_once():
        for attempt in (
            lambda: like(path, {}, JobBatch([])),
            lambda: cards.from_recipe(recipe),
            lambda: make("a red cube", with_=recipe),
            lambda: recipe_args({"prompt": "x", "with": [recipe]}),
        ):
            with pytest.raises(NotAllowed, match=f"secret.png.*{name} of {key}.*--allow") as caught:
                attempt()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "name"), FILES)
def test_a_pipe_is_not_opened_though_allowed(key, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    value = "pipe.png" if "list" not in str(SYSTEMS[key].Params.model_fields[name].annotation) else ["pipe.png"]
    with at_once(), contextlib.suppress(SfumatoError):  # where it is opened only later: see the next test
        cards.from_recipe({"method": key, "params": {name: value}}, allow=["pipe.png"])


@pytest.mark.parametrize("read", [load, load_clip, load_reader, Directions.load, masks.read_mask, files.read_recipe,
                                  files.read_picture], ids=lambda read: read.__qualname__)  # fmt: skip
@pytest.mark.parametrize("what", ["pipe.png", "/dev/zero", "pipe.safetensors"])
def test_pipes_and_devices_are_refused(read, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    os.mkfifo("pipe.safetensors")
    with at_once(), pytest.raises(SfumatoError) as caught:
        read(what)
    assert "\n" not in str(caught.value)


def test_built_in_models_and_embedded_pictures_are_welcome(tmp_path):
    inside = masks.as_text(Image.new("L", (8, 8), 255))
    systems = [
        {"method": "mgad", "params": {"images": [inside], "clip": "toy-clip"}},
        {"method": "blend", "params": {"mask": [inside], "source": "a blue cube"}},
        "daam:words=cube",
    ]
    order = like(picture(tmp_path / "a.png", like_recipe(**{"with": systems})), {}, JobBatch([]))
    assert [type(each).CARD.key for each in order.systems()] == ["mgad", "blend", "daam"]


def test_what_is_allowed(tmp_path):
    (tmp_path / "in").mkdir()
    mask = tmp_path / "in" / "m.png"
    Image.new("L", (8, 8), 255).save(mask)
    (tmp_path / "in" / "out.png").symlink_to(tmp_path / "other.png")
    system = {"method": "blend", "params": {"mask": [str(mask)], "source": "a blue cube"}}
    path = picture(tmp_path / "a.png", like_recipe(**{"with": [system]}))
    for allow in ([mask], [str(mask)], [tmp_path / "in"], ["elsewhere", str(tmp_path)]):
        assert len(like(path, {}, JobBatch([], allow=allow)).systems()) == 1
    for allow in ([], [tmp_path / "in" / "n.png"], [str(mask)[:-1]]):
        with pytest.raises(NotAllowed, match=f"a.png: .*--allow {mask}"):
            like(path, {}, JobBatch([], allow=allow))
    assert not allowed(str(tmp_path / "in" / "out.png"), [tmp_path / "in"])  # it leads out of the folder
    assert allowed("ref.png:-0.5", ["ref.png"]) and not allowed("\0", ["/"])


def test_adapters_that_a_prompt_names(tmp_path):
    path = picture(tmp_path / "a.png", like_recipe(prompt="a cube <lora:ink:0.8>"))
    with pytest.raises(NotAllowed, match="'ink' .file of lora.*--allow ink"):
        like(path, {}, JobBatch([]))
    assert like(path, {}, JobBatch([], allow=["ink"])).jobs[0].prompt == "a cube <lora:ink:0.8>"


def test_an_edit_of_a_stranger_opens_nothing(tmp_path):
    original = picture(tmp_path / "a.png", like_recipe())
    systems = [{"method": "lora", "params": {"file": "/etc/passwd"}}]
    block = {"pixels": files.pixel_hash(files.read_picture(original)), "mask": None, "options": {}, "with": systems}
    edited = picture(tmp_path / "b.png", like_recipe(edit=block))
    with pytest.raises(NotAllowed, match="the recipe in .*b.png names files.*/etc/passwd"):
        edit_like(edited, original, None)
    assert edit_like(edited, original, None, ["/etc/passwd"])["with_"] == systems


@pytest.mark.parametrize("params", [{"self": 1}, {"vectors": "x"}, {"__class__": 1}, {"\ud800": 1}, {"word": {"a": 1}}])
def test_parameters_that_are_none(params):
    with pytest.raises((BadInput, LookupError)):
        cards.from_recipe({"method": "conceptor", "params": params})


@pytest.mark.parametrize("model", ["//evil.example/share/x", "\\\\evil.example\\share\\x.safetensors", "/\\evil/x"])
def test_no_recipe_asks_another_computer(model, tmp_path, monkeypatch):
    """To look whether a network path is there sends its owner this user's name, on Windows."""
    monkeypatch.setattr(checkpoints, "is_pipeline", lambda path: pytest.fail(f"{path} was looked at"))
    path = picture(tmp_path / "a.png", like_recipe(model=model, hash="0" * 64))
    with pytest.raises(BadInput, match="neither built in nor here"):
        like(path, {}, JobBatch([]))
