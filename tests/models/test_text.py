"""Prompts, conditions and token streams."""

from __future__ import annotations

import warnings

import pytest
import torch

from sfumato.errors import BadInput, NotSupported
from sfumato.models import Condition, Model, TruncatedPrompt
from tests.tiny import KINDS, WHOLE_WORDS, clip_tokenizer, t5_tokenizer, tiny_model


def test_tiny_tokenizers() -> None:
    for tokenizer in (clip_tokenizer(), t5_tokenizer()):
        assert all(len(tokenizer.tokenize(word)) == 1 for word in WHOLE_WORDS)
        assert len(tokenizer.tokenize("cylinder")) > 3
    assert clip_tokenizer().unk_token_id not in clip_tokenizer()("żółw 🐢 日本", add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_streams_name_the_positions_that_a_word_moves(kind: str) -> None:
    """Change the last word: embeddings move where the streams say it is, and with the causal CLIP not before."""
    model = tiny_model(kind)
    first, second = (model.encode_text(text, guidance=False).cond["embeds"] for text in ("a red cube", "a red ball"))
    assert first.shape[1] == model.text_length
    moved = (first - second).abs().amax(dim=(0, 2)).nonzero().flatten().tolist()
    starts = []
    for stream in model.tokenizers:
        assert stream.offset + stream.length <= model.text_length
        word = stream.tokenizer(stream.prepare("a red cube"), return_offsets_mapping=True).offset_mapping.index((6, 10))
        starts.append(stream.offset + word)
        if stream.name.startswith("clip"):
            own = [i for i in moved if stream.offset <= i < stream.offset + stream.length]
            assert own and own[0] == stream.offset + word
    assert set(starts) <= set(moved)
    names = [stream.name for stream in model.tokenizers]
    assert names == {
        "sdxl": ["clip", "clip2"],
        "sd3": ["clip", "clip2", "t5"],
        "sd35": ["clip", "clip2", "t5"],
        "sd3clip": ["clip", "clip2"],
    }.get(kind, ["clip"] if kind in ("sd", "sd2", "inpaint") else ["t5"])


def test_sd3_without_t5_pads_with_as_many_zeros_as_its_card_says() -> None:
    pipe = tiny_model("sd3clip").pipe
    for length in (None, 0, 8):
        card = {} if length is None else {"sampling": {"max_sequence_length": length}}
        model = Model(pipe, card=card)
        embeds = model.encode_text("a red cube", guidance=False).cond["embeds"]
        assert embeds.shape[1] == model.text_length == 77 + (256 if length is None else length)
        assert not embeds[:, 77:].any()
        assert [stream.name for stream in model.tokenizers] == ["clip", "clip2"]


def test_truncation_is_said_and_quoted() -> None:
    long = "a red cube " * 30 + "and a blue ball"
    with pytest.warns(TruncatedPrompt, match=r"tiny-sd reads 77 tokens of clip text and does not see '.*blue ball'"):
        with (model := tiny_model("sd")).in_chunks(0):
            model.encode_text(long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_model("sd").encode_text("a red cube " * 25)  # 75 words and two special tokens
        tiny_model("sd").encode_text(long)  # in two chunks
        tiny_model("flux", own_length=True).encode_text(long)  # T5 reads 512
    model = tiny_model("sd3", own_length=True)
    with pytest.warns(TruncatedPrompt) as caught, model.in_chunks(0):
        model.encode_text("a red cube", negative="ball " * 100)
    assert len(caught) == 2  # the two CLIPs, not T5


def test_encoding_is_silent(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncatedPrompt)
        for kind in KINDS:
            tiny_model(kind).encode_text(["word " * 150, ""])  # 600 tokens: more than any encoder reads
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


@pytest.mark.parametrize("prompts", [[], [""] * 0, None, 3, ["a", None], [["a"]]])
def test_prompts_refused(prompts: object) -> None:
    with pytest.raises(BadInput, match="prompts=.* is not allowed: give a string or a non-empty list of strings"):
        tiny_model("sd").encode_text(prompts)  # type: ignore[arg-type]


def test_negatives() -> None:
    model = tiny_model("sd")
    one = model.encode_text(["a cube", "a ball"], "blue")
    assert one.negatives == ("blue", "blue")
    assert torch.equal(one.uncond["embeds"], model.encode_text(["a", "a"], ["blue", "blue"]).uncond["embeds"])
    with pytest.raises(BadInput, match="negative has 3 entries for 2 prompts"):
        model.encode_text(["a cube", "a ball"], ["x", "y", "z"])
    # SDXL stands for "no negative" with zeros, which differ from the empty prompt
    xl = tiny_model("sdxl")
    assert not xl.encode_text("a").uncond["embeds"].any()
    assert xl.encode_text("a", "").uncond["embeds"].any()


def test_condition_rows_and_batches() -> None:
    model = tiny_model("sdxl")
    both = model.encode_text(["a cube", "a ball", "a dog"], "blue")
    assert (len(both), both.branches) == (3, ("uncond", "cond"))
    batch = both.batch()
    assert torch.equal(batch["embeds"], torch.cat([both.uncond["embeds"], both.cond["embeds"]]))
    assert torch.equal(both.batch(("cond",))["pooled"], both.cond["pooled"])
    part = both.rows([2, 0])
    assert part.prompts == ("a dog", "a cube")
    assert torch.equal(part.cond["embeds"], both.cond["embeds"][[2, 0]])
    assert both.rows(1).prompts == ("a ball",) and both.rows(-1).prompts == ("a dog",)
    assert both.rows(slice(1, None)).prompts == ("a ball", "a dog")
    assert both.repeat(2).prompts == ("a cube", "a cube", "a ball", "a ball", "a dog", "a dog")
    joined = Condition.cat([both.rows(0), both.rows([1, 2])])
    assert joined.prompts == both.prompts and torch.equal(joined.uncond["pooled"], both.uncond["pooled"])
    copy = both.clone()
    copy.cond["embeds"].zero_()
    assert both.cond["embeds"].any()
    assert both.to(dtype=torch.bfloat16).cond["pooled"].dtype == torch.bfloat16
    assert tiny_model("pixart").encode_text("a").to(dtype=torch.bfloat16).cond["mask"].dtype == torch.int64
    with pytest.raises(BadInput, match="branch='uncond' is not in this condition; it has cond"):
        model.encode_text("a", guidance=False).branch("uncond")
    with pytest.raises(BadInput, match="differ in branches"):
        Condition.cat([both, model.encode_text("a", guidance=False)])


def test_embedded_guidance_is_kept_only_where_it_is_used() -> None:
    assert tiny_model("flux").encode_text("a", guidance=False, embedded_guidance=3.5).guidance == 3.5
    assert tiny_model("schnell").encode_text("a", guidance=False, embedded_guidance=3.5).guidance is None
    assert tiny_model("sd").encode_text("a", embedded_guidance=3.5).guidance is None


def test_predict_takes_rows_and_times_per_sample() -> None:
    model = tiny_model("sd")
    condition = model.encode_text(["a cube", "a ball"])
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    both = model.predict(x, 500, condition)
    assert torch.equal(both, model.predict(torch.cat([x, x]), torch.tensor([500] * 4), condition))
    times = torch.tensor([100, 700])
    mixed = model.predict(x, times, condition, "cond")
    for i in range(2):
        assert torch.allclose(
            mixed[i : i + 1], model.predict(x[i : i + 1], times[i], condition.rows(i), "cond"), atol=1e-5
        )
    with pytest.raises(BadInput, match=r"x has shape \(3, 4, 16, 16\); expected \(b c h w\) with 2 or 4 rows"):
        model.predict(torch.zeros(3, 4, 16, 16), 500, condition)


def test_sdxl_time_ids_can_be_given() -> None:
    model = tiny_model("sdxl")
    condition = model.encode_text("a cube", guidance=False)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = model.predict(x, 500, condition)
    condition.cond["time_ids"] = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    assert torch.equal(plain, model.predict(x, 500, condition))
    condition.cond["time_ids"][0, 0] = 512
    assert not torch.equal(plain, model.predict(x, 500, condition))


def test_unknown_family() -> None:
    class AudioThing:
        components: dict = {}

    with pytest.raises(NotSupported, match="'AudioThing' is not supported; known: AmusedPipeline, Anim"):
        Model(AudioThing())
