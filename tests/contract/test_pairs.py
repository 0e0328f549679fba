"""Pairs of systems whose common effect can be said exactly: what the trace of a steered picture must show."""

from __future__ import annotations

import pytest
import torch

from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.errors import Conflict, NoMatch
from sfumato.explain.daam import DAAM
from sfumato.sampling import Intervention, generate
from sfumato.steer.attend_excite import AttendExcite
from sfumato.steer.paint_with_words import PaintWithWords
from sfumato.steer.shape_guided import ShapeGuided, Sides
from sfumato.steer.structured_guidance import StructuredGuidance
from sfumato.text import Words
from sfumato.text.weights import encode_weighted
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"
HALF = torch.zeros(32, 32)
HALF[:, :16] = 1


def run(model, systems, prompt=PROMPT, **more):
    scheduler = "flow_euler" if model.flow else "ddim"
    given = {"steps": 2, "seed": 4, "guidance": 3.0, "decode": False, "scheduler": scheduler, **more}
    return generate(model, prompt, interventions=systems, **given)


class Texts(Intervention):
    """The condition as the denoiser gets it."""

    def after_predict(self, step):
        self.condition = step.condition
        self.mark(step)


# --- a silhouette lays the text out anew, and everybody finds the words again ---------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_words_are_found_where_a_silhouette_has_put_them(kind):
    """Every word lies where the encoding of its own side has it, by the embeddings themselves."""
    model, texts = tiny_model(kind), Texts()
    looks = DAAM(words=["cube", "ball", "red cube"])
    more = {"guidance": None} if model.embeds_guidance else {}
    run(model, [ShapeGuided(words=["cube"], mask=HALF), looks, texts], **more)
    reading, plain = looks.maps[0].reading, Words(model)
    embeds = texts.condition.cond["embeds"][0]
    for word, side in (("cube", "a red cube"), ("red", "a red cube"), ("ball", "a blue ball"), ("blue", "a blue ball")):
        alone = model.encode_text(side, guidance=False).cond["embeds"][0]
        for stream, positions in plain.one(side, word).tokens.items():
            there = reading.one(word).tokens[stream]
            assert len(there) == len(positions) > 0
            torch.testing.assert_close(embeds[list(there)], alone[list(positions)])
    assert reading.one("ball").positions != plain.one(PROMPT, "ball").positions


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_the_trace_of_a_silhouette_stays_inside_it(kind):
    model, looks = tiny_model(kind), DAAM(words=["cube", "ball"])
    run(model, [looks, ShapeGuided(words=["cube"], mask=HALF)])
    maps = looks.maps[0]
    for layer in {layer.site.block for layer in maps.layers}:
        h, w = next(layer_.site.grid for layer_ in maps.layers if layer_.site.block == layer)
        if w % 2:
            continue
        cube, ball = (maps.map(word, layers=[layer], size=maps.resolution) for word in ("cube", "ball"))
        if (h, w) == tuple(maps.resolution):  # coarser layers are interpolated
            assert cube[:, w // 2 :].abs().max() < 1e-6 < cube[:, : w // 2].min()
            assert ball[:, : w // 2].abs().max() < 1e-6 < ball[:, w // 2 :].min()
    plain = DAAM(words=["cube", "ball"])
    run(model, [plain])
    assert plain.maps[0].map("cube")[:, 20:].min() > 1e-6


def test_words_that_a_silhouette_has_replaced_are_told():
    model, guided = tiny_model("sd"), ShapeGuided(words=["cube"], mask=HALF, outside="a dog")
    with pytest.raises(NoMatch, match="'ball' is in the prompt, but in none of the texts that were put in its place"):
        run(model, [guided, DAAM(words=["ball"])])


def test_the_next_run_finds_the_words_where_they_were():
    model = tiny_model("sd")
    looks = [DAAM(words=["ball"]), DAAM(words=["ball"])]
    run(model, [ShapeGuided(words=["cube"], mask=HALF), looks[0]])
    run(model, [looks[1]])
    assert looks[1].maps[0].reading == Words(model).read(PROMPT) != looks[0].maps[0].reading


def test_editing_inside_a_silhouette_takes_over_the_attention_among_pixels_alone():
    model = tiny_model("sd")
    silhouette = {"words": ["cube"], "mask": HALF}
    for params in ({}, {"cross_replace": 0, "blend": ["ball"]}, {"cross_replace": 0, "windows": ["cube=0-0.5"]}):
        edit = PromptToPrompt(source="a red cube and a red ball", **params)
        with pytest.raises(Conflict, match="with cross_replace=0 and no blend"):
            run(model, [edit, ShapeGuided(**silhouette)])
    edit = PromptToPrompt(source="a red cube and a red ball", cross_replace=0, self_replace=1)
    both = run(model, [edit, ShapeGuided(**silhouette)])
    assert edit.activity.sites and all("attn1" in site for site in edit.activity.sites)
    assert not torch.equal(both.latents, run(model, [ShapeGuided(**silhouette)]).latents)


# --- traces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_the_trace_of_an_edit_shows_the_maps_of_its_source(kind):
    """While words are replaced, the new word is where the old one was in the source."""
    model = tiny_model(kind)
    new, old = DAAM(words=["ball"], per_step=True), DAAM(words=["cone"], per_step=True)
    edit = PromptToPrompt(source="a red cube and a blue cone", cross_replace=1.0, self_replace=0.0)
    run(model, [edit, new])
    run(model, [old], prompt="a red cube and a blue cone")
    if kind == "sd":  # all of a map's columns are the source's
        torch.testing.assert_close(new.maps[0].map("ball"), old.maps[0].map("cone"), rtol=1e-4, atol=1e-6)
    plain = DAAM(words=["ball"], per_step=True)
    run(model, [plain])
    far, near = (
        (each.maps[0].map("ball", steps=[1]) - old.maps[0].map("cone", steps=[1])).abs().mean() for each in (plain, new)
    )
    assert near < far


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "pixart"])
def test_the_trace_of_a_painting_shows_the_paint(kind):
    model = tiny_model(kind)
    boxes = {"phrases": ["red cube", "blue ball"], "box": [[0, 0, 0.5, 1], [0.5, 0, 1, 1]], "strength": 100.0}
    painted, plain = DAAM(words=["red cube", "blue ball"]), DAAM(words=["red cube", "blue ball"])
    more = {"guidance": None} if model.embeds_guidance else {}
    run(model, [PaintWithWords(**boxes), painted], **more)
    run(model, [plain], **more)
    for word, side in (("red cube", slice(0, 16)), ("blue ball", slice(16, 32))):
        shares = [found.maps[0].map(word)[:, side].sum() / found.maps[0].map(word).sum() for found in (painted, plain)]
        assert shares[0] > shares[1] + 0.05, word


def test_the_trace_of_moved_latents_is_that_of_a_run_that_begins_with_them():
    model, moved = tiny_model("sd"), {}
    excite = AttendExcite(words=["cube", "ball"], thresholds=[], window=(0.0, 0.5))
    both, alone = DAAM(), DAAM()

    class Begin(Intervention):
        def after_predict(self, step):
            moved.setdefault("x", step.x.clone())
            self.mark(step)

    result = run(model, [both, excite, Begin()])
    again = run(model, [alone], latents=moved["x"])
    assert torch.equal(result.latents, again.latents)
    for word in ("cube", "ball"):
        assert torch.equal(both.maps[0].map(word), alone.maps[0].map(word))


def test_moved_latents_follow_the_painted_attention():
    """attend_excite asks for what is left to do after the painting: less, for words that are painted strongly."""
    model = tiny_model("sd")
    boxes = {"phrases": ["cube", "ball"], "box": [[0, 0, 0.5, 1], [0.5, 0, 1, 1]], "strength": 3.0}
    losses = []
    for systems in ([], [PaintWithWords(**boxes)]):
        excite = AttendExcite(words=["cube", "ball"], thresholds=[])
        run(model, [*systems, excite])
        losses.append(excite.attended[0].losses[0][0])
    assert losses[1] < losses[0] - 0.05


# --- weights of words reach every text that a system makes -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_weights_reach_the_texts_of_a_silhouette(kind):
    model, texts = tiny_model(kind), Texts()
    run(model, [ShapeGuided(words=["cube"], mask=HALF), texts], prompt="a (red:1.5) cube and a (blue ball:0.5)")
    embeds = texts.condition.cond["embeds"][0]
    sides = Sides(model, 2)
    for group, side in enumerate(("a (red:1.5) cube", "a (blue ball:0.5)")):
        alone = encode_weighted(model, [side], guidance=False).cond["embeds"][0]
        for stream, (first, part) in sides.stretches.items():
            assert torch.equal(embeds[sides.part(stream, group)], alone[first : first + part])


def test_weights_reach_phrases_that_are_encoded_by_themselves():
    model, prompt = tiny_model("sd"), "a (red:1.5) cube and a blue ball"
    kept = {}

    class Looks(StructuredGuidance):
        def finish(self, run):
            kept.update(keys=self._keys.clone())
            super().finish(run)

    run(model, [Looks(phrases=["red cube"])], prompt=prompt)
    alone = encode_weighted(model, ["(red:1.5) cube"], guidance=False).cond["embeds"][0]
    words = Words(model)
    there, here = words.one(PROMPT, "red cube").positions, words.one("red cube", "red cube").positions
    assert torch.equal(kept["keys"][1, 0, list(there)], alone[list(here)])


def test_weights_reach_the_source_of_an_edit_and_its_negative():
    model, source = tiny_model("sd"), "a (red:1.5) cube and a blue cone"
    edit = PromptToPrompt(source=source)
    run(model, [edit], negative="a (dog:1.4)")
    expected = run(model, [], prompt=source, negative="a (dog:1.4)").latents
    assert torch.equal(edit.recording.latents[-1], expected)
    assert edit.recording.prompts == ["a red cube and a blue cone"]
