"""DreamBooth: the loss with its prior, what learns in each mode, identifiers, scores, and what comes out of files."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from sfumato import app
from sfumato.adapters.lora import LoRA
from sfumato.adapters.trainable import new_lora
from sfumato.adapters.weights import Weights
from sfumato.adapters.word import Word
from sfumato.bench.subject import Score, diversity, drift, identity, pareto, scored
from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported
from sfumato.models.text_towers import text_towers
from sfumato.protocol import Work
from sfumato.sampling import generate
from sfumato.teach.concepts import folders_of, made_prior
from sfumato.teach.dreambooth import DreamBooth, Learner
from sfumato.teach.identifier import candidates, pick
from sfumato.training import Draw
from tests.helpers import fingerprint
from tests.tiny import tiny_model

GIVEN = {"class_noun": "ball", "name": "dog", "steps": 1, "batch": 1, "prior": 0, "lr": 0.01}


def taught(model, photos, work=None, **more):
    return DreamBooth(**{**GIVEN, **more}).teach(model, photos, work=work)


def drawn(model, *systems):
    return generate(model, "a dog ball", steps=1, seed=3, decode=False, interventions=systems).latents


@pytest.mark.parametrize(
    ("kind", "mode", "more"),
    [
        ("sd", "lora", {"text": True}),
        ("sd", "lora", {"dora": True, "alpha": 2.0}),
        ("sd", "full", {}),
        ("sdxl", "kv", {}),
        ("sd3", "lora", {"rslora": True, "rank": 2}),
        ("flux", "pivotal", {"name": "<rex>", "pivot": 1.0}),
    ],
)
def test_every_mode_learns_and_the_file_is_what_was_learnt(photos, tmp_path, kind, mode, more):
    model = tiny_model(kind)
    before, bare = fingerprint(model), drawn(model)
    found = taught(model, photos, mode=mode, **more)
    assert fingerprint(model) == before
    files = found.save(tmp_path / "rex.safetensors")
    if mode in ("full", "kv"):
        held = load_file(files[0])
        denoiser = model.family.denoiser_name
        wanted = {f"{denoiser}.{name}" for name, _ in model.denoiser.named_parameters()
                  if mode == "full" or name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}  # fmt: skip
        assert set(held) == wanted
        system, nothing = Weights(file=str(files[0])), Weights(file=str(files[0]), scale=0)
    else:
        system, nothing = LoRA(file=str(files[0])), LoRA(file=str(files[0]), scale=0)
        learnt = {name: each.delta(1.0) for name, each in found.lora.items()}
        for name, each in system.adapted(model).items():
            torch.testing.assert_close(each.delta(1.0), learnt[name], rtol=1e-4, atol=1e-6)
        assert sum(bool(each.any()) for each in learnt.values()) > len(learnt) / 2  # SD3 throws its last text away
        assert any(name.startswith("text_encoder") for name in learnt) == bool(more.get("text"))
    assert not torch.equal(drawn(model, system), bare) and torch.equal(drawn(model, nothing), bare)
    with safe_open(files[0], "pt") as file:
        told = file.metadata()
    assert told["sfumato.method"] == "dreambooth"
    if mode == "pivotal":
        assert [path.name for path in files] == ["rex.safetensors", "rex-word.safetensors"]
        word = Word(file=str(files[1]))
        assert word.words == ["<rex>"] and len(word.vectors(model)["<rex>"]) == 2
    else:
        assert len(files) == 1 and told["modelspec.trigger_phrase"] == "dog"


def test_loss_is_the_papers_with_its_prior(photos):
    """Against two passes of a plain script, one for the subject and one for the class."""
    model = tiny_model("sd")
    system = DreamBooth(**{**GIVEN, "batch": 2, "prior": 3, "prior_weight": 0.7, "mode": "full"})
    concepts = system._concepts(model, photos, text_towers(model))
    generator = torch.Generator().manual_seed(0)
    concepts[0].prior = [torch.randn(4, 16, 16, generator=generator) for _ in range(3)]
    concepts[0].prior_prompts = ["a ball"] * 3
    learner = Learner(model, text_towers(model), concepts, system.params)
    loss, logs = learner.loss(Draw(0, 5))
    scheduler, denoising = model.pipe.scheduler, learner._loss.denoising

    def plain(latents, prompt, part):
        total = 0.0
        for place, x0 in enumerate(latents):
            noise, t = denoising.drawn(tuple(x0.shape), 5, place, part)
            alpha = scheduler.alphas_cumprod[t]
            x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
            hidden = model.encode_text(prompt, guidance=False).cond["embeds"]
            total += F.mse_loss(model.pipe.unet(x[None], t, hidden).sample[0], noise) / len(latents)
        return total

    with torch.no_grad():
        rows = Draw(0, 5).indices(3, 2).tolist()
        subject = plain([concepts[0].subject.latents(i) for i in rows], "a dog ball", "noise.0")
        prior = plain([concepts[0].prior[i] for i in rows], "a ball", "prior.0")
    torch.testing.assert_close(loss, subject + 0.7 * prior, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logs["prior"], prior, rtol=1e-5, atol=1e-6)


def test_the_prior_is_drawn_by_the_model_as_it_was_and_kept(photos, tmp_path):
    model = tiny_model("sd3clip")
    model.card["sampling"]["steps"] = 1

    def kill(step, steps, log):
        if step == 2:  # the first checkpoint is there
            raise KeyboardInterrupt

    given = {"prior": 2, "mode": "lora", "rank": 2, "checkpoint_every": 1, "steps": 2}
    whole = taught(model, photos, **given)
    with pytest.raises(KeyboardInterrupt):
        taught(model, photos, Work(tmp_path / "run", on_progress=kill), **given)
    kept = load_file(tmp_path / "run" / "prior.safetensors")["latents"]
    seeds = [77_000_000, 77_000_001]
    assert torch.equal(kept, generate(model, ["a ball"] * 2, seed=seeds, decode=False).latents.float())
    again = taught(model, photos, Work(tmp_path / "run", resume=True), **given)
    assert [e["loss"] for e in again.log] == [e["loss"] for e in whole.log]
    for name, each in whole.lora.items():
        assert torch.equal(each.parameters()["up"], again.lora[name].parameters()["up"])
    kept = tmp_path / "prior.safetensors"
    balls, cubes = (made_prior(model, f"a {noun}", 1, 0, kept)[0] for noun in ("ball", "cube"))
    assert not torch.equal(balls, cubes)  # what another run has left is not taken for this one's
    assert torch.equal(made_prior(model, "a cube", 1, 0, kept)[0], cubes)


def test_a_fresh_lora_changes_nothing_yet():
    model = tiny_model("sd")
    for more in ({}, {"dora": True}):
        for each in new_lora(model, {"unet": r".*attn2\.to_k"}, rank=3, alpha=2.0, seed=1, **more).values():
            assert each.delta(1.0).abs().max() < 1e-6 and each.rank == 3 and each.alpha == 2.0
            assert 0.1 < each.parameters()["down"].std() * 3 < 3
    with pytest.raises(NoMatch, match="fits no module of unet"):
        new_lora(model, {"unet": "attn9"})


def test_identifiers_are_rare_tokens_that_no_caption_has():
    towers = text_towers(tiny_model("sdxl"))
    known = candidates(towers)
    assert "dog" in known and "the" in known and "elephant" not in known
    for word in known:
        assert all(len(tower.tokenizer(word, add_special_tokens=False).input_ids) == 1 for tower in towers)
    assert "dog" not in candidates(towers, ["A dog, in the sand"])
    assert pick(towers, seed=1, number=2) == pick(towers, seed=1, number=2)
    only = [each for each in known if each != "cat"]
    assert pick(towers, [" ".join(only)]) == ["cat"]


def test_a_built_in_model_gets_an_identifier_that_it_does_not_know(photos):
    from sfumato.models import load
    from sfumato.toybox import VOCABULARY

    model = load("toy-sd")
    (concept,) = DreamBooth(class_noun="ball")._concepts(model, photos, text_towers(model))
    assert concept.name not in VOCABULARY and concept.phrase == f"{concept.name} ball"
    with pytest.raises(BadInput, match="'red' is a word that toy-sd understands"):
        DreamBooth(class_noun="ball", name="red")._concepts(model, photos, text_towers(model))


def test_several_subjects_in_folders(photos, tmp_path):
    both = tmp_path / "both"
    for name in ("cat ball", "10_dog red cube"):
        shutil.copytree(photos, both / name)
    assert [each[1:] for each in folders_of(both, "", "")] == [("dog", "red cube"), ("cat", "ball")]
    found = taught(tiny_model("sd3clip"), both, mode="lora", name="", steps=1)
    assert found.facts["subjects"] == ["dog red cube", "cat ball"]
    shutil.copytree(photos, both / "nameless")
    with pytest.raises(BadInput, match="'NAME CLASS'"):
        folders_of(both, "", "")


def test_scores_are_cosines():
    real, same = np.array([[1.0, 0], [0, 2]]), np.array([[3.0, 0], [3, 0]])
    assert identity(same, real) == pytest.approx(0.5) and diversity(same) == pytest.approx(0)
    assert diversity(real) == pytest.approx(1) and drift(real, real) == pytest.approx(0)
    assert drift(real, real[::-1]) == pytest.approx(1)
    one = np.array([[1.0, 0]])
    score = scored(
        7, one, one, plain=np.array([[1.0, 1.0]]), plain_before=np.array([[0, 1.0]]), others=one, others_before=one
    )
    assert score.leak == pytest.approx(2**-0.5) and score.identity == 1 and score.drift == pytest.approx(0)
    assert Score.from_json({**score.to_json(), "probe": 3.0}) == Score.from_json(score.to_json())
    known = [(0.2, 0.0), (0.8, 0.05), (0.9, 0.6), (0.7, 0.5)]
    low, good, leaky, worse = (Score(i, alike, leak, 0.0, 0.5) for i, (alike, leak) in enumerate(known))
    assert pareto([low, good, leaky, worse]) == [low, good, leaky]
    assert min([low, good, leaky, worse], key=Score.figure) is good


def test_checkpoints_are_scored_and_shown(photos, tmp_path):
    found = taught(
        tiny_model("sd"), photos, mode="lora", steps=1, score_every=1, scored=2, score_steps=1, lr=0.1, net="toy-clip"
    )
    assert [each["step"] for each in found.facts["scores"]] == [0, 1]
    figures = [Score.from_json(each).figure() for each in found.facts["scores"]]
    files = found.save(tmp_path / "rex.safetensors")
    assert [path.name for path in files] == ["rex.safetensors", "rex-scores.png"] and found.pictures[
        "scores"
    ].width > 300
    changed = any(each.parameters()["up"].any() for each in found.lora.values())
    assert changed == (min(range(2), key=figures.__getitem__) > 0)  # the best is kept, the beginning if it was


def test_refusals(photos, tmp_path):
    model = tiny_model("sd3clip")
    cases = [
        ({"class_noun": None}, BadInput, "class_noun of dreambooth must be given"),
        ({"mode": "pivotal", "name": "ball"}, BadInput, "is a word of text_encoder already"),
        ({"name": "Ball"}, BadInput, "is the class itself; leave it out"),
        ({"prompt": "a ball"}, BadInput, "it must hold {} once"),
        ({"targets": "attn9"}, NoMatch, "fits no module"),
        ({"snr_gamma": 5}, NotSupported, "flow model"),
        ({"steps": 0}, BadInput, "steps"),
        ({"mode": "half"}, BadInput, "mode"),
        ({"model": tiny_model("pixart"), "text": True}, BadInput, "has none: leave it out"),
    ]
    for more, error, says in cases:
        given = {"model": model, "out": tmp_path / "x.safetensors", **GIVEN, **more}
        given = {name: value for name, value in given.items() if value is not None}
        with pytest.raises(error) as raised:
            app.teach(photos, by="dreambooth", **given)
        assert says in str(raised.value) and "\n" not in str(raised.value), str(raised.value)
        assert not list(tmp_path.iterdir()), more
    with pytest.raises(Conflict, match="another steps"):
        for steps, resume in ((1, False), (2, True)):
            work = Work(tmp_path / "run", resume, on_progress=None)
            taught(model, photos, work, steps=steps, rank=1)
