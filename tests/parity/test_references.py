"""Models that look at pictures beside their prompt: the latents of the diffusers pipeline, bit for bit, word maps over
the drawn cells alone, and systems on them. Where words and cells lie is planted, as in `test_families`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext as kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL import Image
from torch import Tensor

from sfumato.adapters.lora import LoRA
from sfumato.cards import build, method
from sfumato.errors import BadInput
from sfumato.explain.daam import DAAM
from sfumato.models import Encoding, Model, load, quiet
from sfumato.sampling import generate, recipe_args
from sfumato.steer.attend_excite import AttendExcite
from sfumato.steer.paint_with_words import PaintWithWords
from tests.adapters.lora_files import factors, write_peft
from tests.helpers import fingerprint
from tests.parity.test_families import (
    NEGATIVES,
    PROMPTS,
    as_given_out,
    guidance,
    pipeline_latents,
    places_changed,
    planted_keys,
    recorded,
    sites_of,
    size_of,
    token_of,
)
from tests.tiny import tiny_model


def picture(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


#: case -> (kind, reference pictures)
CASES = {
    "kontext": ("kontext", [picture(90, 61, 1)]),
    "flux2": ("flux2", [picture(70, 67, 1), picture(64, 78, 2)]),
    "klein": ("klein", [picture(70, 67, 1)]),
    "qwenimage_edit": ("qwenimage_edit", [picture(90, 61, 1)]),
    "qwenimage_edit_plus": ("qwenimage_edit_plus", [picture(90, 61, 1), picture(50, 80, 2)]),
}
#: the published sizes of Kontext's pictures, about a million pixels, brought to those of the tiny one
SIZES = [(int(w / 32), int(h / 32)) for w, h in kontext.PREFERRED_KONTEXT_RESOLUTIONS]


def peer(model: Model, kind: str, pictures: list[Image.Image], monkeypatch: Any, **given: Any) -> Tensor:
    """Final latents of the pipeline's own call with these reference pictures."""
    width, height = size_of(kind)
    own = {"max_area": width * height} if kind == "kontext" else {}
    with monkeypatch.context() as patch:
        patch.setattr(kontext, "PREFERRED_KONTEXT_RESOLUTIONS", SIZES)
        for module in (edit, edit_plus):  # 64x64 pixels where the published models see 1024x1024
            rule = module.calculate_dimensions
            patch.setattr(module, "calculate_dimensions", lambda area, shape, rule=rule: rule(area // 256, shape))
        shown = pictures if len(pictures) > 1 else pictures[0]
        return pipeline_latents(model, kind, (width, height), seeds_of(kind), image=shown, **own, **given)


def seeds_of(kind: str) -> list[int]:
    """One per prompt; pipelines whose language model looks at pictures take one prompt."""
    return [7] if kind.startswith("qwenimage_edit") else [7, 3]


def drawn(model: Model, kind: str, pictures: Any, systems: Any = (), prompts: Any = None, **options: Any) -> Any:
    seeds = seeds_of(kind)
    prompts = PROMPTS[: len(seeds)] if prompts is None else prompts
    given: dict[str, Any] = {"steps": 2, "seed": seeds, "size": size_of(kind), "decode": False}
    return generate(model, prompts, reference=pictures, interventions=systems, **{**given, **options})


@pytest.mark.parametrize("case", CASES)
def test_latents_of_the_pipeline(case: str, monkeypatch: Any):
    kind, pictures = CASES[case]
    model = tiny_model(kind)
    own, theirs = guidance(kind, 4.0)
    negatives = None if model.embeds_guidance else NEGATIVES[: len(seeds_of(kind))]
    theirs = theirs if negatives is None else {**theirs, "negative_prompt": list(negatives)}
    expected = peer(model, kind, pictures, monkeypatch, **theirs)
    result = drawn(model, kind, pictures, negative=negatives, **own)
    assert torch.equal(as_given_out(model, kind, result.latents), expected)


@pytest.mark.parametrize("case", ["kontext", "klein", "qwenimage_edit"])
def test_half_precision(case: str, monkeypatch: Any):
    kind, pictures = CASES[case]
    model = tiny_model(kind, fresh=True).to(dtype=torch.bfloat16)
    own, theirs = guidance(kind, None)
    expected = peer(model, kind, pictures, monkeypatch, **theirs)
    assert torch.equal(as_given_out(model, kind, drawn(model, kind, pictures, **own).latents), expected)


@pytest.mark.parametrize("size", [(1024, 1024), (300, 200), (1000, 3000), (2000, 1500)])
def test_references_are_fitted_as_by_the_published_pipelines(size: tuple[int, int]):
    shown = picture(*size, 3)
    for kind in ("kontext", "klein"):
        model = tiny_model(kind, fresh=True)
        model.pipe.default_sample_size = 1024 // model.pipe.vae_scale_factor
        processor = model.pipe.image_processor
        if kind == "kontext":
            shape = size[0] / size[1]
            _, w, h = min((abs(shape - w / h), w, h) for w, h in kontext.PREFERRED_KONTEXT_RESOLUTIONS)
            expected = processor.resize(shown, h, w)
        else:
            expected = shown if size[0] * size[1] <= 2**20 else processor._resize_to_target_area(shown, 2**20)
            w, h = (side // 4 * 4 for side in expected.size)
            expected = processor.resize(expected, h, w, resize_mode="crop")
        fitted = model.family.fit_reference(shown)
        assert fitted.size == expected.size and fitted.tobytes() == expected.tobytes()


# --- where words and cells lie ----------------------------------------------------------------------------------------


@contextmanager
def looking(model: Model, pictures: list[Image.Image]) -> Iterator[None]:
    with torch.no_grad(), model.encoding(Encoding(references=tuple(pictures))):
        yield


@pytest.mark.parametrize("case", CASES)
def test_words_and_cells_lie_where_they_are_planted(case: str):
    kind, pictures = CASES[case]
    model = tiny_model(kind)
    with looking(model, pictures):
        sites = sites_of(model, kind, PROMPTS[:1])
        for word in ("red", "dog"):
            position = token_of(model, kind, PROMPTS[0], word)
            found = planted_keys(model, kind, position)
            assert found == {site.path: [site.text[0] + position] for site in sites}
        condition = model.encode_text(PROMPTS[:1], guidance=False)
    x = torch.randn(1, *model.latent_shape(*reversed(size_of(kind))), generator=torch.Generator().manual_seed(0))
    queries = queries_of(model, kind, x, condition)
    rows, columns = sites[0].grid
    moved = x.clone()
    cell = x.shape[-2] // rows  # latents of a place, along a side
    moved[..., 2 * cell : 3 * cell, (columns - 1) * cell :] += 1
    for site, after in zip(sites, queries_of(model, kind, moved, condition).values(), strict=True):
        assert places_changed(queries[site.path], after) == [site.image[0] + 2 * columns + columns - 1]
    for key in [key for key in condition.cond if key.startswith("reference")]:
        condition.cond[key] = condition.cond[key] + 1
    for site, after in zip(sites, queries_of(model, kind, x, condition).values(), strict=True):
        changed = places_changed(queries[site.path], after)
        assert changed == list(range(site.image[1], queries[site.path].shape[2]))  # behind the drawn cells


def queries_of(model: Model, kind: str, x: Tensor, condition: Any) -> dict[str, Tensor]:
    with recorded(model, kind, mute=True) as recorder:
        model.predict(x, torch.tensor(500.0), condition)
    return {path: calls[0][0] for path, calls in recorder.calls.items()}


@pytest.mark.parametrize("case", ["kontext", "flux2", "qwenimage_edit_plus"])
def test_word_maps_are_the_attention_of_the_drawn_cells(case: str):
    kind, pictures = CASES[case]
    model = tiny_model(kind)
    own = guidance(kind, None)[0]
    with recorded(model, kind) as recorder:
        plain = drawn(model, kind, pictures, prompts=PROMPTS, seed=[7, 3], **own)
    traced = DAAM(words=["dog", "cat"])
    same = drawn(model, kind, pictures, traced, prompts=PROMPTS, seed=[7, 3], **own)
    assert torch.equal(same.latents, plain.latents)
    with looking(model, pictures):
        sites = sites_of(model, kind, PROMPTS)
        places = [token_of(model, kind, prompt, word) for prompt, word in zip(PROMPTS, ("dog", "cat"), strict=True)]
    for sample, word in enumerate(("dog", "cat")):
        maps = []
        for site in sites:
            for q, k, scale, mask in recorder.calls[site.path]:
                scores = q[sample] @ k[sample].mT * (q.shape[-1] ** -0.5 if scale is None else scale)
                if mask is not None:
                    scores = scores.masked_fill(~mask.expand(q.shape[0], *mask.shape[1:])[sample], -torch.inf)
                column = scores.softmax(-1)[:, slice(*site.image), site.text[0] + places[sample]]
                maps.append(column.mean(0).view(site.shape))
        expected = torch.stack(maps).mean(0)
        found = traced.maps[sample].map(word, size=expected.shape[-2:])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        assert expected.std() > 0


# --- systems, recipes, refusals ---------------------------------------------------------------------------------------


def test_systems(tmp_path: Path):
    kind, pictures = CASES["kontext"]
    model, prompt = tiny_model(kind), PROMPTS[0]
    before = fingerprint(model)
    one: dict[str, Any] = {"prompts": prompt, "seed": 5, **guidance(kind, None)[0]}
    traced, seen = DAAM(words=["dog"]), DAAM(words=["dog"])
    plain = drawn(model, kind, pictures, traced, **one)
    drawn(model, kind, pictures, [seen, PaintWithWords(phrases=["dog"], box=[(0, 0, 0.5, 1)], strength=4.0)], **one)
    share = [each.maps[0].map("dog", size=(8, 8))[:, :4].mean() for each in (traced, seen)]
    assert share[1] > share[0]
    shaped = build(method("shape_guided").CARD.example)  # its masks end before the tokens of the reference
    said = {**one, "prompts": "a red cube and a blue ball", "size": (32, 32)}
    assert drawn(model, kind, pictures, shaped, **said).latents.isfinite().all()
    steered = AttendExcite(words=["dog"], strength=5.0, thresholds=[], window=(0.0, 1.0))
    moved = drawn(model, kind, pictures, steered, **one)
    assert not torch.equal(moved.latents, plain.latents) and moved.latents.isfinite().all()
    path = write_peft(tmp_path / "x.safetensors", given := factors(model, text=False, rank=2, size=0.2))
    adapted = drawn(model, kind, pictures, LoRA(file=str(path)), **one)
    merged = tiny_model(kind, fresh=True)
    with torch.no_grad():
        for name, parts in given.items():
            merged.denoiser.get_submodule(name.partition(".")[2]).weight += parts["up"] @ parts["down"]
    torch.testing.assert_close(adapted.latents, drawn(merged, kind, pictures, **one).latents, rtol=1e-2, atol=1e-3)
    assert fingerprint(model) == before


@pytest.mark.parametrize("case", ["flux2", "qwenimage_edit"])
def test_folders_whose_processors_need_more_than_pictures(case: str, tmp_path: Path):
    """Processors as their publishers save them; those of transformers would ask for torchvision."""
    kind, pictures = CASES[case]
    model = tiny_model(kind)
    part, name = ("tokenizer", "PixtralProcessor") if kind == "flux2" else ("processor", "Qwen2VLProcessor")
    pipe = copy.copy(model.pipe)
    pipe.register_modules(**{part: model.pipe.tokenizer})
    with quiet():
        pipe.save_pretrained(tmp_path)
    if kind != "flux2":
        model.pipe.processor.image_processor.save_pretrained(tmp_path / part)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, part: ["transformers", name]}))
    (tmp_path / "sfumato.json").write_text(json.dumps(model.card))
    read = load(tmp_path)
    read.pipe.default_sample_size = model.pipe.default_sample_size
    if kind == "flux2":
        read.pipe.system_message = model.pipe.system_message
    given = {"prompts": PROMPTS[:1], "seed": 3, **guidance(kind, None)[0]}
    found, expected = (drawn(each, kind, pictures, **given).latents for each in (read, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # weights of a file lie elsewhere in memory


def test_recipes_name_the_references_by_their_hash():
    model, kind, pictures = tiny_model("klein"), "klein", CASES["flux2"][1]
    result = drawn(model, kind, pictures, guidance=1.0, batch_size=1)
    named = result.recipes[1]["reference"]
    assert len(named) == len(set(named)) == 2
    with pytest.raises(BadInput, match="reference must be given exactly when"):
        recipe_args(result.recipes[1])
    again = generate(model, **recipe_args(result.recipes[1], reference=pictures), decode=False)
    assert torch.equal(again.latents, result.latents[1:]) and again.recipe["reference"] == named
    assert "reference" not in drawn(model, kind, None, guidance=1.0).recipe


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("flux", picture(32, 32, 1), r"tiny-flux \(flux\) looks at no pictures.*flux-kontext.*Give image"),
        ("kontext", [picture(32, 32, 1)] * 2, "reference has 2 pictures; tiny-kontext looks at 1 at most"),
        ("kontext", "dog.png", "reference is 'dog.png'; it must be a PIL picture"),
        ("klein", [picture(32, 32, 1), 3], "reference is 3; it must be a PIL picture"),
        ("qwenimage_edit", None, r"tiny-qwenimage_edit \(qwenimage-edit\) edits pictures: give it one as reference"),
        ("klein", [picture(32, 3, 1)], "reference is 32x3; tiny-klein looks at pictures of at least 4x4"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(kind: str, given: Any, message: str):
    with pytest.raises(BadInput, match=message) as refused:
        drawn(tiny_model(kind), kind, given)
    assert "\n" not in str(refused.value)


def test_texts_of_an_editor_are_read_beside_a_picture():
    with pytest.raises(BadInput, match="^qwenimage-edit reads texts beside a picture only; give one as reference"):
        tiny_model("qwenimage_edit").encode_text(["a dog"], guidance=False)
