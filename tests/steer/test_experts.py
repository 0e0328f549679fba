"""Experts by hand: a picture handed over from one model to the next, gradients, nesting, refusals, training of one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.cards import to_recipe
from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.errors import BadInput, BadWeights, Conflict, NoMatch, UnknownName
from sfumato.models import Model
from sfumato.sampling import generate
from sfumato.steer.attend_excite import AttendExcite
from sfumato.steer.experts import Experts
from tests.experts import write_expert
from tests.helpers import fingerprint
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    return tmp_path


def child(kind, folder) -> Model:
    """The tiny model with the weights of an expert, as a model of its own."""
    model = tiny_model(kind, fresh=True)
    weights = next((folder / model.family.denoiser_name).glob("*.safetensors"))
    model.denoiser.load_state_dict(load_file(weights))
    return model


def options(model, steps=4):
    scheduler = "flow_euler" if model.flow else "ddim"
    return {"steps": steps, "seed": 3, "decode": False, "scheduler": scheduler}


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_each_step_is_taken_by_its_expert(cache, kind):
    model = tiny_model(kind)
    low, high = (write_expert(cache, kind, f"e{i}", ends, i) for i, ends in enumerate([(0, 500), (500, 1000)]))
    seen = []
    found = generate(model, PROMPT, interventions=Experts(), on_step=lambda step: seen.append(step), **options(model))
    times = [float(step.t) for step in seen]
    assert times[0] >= 500 > times[-1]
    change = next(i for i, t in enumerate(times) if t < 500)
    walked = []
    first = generate(child(kind, high), PROMPT, on_step=lambda step: walked.append(step.x), **options(model))
    assert not torch.equal(first.latents, found.latents)
    handed = generate(
        child(kind, low), PROMPT, latents=walked[change - 1], start=change, **{**options(model), "seed": None}
    )
    assert torch.equal(found.latents, handed.latents)
    assert found.coverage["experts"]["steps"] == list(range(len(times))) and found.cost == first.cost


def test_where_no_expert_is_the_model_itself_acts_and_the_narrowest_wins(cache):
    model = tiny_model("sd")
    write_expert(cache, "sd", "wide", (500, 1000), 1)
    inner = write_expert(cache, "sd", "narrow", (700, 1000), 2)
    system = Experts()
    found = generate(model, PROMPT, interventions=system, **options(model))
    assert [system.at(t) and system.at(t).name for t in (0, 499.9, 500, 699, 700, 1000)] == [
        None, None, "wide", "wide", "narrow", "narrow",
    ]  # fmt: skip
    assert found.coverage["experts"]["steps"] == [0, 1]  # of timesteps 751, 501, 251, 1
    alone = generate(model, PROMPT, interventions=Experts(models=[str(inner)]), **options(model))
    assert alone.coverage["experts"]["steps"] == [0] and not torch.equal(alone.latents, found.latents)


def test_strength_is_the_share_of_the_way(cache):
    model, folder = tiny_model("sd"), write_expert(cache, "sd", "e", (0, 1000))
    other = child("sd", folder)
    with torch.no_grad():
        for own, base in zip(other.denoiser.parameters(), model.denoiser.parameters(), strict=True):
            own.copy_(torch.lerp(base, own, 0.25))
    expected = generate(other, PROMPT, **options(model)).latents
    assert torch.equal(
        generate(model, PROMPT, interventions=Experts(strength=0.25), **options(model)).latents, expected
    )


def test_gradients_and_other_systems_go_through_the_expert_that_acts(cache):
    model, folder = tiny_model("sd"), write_expert(cache, "sd", "e", (0, 1000))
    moved = [AttendExcite(words=["cube"], thresholds=[[0, 0.9]]) for _ in range(2)]
    ours = generate(model, PROMPT, interventions=[Experts(), moved[0]], **options(model))
    theirs = generate(child("sd", folder), PROMPT, interventions=[moved[1]], **options(model))
    assert torch.equal(ours.latents, theirs.latents) and moved[0].attended[0].losses == moved[1].attended[0].losses
    edit = PromptToPrompt(source="a red cube and a red ball")
    generate(model, PROMPT, interventions=[Experts(), edit], **options(model))
    source = generate(child("sd", folder), "a red cube and a red ball", **options(model))
    assert torch.equal(edit.recording.latents[-1], source.latents)


def test_the_model_is_whole_again_after_an_error_between_two_experts(cache):
    model = tiny_model("sd", fresh=True)
    for i, ends in enumerate([(0, 500), (500, 1000)]):
        write_expert(cache, "sd", f"e{i}", ends, i)
    before, own = fingerprint(model), list(model.denoiser.parameters())
    for at in (0, 3):

        def fail(step, at=at):
            assert not all(a is b for a, b in zip(model.denoiser.parameters(), own, strict=True))
            if step.i == at:
                raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"):
            generate(model, PROMPT, interventions=Experts(), on_step=fail, **options(model))
        assert fingerprint(model) == before
        assert all(a is b for a, b in zip(model.denoiser.parameters(), own, strict=True))
    assert not model._listeners


def test_the_recipe_names_the_experts_that_were_found(cache):
    write_expert(cache, "sd", "e", (0, 1000))
    write_expert(cache, "sd3", "of-another-model", (0, 1000))
    system = Experts()
    generate(tiny_model("sd"), PROMPT, interventions=system, **options(tiny_model("sd")))
    assert to_recipe(system)["params"]["models"] == ["e"]


def _damage(folder, change):
    path = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_refusals(cache):
    model = tiny_model("sd", fresh=True)
    given, before = options(model), fingerprint(model)

    def refused(error, match, *systems):
        with pytest.raises(error, match=match) as caught:
            generate(model, PROMPT, interventions=list(systems), **given)
        assert "\n" not in str(caught.value) and fingerprint(model) == before

    refused(NoMatch, "no expert was trained from tiny-sd yet", Experts())
    folder = write_expert(cache, "sd", "e", (0, 600))
    refused(UnknownName, "unknown expert 'ee'. Did you mean 'e'", Experts(models=["ee"]))
    refused(BadInput, "names e twice", Experts(models=["e", "e"]))
    refused(Conflict, "experts is given twice", Experts(), Experts())
    write_expert(cache, "sd", "f", (500, 1000))
    refused(Conflict, "e and f both claim timesteps from 500 to 600", Experts())
    refused(Conflict, "both claim", Experts(models=["e", "f"], timesteps=[[0, 500], [0, 500]]))
    other = write_expert(cache, "sd3", "g", (0, 600))
    refused(BadInput, "g has no unet", Experts(models=["g"]))
    (other / "unet").mkdir()
    refused(BadWeights, "holds no weights", Experts(models=["g"]))
    nobody = cache / "folder"
    (folder / "unet").rename(nobody.with_name("unet"))
    nobody.mkdir()
    (cache / "unet").rename(nobody / "unet")
    refused(BadInput, "names no timesteps", Experts(models=[str(nobody)]))
    generate(model, PROMPT, interventions=Experts(models=[str(nobody)], timesteps=[[0, 1000]]), **given)
    for change, match in (
        (lambda t: t.pop("conv_in.weight"), "lacks conv_in.weight"),
        (lambda t: t.update({"conv_in.weight": torch.zeros(2)}), r"has \(2,\) instead"),
        (lambda t: t.update({"conv_in.weight": torch.full((16, 4, 3, 3), torch.nan)}), "no finite numbers"),
    ):
        _damage(nobody, change)
        refused(BadWeights, match, Experts(models=[str(nobody)], timesteps=[[0, 1000]]))
    file = next((nobody / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:2000])
    refused(BadWeights, "cut off", Experts(models=[str(nobody)], timesteps=[[0, 1000]]))
    for wrong in ({"timesteps": [[0, 500]]}, {"models": ["e"], "timesteps": [[500, 100]]}):
        with pytest.raises(BadInput):
            Experts(**wrong)


def test_samples_at_levels_of_different_experts_are_a_conflict(cache):
    for i, ends in enumerate([(0, 500), (500, 1000)]):
        write_expert(cache, "sd", f"e{i}", ends, i)
    model, system = tiny_model("sd"), Experts()
    generate(model, PROMPT, interventions=system, **options(model))
    assert system.at(torch.tensor([900, 600])).name == "e1"
    with pytest.raises(Conflict, match="different experts"):
        system.at(torch.tensor([900, 100]))


def test_a_card_that_is_damaged_makes_no_expert(cache):
    folder = write_expert(cache, "sd", "e", (0, 1000))
    for text in ("[]", "{", json.dumps({"expert": 3}), json.dumps({"expert": {"of": "tiny-sd", "timesteps": ["a"]}})):
        (folder / "sfumato.json").write_text(text)
        with pytest.raises((NoMatch, BadInput)):
            generate(tiny_model("sd"), PROMPT, interventions=Experts(), **options(tiny_model("sd")))


def test_a_graph_keeps_the_weights_it_was_recorded_with(cache):
    """A gradient of what one expert said does not change because another has acted since."""
    for i, ends in enumerate([(0, 500), (500, 1000)]):
        write_expert(cache, "sd", f"e{i}", ends, i)
    model = copy.deepcopy(tiny_model("sd"))
    grads = []

    class Late(AttendExcite):
        def before_predict(self, step):
            for between in (False, True):
                x = step.x.detach().requires_grad_(True)
                with torch.enable_grad():
                    value = step.predict(x, t=900).output().square().sum()
                    if between:
                        step.predict(x.detach(), t=100)
                grads.append(torch.autograd.grad(value, x)[0])
            self.mark(step)

    generate(model, PROMPT, interventions=[Experts(), Late(words=["cube"])], **options(model, steps=2))
    assert torch.equal(grads[0], grads[1]) and grads[0].abs().sum() > 0
