"""The memory that a system adds, foreseen on networks without weights, is what it is measured to be with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sfumato.adapters.lora import save_lora
from sfumato.adapters.trainable import ATTENTION, CROSS, matching, new_lora
from sfumato.adapters.weight_sets import read_weights
from sfumato.adapters.word import save_word
from sfumato.cards import method, methods, parse_with
from sfumato.models import Model, quiet
from sfumato.models.outline import outline
from sfumato.models.text_towers import text_towers
from sfumato.sampling import footprint
from sfumato.sampling.footprint import Footprint, adds, drawn
from tests.experts import write_expert
from tests.tiny import tiny_model, tiny_pipeline

CASES = {
    "sd": ["daam", "prompt_to_prompt"],
    "sd3": ["prompt_to_prompt"],
    "flux": ["attend_excite"],
}
SIZE = (64, 64)


def without_weights(kind: str, folder: Path) -> Model:
    with quiet():
        tiny_pipeline(kind).save_pretrained(folder)
    card = {"sampling": {**tiny_model(kind).card["sampling"], "size": SIZE, "steps": 3}}
    (folder / "sfumato.json").write_text(json.dumps(card))
    return outline(folder)


@pytest.mark.parametrize("kind", CASES)
def test_foreseen_is_measured(kind: str, tmp_path: Path, monkeypatch: Any):
    """Within a fifth, and so is the plain picture. The CPU's kernel, which hands out the log-sum-exp as no other does,
    is not asked for it."""
    monkeypatch.setattr("sfumato.attention.call.Call._kernel_gives_lse", lambda call: False)
    model = tiny_model(kind)
    noise = torch.randn(1, *model.latent_shape(*SIZE))
    foreseen = adds(without_weights(kind, tmp_path), CASES[kind])
    for key in CASES[kind]:
        steps = 3 if key == "prompt_to_prompt" else 1
        name, given = parse_with(methods()[key].example or key)
        given |= {"thresholds": []} if key == "attend_excite" else {}  # one pass is as large as twenty
        plain, own = (drawn(model, systems, steps, latents=noise) for systems in ((), method(name)(**given)))
        measured = own.peak - plain.peak
        assert measured > 0 and foreseen[key] == pytest.approx(measured, rel=0.2), key


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_adapters_are_foreseen_at_their_usual_size(kind: str, tmp_path: Path, monkeypatch: Any):
    """What is foreseen is what adapters of that size hold that were read from files."""
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    model = tiny_model(kind)
    denoiser = model.family.denoiser_name
    save_lora(tmp_path / "lora.safetensors", _acting(new_lora(model, {denoiser: ATTENTION})))
    whole = {f"{path}.weight": torch.randn_like(model.denoiser.get_submodule(path).weight)
             for path in matching(model, denoiser, CROSS)}  # fmt: skip
    save_file(whole, tmp_path / "weights.safetensors")
    save_word(tmp_path / "word.safetensors", "<x>", {t.name: t.row(5)[None] for t in text_towers(model)})
    lora = method("lora")(file=str(tmp_path / "lora.safetensors")).adapted(model)
    weights = method("weights")(file=str(tmp_path / "weights.safetensors")).weights(model)[denoiser]
    words = method("word")(file=str(tmp_path / "word.safetensors")).vectors(model)
    held = {
        "lora": [p for each in lora.values() for p in each.parameters().values()],
        "weights": weights.values(),
        "word": [x for each in words.values() for x in each.values()],
        "experts": 2 * list(read_weights(write_expert(tmp_path, kind, "e", (0, 500)) / denoiser).values()),
    }
    foreseen = adds(without_weights(kind, tmp_path / "model"), held)
    assert foreseen == {key: sum(x.numel() * x.element_size() for x in each) for key, each in held.items()}


def _acting(adapted: Any) -> Any:
    for each in adapted.values():
        each.parameters()["up"].data.fill_(0.1)
    return adapted


@pytest.mark.parametrize(
    ("kind", "key"), [("qwenimage", "attend_excite"), ("z_image", "paint_with_words"), ("hidream", "daam")]
)
def test_texts_of_any_length_and_mixtures_of_experts_are_walked(kind: str, key: str, tmp_path: Path):
    """What they ask of numbers: how long a text is, and which expert a token goes to."""
    added = adds(without_weights(kind, tmp_path), [key])[key]
    assert isinstance(added, int) and added > 0


def test_numbers_that_are_known():
    """Masks and lengths that no number of the network enters keep theirs, on the way to its device too."""
    x = torch.ones(2, 3, device="meta")
    with Footprint([x]) as counted:
        mask = torch.tensor([[True, False, True], [True, True, True]]).to("meta")
        lengths = mask[:, 1:].sum(1) + torch.ones(2, dtype=torch.long, device="meta")
        assert [int(n) for n in lengths] == [2, 3] and int((lengths * x[:, 0]).max().long()) == 1
        assert x[mask].shape == (5,) and x[x > 0].shape == (6,)
        lengths += x[:, 0].long()
        assert counted.numbers(lengths).tolist() == [1, 1]


def test_equal_if_made_equally():
    """Keys of a cross-attention, which follow from the text alone, are the same in every step; queries are not."""
    x, text, noise = (torch.ones(2, 4, 4, device="meta") for _ in range(3))
    with Footprint([x, text, noise]):
        first, again = ((text @ x).transpose(0, 1)[:, 1] for _ in range(2))
        assert torch.equal(first.clone(), again) and torch.equal(again, first.contiguous().clone())
        for other in (text @ x + 1, text @ noise, (text @ x).transpose(0, 1)[:, 0], torch.rand_like(first)):
            assert not torch.equal(first, other)
        again.add_(1)
        assert not torch.equal(first, again)
        assert not torch.equal(torch.rand_like(first), torch.rand_like(first))


def test_bytes_that_are_alive():
    kept = torch.zeros(100)
    with Footprint([kept]) as counted:
        kept.view(10, 10)
        assert counted.live == 0
        x = torch.ones(1000)
        y = x + 1
        assert counted.live == 8000
        del y
        assert counted.live == 4000
        z = torch.ones(250, device="meta")
        assert counted.live == 5000 and bool((x[:250] + z).isfinite().all())  # nobody knows
        del x, z
    assert counted.live == 0 and counted.peak == 8000


def test_operations_that_were_seen_before_give_the_same_again():
    """Shapes are worked out once; what is written to in place stays what it is, and views are no memory."""
    for _ in range(2):
        with Footprint() as counted:
            x = torch.ones(4, 1, 2, device="meta")
            x.add_(1)
            assert x.shape == (4, 1, 2) and counted.live == 32
            x.squeeze_(1)
            assert x.shape == (4, 2) and x.t().reshape(8).shape == (8,)
            low, high = x.split(1, dim=1)
            assert low.shape == high.shape == (4, 1)
            assert counted.live == 32 and counted.peak == 64  # of the copy that reshape had to make
            y, place = x.max(dim=1)
            assert y.shape == place.shape == (4,) and place.dtype == torch.long and counted.live == 32 + 16 + 32


def test_networks_that_are_held_from_the_start_do_not_grow(tmp_path: Path, monkeypatch: Any):
    """One step of it is walked, and one of the plain picture; what is recorded in every step is walked further."""
    walks: list[int] = []
    monkeypatch.setattr(
        footprint, "drawn", lambda *given, **more: walks.append(given[2:] or more["steps"]) or drawn(*given, **more)
    )
    model = without_weights("sd", tmp_path)
    assert adds(model, ["clip_guidance"])["clip_guidance"] > 0 and walks == [(1,), 1]
    assert adds(model, ["prompt_to_prompt"])["prompt_to_prompt"] > 0 and walks[2:] == [(1,), 1, (2,), 2, (3,), 3]
