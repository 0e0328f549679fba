"""Custom Diffusion: what learns, the detached start, the masked augmentation, the merge through files, compression."""

from __future__ import annotations

import pytest
import torch

from sfumato import app
from sfumato.adapters.convert import convert
from sfumato.adapters.lora import LoRA
from sfumato.adapters.trainable import copies, substituted_weights
from sfumato.adapters.weights import Weights
from sfumato.adapters.word import Word
from sfumato.errors import BadInput, NotSupported
from sfumato.models.text_towers import text_towers
from sfumato.sampling import generate
from sfumato.teach.augment import resized
from sfumato.teach.custom_diffusion import CustomDiffusion, start_detached
from sfumato.teach.denoising import Denoising
from sfumato.teach.merging import Part, features, merged
from sfumato.teach.subject import Latents, Subject
from tests.helpers import fingerprint
from tests.tiny import tiny_model

GIVEN = {"name": "<rex>", "class_noun": "ball", "steps": 1, "batch": 1, "prior": 0, "lr": 0.02, "augment": False}


def taught(model, photos, **more):
    return CustomDiffusion(**{**GIVEN, **more}).teach(model, photos)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_keys_values_and_the_word_learn_and_nothing_else(photos, kind):
    model = tiny_model(kind)
    before = fingerprint(model)
    found = taught(model, photos, augment=kind == "sd")
    assert fingerprint(model) == before
    assert {name.split(".")[-2] for name in found.weights} == (
        {"to_k", "to_v"} if kind in ("sd", "sdxl") else {"add_k_proj", "add_v_proj"}
    )
    moved = [not torch.equal(value, model.modules[name.split(".")[0]].get_parameter(name.split(".", 1)[1]))
             for name, value in found.weights.items()]  # fmt: skip
    assert sum(moved) >= len(moved) - 1  # the last block of SD3 throws its text away
    assert set(found.words["<rex>"]) == {tower.name for tower in text_towers(model)}


def test_no_gradient_reaches_keys_and_values_through_the_start(photos):
    model = tiny_model("sd")
    weights = copies(model, {"unet": r".*attn2\.(to_k|to_v)\.weight"})
    condition = model.encode_text("a ball", guidance=False)
    only = condition.cond["embeds"].clone()
    only[:, 1:] = 0  # the start alone would carry a gradient
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    condition.cond["embeds"] = only.detach()
    with substituted_weights(model, weights):
        with start_detached(model):
            cut = torch.autograd.grad(model.predict(x, 5, condition).square().mean(), list(weights.values()))
        bare = torch.autograd.grad(model.predict(x, 5, condition).square().mean(), list(weights.values()))
    assert all(not each.any() for each in cut) and any(each.any() for each in bare)


def test_pictures_are_shown_small_and_near_and_only_they_count(photos):
    model = tiny_model("sd")
    subject, seen = Subject(model, photos), set()
    for seed in range(40):
        latents, before, mask = resized(subject, 1, False, torch.Generator().manual_seed(seed))
        assert latents.shape == (4, 16, 16)
        seen.add(before)
        if before in ("a far away ", "very small "):
            assert mask is not None and 1 <= mask.sum() <= 64  # at most 0.6 of the side, a cell less on each
            outside = latents.clone()
            outside[:, mask == 0] += 100.0
            denoising, condition = Denoising(model, 1, 0), model.encode_text("a ball", guidance=False)
            noise = torch.zeros(1, 4, 16, 16)

            def error(x, t, condition, branch):  # what is predicted does not matter here
                return torch.zeros_like(x)

            if seed < 10:
                monkey = pytest.MonkeyPatch()
                monkey.setattr(model, "predict", error)
                noise[0, :, mask > 0] = 2.0
                noise[0, :, mask == 0] = 9.0
                got = denoising.at(latents[None], noise, torch.tensor([500]), condition, [mask])
                monkey.undo()
                torch.testing.assert_close(got, torch.tensor([4.0]))  # the mean over the cells that count
        else:
            assert mask is None
    assert seen == {"", "a far away ", "very small ", "zoomed in ", "close up "}


def test_other_pictures_with_their_captions_keep_the_rest(photos, tmp_path):
    import shutil

    others = tmp_path / "others"
    shutil.copytree(photos, others)
    (others / "b.txt").write_text("a red ball in the sand")
    system = CustomDiffusion(**{**GIVEN, "regular": str(others)})
    found = system.teach(tiny_model("sd"), photos)
    assert found.log[0]["prior"] > 0
    kept = Latents(Subject(tiny_model("sd"), others))  # encoded when they are asked for
    assert len(kept) == 3 and torch.equal(kept[:2][1], kept[1]) and len(list(kept)) == 3
    model = tiny_model("sd")
    model.card["sampling"]["steps"] = 1
    drawn = taught(model, photos, prior=2)
    assert drawn.log[0]["prior"] > 0


def test_concepts_merge_through_files_and_say_what_they_said(photos, tmp_path, monkeypatch):
    model = tiny_model("sd")
    files = {}
    for seed, name in ((1, "<rex>"), (2, "<dino>")):
        file, word = taught(model, photos, name=name, seed=seed).save(tmp_path / f"{name[1:-1]}.safetensors")
        assert word.name == f"{name[1:-1]}-word.safetensors"
        files[name] = (file, word)
    captions = tmp_path / "captions.txt"
    captions.write_text("a red ball on the left\na blue cube and a cone\n\na yellow cone in the right\n")
    listed = "|".join(str(file) for file, _ in files.values())
    found = app.teach(
        captions, by=f"custom_diffusion:merge=[{listed}]", model=model, out=tmp_path / "both.safetensors", prompt="a {}"
    )  # fmt: skip
    assert [path.name for path in found.files] == [
        "both.safetensors", "both-word.safetensors", "both-word2.safetensors"
    ]  # fmt: skip
    assert all(each["residual"] < 1e-8 for each in found.facts["matrices"].values())
    both = [Word(file=str(path)) for path in found.files[1:]]
    for name, (file, word) in files.items():
        text = f"a {name} ball"
        with Word(file=str(word)).attach(model):
            c = torch.cat(features(model, [text]))[1:]  # from the word on
        own, new = (
            Weights(file=str(file)).weights(model)["unet"],
            Weights(file=str(found.files[0])).weights(model)["unet"],
        )
        for path in own:
            torch.testing.assert_close(c @ new[path].T, c @ own[path].T, rtol=1e-3, atol=1e-4)
    made = generate(
        model, "a <rex> ball and a <dino> ball", steps=1, decode=False,
        interventions=[Weights(file=str(found.files[0])), *both],
    )  # fmt: skip
    assert made.coverage["weights"]["sites"]
    (other,) = convert(files["<rex>"][0], tmp_path / "cd.safetensors", "custom-diffusion")
    one, two = (
        Weights(file=str(other), any_base=True).weights(model)["unet"],
        Weights(file=str(files["<rex>"][0])).weights(model)["unet"],
    )
    assert all(torch.equal(one[path], two[path]) for path in two)


def test_compression_is_a_lora(photos, tmp_path):
    model = tiny_model("sd")
    full = taught(model, photos)
    small = taught(model, photos, compress=1.0)
    file = small.save(tmp_path / "small.safetensors")[0]
    deltas = {name: each.delta(1.0) for name, each in LoRA(file=str(file)).adapted(model).items()}
    for name, delta in deltas.items():
        own = model.denoiser.get_submodule(name.removeprefix("unet.")).weight
        change = full.weights[f"{name}.weight"] - own
        assert (delta - change).norm() < 0.05 * change.norm()
    assert sum(each.rank for each in small.lora.values()) > sum(
        each.rank for each in taught(model, photos, compress=0.3).lora.values()
    )


def test_refusals(photos, tmp_path):
    model = tiny_model("sd3")
    words = {name: {t.name: torch.zeros(1, t.table.shape[1]) for t in text_towers(model)} for name in ("<a>", "<b>")}
    parts = [Part(name, "ball", vectors, {}) for name, vectors in words.items()]
    with pytest.raises(NotSupported, match="no cross-attention whose keys and values are linear"):
        merged(model, parts, ["a ball"])
    sd = tiny_model("sd")
    with pytest.raises(BadInput, match="two concepts"):
        merged(sd, parts[:1], ["a ball"])
    with pytest.raises(BadInput, match="a line each"):
        merged(sd, parts, [])
    with pytest.raises(BadInput, match="fix all 16 dimensions"):
        merged(sd, [Part(n, "elephant", {"text_encoder": torch.randn(1, 16)}, {}) for n in ("<a>", "<b>")], ["a ball"])
    cases = [
        ({"class_noun": ""}, "class_noun of custom_diffusion must be given"),
        ({"name": "ball"}, "is a word of text_encoder already"),
        ({"prompt": "x"}, "it must hold {} once"),
        ({"compress": 2}, "compress"),
        ({"merge": ["a.safetensors"]}, "no adapter file"),
    ]
    for more, says in cases:
        with pytest.raises(BadInput) as raised:
            app.teach(photos, by="custom_diffusion", model=sd, out=tmp_path / "x.safetensors", **{**GIVEN, **more})
        assert says in str(raised.value) and not list(tmp_path.iterdir())
