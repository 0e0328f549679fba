"""Taught words: read in every text of a run, found by everybody who looks for words, gone without a trace."""

from __future__ import annotations

import base64
import json

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from sfumato.adapters.lora import LoRA
from sfumato.adapters.word import Word, save_word
from sfumato.cards import build
from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.errors import BadInput, BadWeights, Conflict, NoMatch, NotSupported, WorkInterrupted
from sfumato.explain.daam import DAAM
from sfumato.models.text_towers import pseudo_word, text_towers
from sfumato.sampling import generate
from sfumato.steer.attend_excite import AttendExcite
from sfumato.text import Words
from sfumato.text.placeholders import placeholders
from tests.adapters.lora_files import factors, write_peft
from tests.helpers import fingerprint
from tests.tiny import tiny_model

PROMPT = "a red <rex> and a blue ball"


def run(model, systems=(), prompt=PROMPT, **more):
    scheduler = "flow_euler" if model.flow else "ddim"
    given = {"steps": 1, "seed": 5, "guidance": 3.0, "decode": False, "scheduler": scheduler, **more}
    return generate(model, prompt, interventions=systems, **given)


def vectors(model, k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {t.name: torch.randn(k, t.table.shape[1], generator=generator) for t in text_towers(model)}


@pytest.fixture
def file(tmp_path):
    return str(save_word(tmp_path / "rex.safetensors", "<rex>", vectors(tiny_model("sd"))))


def tokenizers(model):
    """What they know; how long texts may be is set anew in every call."""
    return {
        name: (id(part), len(part), {**json.loads(part._tokenizer.to_str()), "truncation": None, "padding": None})
        for name, part in model.pipe.components.items()
        if name.startswith("tokenizer") and part is not None
    }


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "pixart"])
def test_tokenizers_and_tables_stay_as_they_were(kind):
    model = tiny_model(kind)
    before, learned, config = fingerprint(model), tokenizers(model), dict(model.pipe.config)
    with pytest.raises(RuntimeError), placeholders(model, {"<rex>": vectors(model)}):
        model.encode_text(PROMPT)
        raise RuntimeError("boom")
    assert fingerprint(model) == before and tokenizers(model) == learned and dict(model.pipe.config) == config


def test_an_interruption_leaves_nothing(file):
    model = tiny_model("sd")
    before, learned = fingerprint(model), tokenizers(model)

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(WorkInterrupted):
        run(model, Word(file=file), on_step=stop)
    assert fingerprint(model) == before and tokenizers(model) == learned


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "pixart"])
def test_with_the_rows_of_a_word_it_is_that_word(kind):
    """One vector, equal to the embedding of a word, makes the very embeddings of that word's prompt."""
    model = tiny_model(kind)
    rows = {}
    for tower in text_towers(model):
        (token,) = tower.tokenizer("cube", add_special_tokens=False).input_ids
        rows[tower.name] = tower.table[token].clone()
    with placeholders(model, {"<rex>": rows}):
        taught = model.encode_text("a red <rex> on the left", guidance=False).cond
    plain = model.encode_text("a red cube on the left", guidance=False).cond
    assert all(torch.equal(taught[key], plain[key]) for key in plain)


def test_the_pooled_vector_is_that_of_the_texts_end_in_clips_of_the_first_years(monkeypatch):
    """Their settings say that the end is token 2, and the highest id is taken for it; the new ids are higher."""
    model = tiny_model("sdxl", fresh=True)
    monkeypatch.setattr(model.pipe.text_encoder_2.text_model, "eos_token_id", 2)
    (token,) = model.pipe.tokenizer_2("cube", add_special_tokens=False).input_ids
    row = {"text_encoder_2": model.pipe.text_encoder_2.get_input_embeddings().weight[token].clone()}
    plain = model.encode_text("a red cube on the left", guidance=False).cond
    with placeholders(model, {"cube": row}):
        taught = model.encode_text("a red cube on the left", guidance=False).cond
    assert torch.equal(taught["pooled"], plain["pooled"])


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_words_find_it_with_all_its_vectors(kind):
    model = tiny_model(kind)
    with placeholders(model, {"<rex>": vectors(model, 3)}):
        found = Words(model).one(PROMPT, "<rex>")
        assert all(len(tokens) == 3 for tokens in found.tokens.values())
        assert Words(model).one(PROMPT, "ball").start == PROMPT.index("ball")
        assert [word.text for word in Words(model).all(PROMPT)] == ["a", "red", "<rex>", "and", "a", "blue", "ball"]


def test_only_whole_words_in_any_case_and_the_longest_first():
    model = tiny_model("sd")
    rows = vectors(model, 1)

    def ids(prompt, words):
        with placeholders(model, {word: rows for word in words}):
            return model.pipe.tokenizer(prompt, add_special_tokens=False).input_ids

    plain = len(model.pipe.tokenizer)
    assert ids("REX", ["rex"]) == [plain] == ids("Rex,", ["rex"])[:1]
    assert plain not in ids("trex rexes", ["rex"])
    longer, shorter = ids("<rex-2> <rex>", ["<rex>", "<rex-2>"])
    assert longer != shorter and {longer, shorter} == {plain, plain + 1}


def test_gradients_reach_the_vectors():
    model = tiny_model("sd")
    rows = {"text_encoder": torch.randn(2, 16, requires_grad=True)}
    with placeholders(model, {"<rex>": rows}):
        model.encode_text(PROMPT, guidance=False).cond["embeds"].square().sum().backward()
    assert (rows["text_encoder"].grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("where", ["negative", "compose", "source"])
def test_it_is_read_in_every_text_of_a_run(file, where):
    model, word = tiny_model("sd"), Word(file=file)
    plain = "a red cube and a blue ball"
    if where == "source":
        edit = PromptToPrompt(source="a red <rex> and a blue ball")
        taught, without = run(model, [word, edit], plain), run(model, [edit.__class__(source=PROMPT)], plain)
    else:
        given = {"negative": PROMPT} if where == "negative" else {"compose": [(PROMPT, 1.0)]}
        taught, without = run(model, word, plain, **given), run(model, (), plain, **given)
    assert not torch.equal(taught.latents, without.latents)
    assert taught.coverage["word"]["tokens"] == ["<rex>"]


def test_weights_of_prompts_act_on_it(file):
    model, word = tiny_model("sd"), Word(file=file)
    one, more = (run(model, word, f"a red (<rex>:{w}) and a ball").latents for w in (1.0, 1.4))
    assert not torch.equal(one, more)


def test_scale_is_the_length_and_0_leaves_the_letters(file):
    model = tiny_model("sd")
    bare, one = run(model).latents, run(model, Word(file=file)).latents
    assert torch.equal(run(model, Word(file=file, scale=0)).latents, bare)
    other = run(model, Word(file=file, scale=-0.5)).latents
    assert not torch.equal(other, bare) and not torch.equal(other, one)


def test_lora_word_excitement_and_word_maps_in_one_run(tmp_path, file):
    """... and the maps are those of the taught word, at the positions of all its vectors."""
    model = tiny_model("sd")
    lora = LoRA(file=str(write_peft(tmp_path / "x.safetensors", factors(model))), scale=0.5)
    before = fingerprint(model)
    maps = DAAM(words=["<rex>", "ball"])
    systems = [maps, AttendExcite(words=["<rex>", "ball"], thresholds=[]), Word(file=file), lora]
    result = run(model, systems, steps=2)
    assert all(each["calls"] for each in result.coverage.values()) and set(result.coverage) == {
        "daam", "attend_excite", "word", "lora",
    }  # fmt: skip
    assert fingerprint(model) == before
    assert len(maps.maps[0].reading.one("<rex>").tokens["clip"]) == 2
    assert maps.maps[0].map("<rex>").sum() > 0
    systems = [lora, Word(file=file), DAAM(words=["ball"]), AttendExcite(words=["<rex>", "ball"], thresholds=[])]
    turned = run(model, systems, steps=2)
    assert torch.equal(turned.latents, result.latents)


def test_two_words_in_one_prompt(tmp_path):
    model = tiny_model("sd")
    one, other = (
        Word(file=str(save_word(tmp_path / f"{i}.safetensors", f"<w{i}>", vectors(model, i, i)))) for i in (1, 2)
    )
    both = run(model, [one, other], "a <w1> and a <w2>")
    assert both.coverage["word"]["tokens"] == ["<w1>"] and both.coverage["word 2"]["tokens"] == ["<w2>"]
    with placeholders(model, {"<w1>": vectors(model, 1, 1), "<w2>": vectors(model, 2, 2)}):
        assert torch.equal(run(model, (), "a <w1> and a <w2>").latents, both.latents)


# --- dialects --------------------------------------------------------------------------------------------------------


def same_word(model, path, **given):
    return run(model, Word(file=str(path), **given)).latents


def test_every_dialect_holds_the_same_word(tmp_path, file):
    model = tiny_model("sd")
    rows = load_file(file)["<rex>"]
    expected = same_word(model, file)
    files = {
        "diffusers": {"<rex>": rows},
        "kohya": {"emb_params": rows},
        "pivotal": {"text_encoders_0": rows},
        "comfyui": {"clip_l": rows},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        given = {} if name == "diffusers" else {"name": "<rex>"}
        assert torch.equal(same_word(model, tmp_path / f"{name}.safetensors", **given), expected), name
    assert Word(file=str(tmp_path / "kohya.safetensors")).words == ["kohya"]  # the file's name is the word


def test_a_picture_of_a1111(tmp_path, file):
    rows = load_file(file)["<rex>"]
    held = {"name": "<rex>", "string_to_param": {"*": {"TORCHTENSOR": rows.tolist()}}, "string_to_token": {"*": 265}}
    text = PngInfo()
    text.add_text("sd-ti-embedding", base64.b64encode(json.dumps(held).encode()).decode())
    Image.new("RGB", (8, 8)).save(tmp_path / "rex.png", pnginfo=text)
    model = tiny_model("sd")
    assert torch.equal(same_word(model, tmp_path / "rex.png"), same_word(model, file))
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    with pytest.raises(BadWeights, match="no textual inversion as text"):
        Word(file=str(tmp_path / "bare.png"))
    text = PngInfo()
    text.add_text("sd-ti-embedding", "x" * 9)
    Image.new("RGB", (8, 8)).save(tmp_path / "bad.png", pnginfo=text)
    with pytest.raises(BadWeights, match="damaged textual inversion"):
        Word(file=str(tmp_path / "bad.png"))


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "comfyui"])
def test_saved_words_come_back(tmp_path, file, dialect):
    path = Word(file=file).save(tmp_path / "again.safetensors", dialect)
    again = Word(file=str(path))
    assert again.words == ["<rex>"] and torch.equal(
        same_word(tiny_model("sd"), path), same_word(tiny_model("sd"), file)
    )


def test_pairs_for_two_encoders_and_two_files(tmp_path):
    model = tiny_model("sdxl")
    rows = vectors(model)
    pair = save_word(tmp_path / "pair.safetensors", "<rex>", rows)
    assert set(load_file(pair)) == {"clip_l", "clip_g"}
    one = save_word(tmp_path / "one.safetensors", "<rex>", {"text_encoder": rows["text_encoder"]})
    two = save_word(tmp_path / "two.safetensors", "<rex>", {"text_encoder": rows["text_encoder_2"]})
    both = [Word(file=str(one)), Word(file=str(two), encoder="text_encoder_2")]
    assert torch.equal(run(model, both).latents, same_word(model, pair))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_a_saved_word_draws_what_a_pseudo_word_draws(kind, tmp_path):
    model = tiny_model(kind)
    rows = {name: each[0] for name, each in vectors(model, 1).items()}
    save_word(tmp_path / "x.safetensors", "<cube>", {name: each[None] for name, each in rows.items()})
    word = Word(file=str(tmp_path / "x.safetensors"), name="cube")
    taught = run(model, word, "a red cube").latents
    with pseudo_word(model, "cube", rows):
        assert torch.equal(run(model, (), "a red cube").latents, taught)


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(kind, says, *words, model=None, prompt=PROMPT):
    model = model or tiny_model("sd")
    before, learned = fingerprint(model), tokenizers(model)
    with pytest.raises(kind) as caught:
        run(model, [build(f"word:{each}") for each in words], prompt)
    message = str(caught.value)
    assert all(part in message for part in says) and "\n" not in message and len(message) < 400, message
    assert fingerprint(model) == {**before, "rng": fingerprint()["rng"]} and tokenizers(model) == learned


def test_a_word_that_no_text_has_is_told(file):
    refused(
        NoMatch, ["<rex>", "is in no text of this run", "'rex' without its brackets"], f"file={file}", prompt="a rex"
    )


def test_one_word_twice(tmp_path, file):
    refused(Conflict, ["<rex> is taught twice for text_encoder"], f"file={file}", f"file={file}")


def test_wider_encoders_and_other_files(tmp_path, file):
    save_file({"<rex>": torch.randn(2, 768)}, tmp_path / "wide.safetensors")
    refused(
        BadWeights, ["does not fit tiny-sd", "width 768", "text_encoder 16"], f"file={tmp_path / 'wide.safetensors'}"
    )
    save_file({"<rex>": torch.full((2, 16), float("inf"))}, tmp_path / "inf.safetensors")
    refused(BadWeights, ["no finite numbers"], f"file={tmp_path / 'inf.safetensors'}")
    refused(BadInput, ["cannot be a word of a prompt"], f"file={file},name='two words'")
    refused(BadWeights, ["does not fit"], f"file={file},encoder=text_encoder_2")
    save_file({"<a>": torch.ones(1, 16), "<b>": torch.zeros(1, 16)}, tmp_path / "several.safetensors")
    refused(BadInput, ["several words (<a>, <b>)"], f"file={tmp_path / 'several.safetensors'},name=x")
    lora = write_peft(tmp_path / "lora.safetensors", factors(tiny_model("sd")))
    refused(BadInput, ["holds a lora, not a word"], f"file={lora}")
    torch.save({"string_to_param": {"*": torch.ones(1, 16)}}, tmp_path / "a1111.pt")
    refused(BadWeights, ["is a pickle", "safetensors"], f"file={tmp_path / 'a1111.pt'}")
    with pytest.raises(NotSupported, match="changes no weights"):
        Word(file=file).merge(tiny_model("sd"))
