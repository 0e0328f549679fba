"""LoRA: attached and gone without a trace, in any number, at any scale, refused in one line where it does not fit."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from sfumato.adapters.convert import convert
from sfumato.adapters.layers import AdaptedModule
from sfumato.adapters.lora import LoRA, index_of, save_lora
from sfumato.adapters.word import Word
from sfumato.cards import build, from_recipe, to_recipe
from sfumato.errors import BadInput, BadWeights, NoMatch, NotSupported, WorkInterrupted
from sfumato.models import Model
from sfumato.sampling import generate, recipe_args
from tests.adapters.lora_files import factors, write_kohya, write_peft
from tests.helpers import fingerprint
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"


def latents(model, systems=(), **more):
    given = {"steps": 1, "seed": 5, "guidance": 1.0, "scheduler": "ddim", "decode": False, **more}
    return generate(model, PROMPT, interventions=systems, **given).latents


@pytest.fixture
def file(tmp_path):
    return str(write_peft(tmp_path / "x.safetensors", factors(tiny_model("sd"))))


def test_nothing_stays_after_a_run_a_failure_or_an_interruption(file):
    model = tiny_model("sd")
    before, keys, bare = fingerprint(model), list(model.denoiser.state_dict()), latents(model)
    changed = latents(model, LoRA(file=file))
    assert not torch.equal(changed, bare)
    for error, raised in ((RuntimeError("boom"), RuntimeError), (KeyboardInterrupt(), WorkInterrupted)):

        def fail(step, error=error):
            raise error

        with pytest.raises(raised):
            generate(model, PROMPT, steps=2, interventions=LoRA(file=file), on_step=fail)
    assert fingerprint(model) == {**before, "rng": fingerprint()["rng"]}
    assert list(model.denoiser.state_dict()) == keys and torch.equal(latents(model), bare)


def test_it_can_be_attached_outside_of_a_run(file):
    model = tiny_model("sd")
    inside = latents(model, LoRA(file=file, scale=0.6))
    with LoRA(file=file).attach(model, 0.6):
        assert torch.equal(latents(model), inside)


def test_scales_have_a_sign_and_0_is_nothing(file):
    model = tiny_model("sd")
    bare = latents(model)
    assert torch.equal(latents(model, LoRA(file=file, scale=0)), bare)
    small = 1e-3
    up, down = (latents(model, LoRA(file=file, scale=s)) - bare for s in (small, -small))
    assert torch.cosine_similarity(up.flatten(), down.flatten(), dim=0) < -0.9  # the opposite, to first order


def test_several_add_up_in_the_order_given(tmp_path):
    model = tiny_model("sd")
    one, other = (str(write_peft(tmp_path / f"{i}.safetensors", factors(model, seed=i))) for i in (1, 2))
    both = latents(model, [LoRA(file=one, scale=0.5), LoRA(file=other, scale=-0.3)])
    fresh = tiny_model("sd", fresh=True)
    fresh.pipe.load_lora_weights(one, adapter_name="one")
    with pytest.warns(UserWarning, match="multiple adapters"):  # as is meant
        fresh.pipe.load_lora_weights(other, adapter_name="other")
    fresh.pipe.set_adapters(["one", "other"], [0.5, -0.3])
    assert torch.equal(both, latents(fresh))
    turned = latents(model, [LoRA(file=other, scale=-0.3), LoRA(file=one, scale=0.5)])
    torch.testing.assert_close(turned, both, rtol=1e-4, atol=1e-4)


def test_coverage_names_the_modules_and_steps(file):
    model, lora = tiny_model("sd"), LoRA(file=file)
    result = generate(model, PROMPT, steps=2, interventions=lora, decode=False, scheduler="ddim")
    (covered,) = result.coverage.values()
    assert covered["steps"] == [0, 1] and set(covered["sites"]) == set(lora.adapted(model))


@pytest.mark.parametrize("convolutions", [False, True])
def test_merging_gives_the_same_weights_and_is_undone_to_the_bit(tmp_path, convolutions):
    model = tiny_model("sd")
    given = factors(model, alpha=2, convolutions=convolutions)
    lora = LoRA(file=str(write_kohya(tmp_path / "x.safetensors", given)), scale=0.7)
    before, attached, bare = fingerprint(model), latents(model, lora), latents(model)
    merged = lora.merge(model)
    torch.testing.assert_close(latents(model), attached, rtol=1e-3, atol=1e-3)
    assert not torch.equal(latents(model), bare)
    own = generate(model, PROMPT, steps=1, decode=False).recipe["hash"]
    merged.undo()
    merged.undo()
    assert own != generate(model, PROMPT, steps=1, decode=False).recipe["hash"] == model.weight_hash
    assert fingerprint(model) == {**before, "rng": fingerprint()["rng"]} and torch.equal(latents(model), bare)


def test_differences_are_relative_and_largest_first(tmp_path):
    model = tiny_model("sd")
    given = factors(model, text=False)
    lora = LoRA(file=str(write_peft(tmp_path / "x.safetensors", given)))
    found = lora.diff(model, scale=0.5)
    name, parts = next(iter(given.items()))
    weight = model.denoiser.get_submodule(name.removeprefix("unet.")).weight
    expected = 0.5 * (parts["up"] @ parts["down"]).norm() / weight.norm()
    assert found[f"{name}.weight"] == pytest.approx(float(expected), rel=1e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True) and len(found) == len(given)


def test_half_precision_models_keep_their_precision(file):
    model = tiny_model("sd", fresh=True).to(dtype=torch.bfloat16)
    made = latents(model, LoRA(file=file))
    assert made.dtype == torch.bfloat16 and not torch.equal(made, latents(model))


def test_saving_writes_the_same_adapter(tmp_path, file):
    model, lora = tiny_model("sd"), LoRA(file=file)
    again = LoRA.load(lora.save(tmp_path / "again.safetensors"))
    assert torch.equal(latents(model, again), latents(model, lora))


def test_adapted_modules_are_written_for_everybody(tmp_path):
    model = tiny_model("sd")
    lora = LoRA(file=str(write_kohya(tmp_path / "x.safetensors", factors(model, alpha=2))))
    written = save_lora(tmp_path / "y.safetensors", lora.adapted(model), {"sfumato.method": "test"})
    fresh = tiny_model("sd", fresh=True)
    fresh.pipe.load_lora_weights(str(written))
    torch.testing.assert_close(latents(fresh), latents(model, lora), rtol=1e-4, atol=1e-4)


def test_peft_layers_train_beside_the_model():
    """What a system that teaches does: peft's layers, gradients on their parameters only."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    model = tiny_model("sd")
    module = model.denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    adapted = AdaptedModule(module, Linear(module, "default", LoraConfig(r=2, lora_alpha=2), r=2, lora_alpha=2))
    handle = module.register_forward_hook(lambda m, args, out: adapted.added(args[0], out, 1.0))
    module(torch.randn(3, 16)).square().sum().backward()
    handle.remove()
    assert adapted.parameters()["up"].grad.abs().sum() > 0 and module.weight.grad is None


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_the_recipe_holds_the_hash_and_repeats_the_picture(tmp_path, file):
    model = tiny_model("sd")
    lora = build(f"lora:file={file},scale=-0.8")
    result = generate(model, PROMPT, steps=2, interventions=lora, decode=False)
    recipe = json.loads(json.dumps(result.recipe))
    assert recipe["with"][0]["params"]["hash"] == lora.hash and len(lora.hash) == 64
    again = generate(model, **recipe_args(recipe, allow=[file]), decode=False)
    assert torch.equal(again.latents, result.latents)
    save_file({key: value * 2 for key, value in load_file(file).items()}, file)
    with pytest.raises(BadInput, match="has changed: its hash is .* give the file that was used then"):
        from_recipe(recipe["with"][0], [file])
    assert to_recipe(lora)["params"]["scale"] == -0.8


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(kind, says, file, model=None, **params):
    with pytest.raises(kind) as caught:
        lora = LoRA(file=str(file), **params)
        latents(model or tiny_model("sd"), lora)
    message = str(caught.value)
    assert all(part in message for part in says) and "\n" not in message and len(message) < 500, message


def test_modules_that_the_model_lacks_are_told_with_the_nearest(tmp_path):
    model = tiny_model("sd")
    given = factors(model, text=False)
    given["unet.down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"] = {
        part: value.clone() for part, value in next(iter(given.values())).items()
    }
    path = write_peft(tmp_path / "x.safetensors", given)
    says = [f"fits {len(given) - 1} of {len(given)} modules of tiny-sd", "down_blocks_7", "nearest: down_blocks_"]
    refused(NoMatch, [*says, "partial=true"], path)
    assert not torch.equal(latents(model, LoRA(file=str(path), partial=True)), latents(model))


def test_an_adapter_of_another_family_fits_nothing_even_partially(tmp_path):
    path = write_peft(tmp_path / "x.safetensors", factors(tiny_model("flux"), text=False))
    refused(NoMatch, ["fits 0 of", "tiny-sd", "made for Flux"], path, partial=True)


def test_other_widths_are_told(tmp_path):
    path = write_peft(tmp_path / "x.safetensors", factors(tiny_model("sdxl"), text=False))
    refused(BadWeights, ["does not fit tiny-sd", "adapts a weight of"], path, partial=True)


def test_an_adapter_that_changes_nothing_is_told(tmp_path):
    given = factors(tiny_model("sd"))
    for parts in given.values():
        parts["up"].zero_()
    refused(NoMatch, ["changes nothing"], write_peft(tmp_path / "x.safetensors", given))


def test_a_change_that_is_lost_in_the_precision_is_told(tmp_path):
    given = factors(tiny_model("sd"), size=1e-12)
    refused(
        NoMatch, ["changed the output of none", "too small for float32"], write_peft(tmp_path / "x.safetensors", given)
    )


def test_damaged_files_pickles_and_others(tmp_path, file):
    given = load_file(file)
    key = next(iter(given))
    save_file({**given, key: given[key] * float("nan")}, tmp_path / "nan.safetensors")
    refused(BadWeights, ["no finite numbers"], tmp_path / "nan.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-50])
    refused(BadWeights, ["cut off"], tmp_path / "cut.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    refused(BadWeights, ["no safetensors file"], tmp_path / "junk.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    refused(BadWeights, ["is a pickle", "save_file"], tmp_path / "x.pt")
    save_file({"something.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    refused(BadInput, ["not a lora", "sfumato adapters"], tmp_path / "other.safetensors")
    refused(BadInput, ["no adapter file", "nowhere"], tmp_path / "nowhere.safetensors")


def test_names_are_found_in_the_cache(tmp_path, monkeypatch, file):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "mine.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes())
    assert LoRA(file="mine").hash == LoRA(file=file).hash
    refused(BadInput, ["Did you mean 'mine'"], "mien")


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("oft_blocks", "OFT"), ("oft_diag", "OFT"), ("diff", "full differences"), ("diff_b", "of biases"),
        ("a1.weight", "GLoRA"), ("on_input", "(IA)^3"), ("lora_B.bias", "LoRA with biases"),
    ],
)  # fmt: skip
def test_other_algebra_is_named(tmp_path, part, name):
    save_file({f"lora_unet_mid_block_attentions_0_proj_in.{part}": torch.ones(32, 32)}, tmp_path / "x.safetensors")
    refused(NotSupported, [name, "not supported", "LoKr"], tmp_path / "x.safetensors")


@pytest.mark.parametrize("key", ["lora_unet_conv_in.scalar", "lora_unet_conv_norm_out.w_norm", "bundle_emb.rex.notes"])
def test_tensors_that_are_no_part_of_it_are_not_dropped_silently(tmp_path, file, key):
    save_file({**load_file(file), key: torch.ones(4)}, tmp_path / "more.safetensors")
    refused(NoMatch, ["1 tensors that are no part", key, "partial=true"], tmp_path / "more.safetensors")
    LoRA(file=str(tmp_path / "more.safetensors"), partial=True).adapted(tiny_model("sd"))
    with pytest.raises(NoMatch, match="no part of a low-rank adapter"):
        convert(tmp_path / "more.safetensors", tmp_path / "k.safetensors", "kohya")


def test_words_that_a1111_packs_into_the_file_are_words(tmp_path, file):
    rows = torch.randn(2, 16)
    held = {"bundle_emb.rex.string_to_param.*": rows, "bundle_emb.max.clip_l": rows[:1].clone()}
    save_file({**load_file(file), **held}, tmp_path / "both.safetensors")
    model, both = tiny_model("sd"), str(tmp_path / "both.safetensors")
    assert LoRA(file=both).adapted(model).keys() == LoRA(file=file).adapted(model).keys()
    found = Word(file=both).vectors(model)
    assert torch.equal(found["rex"]["text_encoder"], rows) and torch.equal(found["max"]["text_encoder"], rows[:1])


def test_each_module_has_its_own_rank_and_alpha(tmp_path):
    given = factors(tiny_model("sd"), text=False)
    for i, parts in enumerate(given.values()):
        rank = 1 + i % 3
        parts |= {"down": parts["down"][:rank].clone(), "up": parts["up"][:, :rank].clone()}
        if i % 2:
            parts["alpha"] = torch.tensor([0.5 * i])  # some trainers write (1), some ()
    found = LoRA(file=str(write_kohya(tmp_path / "x.safetensors", given))).adapted(tiny_model("sd"))
    for name, parts in given.items():
        factor = float(parts["alpha"]) / len(parts["down"]) if "alpha" in parts else 1.0
        torch.testing.assert_close(found[name].delta(1.0), factor * parts["up"] @ parts["down"])


def test_convolutions_with_tuckers_core(tmp_path):
    model, stem = tiny_model("sd"), "lora_unet_down_blocks_0_resnets_0_conv1"
    conv = model.denoiser.down_blocks[0].resnets[0].conv1
    down, mid = torch.randn(2, conv.in_channels, 1, 1), torch.randn(2, 2, 3, 3)
    up = torch.randn(conv.out_channels, 2, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    save_file({f"{stem}.{key}": value for key, value in parts.items()}, tmp_path / "x.safetensors")
    (found,) = LoRA(file=str(tmp_path / "x.safetensors")).adapted(model).values()
    x = torch.randn(1, conv.in_channels, 5, 5)
    layers = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)  # as LyCORIS applies it
    torch.testing.assert_close(F.conv2d(x, found.delta(1.0), padding=1), layers / 2, rtol=1e-4, atol=1e-4)


def test_lengths_of_columns_are_not_taken_for_those_of_rows(tmp_path):
    given = {"unet.mid_block.attentions.0.proj_in": {"down": torch.ones(2, 32), "up": torch.ones(32, 2)}}
    write_kohya(tmp_path / "x.safetensors", given)
    lengths = {"lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.ones(1, 32)}
    save_file({**load_file(tmp_path / "x.safetensors"), **lengths}, tmp_path / "x.safetensors")
    refused(NotSupported, ["DoRA over columns", "wd_on_out"], tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "said", ["{", "[1]", '{"unet.lora_alpha": "four"}', '{"unet.r": [4]}', '{"unet.alpha_pattern": {"to_k": "x"}}',
             '{"unet.alpha_pattern": {"(": 2}}', '{"unet.alpha_pattern": 3}', "3"],
)  # fmt: skip
def test_settings_of_a_wrong_type(tmp_path, file, said):
    save_file(load_file(file), tmp_path / "y.safetensors", {"lora_adapter_metadata": said})
    refused(BadWeights, ["y.safetensors: its metadata lora_adapter_metadata"], tmp_path / "y.safetensors")


@pytest.mark.parametrize("metadata", [{"ss_steps": 3}, ["x"], {"format": None}, "pt"])
def test_metadata_of_a_wrong_type(tmp_path, file, metadata):
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps({**json.loads(content[8 : 8 + length]), "__metadata__": metadata}).encode()
    (tmp_path / "y.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    refused(BadWeights, ["y.safetensors", "corrupt"], tmp_path / "y.safetensors")


@pytest.mark.parametrize("to", ["lora_te2_", "lora_te3_"])
def test_text_encoders_that_the_model_lacks_are_told(tmp_path, to):
    given = load_file(write_kohya(tmp_path / "x.safetensors", factors(tiny_model("sd")), one_text=False))
    assert any(key.startswith("lora_te1_") for key in given)
    LoRA(file=str(tmp_path / "x.safetensors")).adapted(tiny_model("sd"))  # SD 1 has only the first
    save_file({key.replace("lora_te1_", to): value for key, value in given.items()}, tmp_path / "x.safetensors")
    refused(NoMatch, ["it has none for", "encoder_layers"], tmp_path / "x.safetensors")


def test_the_index_of_a_model_is_its_linear_maps_and_convolutions():
    index = index_of(tiny_model("sdxl"))
    assert set(index) == {"unet", "text_encoder", "text_encoder_2"}
    assert index["unet"]["conv_in"] == (16, 4, 3, 3)
    assert isinstance(tiny_model("sdxl"), Model)


def test_motion_lora_in_the_names_of_animatediffs_own_code(tmp_path):
    model = tiny_model("animatediff")
    path = "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn{}.to_{}"
    generator = torch.Generator().manual_seed(0)
    given, original = {}, {}
    for number in (1, 2):
        for part in ("q", "out.0"):
            name = path.format(number, part)
            rows, columns = model.denoiser.get_submodule(name.removeprefix("unet.")).weight.shape
            down, up = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
            given[name] = {"down": down, "up": up}
            block = f"temporal_transformer.transformer_blocks.0.attention_blocks.{number - 1}"
            key = f"down_blocks.0.motion_modules.0.{block}.processor.to_{part.removesuffix('.0')}_lora"
            original |= {f"{key}.down.weight": down.clone(), f"{key}.up.weight": up.clone()}
    save_file(original, tmp_path / "x.safetensors")
    plain = LoRA(file=str(write_peft(tmp_path / "y.safetensors", given)))
    found = LoRA(file=str(tmp_path / "x.safetensors"))
    assert set(found.adapted(model)) == set(plain.adapted(model)) == set(given)
    for name, adapted in found.adapted(model).items():
        assert torch.equal(adapted.delta(1.0), plain.adapted(model)[name].delta(1.0))
