"""What was taught together with everything else: LoRAs, word maps, excitement, edits, mixtures of words."""

from __future__ import annotations

import pytest
import torch

from sfumato.adapters.lora import LoRA
from sfumato.adapters.weights import Weights
from sfumato.adapters.word import Word, save_word
from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.errors import BadInput, Conflict, NoMatch
from sfumato.explain.conceptor.pseudo_word import mixture_vectors
from sfumato.explain.daam import DAAM
from sfumato.models.text_towers import text_towers, token_of
from sfumato.protocol import Work
from sfumato.sampling import generate
from sfumato.steer.attend_excite import AttendExcite
from sfumato.teach.custom_diffusion import CustomDiffusion
from sfumato.teach.dreambooth import DreamBooth
from sfumato.teach.textual_inversion import TextualInversion
from tests.helpers import fingerprint
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def things(photos, tmp_path_factory):
    """Files of a word, a LoRA with a word of its own, another LoRA, and weights with theirs; one step each."""
    model, folder = tiny_model("sd"), tmp_path_factory.mktemp("things")
    few = {"steps": 1, "lr": 0.05, "batch": 1, "class_noun": "ball"}
    taught = {
        "rex": TextualInversion(name="<rex>", **few),
        "dino": DreamBooth(name="<dino>", mode="pivotal", prior=0, **few),
        "style": DreamBooth(name="cat", seed=1, prior=0, **few),
        "cone": CustomDiffusion(name="<cone>", prior=0, augment=False, **few),
    }
    return {key: [str(path) for path in system.teach(model, photos).save(folder / f"{key}.safetensors")]
            for key, system in taught.items()}  # fmt: skip


def drawn(systems, prompt="a <rex> and a blue ball", **more):
    return generate(
        tiny_model("sd"), prompt, steps=1, seed=5, scheduler="ddim", decode=False, interventions=systems, **more
    )  # fmt: skip


def test_word_two_loras_excitement_and_word_maps(things):
    model = tiny_model("sd")
    before = fingerprint(model)
    maps = DAAM(words=["<rex>", "ball"])
    parts = [
        Word(file=things["rex"][0]),
        LoRA(file=things["dino"][0], scale=0.5),
        LoRA(file=things["style"][0], scale=-0.3),
    ]
    parts += [Word(file=things["dino"][1]), AttendExcite(words=["<rex>", "<dino>"], thresholds=[]), maps]
    made = drawn(parts, "a <rex> and a blue ball and a <dino>")
    assert {key.split("#")[0].split(" ")[0] for key in made.coverage} >= {"word", "lora", "attend_excite", "daam"}
    assert maps.maps[0].map("<rex>").shape == maps.maps[0].map("ball").shape
    assert fingerprint(model) == {**before, "rng": fingerprint()["rng"]}
    fewer = drawn(parts[:2] + parts[3:], "a <rex> and a blue ball and a <dino>")
    assert not torch.equal(made.latents, fewer.latents)


def test_concept_weights_and_a_lora(things):
    weights, word = things["cone"]
    alone = drawn([Weights(file=weights), Word(file=word)], "a <cone> ball").latents
    both = drawn([Weights(file=weights), Word(file=word), LoRA(file=things["style"][0])], "a <cone> ball").latents
    bare = drawn([], "a <cone> ball").latents
    assert not torch.equal(alone, both) and not torch.equal(alone, bare)


def test_a_taught_word_takes_part_in_edits(things):
    word = Word(file=things["rex"][0])
    edited = drawn([word, PromptToPrompt(source="a red cube and a blue ball")], "a red <rex> and a blue ball")
    plain = drawn([word], "a red <rex> and a blue ball")
    assert not torch.equal(edited.latents, plain.latents)


def test_a_mixture_of_words_is_a_word_too(things, tmp_path):
    vectors = mixture_vectors(tiny_model("sd"), {"cube": 0.7, "ball": 0.3})
    file = save_word(tmp_path / "mixed.safetensors", "<mixed>", vectors)
    made = drawn([Word(file=str(file)), Word(file=things["rex"][0])], "a <rex> and a <mixed>")
    assert made.coverage["word"]["tokens"] or made.coverage
    model, word = tiny_model("sd"), Word(file=things["rex"][0])
    rex = word.vectors(model)["<rex>"]["text_encoder"][0]
    with word.attach(model):  # a taught word may be mixed, and mixed into
        for mixture, wanted in (({"<rex>": 2.0}, rex), ({"<rex>": 1.0, "ball": -0.5}, rex - 0.5 * ball_row(model))):
            mixed = mixture_vectors(model, mixture)["text_encoder"]
            torch.testing.assert_close(mixed / mixed.norm(), wanted / wanted.norm())


def ball_row(model):
    (tower,) = text_towers(model)
    return tower.row(token_of(tower, "ball"))


def test_what_cannot_go_together_says_why(things):
    with pytest.raises(Conflict, match="is taught twice for text_encoder"):
        drawn([Word(file=things["rex"][0]), Word(file=things["dino"][1], name="<rex>")])
    with pytest.raises(NoMatch, match="is in no text of this run"):
        drawn([Word(file=things["rex"][0])], "a ball")
    with pytest.raises(Conflict, match="only one set can be in place"):
        drawn([Weights(file=things["cone"][0]), Weights(file=things["cone"][0], scale=0.5)], "a ball")
    with pytest.raises(BadInput, match="holds a lora, not a word"):
        Word(file=things["style"][0])


class Stopped(Exception):
    pass


def learnt(found):
    """Every tensor that was learnt, in order."""
    adapted = [p for each in found.lora.values() for p in each.parameters().values()]
    return [*(v for each in found.words.values() for v in each.values()), *adapted, *found.weights.values()]


WHOLE = {"class_noun": "ball", "prior": 0}
HALF = [
    ("sd3clip", TextualInversion, {"name": "<rex>", "length": "free", "probe_every": 3, "lr": 0.1}),
    ("sd", DreamBooth, {"name": "dog", "prior": 0, "lr": 0.02}),
    ("sd3clip", DreamBooth, {"name": "dog", "prior": 0, "lr": 0.02, "keep_aspect": True}),
]


@pytest.mark.parametrize(("kind", "cls", "given"), HALF)
def test_half_precision_and_recomputation_learn_and_a_stopped_run_goes_on(photos, tmp_path, kind, cls, given):
    model = tiny_model(kind, fresh=True).to(dtype=torch.bfloat16)
    given = {"class_noun": "ball", "steps": 6, "batch": 2, "checkpointing": True, "checkpoint_every": 3, **given}
    before = fingerprint(model)
    whole = cls(**given).teach(model, photos)

    def stop(step, steps, log):
        if step == 4:
            raise Stopped

    with pytest.raises(Stopped):
        cls(**given).teach(model, photos, work=Work(tmp_path / "run", on_progress=stop))
    again = cls(**given).teach(model, photos, work=Work(tmp_path / "run", resume=True))
    losses = [each["loss"] for each in whole.log]
    assert [each["loss"] for each in again.log] == losses
    if "probe_first" in whole.facts:  # a word alone moves a random model little: at fixed noise then
        assert whole.facts["probe_best"] < whole.facts["probe_first"]
    else:
        assert sum(losses[3:]) < sum(losses[:3])
    assert fingerprint(model) == {**before, "rng": fingerprint(model)["rng"]}
    for one, other in zip(learnt(again), learnt(whole), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_whole_weights_are_not_taught_in_half_precision(photos):
    model = tiny_model("sd", fresh=True).to(dtype=torch.bfloat16)
    for system in (DreamBooth(mode="full", **WHOLE), DreamBooth(mode="kv", **WHOLE), CustomDiffusion(**WHOLE)):
        with pytest.raises(BadInput, match="is in bfloat16.*dtype=float32, or teach a LoRA"):
            system.teach(model, photos)
