"""Systems on the families of today's models: each does on each family what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.adapters.lora import LoRA
from sfumato.cards import build, method
from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.errors import NotSupported
from sfumato.explain.daam import DAAM
from sfumato.models import Model
from sfumato.sampling import generate
from sfumato.steer.attend_excite import AttendExcite
from sfumato.steer.paint_with_words import PaintWithWords
from tests.adapters.lora_files import factors, write_peft
from tests.helpers import fingerprint
from tests.parity.test_families import CALLS, guidance, size_of
from tests.tiny import tiny_model

PROMPT = "a red cube and a dog"
BOX = (0.0, 0.0, 0.5, 1.0)


def made(model: Model, kind: str, systems: Any = (), prompt: Any = PROMPT, **options: Any) -> Any:
    given: dict[str, Any] = {"steps": 2, "seed": 5, "size": size_of(kind), "decode": False, **guidance(kind, None)[0]}
    return generate(model, prompt, interventions=systems, **{**given, **options})


@pytest.mark.parametrize("kind", CALLS)
def test_systems_on_a_family(kind: str, tmp_path: Path):
    """Traced, steered, edited, and with a LoRA: each does what it says and leaves nothing behind."""
    model = tiny_model(kind)
    before, traced = fingerprint(model), DAAM(words=["dog"])
    plain = made(model, kind, traced)
    shape = traced.maps[0].map("dog", size=(8, 8)).shape
    assert shape == ((model.latent_shape(*reversed(size_of(kind)))[1], 8, 8) if model.clips else (8, 8))
    if model.family.has("differentiable_state"):
        steered = AttendExcite(words=["dog"], strength=5.0, thresholds=[], window=(0.0, 1.0))
        moved = made(model, kind, steered)
        assert not torch.equal(moved.latents, plain.latents) and moved.latents.isfinite().all()
    if not model.clips:
        on_pictures(model, kind, traced, plain)
    path = write_peft(tmp_path / "x.safetensors", given := factors(model, text=False, rank=2, size=0.2))
    adapted = made(model, kind, LoRA(file=str(path)))
    merged = tiny_model(kind, fresh=True)
    with torch.no_grad():
        for name, parts in given.items():
            layer = merged.denoiser.get_submodule(name.partition(".")[2])
            layer.weight += parts["up"] @ parts["down"]
    torch.testing.assert_close(adapted.latents, made(merged, kind).latents, rtol=1e-2, atol=1e-3)
    assert fingerprint(model) == before


def on_pictures(model: Model, kind: str, traced: DAAM, plain: Any) -> None:
    # paint_with_words raises a word inside its box, on the very maps that daam reads in the same run
    seen = DAAM(words=["dog"])
    made(model, kind, [seen, PaintWithWords(phrases=["dog"], box=[BOX], strength=4.0)])
    share = [each.maps[0].map("dog", size=(8, 8))[:, :4].mean() for each in (traced, seen)]
    assert share[1] > share[0]
    # prompt_to_prompt with the source's own prompt is the source, with another word something else
    same = made(model, kind, PromptToPrompt(source=PROMPT))
    assert torch.equal(same.latents, plain.latents)
    edited = made(model, kind, PromptToPrompt(source=PROMPT), "a red ball and a dog")
    assert not torch.equal(edited.latents, plain.latents)


@pytest.mark.parametrize("kind", ["lumina2", "z_image"])
@pytest.mark.parametrize("system", ["latent_geometry", "pullback"])
def test_features_of_layers_are_refused_where_no_block_gives_a_picture(kind: str, system: str):
    with pytest.raises(NotSupported, match=f"no block of tiny-{kind} .* gives a picture"):
        made(tiny_model(kind), kind, build(method(system).CARD.example or system), "a red cube and a blue ball")


@pytest.mark.parametrize("kind", ["qwenimage", "lumina2", "z_image"])
def test_texts_of_no_fixed_length_are_not_laid_side_by_side(kind: str):
    with pytest.raises(NotSupported, match="side by side"):
        made(tiny_model(kind), kind, build(method("shape_guided").CARD.example), "a red cube and a blue ball")


def test_edits_of_prompts_of_other_lengths_are_refused_where_texts_have_none_fixed():
    with pytest.raises(NotSupported, match="prompts of equal length"):
        made(tiny_model("qwenimage"), "qwenimage", PromptToPrompt(source=PROMPT), "a dog")
