"""The same files give the same latents, bit for bit, as diffusers' own ``load_lora_weights``; what diffusers cannot
read is held against peft, or against the same adapter in a dialect that it reads."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

from sfumato.adapters.lora import LoRA, index_of
from sfumato.adapters.naming import places
from sfumato.models.quiet import quiet
from sfumato.sampling import generate
from tests.adapters import lora_files
from tests.adapters.lora_files import factors, write_kohya, write_peft
from tests.tiny import tiny_model

PROMPT = "a red cube and a dog"


def latents(model, systems=()):
    given = {"steps": 1, "seed": 3, "guidance": 1.0, "decode": False}
    return generate(model, PROMPT, interventions=systems, **given).latents


def theirs(kind, path, scale=0.7):
    model = tiny_model(kind, fresh=True)
    with quiet():
        model.pipe.load_lora_weights(str(path), adapter_name="x")
        model.pipe.set_adapters("x", scale)
    return latents(model)


def ours(kind, path, scale=0.7, **given):
    return latents(tiny_model(kind), LoRA(file=str(path), scale=scale, **given))


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "sd3", "flux"])
def test_as_the_pipeline_saves_it(kind, tmp_path):
    path = lora_files.write_saved(tmp_path, tiny_model(kind), factors(tiny_model(kind)))
    made = ours(kind, path)
    assert torch.equal(made, theirs(kind, path)) and not torch.equal(made, latents(tiny_model(kind)))


@pytest.mark.parametrize("write", [lora_files.write_attention_processors, lora_files.write_layers])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_older_dialects_of_diffusers(kind, write, tmp_path):
    path = write(tmp_path / "x.safetensors", factors(tiny_model(kind)))
    assert torch.equal(ours(kind, path), theirs(kind, path))


@pytest.mark.parametrize("alpha", [None, 1, 6])
def test_kohya_of_stable_diffusion(alpha, tmp_path):
    path = write_kohya(tmp_path / "x.safetensors", factors(tiny_model("sd"), alpha=alpha))
    assert torch.equal(ours("sd", path), theirs("sd", path))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_kohya_as_diffusers_writes_it(kind, tmp_path):
    state = load_file(write_peft(tmp_path / "x.safetensors", factors(tiny_model(kind))))
    save_file(convert_state_dict_to_kohya(state), tmp_path / "kohya.safetensors")
    assert torch.equal(ours(kind, tmp_path / "kohya.safetensors"), ours(kind, tmp_path / "x.safetensors"))


def published(kind):
    """diffusers path -> name in the code that the model was published with, for modules that are not fused."""
    index = index_of(tiny_model(kind))
    names = {}
    for (_, name), at in places(index).items():
        if len(at) == 1 and not at[0].rows and at[0].path.replace(".", "_") != name:
            names[at[0].path] = name
    return names


def test_kohya_of_sdxl_with_the_names_of_sgm(tmp_path):
    given = factors(tiny_model("sdxl"), alpha=2)
    names = published("sdxl")
    path = write_kohya(tmp_path / "x.safetensors", given, names, one_text=False)
    keys = load_file(path)
    assert any("input_blocks_3_1" in key for key in keys) and not any("down_blocks" in key for key in keys)
    assert torch.equal(ours("sdxl", path), theirs("sdxl", path))


def test_convolutions_and_the_names_of_ldm(tmp_path):
    """Every resnet, resampler and end of the network lies where LDM's code has it: the same file under both names."""
    model = tiny_model("sdxl")
    generator, given = torch.Generator().manual_seed(0), {}
    for path, module in model.denoiser.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and "attentions" not in path:
            out, *rest = module.weight.shape
            given[f"unet.{path}"] = {
                "down": 0.1 * torch.randn(2, *rest, generator=generator),
                "up": 0.1 * torch.randn(out, 2, *[1] * (len(rest) - 1), generator=generator),
                "alpha": torch.tensor(1.0),
            }
    ldm = write_kohya(tmp_path / "ldm.safetensors", given, published("sdxl"))
    names = " ".join(load_file(ldm))
    parts = ("input_blocks_0_0", "input_blocks_2_0_op", "middle_block_2", "out_2", "label_emb_0_2", "skip_connection")
    assert all(part in names for part in parts)
    plain = write_kohya(tmp_path / "plain.safetensors", given)
    assert torch.equal(ours("sdxl", ldm), ours("sdxl", plain))
    with_lora = tiny_model("sdxl", fresh=True)
    with_lora.pipe.load_lora_weights(str(ldm), adapter_name="x")
    with_lora.pipe.set_adapters("x", 0.7)
    assert torch.equal(ours("sdxl", ldm), latents(with_lora))


def test_kohya_of_flux_with_fused_projections(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def pair(rows, columns):
        return torch.randn(4, columns, generator=generator) * 0.3, torch.randn(rows, 4, generator=generator) * 0.3

    state = {}
    for name, (rows, columns) in {
        "double_blocks_0_img_attn_qkv": (96, 32),
        "double_blocks_0_txt_attn_qkv": (96, 32),
        "double_blocks_0_img_attn_proj": (32, 32),
        "double_blocks_0_txt_attn_proj": (32, 32),
        "double_blocks_0_img_mlp_0": (128, 32),
        "double_blocks_0_txt_mlp_2": (32, 128),
        "double_blocks_0_img_mod_lin": (192, 32),
        "single_blocks_1_linear2": (32, 160),
        "single_blocks_1_modulation_lin": (96, 32),
    }.items():
        down, up = pair(rows, columns)
        stem = f"lora_unet_{name}"
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    save_file(state, tmp_path / "x.safetensors")
    made = ours("flux", tmp_path / "x.safetensors", 1.0)
    # diffusers multiplies alpha / r into the factors beforehand, which rounds elsewhere
    torch.testing.assert_close(made, theirs("flux", tmp_path / "x.safetensors", 1.0), rtol=1e-5, atol=1e-5)


def test_the_widest_fused_projection_of_flux(tmp_path):
    """diffusers has the widths of the full-size model written into its converter: divided by hand instead."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 32, generator=generator), torch.randn(224, 4, generator=generator)
    stem = "diffusion_model.single_blocks.0.linear1"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, tmp_path / "x.safetensors")
    paths = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    split = {
        f"transformer.single_transformer_blocks.0.{path}": {"down": down.clone(), "up": part.clone()}
        for path, part in zip(paths, up.split([32, 32, 32, 128]), strict=True)
    }
    plain = write_peft(tmp_path / "y.safetensors", split)
    torch.testing.assert_close(ours("flux", tmp_path / "x.safetensors"), ours("flux", plain))


def test_the_names_of_sd3s_own_code(tmp_path):
    """diffusers reads no such file: the same adapter, divided by hand, in its own dialect."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 16, generator=generator), torch.randn(48, 4, generator=generator)
    last = torch.randn(4, 16, generator=generator), torch.randn(32, 4, generator=generator)
    stem, end = "lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_unet_final_layer_adaLN_modulation_1"
    save_file(
        {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{end}.lora_down.weight": last[0],
            f"{end}.lora_up.weight": last[1],
        },
        tmp_path / "x.safetensors",
    )
    split = {
        f"transformer.transformer_blocks.0.attn.to_{each}": {"down": down.clone(), "up": up[i * 16 :][:16].clone()}
        for i, each in enumerate("qkv")
    }
    turned = torch.cat([last[1][16:], last[1][:16]])  # scale and shift the other way round
    split["transformer.norm_out.linear"] = {"down": last[0], "up": turned}
    plain = write_peft(tmp_path / "y.safetensors", split)
    torch.testing.assert_close(ours("sd3", tmp_path / "x.safetensors"), ours("sd3", plain))


@pytest.mark.parametrize("setting", ["lora_alpha", "alpha_pattern", "use_rslora"])
def test_settings_of_peft_in_the_metadata(setting, tmp_path):
    model = tiny_model("sd", fresh=True)
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    more = {"alpha_pattern": {"attn2.to_v": 9}} if setting == "alpha_pattern" else {}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"], use_rslora=setting == "use_rslora", **more)
    model.denoiser.add_adapter(config, "x")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(model.denoiser, adapter_name="x"),
        unet_lora_adapter_metadata=model.denoiser.peft_config["x"].to_dict(),
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert torch.equal(ours("sd", file, 1.0), theirs("sd", file, 1.0))
    assert torch.equal(ours("sd", file, 1.0), latents(model))


@pytest.mark.parametrize("algebra", ["LoHa", "LoKr", "DoRA"])
def test_a_folder_that_peft_saved(algebra, tmp_path):
    """... of every algebra: what peft's own injected layers make."""
    import peft

    targets = ["to_q", "to_v", "conv1"]
    config = {
        "LoHa": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=targets, init_weights=False),
        "LoKr": lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=targets, init_weights=False),
        "DoRA": lambda: peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, use_dora=True
        ),
    }[algebra]()
    model = tiny_model("sd", fresh=True)
    wrapped = peft.get_peft_model(model.denoiser, config)
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.3
    wrapped.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found["peft_type"] == ("LORA" if algebra == "DoRA" else algebra.upper())
    lora = LoRA(file=str(tmp_path))
    assert lora.contents.algebras == [algebra]
    made = ours("sd", tmp_path, 1.0)
    assert torch.equal(made, latents(model)) and not torch.equal(made, latents(tiny_model("sd")))


def test_kohya_files_with_dora(tmp_path):
    """diffusers drops dora_scale with a warning; here it acts as in the webui."""
    given = factors(tiny_model("sd"), alpha=4, text=False)
    path = write_kohya(tmp_path / "x.safetensors", given)
    state = load_file(path)
    peft_state = {}
    for name, parts in given.items():
        weight = tiny_model("sd").denoiser.get_submodule(name.removeprefix("unet.")).weight
        scale = weight.norm(dim=1, keepdim=True) * 1.2
        state[f"lora_{name.replace('.', '_')}.dora_scale"] = scale
        peft_state |= {
            f"{name}.lora_A.weight": parts["down"],
            f"{name}.lora_B.weight": parts["up"],
            f"{name}.lora_magnitude_vector": scale.flatten().clone(),
        }
    save_file(state, path)
    save_file(peft_state, tmp_path / "y.safetensors")
    assert LoRA(file=str(path)).contents.algebras == ["DoRA"]
    assert torch.equal(ours("sd", path), ours("sd", tmp_path / "y.safetensors"))
    assert torch.equal(ours("sd", tmp_path / "y.safetensors"), theirs("sd", tmp_path / "y.safetensors"))


def test_tucker_cores_of_convolutions(tmp_path):
    module = "mid_block.resnets.0.conv1"
    generator = torch.Generator().manual_seed(0)
    down, mid = torch.randn(3, 32, 1, 1, generator=generator), torch.randn(3, 3, 3, 3, generator=generator)
    up = torch.randn(32, 3, 1, 1, generator=generator)
    stem = f"lora_unet_{module.replace('.', '_')}"
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": up},
        tmp_path / "x.safetensors",
    )
    model = tiny_model("sd")
    x = torch.randn(1, 32, 4, 4, generator=generator)
    conv = model.denoiser.get_submodule(module)
    expected = conv(x) + 0.5 * torch.nn.functional.conv2d(
        torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), mid, padding=1), up
    )
    with LoRA(file=str(tmp_path / "x.safetensors")).attach(model, 0.5):
        torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)
