"""What errors about files, commands and runs say would help, helps: the file is got again, moved, named otherwise."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from sfumato import app, cards, writing
from sfumato.adapters.trainable import copies
from sfumato.bench.journal import Journal
from sfumato.models import Model, load, quiet
from sfumato.sampling.request import checked_request
from sfumato.training import runs
from tests.front_door.remedies import PICTURE, PROMPT, SAID, draw, follows, fresh, message, named
from tests.tiny import tiny_model, tiny_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"


def _model(at, spoil=None):
    """A model folder, whose denoiser's file is spoilt, or got again from where it came from."""
    folder, source = at / "model", at / "source"
    if not source.exists():
        with quiet():
            tiny_pipeline("sd").save_pretrained(source)
        shutil.copytree(source, folder)
    if spoil is None:
        shutil.copy(source / UNET, folder / UNET)
    else:
        spoil(folder / UNET)
    return load(folder)


def _pickled(path):
    path.replace(path.with_suffix(".bin"))


def _pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")


def _lora(at, name):
    place = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{place}.lora_A.weight": torch.ones(2, 32), f"{place}.lora_B.weight": torch.ones(32, 2)}, at / name)
    return cards.method("lora")(file=str(at / name))


def _pickle(at):
    torch.save({}, at / "x.pt")
    return cards.method("lora")(file=str(at / "x.pt"))


def _journal(at, move=False):
    if move:
        (at / "metadata.jsonl").rename(at / "moved.jsonl")
    else:
        (at / "metadata.jsonl").write_text("{not json\n")
    assert Journal(at).take("key") is None


def _written(at, name):
    with writing.output(at / name) as (_, path):
        path.write_bytes(b"whole")


def _explained(**given):
    model = tiny_model("sd")
    given = {"model": model, "steps": 1, **given}
    return app.explain(PICTURE, prompt=PROMPT, **given)


TABLE = {
    "cut off: ": (
        lambda at: _model(at, lambda path: path.write_bytes(path.read_bytes()[:-9])), lambda said, at: _model(at),
    ),
    "corrupt safetensors header; get the file again": (
        lambda at: _model(at, lambda path: path.write_bytes(b"\x08" + bytes(7) + b"no json!")),
        lambda said, at: _model(at),
    ),
    "run `git lfs pull` in its repository": (lambda at: _model(at, _pointer), lambda said, at: _model(at)),
    "get the .safetensors files of this model": (lambda at: _model(at, _pickled), lambda said, at: _model(at)),
    "Get the .safetensors": (
        lambda at: draw(tiny_model("sd"), by=_pickle(at)),
        lambda said, at: draw(tiny_model("sd"), by=_lora(at, "x.safetensors")),
    ),
    "is damaged; move the file away": (lambda at: _journal(at), lambda said, at: _journal(at, move=True)),
    "; name such a file": (
        lambda at: _written(at, "x.pdf"),
        lambda said, at: _written(at, "x" + named(r"ends in (\.\w+)", said)),
    ),
    "or leave with_ out": (
        lambda at: _explained(with_=["structured_guidance"]), lambda said, at: _explained(),
    ),
    "but no adapter is read here; give --with lora:file=NAME": (
        lambda at: checked_request(tiny_model("sd"), "a cube <lora:x:1>"),
        lambda said, at: draw(tiny_model("sd"), by=_lora(at, "x.safetensors")),
    ),
    "load it with dtype=float32": (
        lambda at: copies(_half(), {"unet": r"conv_in\.weight"}),
        lambda said, at: copies(fresh("sd"), {"unet": r"conv_in\.weight"}),
    ),
}  # fmt: skip


def _half():
    return Model(tiny_pipeline("sd", fresh=True).to(dtype=torch.bfloat16), name="tiny")


@pytest.mark.parametrize("fragment", TABLE)
def test_files(fragment, tmp_path):
    fails, helps = TABLE[fragment]
    said = message(lambda: fails(tmp_path))
    assert fragment in said
    helps(said, tmp_path)


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def refuses(sfumato):
    """A command that is refused: what it says is remembered for :func:`follows`."""

    def run(*args):
        done = sfumato(*args)
        assert done.code in (2, 130), done
        SAID.append(done.err)
        return done.err

    return run


@follows("give --ray too", "spreads the lines of a prompts file: give --prompts")
def test_ray(refuses, sfumato, monkeypatch):
    seen = []
    monkeypatch.setattr("sfumato.app.make_prompts", lambda *_, **given: seen.append(given) or iter(()))
    with open("p.jsonl", "w") as file:
        file.write('{"prompt": "a cube"}\n')
    refuses("make", "--prompts", "p.jsonl", "--workers", 2)
    refuses("make", "a cube", "--ray")
    assert sfumato("make", "--prompts", "p.jsonl", "--workers", 2, "--ray").code == 0
    assert seen == [{"ray": True, "workers": 2}]


@follows("convert takes two files and a dialect")
def test_convert(refuses, sfumato, tiny_sd, tmp_path):
    _lora(tmp_path, "x.safetensors")
    said = refuses("adapters", "convert", tmp_path / "x.safetensors", "--to", "kohya")
    words = named(r"sfumato (adapters convert IN OUT --to \w+)", said).split()
    given = {"IN": tmp_path / "x.safetensors", "OUT": tmp_path / "y.safetensors"}
    done = sfumato(*(given.get(word, word) for word in words), "--model", tiny_sd)
    assert done.code == 0 and (tmp_path / "y.safetensors").is_file(), done.err


@follows("use 'cpu', or leave device out")
def test_devices(refuses, sfumato, monkeypatch):
    asked = []

    def begin(recipe, folder, snapshots, device):
        asked.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runs, "TrainingRun", begin)
    refuses("train", "toy-vae", "--device", "cuda")
    assert [sfumato("train", "toy-vae", *more).code for more in (("--device", "cpu"), ())] == [130, 130]
    assert asked == ["cpu", None]


@follows("and there are none: give --real, or leave net out")
def test_a_net_without_anything_to_measure_to(refuses, sfumato, clip_folder, renders, others):
    refuses("judge", others, "--net", clip_folder, "--metric", "presence")
    assert sfumato("judge", others, "--net", clip_folder, "--real", renders, "--metric", "frechet").code == 0
    assert sfumato("judge", others, "--metric", "presence").code == 0
    refuses("compare", others, renders, "--net", clip_folder)


def test_readers_that_are_known_read(refuses):
    said = refuses("teach", "toybox", "--by", "robust_vit", "--model", "nobody/nothing", "-o", "taught")
    assert "toy-vit" in said and "toy-sd" not in said and "toy-vae" not in said


@follows("say --by lrp", "such as --model toy-vit")
def test_who_explains_what(refuses, sfumato):
    PICTURE.resize((64, 64)).save("photo.png")
    by = named(r"say (--by \w+)", refuses("explain", "photo.png", "--prompt", "a cube", "--model", "toy-vit")).split()
    model = named(r"such as (--model toy-vit)", refuses("explain", "photo.png", "--prompt", "a cube", *by)).split()
    done = sfumato("explain", "photo.png", *by, *model, "-o", "found")
    assert done.code == 0 and done.lines, done.err


@follows("go on with: ")
def test_a_teaching_goes_on(refuses, sfumato, tiny_sd, monkeypatch):
    import os
    import shlex

    os.mkdir("photos")
    for i in range(2):
        PICTURE.save(f"photos/{i}.png")
    words = ["teach", "photos", "--name", "<rex>", "--steps", "2", "--model", str(tiny_sd), "-o", "rex.safetensors"]
    monkeypatch.setattr(sys, "argv", ["sfumato", *words])
    said = refuses(*words, "--minutes", 1e-9)
    again = shlex.split(named(r"go on with: (sfumato .*)$", said.strip()))
    done = sfumato(*again[1:])
    assert done.code == 0 and os.path.isfile("rex.safetensors") and not os.path.exists("rex.safetensors.training")
