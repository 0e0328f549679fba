"""The controls of the structured guidance claims, on tiny models and by hand."""

from __future__ import annotations

from claims import common
from claims import structured_guidance as claim
from sfumato.sampling import generate
from sfumato.steer.structured_guidance import StructuredGuidance
from sfumato.text import Words
from tests.tiny import tiny_model


def test_random_spans_are_as_long_and_elsewhere():
    words = Words(tiny_model("sd"))
    for prompt in common.pair_prompts(3, 10):
        reading = words.read(prompt.text)
        ours, theirs = (system._parsed(reading) for system in (StructuredGuidance(), claim.RandomSpans()))
        assert [len(a.text.split()) for a in ours] == [len(b.text.split()) for b in theirs] == [3, 3]
        assert not {(a.start, a.end) for a in ours} & {(b.start, b.end) for b in theirs}
        assert theirs == claim.RandomSpans()._parsed(reading)


def test_a_turned_prompt_keeps_its_wishes():
    prompt = common.pair_prompts(3, 1)[0]
    other = claim.turned(prompt)
    first, second = prompt.text.split(" and ")
    assert other.text == f"{second} and {first}" and other.requests == prompt.requests
    assert claim.turned(prompt).text != prompt.text


def test_only_the_second_phrase_is_contaminated():
    system = StructuredGuidance()
    watch = claim.Contamination(system)
    prompts = [prompt.text for prompt in common.pair_prompts(4, 3)]
    generate(tiny_model("sd"), prompts, steps=1, interventions=[system, watch], decode=False)
    assert len(watch.distances) == 3
    for first, second in watch.distances:
        assert first < 1e-4 < 1e-3 < second
