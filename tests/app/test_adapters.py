"""`sfumato adapters`, adapters in `make`, and their place in recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato import files
from sfumato.adapters.word import save_word
from tests.adapters.lora_files import factors, write_kohya, write_peft
from tests.tiny import tiny_model


@pytest.fixture
def lora(tmp_path) -> Path:
    given = factors(tiny_model("sd"), alpha=2)
    tags = json.dumps({"10_toy": {"red toy": 3, "grass": 9}, "1_other": {"red toy": 7}})
    return write_kohya(
        tmp_path / "toy.safetensors",
        given,
        metadata={"modelspec.title": "Toy", "ss_steps": "10", "ss_tag_frequency": tags},
    )


@pytest.fixture
def word(tmp_path) -> Path:
    return save_word(tmp_path / "rex.safetensors", "<rex>", {"text_encoder": torch.randn(2, 16)})


def test_what_files_hold_and_fit(sfumato, lora, word, tiny_sd):
    done = sfumato("adapters", lora, word, "--model", tiny_sd)
    assert done.code == 0, done.err
    text = done.out
    assert "LoRA (kohya); rank 4; alpha 2; 32 modules of denoiser, 12 modules of text_encoder" in text
    assert (
        "modelspec.title: Toy" in text
        and "captions said most: red toy, grass" in text
        and f"fits {tiny_sd}: yes: all 44 modules" in text
    )
    assert "<rex> = 2 x 16 for one text encoder" in text and "yes: all 1 widths" in text
    told = json.loads(sfumato("adapters", lora, "--json").out)
    assert told[0]["ranks"] == {"4": 44} and told[0]["algebras"] == ["LoRA"] and len(told[0]["hash"]) == 64
    assert set(told[0]["fits"]) == {"toy-sd", "toy-sd3", "toy-sd-inpaint"}
    assert all(answer.startswith("no: ") for answer in told[0]["fits"].values())


def test_other_files(sfumato, refused, tmp_path):
    save_file({"unet.mid_block.attentions.0.proj_in.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    save_file({"model.diffusion_model.out.2.weight": torch.ones(2, 2)}, tmp_path / "c.safetensors")
    save_file({"x": torch.ones(2, 2, 2)}, tmp_path / "u.safetensors")
    done = sfumato("adapters", *(tmp_path / f"{name}.safetensors" for name in "wcu"))
    assert [line.split(": ")[1].split(" ")[0].strip(";") for line in done.lines if not line.startswith(" ")] == [
        "weights", "checkpoint", "unknown",
    ]  # fmt: skip
    refused("adapters", tmp_path / "none.safetensors", says=["no adapter file", "none.safetensors"])
    torch.save({}, tmp_path / "x.pt")
    refused("adapters", tmp_path / "x.pt", says=["is a pickle", "save_file"])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "u.safetensors").read_bytes()[:-3])
    refused("adapters", tmp_path / "cut.safetensors", says=["cut off"])


def test_a_picture_is_repeated_with_the_same_files_only(sfumato, refused, lora, word, tiny_sd, loaded_once):
    with_ = ("--with", f"lora:file={lora},scale=-0.5", "--with", f"word:file={word}")
    done = sfumato("make", "a red <rex>", "--model", tiny_sd, "--steps", 1, *with_, "-o", "one")
    assert done.code == 0, done.err
    (picture,) = Path("one").glob("*.png")
    recipe, exact = files.read_recipe(picture)
    assert exact and [each["method"] for each in recipe["with"]] == ["lora", "word"]
    leave = ("--model", tiny_sd, "--allow", lora, "--allow", word)
    refused("make", "--like", picture, "--model", tiny_sd, says=["names files of this computer", "--allow"])
    again = sfumato("make", "--like", picture, *leave, "-o", "two")
    assert again.code == 0, again.err
    (copy,) = Path("two").glob("*.png")
    assert copy.read_bytes() == picture.read_bytes()
    save_file({key: value * 2 for key, value in load_file(word).items()}, word)
    refused("make", "--like", picture, *leave, says=["cannot be followed", str(word), "has changed"])
    word.unlink()
    refused("make", "--like", picture, *leave, says=["cannot be followed", "no adapter file", str(word)])


def test_bad_adapters_are_told_before_the_model_is_loaded(refused, lora, tmp_path):
    refused("make", "a cube", "--model", "nowhere", "--with", "lora:file=missing", says=["no adapter file 'missing'"])
    refused("make", "a cube", "--model", "nowhere", "--with", "lora", says=["file of lora", "must be given"])
    peft = write_peft(tmp_path / "sd3.safetensors", factors(tiny_model("sd3"), text=False))
    refused("make", "a cube", "--with", f"lora:file={peft}", says=["fits 0 of", "toy-sd"])
