"""Prompts as people write them elsewhere: longer than CLIP's window, with BREAK, AND, ``<lora:...>`` and weights."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch

from sfumato import cards
from sfumato.errors import BadInput, NoMatch, NotSupported
from sfumato.models.condition import TruncatedPrompt
from sfumato.sampling import generate, recipe_args
from sfumato.text.dialects import PlainWords, adapter_tags, read_composition, warn_of_plain_words
from sfumato.text.weights import encode_weighted, read_weights
from sfumato.text.words import Words
from tests.examples import write_adapters
from tests.tiny import length_of, tiny_model

LONG = "a red cube and a blue ball, " * 9 + "one green cone on the table"  # 83 tokens of the tiny CLIP and more
SHORT = "a red cube"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    return write_adapters(tmp_path) / "adapters"


def bodies(tokenizer, text):
    """Token ids in windows of 75, by hand."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return [ids[i : i + 75] for i in range(0, max(len(ids), 1), 75)]


def window(tokenizer, body):
    ids = [tokenizer.bos_token_id, *body, tokenizer.eos_token_id]
    return torch.tensor([ids + [tokenizer.pad_token_id] * (77 - len(ids))])


def by_hand(pipe, windows, suffix=""):
    """Features (1 t d) as the pipelines take them from a CLIP, window after window."""
    tokenizer, encoder = getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, f"text_encoder{suffix}")
    out = []
    for body in windows:
        found = encoder(window(tokenizer, body), output_hidden_states=True)
        plain = type(pipe).__name__.startswith(("StableDiffusionPipeline", "AnimateDiff"))
        out.append(found.last_hidden_state if plain else found.hidden_states[-2])
    return torch.cat(out, 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "sd3", "amused", "animatediff"])
def test_a_long_prompt_is_its_windows_one_behind_the_other(kind):
    model = tiny_model(kind)
    pipe = model.pipe
    found = model.encode_text([LONG, SHORT], ["ugly", "ugly"])
    assert found.cond["embeds"].shape == found.uncond["embeds"].shape
    windows = bodies(pipe.tokenizer, LONG)
    assert len(windows) == 2
    suffixes = ("", "_2") if kind in ("sdxl", "sd3") else ("",)
    for rows, i, parts in (
        (found.cond, 0, windows),
        (found.cond, 1, [*bodies(pipe.tokenizer, SHORT), []]),
        (found.uncond, 0, [*bodies(pipe.tokenizer, "ugly"), []]),
    ):
        expected = torch.cat([by_hand(pipe, parts, suffix) for suffix in suffixes], -1)
        assert torch.equal(rows["embeds"][i : i + 1, :154, : expected.shape[-1]], expected)
    if "pooled" in found.cond:  # of the first chunk
        heads = {"sdxl": ("_2",), "sd3": ("", "_2"), "amused": ("",)}[kind]
        ids = window(pipe.tokenizer, windows[0])
        pooled = torch.cat([getattr(pipe, f"text_encoder{suffix}")(ids).text_embeds for suffix in heads], -1)
        torch.testing.assert_close(found.cond["pooled"][:1], pooled)
    if kind == "sd3":  # T5 reads everything once, behind all windows of CLIP
        t5 = pipe._get_t5_prompt_embeds(LONG, **length_of(model))
        assert torch.equal(found.cond["embeds"][:1, 154:], t5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_75_tokens_are_the_pipelines_own_bits(kind):
    model = tiny_model(kind)
    text = "cube " * 75
    own = model.family.encode([text], ["ball"], True)
    found = model.encode_text([text], ["ball"])
    for mine, theirs in ((found.cond, own[0]), (found.uncond, own[1])):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    if kind in ("sd", "sdxl", "sd3"):
        longer = model.encode_text([text + "cube"], guidance=False).cond["embeds"]
        assert longer.shape[1] == found.cond["embeds"].shape[1] + 77


@torch.no_grad()
def test_break_begins_a_chunk():
    model = tiny_model("sd")
    pipe = model.pipe
    found = encode_weighted(model, ["a (red:1.3) cube BREAK a blue ball"], ["x"])
    plain = encode_weighted(model, ["a red cube\nBREAK\na blue ball"], ["x"])
    parts = [ids for text in (SHORT, "a blue ball") for ids in bodies(pipe.tokenizer, text)]
    assert torch.equal(plain.cond["embeds"], by_hand(pipe, parts))
    same = (found.cond["embeds"] == plain.cond["embeds"]).all(-1)[0]
    assert [i for i in range(154) if not same[i]] == [2]  # the weighted word alone
    assert "BREAK" not in read_weights("a BREAK b").text
    assert torch.equal(
        model.encode_text("BREAK a red cube BREAK BREAK").cond["embeds"], model.encode_text(SHORT).cond["embeds"]
    )
    words = Words(model)
    assert words.one("a cube BREAK a ball", "ball").positions == (79,)
    with pytest.raises(NoMatch):
        words.one("a cube BREAK a ball", "BREAK")
    assert torch.equal(  # where nothing is read in chunks it is a blank
        tiny_model("pixart").encode_text("a cube BREAK a ball").cond["embeds"],
        tiny_model("pixart").encode_text("a cube a ball").cond["embeds"],
    )
    with pytest.raises(BadInput, match="at most 64"):
        model.encode_text("a BREAK " * 70)


def test_no_sample_depends_on_the_length_of_another():
    model = tiny_model("sd")
    both = generate(model, [SHORT, LONG, "a BREAK b"], steps=1, seed=3, decode=False)
    for i, text in enumerate([SHORT, LONG, "a BREAK b"]):
        alone = generate(model, text, steps=1, seed=3 + i, decode=False)
        torch.testing.assert_close(both.latents[i : i + 1], alone.latents, atol=1e-4, rtol=1e-4)  # two are one batch


def test_the_switch_cuts_as_diffusers_does():
    model = tiny_model("sd")
    given = {"latents": torch.randn(1, 4, 16, 16), "steps": 2, "decode": False}
    with pytest.warns(TruncatedPrompt, match="does not see 'green cone on the table'"):
        cut = generate(model, LONG, **given, long_prompts="cut")
    theirs = model.pipe(LONG, num_inference_steps=2, output_type="latent", latents=given["latents"]).images
    assert torch.equal(cut.latents, theirs)
    assert not torch.equal(generate(model, LONG, **given).latents, theirs)
    assert cut.recipe["long_prompts"] == "cut"
    old = {name: value for name, value in cut.recipe.items() if name != "long_prompts"}  # of an earlier version
    assert recipe_args(old, latents=given["latents"])["long_prompts"] == "cut"


SYSTEMS = {
    "daam": {"words": ["cone"]},
    "attend_excite": {"words": ["cone", "cube#1"], "thresholds": []},
    "paint_with_words": {"phrases": ["green cone"], "box": [[0, 0, 0.5, 0.5]]},
    "prompt_to_prompt": {"source": LONG.replace("cone", "ball")},
}


@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.parametrize("key", SYSTEMS)
def test_words_in_later_chunks_are_found_and_act(key, kind):
    model = tiny_model(kind)
    system = cards.method(key)(**SYSTEMS[key])
    made = generate(model, LONG, steps=1, decode=False, interventions=system, guidance=3.0)
    assert made.coverage[key]["calls"]
    plain = generate(model, LONG, steps=1, decode=False, guidance=3.0)
    if key == "daam":
        assert torch.equal(made.latents, plain.latents)
        assert 82 in system.maps[0].positions and float(system.maps[0].map("cone").max()) > 0
    else:
        assert not torch.equal(made.latents, plain.latents)


@pytest.mark.parametrize(
    ("chunks", "text", "seen", "beyond"),
    [
        (2, "a cube BREAK a ball BREAK a cone", {"cube": 2, "ball": 79}, "cone"),
        (1, LONG, {"cube#1": 3}, "cone"),
        (0, LONG, {"cube#1": 3}, "cone"),
    ],
)
def test_a_word_beyond_the_chunks_that_are_read(chunks, text, seen, beyond):
    """Where a run fixes how many chunks there are, a word behind them is named as one that no encoder sees."""
    model = tiny_model("sd")
    assert Words(model).one(text, beyond).positions[0] > 77  # as many as the text needs
    with model.in_chunks(chunks):
        words = Words(model)
        assert {word: words.one(text, word).positions[0] for word in seen} == seen
        with pytest.raises(NoMatch, match=f"'{beyond}' lies beyond what the text encoders read"):
            words.one(text, beyond)
        assert beyond not in [word.text for word in words.all(text)]


def test_shape_guided_reads_each_side_in_one_window():
    model = tiny_model("sd")
    given = {"steps": 1, "decode": False, "guidance": 3.0, "n": 2, "batch_size": 1}
    system = cards.method("shape_guided")(words=["cube"], box=[0, 0, 0.5, 1])
    made = generate(model, "a red cube BREAK a blue ball", interventions=system, **given)
    assert made.coverage["shape_guided"]["calls"] and system.texts[0] == ["a red cube", "a blue ball"]
    with pytest.raises(BadInput, match="tokens; beside the other texts"):
        generate(model, LONG, interventions=cards.method("shape_guided")(words=["cone"], box=[0, 0, 0.5, 1]), **given)


def test_prompt_to_prompt_aligns_a_word_of_the_second_chunk():
    model = tiny_model("sd")
    same = cards.method("prompt_to_prompt")(source=LONG)
    plain = generate(model, LONG, steps=1, decode=False)
    assert torch.equal(generate(model, LONG, steps=1, decode=False, interventions=same).latents, plain.latents)
    longer = cards.method("prompt_to_prompt")(source=LONG)  # a source of more chunks than the edit
    generate(model, "a red cube and a ball", steps=1, decode=False, interventions=longer)
    assert longer.recording.facts["text"] == 154


# --- AND ------------------------------------------------------------------------------------------


def test_and_composes_with_shares_of_the_guidance():
    model = tiny_model("sd")
    found = generate(model, "a red cube AND a blue ball :0.5", steps=1, guidance=4.0, decode=False)
    same = generate(model, "a red cube", compose=[("a blue ball", 2.0)], steps=1, guidance=4.0, decode=False)
    assert torch.equal(found.latents, same.latents)
    seen = []
    generate(
        model, "a red cube :0.7 AND a blue ball:-0.3 AND a cone", steps=1, guidance=4.0, decode=False,
        on_step=lambda step: seen.append((step.outputs, step.output)),
    )  # fmt: skip
    (outputs, output), u = seen[0], seen[0][0]["uncond"]
    weights = {"cond": 2.8, "compose 1": -1.2, "compose 2": 4.0}
    expected = u + sum(weight * (outputs[name] - u) for name, weight in weights.items())
    torch.testing.assert_close(output, expected)
    again = generate(model, **recipe_args(found.recipe), decode=False)
    assert torch.equal(again.latents, found.latents)
    mixed = generate(model, ["a red cube AND a blue ball :0.5", "a cone"], steps=1, guidance=4.0, decode=False)
    assert torch.equal(mixed.latents[:1], found.latents)
    chunked = generate(model, f"{SHORT} AND {LONG}", negative="ugly", steps=1, guidance=4.0, decode=False)
    assert len(chunked) == 1


def test_and_that_composes_nothing_is_refused():
    model = tiny_model("sd")
    for prompt in ("a cat AND ", "AND a cat", "a AND AND b"):
        with pytest.raises(BadInput, match="empty.*'and'"):
            generate(model, prompt, steps=1)
    with pytest.raises(BadInput, match="negative prompt.*'and'"):
        generate(model, "a cat", negative="a AND b", steps=1)
    assert read_composition("sand AND_PROMPT and Andy").others == ()
    assert read_composition("a ratio of 3:4").text == "a ratio of 3:4"


# --- adapters ------------------------------------------------------------------------------------------


def test_lora_tags_attach_adapters_of_the_shelf(shelf):
    model = tiny_model("sd")
    adapter = cards.method("lora")(file="example-lora", scale=0.8, partial=True)
    expected = generate(model, SHORT, steps=1, decode=False, interventions=adapter)
    with pytest.raises(NoMatch, match="partial=true"):
        generate(model, "a red cube <lora:example-lora:0.8>", steps=1)
    keep_what_fits(shelf, model)
    for prompt in ("a red cube <lora:fits:0.8>", "a red cube<lora:fits: .8>", "<LoRA:fits:0.8>a red cube"):
        found = generate(model, prompt, steps=1, decode=False)
        assert torch.equal(found.latents, expected.latents)
    assert found.recipe["prompt"] == SHORT and found.recipe["with"][0]["params"]["scale"] == 0.8
    again = generate(model, **recipe_args(found.recipe, allow=["fits"]), decode=False)
    assert torch.equal(again.latents, found.latents)
    plain = generate(model, SHORT, steps=1, decode=False)
    assert not torch.equal(plain.latents, found.latents)
    assert torch.equal(generate(model, "a red cube <lora:fits:0>", steps=1, decode=False).latents, plain.latents)


def keep_what_fits(shelf, model):
    """The example without modules that this model lacks."""
    from safetensors.torch import load_file, save_file

    known = {f"{name}.{path}" for name, part in model.modules.items() for path, _ in part.named_modules()}
    tensors = load_file(shelf / "example-lora.safetensors")
    fitting = {key: each for key, each in tensors.items() if key.split(".lora_")[0] in known}
    assert fitting
    save_file(fitting, shelf / "fits.safetensors")


@pytest.mark.parametrize(
    ("prompt", "kind", "says"),
    [
        ("a <lora:nowhere:1>", BadInput, "no adapter file 'nowhere'"),
        ("a <lora:example-lor:1>", BadInput, "Did you mean 'example-lora'"),
        ("a <lyco:x:1>", NotSupported, "lyco is not supported; write <lora:x:1>"),
        ("a <hypernet:x:1>", NotSupported, "hypernetworks are not supported"),
        ("a <lora:x:0.5:0.7>", NotSupported, "only one scale"),
        ("a <lora:x:te=1>", BadInput, "no scale"),
        ("a <lora:x:nan>", BadInput, "no scale"),
        ("a <lora::1>", BadInput, "no name"),
        ("a <lora:../x:1>", BadInput, "--with lora:file=PATH"),
        ("a <lora:/etc/passwd>", BadInput, "no name"),
        (["a <lora:x:1>", "a"], BadInput, "one by one"),
    ],
)
def test_tags_that_bring_nothing_say_so(prompt, kind, says, shelf):
    with pytest.raises(kind, match=says):
        generate(tiny_model("sd"), prompt, steps=1)


@pytest.mark.parametrize(
    ("prompt", "unread"),
    [
        ("a [red:blue:0.5] cube", "[red:blue:0.5]"),
        ("a [cube:8] here", "[cube:8]"),
        ("a [cow|horse]", "[cow|horse]"),
        ("a {red|blue} cube", "{red|blue}"),
        ("a __colour__ cube", "__colour__"),
        ("a cube, embedding:easynegative", "embedding:easynegative"),
        ("a cube AND_PERP a ball", "AND_PERP"),
        ("a cube ADDCOMM a ball", "ADDCOMM"),
        ("a <wildcard:colour> cube", "<wildcard:colour>"),
    ],
)
def test_notations_that_are_not_read_are_named(prompt, unread):
    for given in ({"prompt": prompt}, {"prompt": "a cube", "negative": prompt}):
        with pytest.warns(PlainWords, match=re.escape(repr(unread)) + ": .* drawn as plain words"):
            generate(tiny_model("sd"), steps=1, decode=False, guidance=3.0, **given)


@pytest.mark.parametrize(
    "prompt", ["a [red] cube", "a (red:1.2) ball: blue", "f(x) = {x}", r"a \[b|c\]", "4:3, 16:9 [wide]"]
)
def test_plain_words_are_not_named(prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_plain_words([prompt])
    warn_of_plain_words(["[:" * 10_000, "{" * 20_000, "__" * 10_000])  # no longer than its length


def test_tags_within_brackets():
    assert adapter_tags("a cube (<lora:ink:0.5>:1.2), big") == ("a cube, big", (("ink", 0.5),))
    assert adapter_tags("a (red <lora:ink> cube:1.2)") == ("a (red cube:1.2)", (("ink", 1.0),))


def test_tags_elsewhere_are_refused():
    with pytest.raises(BadInput, match="negative prompt.*write it in the prompt"):
        generate(tiny_model("sd"), "a", negative="b <lora:x:1>", steps=1)
    assert adapter_tags("a <rex> and a <3 heart") == ("a <rex> and a <3 heart", ())


# --- weights ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart"])
def test_weights_below_1_by_compels_convention(kind):
    model = tiny_model(kind)
    prompt = "a (red:0.5) cube and (a blue ball:0.2) (cone:1.4)"
    read = read_weights(prompt)
    hidden = {}
    for suffix in ("", "_2") if kind == "sdxl" else ("",):
        tokenizer, encoder = getattr(model.pipe, f"tokenizer{suffix}"), getattr(model.pipe, f"text_encoder{suffix}")
        length = 77 if kind != "pixart" else model.text_length
        encoded = tokenizer(read.text, padding="max_length", max_length=length, return_tensors="pt")
        base = encoded.attention_mask if kind == "pixart" else torch.ones_like(encoded.input_ids)
        shift = 0 if kind == "pixart" else 1
        for label, words in (("red", [1]), ("ball", [4, 5, 6])):
            mask = base.clone()
            mask[0, [shift + word for word in words]] = 0
            out = encoder(encoded.input_ids, attention_mask=mask, output_hidden_states=True)
            features = out.hidden_states[-2] if kind == "sdxl" else out[0]
            hidden.setdefault(label, []).append(features)
    found = encode_weighted(model, [prompt], guidance=False, weighting="compel").cond["embeds"]
    base, empty = (model.encode_text(text, guidance=False).cond["embeds"] for text in (read.text, ""))
    weights = torch.ones(base.shape[1])
    shift = 0 if kind == "pixart" else 1
    for places, weight in (([1], 0.5), ([4, 5, 6], 0.2), ([7], 1.4)):
        weights[[shift + place for place in places]] = weight
    moved = [empty + weights[:, None] * (e - empty) for e in (base, *(torch.cat(hidden[x], -1) for x in hidden))]
    shares = [1.0, *(math.tan((1 - w) * math.pi / 2) for w in (0.5, 0.2))]
    expected = sum(share * each for share, each in zip(shares, moved, strict=True)) / sum(shares)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, encode_weighted(model, [prompt], guidance=False).cond["embeds"])


@torch.no_grad()
def test_both_conventions_agree_above_1_and_in_chunks():
    model = tiny_model("sd")
    above = ["a (red:1.3) cube " + LONG]
    ours, theirs = (encode_weighted(model, above, weighting=name).cond["embeds"] for name in ("comfyui", "compel"))
    assert torch.equal(ours, theirs)
    low = [LONG.replace("cone", "(cone:0.4)")]
    ours, theirs = (encode_weighted(model, low, weighting=name).cond["embeds"] for name in ("comfyui", "compel"))
    assert torch.equal(ours[:, :77], theirs[:, :77].to(ours)) or torch.allclose(ours[:, :77], theirs[:, :77], atol=1e-6)
    assert not torch.allclose(ours[:, 77:], theirs[:, 77:], atol=1e-4)
    with pytest.raises(BadInput, match="weighting is 'a1111'"):
        generate(model, SHORT, weighting="a1111", steps=1)
    with pytest.raises(NotSupported, match="weighting=comfyui"):
        encode_weighted(tiny_model("klein"), ["a (red:0.5) cube"], weighting="compel")
