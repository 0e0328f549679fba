"""Adapter files in every dialect: the same change of the same weights, for us and for the stock loaders."""

from __future__ import annotations

import json
import logging
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.adapters.convert import convert, modules_of
from sfumato.adapters.formats import read_contents
from sfumato.adapters.inspection import fits
from sfumato.adapters.lora import LoRA, index_of
from sfumato.adapters.naming import LDM, _plain
from sfumato.adapters.spelling import dotted
from sfumato.adapters.weights import Weights
from sfumato.adapters.word import Word, save_word
from sfumato.errors import BadInput, BadWeights, NoMatch, NotSupported, UnknownName
from tests.adapters.lora_files import factors, write_kohya, write_peft
from tests.tiny import tiny_model

LDM_PATH, LDM_OURS = (
    f"{block}.transformer_blocks.0.attn2.to_k" for block in ("middle_block.1", "mid_block.attentions.0")
)


def given_changes(given):
    """``component.path`` -> what a file of these factors adds to the weight."""
    out = {}
    for name, parts in given.items():
        rank = parts["down"].shape[0]
        out[name] = parts["up"].flatten(1) @ parts["down"].flatten(1) * (float(parts.get("alpha", rank)) / rank)
    return out


def ours(model, file):
    return {name: each.delta(1.0).flatten(1) for name, each in LoRA(file=str(file)).adapted(model).items()}


def stock(pipe):
    """What the layers of peft in a pipeline add."""
    out = {}
    for component, network in pipe.components.items():
        for path, module in network.named_modules() if isinstance(network, torch.nn.Module) else ():
            if hasattr(module, "lora_A") and len(module.lora_A):
                (adapter,) = module.lora_A
                out[f"{component}.{path}"] = module.get_delta_weight(adapter).flatten(1)
    return out


def equal(one, other, where=""):
    one = {name: each for name, each in one.items() if name in other or each.any()}  # parts of a fused one may be zero
    assert one.keys() == other.keys(), (where, sorted(one.keys() ^ other.keys())[:4])
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{where} {n} {m}"
        )


@pytest.mark.parametrize(("kind", "alpha"), [("sd", 3.0), ("sdxl", 2.0), ("sd3", None), ("flux", 8.0)])
def test_lora_in_every_dialect_is_the_same_change(tmp_path, kind, alpha):
    model = tiny_model(kind)
    given = factors(model, alpha=alpha, text=kind in ("sd", "sdxl"))
    wanted, index = given_changes(given), index_of(model)
    first = tmp_path / "first.safetensors"
    if kind == "sd":
        write_kohya(first, given)
    else:
        for parts in given.values():  # diffusers' dialect has no alpha
            parts["up"] = parts["up"] * (float(parts.pop("alpha", 4)) / 4)
        write_peft(first, given)
    for to in ("diffusers", "kohya", "old-diffusers", "attn-procs"):
        if to == "attn-procs" and kind != "sd":
            continue
        (file,) = convert(first, tmp_path / f"{to}.safetensors", to, index)
        equal(ours(model, file), wanted, to)
        (back,) = convert(file, tmp_path / f"back-from-{to}.safetensors", "diffusers", index)
        equal(ours(model, back), wanted, f"{to} and back")
        if to in {"sd": ("kohya", "old-diffusers", "attn-procs"), "sdxl": ("kohya",)}.get(kind, ("diffusers",)):
            fresh = tiny_model(kind, fresh=True)
            fresh.pipe.load_lora_weights(str(file))
            equal(stock(fresh.pipe), wanted, f"diffusers reads {to}")
    keys = " ".join(load_file(tmp_path / "kohya.safetensors"))
    name = {"sd": "lora_te_text_model_", "sdxl": "lora_unet_input_blocks_", "sd3": "lora_unet_joint_blocks_",
            "flux": "lora_unet_double_blocks_"}[kind]  # fmt: skip
    assert name in keys and read_contents(tmp_path / "kohya.safetensors").metadata["ss_network_module"]


def test_without_a_model_names_tell_the_places(tmp_path):
    for kind in ("sd", "sd3"):
        model = tiny_model(kind)
        index = index_of(model)
        for component, paths in index.items():
            for path in paths:
                if "block.0.layer" not in path:
                    assert _plain(dotted(_plain(path))) == _plain(path), (component, path)
    model = tiny_model("sd")
    given = factors(model, alpha=2.0)
    write_kohya(tmp_path / "k.safetensors", given)
    (file,) = convert(tmp_path / "k.safetensors", tmp_path / "d.safetensors", "diffusers")
    equal(ours(model, file), given_changes(given))
    assert set(load_file(file)) == {
        f"{name.replace('text_encoder.encoder', 'text_encoder.text_model.encoder')}.lora_{ab}.weight"
        for name in given for ab in "AB"
    }  # fmt: skip
    sdxl = tiny_model("sdxl")
    write_peft(tmp_path / "x.safetensors", factors(sdxl))
    (file,) = convert(tmp_path / "x.safetensors", tmp_path / "xk.safetensors", "kohya", index_of(sdxl))
    with pytest.raises(NoMatch, match="--model"):
        convert(file, tmp_path / "xd.safetensors", "diffusers")


def test_a_folder_for_peft(tmp_path):
    from peft import PeftModel

    model = tiny_model("sd", fresh=True)
    given = factors(model, alpha=3.0, text=False)
    for parts in list(given.values())[:1]:  # one of another rank and alpha
        parts |= {"down": parts["down"][:2], "up": parts["up"][:, :2].contiguous(), "alpha": torch.tensor(5.0)}
    write_kohya(tmp_path / "k.safetensors", given)
    config, weights = convert(tmp_path / "k.safetensors", tmp_path / "peft", "peft"), tmp_path / "peft"
    assert config == [weights / "adapter_model.safetensors"]
    equal(ours(model, weights), given_changes(given))
    loaded = PeftModel.from_pretrained(model.pipe.unet, weights)
    found = {}
    for path, module in loaded.base_model.model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            found[f"unet.{path}"] = module.get_delta_weight("default").flatten(1)
    equal(found, given_changes(given), "peft")


def test_dora_keeps_its_lengths(tmp_path):
    model = tiny_model("sd")
    given = factors(model, text=False, alpha=4.0)
    tensors = {}
    for name, parts in given.items():
        stem = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": parts["down"], f"{stem}.lora_up.weight": parts["up"]}
        tensors |= {f"{stem}.alpha": parts["alpha"], f"{stem}.dora_scale": torch.rand(len(parts["up"]), 1) + 0.5}
    save_file(tensors, tmp_path / "k.safetensors")
    wanted = ours(model, tmp_path / "k.safetensors")
    for to in ("diffusers", "peft"):
        convert(tmp_path / "k.safetensors", tmp_path / f"{to}.safetensors", to)
        equal(ours(model, tmp_path / f"{to}.safetensors"), wanted, to)
    (back,) = convert(tmp_path / "diffusers.safetensors", tmp_path / "b.safetensors", "kohya")
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_file(back).items())
    with pytest.raises(NotSupported, match="is a DoRA"):
        convert(tmp_path / "k.safetensors", tmp_path / "o.safetensors", "old-diffusers")


def test_other_algebra_keeps_its_tensors(tmp_path, caplog):
    model = tiny_model("sd")
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    shape = model.denoiser.get_submodule(path).weight.shape
    stem = "lora_unet_" + path.replace(".", "_")
    tensors = {f"{stem}.alpha": torch.tensor(1.0)}
    for i in (1, 2):
        tensors |= {f"{stem}.hada_w{i}_a": torch.randn(shape[0], 2), f"{stem}.hada_w{i}_b": torch.randn(2, shape[1])}
    save_file(tensors, tmp_path / "loha.safetensors")
    wanted = ours(model, tmp_path / "loha.safetensors")
    convert(tmp_path / "loha.safetensors", tmp_path / "peft", "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LOHA"
    equal(ours(model, tmp_path / "peft"), wanted)
    (back,) = convert(tmp_path / "peft", tmp_path / "back.safetensors", "kohya")
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_file(back).items())
    with pytest.raises(NotSupported, match="is a LoHa, which diffusers cannot hold; kohya and peft can"):
        convert(tmp_path / "loha.safetensors", tmp_path / "d.safetensors", "diffusers")
    logging.getLogger("peft").setLevel(logging.NOTSET)


@pytest.mark.parametrize("to", ["diffusers", "kohya", "comfyui", "pivotal"])
def test_words_are_the_same_vectors(tmp_path, to):
    one = {"text_encoder": torch.randn(2, 16)}
    first = save_word(tmp_path / "rex.safetensors", "<rex>", one, metadata={"sfumato.method": "x"})
    (file,) = convert(first, tmp_path / f"{to}.safetensors", to)
    (tensor,) = load_file(file).values()
    assert torch.equal(tensor, one["text_encoder"])
    word = Word(file=str(file))
    assert word.words == ["<rex>"] and word.contents.metadata["sfumato.method"] == "x"
    assert torch.equal(word.vectors(tiny_model("sd"))["<rex>"]["text_encoder"], tensor)
    (other,) = convert(first, tmp_path / f"{to}-2.safetensors", to, name="<dino>")
    assert Word(file=str(other)).words == ["<dino>"]


def test_flux_words_name_their_t5(tmp_path):
    model = tiny_model("flux")
    rows = {"text_encoder": torch.randn(1, 16), "text_encoder_2": torch.randn(1, 32)}
    file = save_word(tmp_path / "rex.safetensors", "<rex>", rows, t5=["text_encoder_2"])
    assert set(load_file(file)) == {"clip_l", "t5xxl"}
    assert Word(file=str(file)).vectors(model)["<rex>"].keys() == rows.keys()


def test_custom_diffusions_weights(tmp_path):
    model = tiny_model("sd")
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    values = {f"unet.{path}.{end}": model.denoiser.get_submodule(path).get_submodule(end.removesuffix(".weight")).weight
              + 1 for end in ("to_k.weight", "to_out.0.weight")}  # fmt: skip
    save_file(values, tmp_path / "w.safetensors")
    (file,) = convert(tmp_path / "w.safetensors", tmp_path / "cd.safetensors", "custom-diffusion")
    assert set(load_file(file)) == {
        f"{path}.processor.to_k_custom_diffusion.weight", f"{path}.processor.to_out_custom_diffusion.0.weight"
    }  # fmt: skip
    one, other = (Weights(file=str(each)).weights(model) for each in (file, tmp_path / "w.safetensors"))
    assert all(torch.equal(one["unet"][key], other["unet"][key]) for key in other["unet"])
    save_file({"unet.conv_in.weight": torch.zeros(2, 2)}, tmp_path / "c.safetensors")
    with pytest.raises(NotSupported, match="no weight of cross-attention"):
        convert(tmp_path / "c.safetensors", tmp_path / "c2.safetensors", "custom-diffusion")


def test_custom_diffusions_own_files(tmp_path):
    """What was taught goes into one file with its words, in the names of either of the paper's programs, and back."""
    model = tiny_model("sd")
    index, wanted = index_of(model), {}
    for path in index["unet"]:
        if path.endswith(("attn2.to_k", "attn2.to_v")):
            wanted[f"unet.{path}.weight"] = model.denoiser.get_parameter(f"{path}.weight").detach() + 1
    save_file(wanted, tmp_path / "rex.safetensors")
    words = {"<rex>": torch.randn(1, 16), "<ball>": torch.randn(2, 16)}
    save_word(tmp_path / "rex-word.safetensors", "<rex>", {"text_encoder": words["<rex>"]})
    save_word(tmp_path / "rex-word2.safetensors", "<ball>", {"text_encoder": words["<ball>"]})
    (file,) = convert(tmp_path / "rex.safetensors", tmp_path / "ldm.safetensors", "compvis")
    keys = load_file(file)
    assert torch.equal(keys["embed"], torch.cat(list(words.values()))) and len(keys) == len(wanted) + 1
    assert torch.equal(keys[f"{LDM}{LDM_PATH}.weight"], wanted[f"unet.{LDM_OURS}.weight"])
    (same,) = convert(tmp_path / "rex.safetensors", tmp_path / "ldm-by-model.safetensors", "compvis", index)
    assert load_file(same).keys() == keys.keys()
    assert read_contents(file).dialects == ("Custom Diffusion (LDM)",) and fits(str(file), index).startswith("yes: all")
    for name, rows in Word(file=str(file)).vectors(model).items():
        assert torch.equal(rows["text_encoder"], words[name])
    found = Weights(file=str(file)).weights(model)["unet"]
    assert all(torch.equal(found[path.removeprefix("unet.")], value) for path, value in wanted.items())
    with pytest.raises(NoMatch, match="--model"):
        convert(file, tmp_path / "d.safetensors", "diffusers")
    whole, *beside = convert(file, tmp_path / "d.safetensors", "diffusers", index)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in load_file(whole).items())
    assert [Word(file=str(each)).words for each in beside] == [["<rex>"], ["<ball>"]]
    with pytest.raises(NotSupported, match="<ball> has 2 vectors; delta holds one"):
        convert(file, tmp_path / "delta.safetensors", "delta", index)
    beside[1].unlink()
    (delta,) = convert(whole, tmp_path / "delta.safetensors", "delta")
    tensors = load_file(delta)
    assert torch.equal(tensors.pop("modifier_token.<rex>"), words["<rex>"][0]) and tensors.keys() == wanted.keys()
    nothing = torch.full_like(keys["embed"], float("nan"))
    save_file({**keys, "embed": nothing}, tmp_path / "nan.safetensors")
    with pytest.raises(BadWeights, match="embed holds values that are no finite numbers"):
        Word(file=str(tmp_path / "nan.safetensors")).vectors(model)


def test_refusals(tmp_path):
    first = save_word(tmp_path / "rex.safetensors", "<rex>", {"text_encoder": torch.randn(1, 16)})
    pickled = tmp_path / "rex.pt"
    torch.save({"string_to_param": {}}, pickled)
    (tmp_path / "cut.safetensors").write_bytes(first.read_bytes()[:-8])
    cases = [
        ((first, "x.safetensors", "peft"), UnknownName, "dialect of a word 'peft'"),
        ((first, "x.pt", "kohya"), BadInput, "must end in .safetensors"),
        ((first, "rex.safetensors", "kohya"), BadInput, "exists"),
        ((pickled, "x.safetensors", "kohya"), BadWeights, "is a pickle"),
        ((tmp_path / "cut.safetensors", "x.safetensors", "kohya"), BadWeights, "cut.safetensors"),
        ((tmp_path / "none.safetensors", "x.safetensors", "kohya"), BadInput, "no adapter file"),
    ]
    for (source, target, to), error, says in cases:
        with pytest.raises(error) as raised:
            convert(source, tmp_path / target, to)
        assert says in str(raised.value), str(raised.value)
    assert not (tmp_path / "x.safetensors").exists()


def test_modules_at_their_places(tmp_path):
    model = tiny_model("flux")
    given = factors(model, text=False)
    file = write_peft(tmp_path / "x.safetensors", given)
    held = read_contents(file)
    assert {f"{each.component}.{each.path}" for each in modules_of(held)} == set(given)
    assert {f"{each.component}.{each.path}" for each in modules_of(held, index_of(model))} == set(given)


def unpickled(source, target):
    """By the lines of the documentation, as a program of their own."""
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(import sys\n.*?)```", page, re.S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["unpickle.py", str(source), str(target)])
        exec(compile(lines, "docs/adapters.md", "exec"), {})  # noqa: S102
    return target


def test_the_way_out_of_pickles_works(tmp_path):
    model, rows = tiny_model("sd"), torch.randn(2, 16)
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    own = model.denoiser.get_submodule(path).weight.detach()
    u, v = torch.randn(len(own), 1), torch.randn(1, own.shape[1])
    stem, number = "lora_unet_" + path.replace(".", "_"), torch.tensor(265)
    held = {
        "a1111": {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "x", "sd_checkpoint": None},
        "original": {"string_to_token": {"*": number}, "string_to_param": torch.nn.ParameterDict({"*": rows.clone()})},
        "named": {"string_to_token": {"<rex>": number}, "string_to_param": {"<rex>": rows}},
        "learned_embeds": {"<rex>": rows},
        "lora": {f"{stem}.lora_up.weight": u, f"{stem}.lora_down.weight": v},
        "delta": {"unet": {f"{path}.weight": own + 1}, "modifier_token": {"<rex>": rows[0]}},
        "compressed": {"unet": {f"{path}.weight": {"u": u, "v": v}}, "modifier_token": {"<rex>": rows[0]}},
        "compvis": {"state_dict": {f"{LDM}{LDM_PATH}.weight": own + 1, "embed": rows}},
        "compvis-small": {"state_dict": {f"{LDM}{LDM_PATH}.weight": {"u": u, "v": v}, "embed": rows}},
        "checkpoint": {"state_dict": {"model.diffusion_model.conv.weight": rows}, "epoch": 3},
    }  # fmt: skip
    files = {}
    for name, each in held.items():
        torch.save(each, tmp_path / f"{name}.pt")
        with pytest.raises(BadWeights, match="is a pickle.*docs/adapters.md"):
            read_contents(tmp_path / f"{name}.pt")
        files[name] = unpickled(tmp_path / f"{name}.pt", tmp_path / f"{name}.safetensors")
    for name in ("a1111", "original", "named", "learned_embeds"):
        word = Word(file=str(files[name]), name="<rex>")
        assert torch.equal(word.vectors(model)["<rex>"]["text_encoder"], rows), name
    assert Word(file=str(files["original"])).words == ["original"] and Word(file=str(files["named"])).words == ["<rex>"]
    for name in ("lora", "compressed", "compvis-small"):
        (change,) = ours(model, files[name]).values()
        torch.testing.assert_close(change, u @ v, msg=name)
    assert read_contents(files["checkpoint"]).kind == "checkpoint"
    for name in ("delta", "compvis"):
        ((changed_path, changed),) = Weights(file=str(files[name])).weights(model)["unet"].items()
        assert changed_path == f"{path}.weight" and torch.equal(changed, own + 1), name
    for name in ("compvis", "compvis-small"):
        found = Word(file=str(files[name])).vectors(model)
        assert [*found] == ["<new1>", "<new2>"]
        assert torch.equal(torch.cat([each["text_encoder"] for each in found.values()]), rows)
    for name, to in (("delta", "diffusers"), ("compressed", "kohya")):
        assert torch.equal(Word(file=str(files[name])).vectors(model)["<rex>"]["text_encoder"], rows[:1]), name
        whole, word = convert(files[name], tmp_path / f"{name}-{to}.safetensors", to)
        assert Word(file=str(word)).words == ["<rex>"] and read_contents(whole).words == {}
    equal(ours(model, tmp_path / "compressed-kohya.safetensors"), {f"unet.{path}": u @ v})
    (again,) = Weights(file=str(tmp_path / "delta-diffusers.safetensors")).weights(model)["unet"].values()
    assert torch.equal(again, own + 1)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_the_way_out_runs_no_code(tmp_path, capsys):
    torch.save({"string_to_param": {"*": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        unpickled(tmp_path / "evil.pt", tmp_path / "evil.safetensors")
    assert "code ran" not in capsys.readouterr().out and not (tmp_path / "evil.safetensors").exists()
