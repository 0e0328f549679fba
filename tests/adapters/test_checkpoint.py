"""Single files: what diffusers' own converters make of them is the model again, bit for bit."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders import single_file_utils as stock
from safetensors.torch import load_file

from sfumato import app
from sfumato.adapters.checkpoint import save_checkpoint, single_file
from sfumato.errors import BadInput, NotSupported
from tests.adapters.lora_files import factors, write_peft
from tests.tiny import tiny_model


def same(found, wanted):
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:4]
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_diffusers_reads_the_model_back(kind, tmp_path):
    model = tiny_model(kind)
    file = load_file(save_checkpoint(model, tmp_path / "m.safetensors"))
    unet, vae = model.pipe.unet, model.pipe.vae
    same(stock.convert_ldm_unet_checkpoint(dict(file), dict(unet.config)), unet.state_dict())
    same(stock.convert_ldm_vae_checkpoint(dict(file), dict(vae.config)), vae.state_dict())
    texts = {"sd": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
    if kind in texts:
        found = {key.removeprefix(f"{texts[kind]}text_model."): value for key, value in file.items()
                 if key.startswith(texts[kind])}  # fmt: skip
        same(found, model.pipe.text_encoder.state_dict())
    if kind == "sdxl":
        found = stock.convert_open_clip_checkpoint(
            model.pipe.text_encoder_2, dict(file), prefix="conditioner.embedders.1.model."
        )
        own = model.pipe.text_encoder_2.state_dict()
        same({key: found[key] for key in own}, own)


def test_a_fine_tuned_model_becomes_one_file(tmp_path, monkeypatch):
    model = tiny_model("sd")
    lora = write_peft(tmp_path / "x.safetensors", factors(model, text=False))
    (file,) = app.convert(lora, tmp_path / "m.safetensors", "checkpoint", model)
    merged, bare = load_file(file), single_file(model)
    changed = {key for key in bare if not torch.equal(merged[key], bare[key])}
    assert changed and all("attn" in key for key in changed)
    with pytest.raises(BadInput, match="say which model"):
        app.convert(lora, tmp_path / "n.safetensors", "checkpoint")
    with pytest.raises(BadInput, match="exists"):
        app.convert(lora, tmp_path / "m.safetensors", "checkpoint", model)


def test_other_families_are_refused():
    with pytest.raises(NotSupported, match="Stable Diffusion 1, 2 and XL"):
        single_file(tiny_model("sd3"))
