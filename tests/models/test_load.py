"""Loading: what is saved comes back bit for bit; what is broken is refused in one line that says what and where."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sfumato.errors import BadInput, BadWeights, NotSupported, SfumatoError, UnknownName
from sfumato.models import Model, load
from sfumato.models.quiet import quiet
from tests.tiny import tiny_model, tiny_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"
Saved = Callable[[str], Path]


# --- what works -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd35", "sd3clip", "flux", "pixart", "pixart_alpha"])
def test_saved_and_loaded(kind: str, saved: Saved, capfd: pytest.CaptureFixture[str]) -> None:
    original = tiny_model(kind, own_length=True)
    folder = saved(kind)
    capfd.readouterr()
    model = load(folder)
    assert capfd.readouterr() == ("", "")
    assert model.name == str(folder) and model.revision is None
    assert type(model.pipe) is type(original.pipe)
    assert model.modules.keys() == original.modules.keys()
    for name, module in model.modules.items():
        expected = original.modules[name].state_dict()
        assert module.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert model.sites(32, 48) == original.sites(32, 48)
    prompt = "a photo of a red cube"
    mine, theirs = model.encode_text(prompt).cond, original.encode_text(prompt).cond
    assert torch.equal(mine["embeds"][:, :77], theirs["embeds"][:, :77])


@pytest.mark.parametrize("dtype", ["bf16", torch.float16])
def test_dtype(dtype: object, saved: Saved) -> None:
    model = load(saved("sd"), dtype=dtype)  # type: ignore[arg-type]
    expected = torch.bfloat16 if dtype == "bf16" else torch.float16
    assert model.dtype == expected
    assert {p.dtype for module in model.modules.values() for p in module.parameters()} == {expected}


def test_weight_hash_is_of_the_content(saved: Saved, broken: Path) -> None:
    model = load(saved("sd"))
    assert model.weight_hash == load(broken).weight_hash == tiny_model("sd").weight_hash
    assert len(model.weight_hash) == 64
    tensors = load_file(broken / UNET)
    save_file(dict(reversed(tensors.items())), broken / UNET, metadata={"format": "pt", "note": "other order"})
    assert load(broken).weight_hash == model.weight_hash
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, broken / UNET, metadata={"format": "pt"})
    assert load(broken).weight_hash != model.weight_hash


def test_sharded_weights_and_variants(saved: Saved, broken: Path) -> None:
    expected = load(saved("sd")).weight_hash
    tensors = load_file(broken / UNET)
    names = sorted(tensors)
    shards = {"unet-00001.safetensors": names[:50], "unet-00002.safetensors": names[50:]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, broken / "unet" / shard, metadata={"format": "pt"})
    (broken / UNET).unlink()
    table = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    index = broken / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(table))
    assert load(broken).weight_hash == expected
    (broken / "unet/unet-00002.safetensors").unlink()
    with pytest.raises(BadWeights, match=r"index.json names shards that are not there: unet-00002.safetensors"):
        load(broken)

    index.unlink()
    (broken / "unet/unet-00001.safetensors").unlink()
    save_file(tensors, broken / "unet/diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    assert load(broken).weight_hash == expected


def test_card(broken: Path) -> None:
    card = {"sampling": {"steps": 20, "guidance": 4.0, "scheduler": "ddim", "size": [32, 64]}}
    (broken / "sfumato.json").write_text(json.dumps(card))
    model = load(broken)
    assert model.card == card and model.default_size == (32, 64)
    assert model.defaults == {"steps": 20, "guidance": 4.0, "scheduler": "ddim", "size": [32, 64]}
    assert tiny_model("sdxl").defaults["guidance"] == 5.0


def test_unused_parts_may_be_missing(broken: Path) -> None:
    index = json.loads((broken / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (broken / "model_index.json").write_text(json.dumps(index))
    assert load(broken).pipe.safety_checker is None


LIBRARIES = ("diffusers", "transformers", "huggingface_hub")


def test_quiet_is_quiet_whatever_the_user_has_set(caplog, capfd, monkeypatch) -> None:
    for name in LIBRARIES:
        log = logging.getLogger(name)
        monkeypatch.setattr(log, "propagate", True)
        with quiet():
            logging.getLogger(f"{name}.anything").error("not heard")
        assert log.propagate
        logging.getLogger(f"{name}.anything").error("heard")
    assert {record.message for record in caplog.records} == {"heard"}
    assert "not heard" not in capfd.readouterr().err


def test_loading_leaves_no_trace_in_the_libraries(saved: Saved, broken: Path) -> None:
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    def settings() -> list[object]:
        return [
            diffusers.utils.logging.is_progress_bar_enabled(),
            transformers.utils.logging.is_progress_bar_enabled(),
            huggingface_hub.utils.are_progress_bars_disabled(),
            *((log.level, [*log.handlers], log.propagate) for log in map(logging.getLogger, LIBRARIES)),
            torch.random.get_rng_state().tolist(),
            torch.get_default_dtype(),
        ]

    before = settings()
    load(saved("sd"), dtype="bf16")
    (broken / UNET).write_bytes(b"")
    with pytest.raises(BadWeights):
        load(broken)
    assert settings() == before


def test_importing_says_nothing_and_changes_nothing() -> None:
    code = "import sys, sfumato.models; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- names ----------------------------------------------------------------------------------------------------------


def test_builtin_names(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato import registry

    monkeypatch.setattr(registry, "names", lambda: ["toy-clip", "toy-sd"])
    monkeypatch.setattr(registry, "find", lambda name: saved("sd") if name == "toy-sd" else None)
    assert load("toy-sd").name == "toy-sd"
    with pytest.raises(UnknownName, match="unknown model 'toysd'. Did you mean 'toy-sd'"):
        load("toysd")
    with pytest.raises(UnknownName, match="unknown model ''"):
        load("")


@pytest.mark.parametrize("name", ["no/such/path", "model.safetensors", "./here", "x" * 5000, "nul\0byte/x"])
def test_nothing_there(name: str) -> None:
    with pytest.raises(BadInput) as caught:
        load(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_hub_id_offline_and_from_the_cache(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        BadInput, match="nobody/nothing is not in the local cache and the Hugging Face Hub cannot be rea"
    ):
        load("nobody/nothing")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--somebody--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    shutil.copytree(saved("sd"), repo / "snapshots" / commit)
    for revision in (None, "main", commit):
        model = load("somebody/tiny", revision=revision)
        assert (model.name, model.revision) == ("somebody/tiny", commit)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(BadInput, match="somebody/tiny at 'v2' is not in the local cache"):
        load("somebody/tiny", revision="v2")


def test_arguments_refused(saved: Saved) -> None:
    folder = saved("sd")
    with pytest.raises(UnknownName, match="unknown dtype 'fp17'. Did you mean 'fp16'"):
        load(folder, dtype="fp17")
    with pytest.raises(BadInput, match="device='gpu' is not available here"):
        load(folder, device="gpu")
    with pytest.raises(BadInput, match="revision='x' only applies to a Hub id"):
        load(folder, revision="x")
    with pytest.raises(BadInput, match="config='x' only applies to a single-file checkpoint"):
        load(folder, config="x")


# --- folders that are not models ------------------------------------------------------------------------------------


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_not_a_diffusers_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a diffusers model: it has no model_index.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"_class_name": "AudioLDMPipeline"},
            NotSupported,
            "'AudioLDMPipeline' is not supported; known: AmusedPipeline",
        ),
        ({"_class_name": ["my_code", "Pipe"]}, NotSupported, "custom pipeline code is never run"),
        ({"_class_name": None}, NotSupported, "names no diffusers pipeline"),
        ({"unet": ["my_code", "UNet2DConditionModel"]}, NotSupported, "my_code.UNet2DConditionModel"),
        ({"unet": ["transformers", "Trainer"]}, NotSupported, "transformers.Trainer"),
        ({"unet": ["os", "system"]}, NotSupported, "os.system"),
        ({"unet": [None, None]}, BadInput, "is not a whole StableDiffusionPipeline: it has no unet"),
        ({"tokenizer": [None, None]}, BadInput, "it has no tokenizer"),
        ({"scheduler": ["diffusers", "UNet2DConditionModel"]}, BadWeights, "scheduler holds no weights"),
        ({"unet": ["diffusers"]}, NotSupported, "unet is declared as"),
    ],
)
def test_index_refused(broken: Path, changes: dict, error: type[SfumatoError], message: str) -> None:
    edit_index(broken, **changes)
    with pytest.raises(error, match=message) as caught:
        load(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", [{"quant_method": "bitsandbytes"}, {"quant_method": "torchao"}, {"bits": 4}])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_quantized_parts_are_refused_by_name(broken: Path, part: str, said: dict) -> None:
    path = broken / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": said}))
    method = said.get("quant_method", "by an unnamed method")
    with pytest.raises(NotSupported, match=rf"{part} is quantized \({method}\); only whole weights") as caught:
        load(broken)
    assert "\n" not in str(caught.value)


def test_text_encoders_of_another_width(broken: Path) -> None:
    """Whole in itself, and nothing that its denoiser could read."""
    config = transformers.CLIPTextConfig.from_pretrained(broken / "text_encoder", hidden_size=24)
    transformers.CLIPTextModel(config).save_pretrained(broken / "text_encoder")
    with pytest.raises(BadInput, match=r"vectors of 24 numbers, its denoiser reads 16 \(cross_attention_dim\); load"):
        load(broken).encode_text("a cube")


def test_text_encoders_that_cannot_read_their_prompts(broken: Path) -> None:
    """Fewer tokens or positions than the tokenizer gives, and a first encoder of another width."""
    for less in ({"vocab_size": 20}, {"max_position_embeddings": 16}):
        config = transformers.CLIPTextConfig.from_pretrained(broken / "text_encoder", **less)
        transformers.CLIPTextModel(config).save_pretrained(broken / "text_encoder")
        with pytest.raises(BadInput, match="cannot read what its tokenizers make of a prompt.*load it with"):
            load(broken).encode_text("a cube")
    pipe = tiny_pipeline("flux", fresh=True)
    config = type(pipe.text_encoder.config)(**{**pipe.text_encoder.config.to_dict(), "hidden_size": 24})
    pipe.register_modules(text_encoder=transformers.CLIPTextModel(config))
    with pytest.raises(BadInput, match=r"vectors of 24 numbers, its denoiser reads \d+ \(pooled_projection_dim\)"):
        Model(pipe).encode_text("a cube")


def test_missing_part(broken: Path) -> None:
    shutil.rmtree(broken / "vae")
    with pytest.raises(BadInput, match="vae is missing although model_index.json names it"):
        load(broken)
    (broken / "model_index.json").write_text("{ half")
    with pytest.raises(BadInput, match="model_index.json is not valid JSON"):
        load(broken)
    (broken / "model_index.json").write_text("[]")
    with pytest.raises(BadInput, match="must hold a JSON object"):
        load(broken)


@pytest.mark.parametrize("part", ["unet/config.json", "text_encoder/config.json"])
def test_broken_config(broken: Path, part: str) -> None:
    (broken / part).write_text("{ half")
    with pytest.raises(BadWeights, match=f"cannot load .*{part.split('/')[0]} as ") as caught:
        load(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["tokenizer/tokenizer.json", "scheduler/scheduler_config.json"])
def test_broken_tokenizer_and_scheduler(broken: Path, part: str) -> None:
    (broken / part).write_text("{ half")
    with pytest.raises(BadInput, match=f"cannot load .*{part.split('/')[0]} as ") as caught:
        load(broken)
    assert "\n" not in str(caught.value)


# --- broken weights -------------------------------------------------------------------------------------------------


class Canary:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_pickles_are_recognised_by_content(broken: Path, tmp_path: Path, name: str, protocol: int) -> None:
    (broken / UNET).unlink()
    canary = tmp_path / "executed"
    (broken / "unet" / name).write_bytes(pickle.dumps(Canary(canary), protocol))
    with pytest.raises(BadWeights, match="pickle") as caught:
        load(broken)
    assert "\n" not in str(caught.value) and not canary.exists()


def test_zipped_pickle_named_safetensors(broken: Path) -> None:
    with zipfile.ZipFile(broken / UNET, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    with pytest.raises(BadWeights, match="is a pickle or an archive of pickles"):
        load(broken)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"", "no safetensors file"),
        (b"<!DOCTYPE html><html></html>" * 9, "no safetensors file"),
        (b"\xff" * 8 + b"{}", "no safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "corrupt safetensors header"),
        ((4).to_bytes(8, "little") + b"{\xff\xfe}", "corrupt safetensors header"),
        ((9).to_bytes(8, "little") + b'{"a": {}}', "corrupt safetensors header"),
    ],
)
def test_other_files_named_safetensors(broken: Path, start: bytes, message: str) -> None:
    (broken / UNET).write_bytes(start)
    with pytest.raises(BadWeights, match=message):
        load(broken)


def test_truncated_at_many_places(broken: Path) -> None:
    whole = (broken / UNET).read_bytes()
    for size in [1, 7, 8, 9, 100, 5000, len(whole) // 2, len(whole) - 1]:
        (broken / UNET).write_bytes(whole[:size])
        with pytest.raises(BadWeights, match=r"get (it|the file) again from its source") as caught:
            load(broken)
        assert "\n" not in str(caught.value)
    (broken / UNET).write_bytes(whole + b"tail")
    with pytest.raises(BadWeights, match="is a corrupt safetensors file"):
        load(broken)


def rewrite(folder: Path, part: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / part)
    change(tensors)
    save_file(tensors, folder / part, metadata={"format": "pt"})


CASES = {
    "missing": (lambda t, key: t.pop(key), r"tensor {key} is missing from the weights"),
    "extra": (
        lambda t, key: t.update({"extra.weight": torch.zeros(2)}),
        r"tensor extra.weight is in the weights but not in the architecture",
    ),
    "shape": (
        lambda t, key: t.update({key: torch.zeros(3)}),
        r"tensor {key} has shape \(3,\), but config.json asks for",
    ),
    "nan": (lambda t, key: t[key].view(-1).__setitem__(0, float("nan")), r"tensor {key} holds NaN or infinite values"),
    "infinite": (lambda t, key: t[key].view(-1).__setitem__(0, float("inf")), r"tensor {key} holds NaN or infinite"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("part", "key"),
    [
        (UNET, "conv_in.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
        ("text_encoder/model.safetensors", None),
    ],
    ids=["unet", "vae", "text_encoder"],
)
def test_tensors_that_do_not_fit(broken: Path, part: str, key: str | None, case: str) -> None:
    key = key or next(name for name in load_file(broken / part) if name.endswith("final_layer_norm.weight"))
    change, message = CASES[case]
    rewrite(broken, part, lambda tensors: change(tensors, key))
    shown = key.removeprefix("text_model.")
    with pytest.raises(BadWeights, match=message.format(key=rf"[\w.]*{shown}")) as caught:
        load(broken)
    assert "\n" not in str(caught.value) and part.split("/")[0] in str(caught.value)


def test_a_large_but_finite_tensor_is_accepted(broken: Path) -> None:
    """Its sum overflows float32, which alone must not condemn it."""
    rewrite(broken, UNET, lambda tensors: tensors["conv_in.weight"].fill_(3e38))
    assert load(broken).pipe.unet.conv_in.weight.isfinite().all()


def test_old_position_ids_are_harmless(broken: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    rewrite(broken, "text_encoder/model.safetensors", add)
    load(broken)
