"""Words to token spans: checked by decoding the tokens again, by hand-counted positions, and on awkward text."""

from __future__ import annotations

import unicodedata
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from sfumato.errors import BadInput, NoMatch, NotSupported
from sfumato.models.condition import TruncatedPrompt
from sfumato.models.families import TextStream
from sfumato.text.phrases import nested_phrases
from sfumato.text.words import Reading, Words, character_origins, noun_phrases
from sfumato.toybox import caption
from sfumato.toybox.dataset import draw_scene
from tests.tiny import clip_tokenizer, t5_tokenizer, tiny_model


def stream(tokenizer, name, offset=0, length=77, prepare=lambda text: text):
    return TextStream(tokenizer, name, offset, length, prepare)


@pytest.fixture
def clip():
    return Words([stream(clip_tokenizer(), "clip")])


@pytest.fixture
def both():
    return Words([stream(clip_tokenizer(), "clip"), stream(t5_tokenizer(), "t5", 77, 40)])


def decoded(words, prompt, span, name="clip"):
    """What the tokens of a span say, read back from the padded ids at the very positions attention sees."""
    each = next(s for s in words.streams if s.name == name)
    ids = each.tokenizer(each.prepare(prompt), truncation=True, padding="max_length", max_length=each.length).input_ids
    pieces = [ids[position - each.offset] for position in span.tokens[name]]
    text = each.tokenizer.decode(pieces)
    return text.replace("\u2581", " ").replace("</w>", " ").strip()


def test_positions_counted_by_hand(clip):
    prompt = "a red cube on a blue ball"  # 0 is the start token, one token per word
    assert [s.tokens["clip"] for s in clip.all(prompt)] == [(1,), (2,), (3,), (4,), (5,), (6,), (7,)]
    assert clip.one(prompt, "red cube").tokens == {"clip": (2, 3)}
    assert clip.one(prompt, "blue ball").positions == (6, 7)
    green = clip.one("a green cube", "green")  # four pieces: g re e n
    assert green.tokens["clip"] == tuple(range(2, 2 + len(green.positions))) and len(green.positions) > 1
    assert clip.tokens(prompt) == {"clip": tuple(range(1, 8))}
    special = clip.special(prompt)
    assert special["<start>"].positions == (0,) and special["<end>"].positions == (8,)
    assert special["<pad>"].positions == tuple(range(9, 77))


def test_streams_share_one_text_axis(both):
    span = both.one("a red cube", "red cube")
    assert span.tokens == {"clip": (2, 3), "t5": (78, 79)} and span.positions == (2, 3, 78, 79)
    assert both.special("a red cube")["<start>"].tokens == {"clip": (0,), "t5": ()}
    assert both.special("a red cube")["<end>"].tokens == {"clip": (4,), "t5": (80,)}
    assert both.find("a red cube", "<pad>")[0].tokens["t5"] == tuple(range(81, 117))


AWKWARD = [
    "a  Red\tcube's  İstanbul\n dog",
    "café naïve 🐱 x, a cat!",
    "Ünïcödé  cube",
    "  leading and trailing  ",
    "e\u0301cole: cafe\u0301",
    "ﬁre ½ ™ x² dog",
    "it's don't o'clock",
    "<|endoftext|> cube",
    "猫 と 犬",
    "👩‍👩‍👧 cat",
    "שלום cat عربى",
    "a\u200bb \u00a0 c",
    "x" * 50,
]


@pytest.mark.parametrize("prompt", AWKWARD)
def test_every_word_of_awkward_text_has_its_tokens(clip, both, prompt):
    for words in (clip, both):
        found = words.all(prompt)
        assert found
        for span in found:
            assert prompt[span.start : span.end] == span.text
            for name in span.tokens:
                assert span.tokens[name], f"{span.text!r} has no {name} tokens"
        for a, b in zip(found, found[1:], strict=False):
            if prompt[a.end : b.start].strip() == "" and a.end < b.start:
                assert set(a.positions).isdisjoint(b.positions)
    for span in clip.all(prompt):
        if "<|" not in prompt:
            written = unicodedata.normalize("NFC", span.text).lower()
            assert decoded(clip, prompt, span).replace(" ", "") == written


def test_emoji_and_byte_fallback_keep_all_their_bytes(clip):
    prompt = "a 🐱 and a café"
    assert decoded(clip, prompt, clip.one(prompt, "🐱")) == "🐱"
    assert decoded(clip, prompt, clip.one(prompt, "café")) == "café"
    assert len(clip.one(prompt, "🐱").positions) == 4


def test_whole_words_only_any_case_any_blanks(clip):
    prompt = "Category cat, CAT  and concatenate; cat-like"
    assert [s.text for s in clip.find(prompt, "cat")] == ["cat", "CAT", "cat"]
    assert clip.one("a red \n  cube", "Red Cube").text == "red \n  cube"
    assert clip.one("a cat.", "cat").end == 5 and clip.one("a cat.", "cat.").end == 6
    assert clip.one("黒い猫がいる", "猫").start == 2  # scripts without blanks
    assert clip.one("a cafe\u0301 and", "caf\u00e9").text == "cafe\u0301"  # composed and decomposed accents
    assert [s.text for s in clip.all("हिन्दी, o'clock: 'quoted' (two-tone) -x- 👩‍👩‍👧!")] == [
        "हिन्दी", "o'clock", "quoted", "two-tone", "x", "👩‍👩‍👧",
    ]  # fmt: skip


def test_occurrences_stay_apart(clip):
    prompt = "a cube on a cube, one cube"
    found = clip.find(prompt, "cube")
    assert [s.label for s in found] == ["cube#1", "cube#2", "cube#3"]
    assert [s.positions for s in found] == [(2,), (5,), (found[2].positions[0],)] and found[2].start == 22
    assert clip.find(prompt, "cube", 2) == clip.find(prompt, "cube#2") == [found[1]]
    assert clip.one(prompt, "cube#3") == found[2] and clip.one(prompt, "one").label == "one"
    with pytest.raises(BadInput, match="'cube' occurs 3 times.*'cube#1' or 'cube#2' or 'cube#3'"):
        clip.one(prompt, "cube")
    with pytest.raises(NoMatch, match="occurrence=4 of 'cube'.*3 times"):
        clip.find(prompt, "cube#4")
    with pytest.raises(BadInput, match="count from 1"):
        clip.find(prompt, "cube", 0)
    assert [s.label for s in clip.all(prompt)] == ["a#1", "cube#1", "on", "a#2", "cube#2", "one", "cube#3"]
    assert clip.one("agent #2 waits", "agent #2").text == "agent #2"  # a number sign of the prompt itself


def test_unknown_word_names_the_nearest(clip):
    with pytest.raises(NoMatch, match="'cubes' is not in the prompt. Did you mean 'cube'.*Its words: a, red, cube"):
        clip.find("a red cube", "cubes")
    with pytest.raises(NoMatch, match="Did you mean 'red' or 'cube'"):
        clip.find("a cube that is red", "red cub")
    with pytest.raises(NoMatch, match="Its words: none"):
        clip.find("", "cube")
    for phrase in ("", "  ", None, 3):
        with pytest.raises(BadInput, match="a word or phrase"):
            clip.find("a cube", phrase)


def test_special_tokens_by_name(clip):
    assert clip.find("a cube", "<end>")[0].positions == (3,)
    assert clip.find("", "<end>")[0].positions == (1,) and clip.all("") == []
    with pytest.raises(NoMatch, match="no <start> token"):
        Words([stream(t5_tokenizer(), "t5")]).find("a cube", "<start>")
    with pytest.raises(NoMatch, match="no <pad> token"):
        clip.find("a cube " * 60, "<pad>")


def test_words_past_the_end_of_the_encoder(both):
    prompt = "a cube and " * 11 + "a red ball in " + "a cube and " * 14 + "a dog"  # CLIP: 75 words, T5: 39
    dropped = both.dropped(prompt)
    assert (
        set(dropped) == {"clip", "t5"} and dropped["t5"].endswith("a dog") and len(dropped["t5"]) > len(dropped["clip"])
    )
    assert both.one(prompt, "red ball").tokens["t5"] == (77 + 34, 77 + 35)
    with pytest.raises(NoMatch, match="'dog' lies beyond what the text encoders read .clip: 77 tokens, t5: 40"):
        both.find(prompt, "dog")
    assert all(span.positions for span in both.all(prompt))
    assert both.dropped("a cube") == {}
    clip = Words([stream(clip_tokenizer(), "clip", length=6)])
    with pytest.warns(TruncatedPrompt, match="the clip text encoder sees only 'red' of 'red ball'"):
        assert clip.one("a cube a red ball", "red ball").tokens["clip"] == (4,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip.one("a cube a red ball", "red")


def test_ten_thousand_words_are_no_burden(clip):
    prompt = " ".join(f"word{i}" for i in range(10_000))
    assert [s.text for s in clip.all(prompt)][:2] == ["word0", "word1"]
    assert clip.find(prompt, "word1")
    with pytest.raises(NoMatch, match="beyond"):
        clip.find(prompt, "word9999")


def test_characters_to_tokens(clip):
    assert clip.span("a red cube", 2, 10).tokens["clip"] == (2, 3)
    assert clip.span("a red cube", 4, 7).tokens["clip"] == (2, 3)  # "d c" touches both words
    with pytest.raises(BadInput, match="do not lie in the prompt, which has 10"):
        clip.span("a red cube", 2, 11)
    with pytest.raises(NoMatch, match="no token stands for"):
        clip.span("a  cube", 1, 2)


def test_texts_that_the_pipeline_changes_before_tokenizing():
    lower = Words([stream(t5_tokenizer(), "t5", prepare=lambda text: text.lower().strip())])
    plain = Words([stream(t5_tokenizer(), "t5")])
    prompt = "   A Red CUBE  and a Red ball "
    for phrase in ("Red#1", "CUBE", "red#2", "ball"):
        ours, theirs = lower.one(prompt, phrase), plain.one(prompt.lower().strip(), phrase)
        assert ours.tokens == theirs.tokens and prompt[ours.start : ours.end].lower() == theirs.text

    def write_out(text):
        return text.replace("<my-cat>", "<my-cat> <my-cat>_1 <my-cat>_2")

    tokenizer = tiny_model("sd", fresh=True).pipe.tokenizer
    tokenizer.add_tokens(["<my-cat>", "<my-cat>_1", "<my-cat>_2"])
    words = Words([stream(tokenizer, "clip", prepare=write_out)])
    assert words.one("a <my-cat> on a dog", "<my-cat>").positions == (2, 3, 4)
    assert words.one("a <my-cat> on a dog", "on").positions == (5,) and words.one(
        "a <my-cat> on a dog", "dog"
    ).positions == (7,)


def test_alignment_of_unchanged_and_changed_text():
    assert list(character_origins("abc", "abc")) == [0, 1, 2]
    assert character_origins("  Ab c ", "ab c") == [2, 3, 4, 5]
    assert character_origins("a <c> b", "a <c> <c>_1 b")[6:11] == [4] * 5


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_positions_index_the_ids_that_the_pipeline_feeds_its_encoders(kind):
    words, prompt = Words(tiny_model(kind)), "A small Red cube, and café dog"
    span = words.one(prompt, "red cube")
    assert set(span.tokens) == {s.name for s in words.streams}
    for name in span.tokens:
        assert decoded(words, prompt, span, name).lower().replace(" ", "") == "redcube"
    if kind == "sdxl":
        assert span.tokens["clip"] == span.tokens["clip2"]
    if kind == "sd3":
        assert min(span.tokens["t5"]) >= 77 > max(span.tokens["clip"])


def test_slow_tokenizers_are_refused():
    with pytest.raises(NotSupported, match="no character offsets"):
        Words([stream(SimpleNamespace(is_fast=False), "clip")])


PHRASES = {
    "a red cube to the left of a big striped ball on a wooden floor": [
        "a red cube",
        "a big striped ball",
        "a wooden floor",
    ],
    "A small, shiny green cone in front of two yellow cylinders.": [
        "A small, shiny green cone",
        "two yellow cylinders",
    ],
    "a black and white cat chasing a running dog": ["a black and white cat", "a running dog"],
    "a cat sits on the mat": ["a cat", "the mat"],
    "the sky is blue": ["the sky"],
    "a zebra and a giraffe": ["a zebra", "a giraffe"],
    "a man wearing a hat rides a horse": ["a man", "a hat", "a horse"],
    "the dog's tail and a cup of coffee": ["the dog's tail", "a cup", "coffee"],
    "a very old painting of a king": ["a very old painting", "a king"],
    "an astronaut riding a horse on mars, highly detailed, 4k": ["an astronaut", "a horse", "mars", "4k"],
    "there is a tiny purple pyramid behind it": ["a tiny purple pyramid"],
    "give the dog a bone": ["the dog", "a bone"],
    "<my-cat> on a beach": ["<my-cat>", "a beach"],
    "": [],
    "and or of": [],
}


@pytest.mark.parametrize("text", PHRASES)
def test_noun_phrases(text):
    found = noun_phrases(text)
    assert [p.text for p in found] == PHRASES[text]
    for phrase in found:
        assert text[phrase.start : phrase.end] == phrase.text
        assert text[phrase.head.start : phrase.head.end] == phrase.head.text
        assert phrase.head.text not in [m.text for m in phrase.modifiers]


def test_head_and_modifiers():
    (phrase,) = noun_phrases("a very small, shiny green cone")
    assert phrase.head.text == "cone" and [m.text for m in phrase.modifiers] == ["small", "shiny", "green"]


def test_a_parser_of_ones_own():
    token = SimpleNamespace(text="cube", idx=6, pos_="NOUN")
    red = SimpleNamespace(text="red", idx=2, pos_="ADJ")

    class Chunk(list):
        text, start_char, end_char, root = "red cube", 2, 10, token

    (phrase,) = noun_phrases("a red cube", parser=lambda text: SimpleNamespace(noun_chunks=[Chunk([red, token])]))
    assert phrase.text == "red cube" and phrase.head.start == 6 and phrase.modifiers[0].end == 5


def test_a_reading_is_plain_data(both):
    import json

    reading = both.read("a red cube and a red café")
    again = Reading.from_json(json.loads(json.dumps(reading.to_json())))
    assert again == reading and again.find("red") == reading.find("red") and again.special() == reading.special()


NESTED = {
    "a red cube": [("a red cube", None)],
    "a red cube and a blue ball": [("a red cube and a blue ball", None), ("a red cube", 0), ("a blue ball", 0)],
    "a red ball on a blue cube next to a green cone": [
        ("a red ball on a blue cube next to a green cone", None),
        ("a red ball", 0),
        ("a blue cube next to a green cone", 0),
        ("a blue cube", 2),
        ("a green cone", 2),
    ],
    "a cone, a cube and a ball on the grass": [
        ("a cone, a cube and a ball on the grass", None),
        ("a cone", 0),
        ("a cube", 0),
        ("a ball on the grass", 0),
        ("a ball", 3),
        ("the grass", 3),
    ],
    "a cat, a dog, highly detailed, 4k": [("a cat", None), ("a dog", None), ("4k", None)],
    "a man wearing a red hat rides a horse": [
        ("a man wearing a red hat", None),
        ("a man", 0),
        ("a red hat", 0),
        ("a horse", None),
    ],
    "": [],
}


@pytest.mark.parametrize("text", NESTED)
def test_nested_phrases(text):
    found = nested_phrases(text)
    assert [(phrase.text, phrase.parent) for phrase in found] == NESTED[text]
    assert all(text[phrase.start : phrase.end] == phrase.text for phrase in found)


def test_nested_phrases_hold_the_flat_ones_and_nest_properly():
    rng = np.random.default_rng(3)
    for i in range(60):
        told = caption(draw_scene("test", 1, i), rng, "random")
        found = nested_phrases(told.text)
        spans = {(phrase.start, phrase.end) for phrase in found}
        assert {(phrase.start, phrase.end) for phrase in told.phrases} <= spans  # the toybox's own parse
        assert {(phrase.start, phrase.end) for phrase in noun_phrases(told.text)} <= spans and len(spans) == len(found)
        for j, phrase in enumerate(found):
            around = [k for k, other in enumerate(found) if other.start <= phrase.start and phrase.end <= other.end]
            around.remove(j)
            smallest = min(around, key=lambda k: found[k].end - found[k].start, default=None)
            assert phrase.parent == smallest
