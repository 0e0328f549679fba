"""Families of today's models: the latents of the diffusers pipeline, bit for bit, and word maps that are where the
attention is.

Where the text lies is not read from the family's table but *planted*: with all attention muted nothing moves between
places, so a change of one token's features can reach its own key only, and a change of one picture cell its own query.
The maps of DAAM must then be the softmax over recorded queries and keys at exactly these columns and rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sfumato.explain.daam import DAAM
from sfumato.models import Model, load, quiet
from sfumato.models.hooks import running
from sfumato.sampling import generate
from tests.tiny import tiny_model, tiny_pipeline

PROMPTS = ["a red cube and a dog", "a big blue cat on the left"]
NEGATIVES = ["green", "a small cone"]
#: kind -> further arguments of its pipeline's call
CALLS: dict[str, dict[str, Any]] = {
    "chroma": {},
    "auraflow": {},
    "sana": {"use_resolution_binning": False, "clean_caption": False, "complex_human_instruction": None},
    "klein": {"max_sequence_length": 48},
}
SIZES = {"sana": (96, 64)}
#: parts that mix places without attention, muted too
MIXING = {"sana": ("attn1", "ff")}


def size_of(kind: str) -> tuple[int, int]:
    """An odd (width, height)."""
    return SIZES.get(kind, (72, 40))


def pipeline_latents(model: Model, kind: str, size: tuple[int, int], seeds: list[int], **given: Any) -> Tensor:
    """Final latents (b c h w) of the diffusers pipeline for a picture of (width, height)."""
    if kind == "klein" and (negatives := given.pop("negative_prompt", None)):
        given["negative_prompt_embeds"] = model.pipe.encode_prompt(negatives, max_sequence_length=48)[0]
    with quiet():
        latents = model.pipe(
            prompt=PROMPTS,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            width=size[0],
            height=size[1],
            num_inference_steps=3,
            **given,
            **CALLS[kind],
        ).images
    if kind == "chroma":
        latents = model.pipe._unpack_latents(latents, size[1], size[0], model.pipe.vae_scale_factor)
    return latents


def as_given_out(model: Model, kind: str, latents: Tensor) -> Tensor:
    """Our final states in the pipeline's own form."""
    if kind != "klein":
        return latents
    norm = model.pipe.vae.bn
    std = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + model.pipe.vae.config.batch_norm_eps).to(latents.dtype)
    mean = norm.running_mean.view(1, -1, 1, 1).to(latents.dtype)
    return model.pipe._unpatchify_latents(latents * std + mean)


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("given", [{"guidance": 1.0}, {"guidance": 4.0, "negative": NEGATIVES}], ids=["off", "on"])
def test_latents_of_the_pipeline(kind: str, given: dict[str, Any]):
    model = tiny_model(kind)
    theirs = {"guidance_scale": given["guidance"]}
    if "negative" in given:
        theirs["negative_prompt"] = given["negative"]
    peer = pipeline_latents(model, kind, size_of(kind), [7, 3], **theirs)
    ours = generate(model, PROMPTS, steps=3, seed=[7, 3], size=size_of(kind), decode=False, **given)
    assert torch.equal(as_given_out(model, kind, ours.latents), peer)
    assert peer.abs().sum() > 0
    assert ours.cost == 3 * (2 if given["guidance"] > 1 else 1)


# Sana's pipeline keeps its latents in float32 whatever the model's precision
@pytest.mark.parametrize("kind", [kind for kind in CALLS if kind != "sana"])
def test_half_precision(kind: str):
    model = tiny_model(kind, fresh=True).to(dtype=torch.bfloat16)
    peer = pipeline_latents(model, kind, size_of(kind), [7, 3], guidance_scale=4.0)
    ours = generate(model, PROMPTS, steps=3, seed=[7, 3], size=size_of(kind), guidance=4.0, decode=False)
    assert ours.latents.dtype == torch.bfloat16
    assert torch.equal(as_given_out(model, kind, ours.latents), peer)


@pytest.mark.parametrize("kind", CALLS)
def test_picture_from_a_saved_folder(kind: str, tmp_path):
    with quiet():
        tiny_pipeline(kind).save_pretrained(tmp_path)
    (tmp_path / "sfumato.json").write_text(json.dumps(tiny_model(kind).card))
    model = load(tmp_path)
    assert model.family.name == tiny_model(kind).family.name
    width, height = size_of(kind)
    with quiet():
        generator = torch.Generator().manual_seed(4)
        peer = tiny_pipeline(kind)(
            prompt=PROMPTS[0],
            num_inference_steps=2,
            guidance_scale=2.0,
            generator=generator,
            height=height,
            width=width,
            **CALLS[kind],
        ).images[0]
    ours = generate(model, PROMPTS[0], steps=2, guidance=2.0, seed=4, size=size_of(kind)).images[0]
    assert ours.size == size_of(kind)
    assert ours.tobytes() == peer.tobytes()


# --- where the text lies ----------------------------------------------------------------------------------------------


class Recorder(TorchFunctionMode):
    """Attention calls of the denoiser by module path, each as (q, k, scale, mask); ``mute`` lets none of them act."""

    def __init__(self, stack: list[Any], mute: bool):
        super().__init__()
        self.stack, self.mute = stack, mute
        self.calls: dict[str, list[tuple[Tensor, Tensor, float | None, Tensor | None]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self.stack:
            return func(*args, **kwargs)
        named = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
        call = (named["query"], named["key"], named.get("scale"), named.get("attn_mask"))
        self.calls.setdefault(self.stack[-1].path, []).append(call)
        return torch.zeros_like(named["query"]) if self.mute else func(*args, **kwargs)


@contextmanager
def recorded(model: Model, kind: str, mute: bool = False) -> Iterator[Recorder]:
    mixing = [part for name, part in model.denoiser.named_modules() if name.split(".")[-1] in MIXING.get(kind, ())]
    handles = [part.register_forward_hook(lambda *call: torch.zeros_like(call[-1])) for part in mixing if mute]
    with torch.no_grad(), running(model.denoiser) as stack, Recorder(stack, mute) as recorder:
        yield recorder
    for handle in handles:
        handle.remove()


def places_changed(a: Tensor, b: Tensor) -> list[int]:
    """Positions along the sequence of (b k n d) that differ."""
    return ((a - b).abs().amax((0, 1, 3)) > 0).nonzero().flatten().tolist()


def token_of(model: Model, prompt: str, word: str) -> int:
    """Place of a one-token word in the features that the pipeline makes of a prompt."""
    tokenizer = model.pipe.tokenizer
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    alone = [tokenizer(blank + word, add_special_tokens=False).input_ids for blank in ("", " ")]
    whole = tokenizer(prompt).input_ids
    # byte-pair pieces within a text begin with the blank
    (place,) = (i for i, token in enumerate(whole) if [token] in alone)
    return place


def planted_keys(model: Model, kind: str, position: int) -> dict[str, list[int]]:
    """Site path -> keys that a change of one text position reaches while attention is muted."""
    size = size_of(kind)
    x = torch.randn(1, *model.latent_shape(size[1], size[0]), generator=torch.Generator().manual_seed(0))
    condition = model.encode_text(PROMPTS[:1], guidance=False)
    calls = []
    for planted in (False, True):
        if planted:
            condition.cond["embeds"] = condition.cond["embeds"].clone()
            condition.cond["embeds"][:, position] += torch.linspace(-1, 1, condition.cond["embeds"].shape[-1])
        with recorded(model, kind, mute=True) as recorder:
            model.predict(x, torch.tensor(500.0), condition)
        calls.append(recorder.calls)
    return {path: places_changed(calls[0][path][0][1], calls[1][path][0][1]) for path in calls[0]}


@pytest.mark.parametrize("kind", CALLS)
def test_one_token_reaches_one_key(kind: str):
    model = tiny_model(kind)
    sites = {site.path: site for site in model.sites(*reversed(size_of(kind)))}
    for word in ("red", "dog"):
        position = token_of(model, PROMPTS[0], word)
        found = planted_keys(model, kind, position)
        assert set(sites) == set(found)
        for path, site in sites.items():
            assert found[path] == ([site.text[0] + position] if site.text else [])


@pytest.mark.parametrize("kind", CALLS)
def test_one_cell_reaches_one_query(kind: str):
    model = tiny_model(kind)
    c, h, w = model.latent_shape(*reversed(size_of(kind)))
    condition = model.encode_text(PROMPTS[:1], guidance=False)
    sites = model.sites(*reversed(size_of(kind)))
    x = torch.randn(1, c, h, w, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    rows, columns = sites[0].grid
    row, column = 3, 5
    moved[..., row * h // rows : (row + 1) * h // rows, column * w // columns : (column + 1) * w // columns] += 1
    calls = []
    for state in (x, moved):
        with recorded(model, kind, mute=True) as recorder:
            model.predict(state, torch.tensor(500.0), condition)
        calls.append(recorder.calls)
    for site in sites:
        before, after = (each[site.path][0][0] for each in calls)
        assert places_changed(before, after) == [site.image[0] + row * columns + column]


@pytest.mark.parametrize("kind", CALLS)
def test_word_maps_are_the_attention_at_the_planted_keys(kind: str):
    model = tiny_model(kind)
    options: dict[str, Any] = {"steps": 2, "seed": [7, 3], "size": size_of(kind), "guidance": 1.0, "decode": False}
    with recorded(model, kind) as recorder:
        plain = generate(model, PROMPTS, **options)
    daam = DAAM(words=["dog", "cat"])
    seen = generate(model, PROMPTS, interventions=daam, **options)
    assert torch.equal(seen.latents, plain.latents)
    sites = [site for site in model.sites(*reversed(size_of(kind))) if site.text]
    for sample, word in enumerate(("dog", "cat")):
        position = token_of(model, PROMPTS[sample], word)
        keys = planted_keys(model, kind, position)
        maps = []
        for site in sites:
            for q, k, scale, mask in recorder.calls[site.path]:
                scores = q[sample] @ k[sample].mT * (q.shape[-1] ** -0.5 if scale is None else scale)
                if mask is not None:
                    mask = mask.expand(q.shape[0], *mask.shape[1:])[sample]
                    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
                column = scores.softmax(-1)[:, slice(*site.image), keys[site.path][0]]
                maps.append(column.mean(0).view(site.grid))
        expected = torch.stack(maps).mean(0)
        torch.testing.assert_close(daam.maps[sample].map(word, size=expected.shape), expected, rtol=1e-4, atol=1e-7)
        assert expected.std() > 0
