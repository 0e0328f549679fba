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

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as HUNYUAN
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sfumato.explain.daam import DAAM
from sfumato.models import Model, Site, load, quiet
from sfumato.models.hooks import running
from sfumato.sampling import Intervention, Step, generate
from sfumato.sampling.attached import attached
from sfumato.text import Words
from tests import tiny
from tests.pipelines import assert_same_maps
from tests.tiny import length_of, tiny_model, tiny_pipeline

PROMPTS = ["a red cube and a dog", "a big blue cat on the left"]
NEGATIVES = ["green", "a small cone"]
#: kind -> further arguments of its pipeline's call
CALLS: dict[str, dict[str, Any]] = {
    "chroma": {},
    "auraflow": {},
    "sana": {"use_resolution_binning": False, "clean_caption": False, "complex_human_instruction": None},
    "klein": {},
    "qwenimage": {},
    "lumina2": {},
    "hidream": {},
    "z_image": {},
    "wan": {"num_frames": 5},
    "ltx": {"num_frames": 9},
    "cogvideox": {"num_frames": 9},
    "hunyuan": {"num_frames": 9},
}
SIZES = {"sana": (96, 64), "lumina2": (144, 80), "hidream": (64, 36)}
SIZES |= {kind: size[::-1] for kind, size in tiny.SIZES.items()}
#: what the pipeline calls its guidance, and the scale that turns it off
GUIDANCE = {
    **dict.fromkeys(("qwenimage", "qwenimage_edit", "qwenimage_edit_plus"), ("true_cfg_scale", 1.0)),
    "z_image": ("guidance_scale", 0.0),
    "hunyuan": ("true_cfg_scale", 1.0),
}
#: what has to be said for "nothing": without it the pipeline would not guide
NEGATIVE = {"qwenimage": " ", "qwenimage_edit": " ", "qwenimage_edit_plus": " ", "hunyuan": ""}
#: the tokenizer whose tokens attention sees (first), where it is not the pipeline's first
TOKENIZER = {"kontext": "tokenizer_2", "hidream": "tokenizer_3", "refiner": "tokenizer_2"}
#: attention among the text alone, no sites
TEXT_ALONE = ("context_refiner", "context_embedder")
#: parts that mix places without attention, muted too
MIXING = {"sana": ("attn1", "ff"), "hunyuan": ("context_embedder.time_text_embed",)}


def size_of(kind: str) -> tuple[int, int]:
    """An odd (width, height)."""
    return SIZES.get(kind, (72, 40))


def pipeline_latents(model: Model, kind: str, size: tuple[int, int], seeds: list[int], **given: Any) -> Tensor:
    """Final latents (b c h w) of the diffusers pipeline for a picture of (width, height), one per seed."""
    if kind in NEGATIVE:
        given.setdefault("negative_prompt", [NEGATIVE[kind]] * len(seeds))
    if kind == "klein" and (negatives := given.pop("negative_prompt", None)):
        given["negative_prompt_embeds"] = model.pipe.encode_prompt(negatives, max_sequence_length=48)[0]
    with quiet():
        out = model.pipe(
            prompt=PROMPTS[: len(seeds)],  # some write their template into it
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            width=size[0],
            height=size[1],
            num_inference_steps=2,
            **given,
            **CALLS.get(kind, {}),
            **length_of(model),
        )
    latents = out.frames if model.clips else out.images
    if kind == "flux2":
        latents = latents.transpose(1, 2).unflatten(-1, (size[1] // 4, size[0] // 4))
    if kind.startswith(("chroma", "qwenimage", "kontext")):
        latents = model.pipe._unpack_latents(latents, size[1], size[0], model.pipe.vae_scale_factor)
    if kind == "ltx":
        latents = model.pipe._unpack_latents(latents, 3, size[1] // 4, size[0] // 4)
    if kind == "cogvideox":
        latents = latents.transpose(1, 2)
    return latents[:, :, 0] if kind.startswith("qwenimage") else latents


def as_given_out(model: Model, kind: str, latents: Tensor) -> Tensor:
    """Our final states in the pipeline's own form."""
    if kind != "klein":
        return latents
    norm = model.pipe.vae.bn
    std = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + model.pipe.vae.config.batch_norm_eps).to(latents.dtype)
    mean = norm.running_mean.view(1, -1, 1, 1).to(latents.dtype)
    return model.pipe._unpatchify_latents(latents * std + mean)


def guidance(kind: str, scale: float | None) -> tuple[dict[str, float], dict[str, float]]:
    """Our argument, none being off, and the pipeline's."""
    name, off = GUIDANCE.get(kind, ("guidance_scale", 1.0))
    scale = off if scale is None else scale
    return {"true_guidance" if kind == "hunyuan" else "guidance": scale}, {name: scale}


class Outputs(Intervention):
    """Notes what the denoiser says to the prompts."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def after_predict(self, step: Step) -> None:
        self.found.append(step.outputs["cond"].clone())
        self.mark(step)


@pytest.mark.parametrize("kind", CALLS)
def test_latents_of_the_pipeline(kind: str):
    model = tiny_model(kind)
    own, theirs = guidance(kind, 4.0)
    theirs_seen, ours_seen = Outputs(), Outputs()
    with attached(model.pipe, [DAAM(per_head=True), theirs_seen]) as own_loop:  # it changes nothing
        peer = pipeline_latents(model, kind, size_of(kind), [7, 3], negative_prompt=list(NEGATIVES), **theirs)
    ours = generate(
        model, PROMPTS, steps=2, seed=[7, 3], size=size_of(kind), decode=False, negative=NEGATIVES,
        interventions=[daam := DAAM(per_head=True), ours_seen], **own,
    )  # fmt: skip
    assert torch.equal(as_given_out(model, kind, ours.latents), peer)
    assert peer.abs().sum() > 0
    assert ours.cost == 4
    assert_same_maps(daam.maps, own_loop.maps)  # it sees what it sees in our loop
    assert ours.coverage == own_loop.coverage
    assert all(map(torch.equal, ours_seen.found, theirs_seen.found)) and len(ours_seen.found) == 2


@pytest.mark.parametrize("kind", CALLS)
def test_half_precision_without_guidance(kind: str):
    model = tiny_model(kind, fresh=True).to(dtype=torch.bfloat16)
    own, theirs = guidance(kind, None)
    peer = pipeline_latents(model, kind, size_of(kind), [7, 3], **theirs)
    ours = generate(model, PROMPTS, steps=2, seed=[7, 3], size=size_of(kind), decode=False, **own)
    assert ours.latents.dtype == peer.dtype  # some keep theirs in float32 whatever the model's precision
    assert torch.equal(as_given_out(model, kind, ours.latents), peer)


@pytest.mark.parametrize("kind", CALLS)
def test_picture_from_a_saved_folder(kind: str, tmp_path):
    """Texts are as long as the pipeline has them by itself, where those are not many hundreds of tokens."""
    with quiet():
        tiny_pipeline(kind).save_pretrained(tmp_path)
    own_length = kind in ("chroma", "auraflow", "sana", "ltx")
    (tmp_path / "sfumato.json").write_text(json.dumps(tiny_model(kind, own_length=own_length).card))
    model = load(tmp_path)
    assert model.family.name == tiny_model(kind).family.name
    if kind == "hidream":
        model.pipe.default_sample_size = tiny_pipeline(kind).default_sample_size
    width, height = size_of(kind)
    own, theirs = guidance(kind, 2.0)
    with quiet():
        generator = torch.Generator().manual_seed(4)
        peer = model.pipe(
            prompt=PROMPTS[0],
            num_inference_steps=2,
            generator=generator,
            height=height,
            width=width,
            **theirs,
            **CALLS[kind],
            **length_of(model),
            **({"negative_prompt": NEGATIVE[kind]} if kind in NEGATIVE else {}),
        )
    ours = generate(model, PROMPTS[0], steps=2, seed=4, size=size_of(kind), **own)
    if model.clips:
        frames = np.stack([np.asarray(frame) for frame in peer.frames[0]])  # pictures or floats
        frames = frames if frames.dtype == np.uint8 else (frames * 255).round().astype("uint8")
        assert np.array_equal(ours.clips[0], frames) and frames.shape[1:3] == size_of(kind)[::-1]
    else:
        assert ours.images[0].size == size_of(kind) and ours.images[0].tobytes() == peer.images[0].tobytes()


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
    mixing = [part for name, part in model.denoiser.named_modules() if name.endswith(MIXING.get(kind, ()) or "-")]
    handles = [part.register_forward_hook(lambda *call: torch.zeros_like(call[-1])) for part in mixing if mute]
    with torch.no_grad(), running(model.denoiser) as stack, Recorder(stack, mute) as recorder:
        yield recorder
    for handle in handles:
        handle.remove()


def places_changed(a: Tensor, b: Tensor) -> list[int]:
    """Positions along the sequence of (b k n d) that differ."""
    return ((a - b).abs().amax((0, 1, 3)) > 0).nonzero().flatten().tolist()


def tokens_of(model: Model, kind: str, prompt: str) -> list[int]:
    """The tokens whose features the denoiser is given, as the pipeline lays the prompt out."""
    tokenizer, head = getattr(model.pipe, TOKENIZER.get(kind, "tokenizer")), 0
    if kind == "qwenimage":
        prompt, head = model.pipe.prompt_template_encode.format(prompt), model.pipe.prompt_template_encode_start_idx
    elif kind == "hunyuan":
        prompt, head = HUNYUAN["template"].format(prompt), HUNYUAN["crop_start"]
    elif kind == "lumina2":
        prompt = f"{model.pipe.system_prompt} <Prompt Start> {prompt}"
    elif kind.startswith("qwenimage_edit"):
        return edited_tokens(model, prompt)
    elif kind == "flux2":
        (messages,) = format_input([prompt], model.pipe.system_message)
        prompt = tokenizer.apply_chat_template(messages, tokenize=False)
        return tokenizer(prompt, padding="max_length", max_length=48, add_special_tokens=False).input_ids
    elif tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt).input_ids[head:]


def edited_tokens(model: Model, prompt: str) -> list[int]:
    """As the pipeline's own language model is given them, pictures included."""
    seen: list[Tensor] = []
    hook = model.pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    model.family.encode([prompt], None, False)
    hook.remove()
    return seen[0][0].tolist()[model.pipe.prompt_template_encode_start_idx :]


def token_of(model: Model, kind: str, prompt: str, word: str) -> int:
    """Place of a one-token word in the features that the pipeline makes of a prompt."""
    tokenizer = getattr(model.pipe, TOKENIZER.get(kind, "tokenizer"))
    alone = [tokenizer(blank + word, add_special_tokens=False).input_ids for blank in ("", " ")]
    # byte-pair pieces within a text begin with the blank
    (place,) = (i for i, token in enumerate(tokens_of(model, kind, prompt)) if [token] in alone)
    return place


def sites_of(model: Model, kind: str, prompts: list[str]) -> list[Site]:
    """The sites of a call with these prompts."""
    text = model.family.text_in(model.encode_text(prompts, guidance=False).cond)
    return model.sites(*reversed(size_of(kind)), text)


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
    sites = {site.path: site for site in sites_of(model, kind, PROMPTS[:1])}
    for word in ("red", "dog"):
        position = token_of(model, kind, PROMPTS[0], word)
        found = planted_keys(model, kind, position)
        assert set(sites) == {path for path in found if not path.startswith(TEXT_ALONE)}
        for path, site in sites.items():
            assert found[path] == ([site.text[0] + position] if site.text else [])


@pytest.mark.parametrize("kind", CALLS)
def test_one_cell_reaches_one_query(kind: str):
    model = tiny_model(kind)
    shape = model.latent_shape(*reversed(size_of(kind)))
    h, w = shape[-2:]
    condition = model.encode_text(PROMPTS[:1], guidance=False)
    sites = sites_of(model, kind, PROMPTS[:1])
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    rows, columns = sites[0].grid
    row, column = rows - 2, columns - 1
    frame = model.clips * 1
    part = moved[:, :, frame] if model.clips else moved
    part[..., row * h // rows : (row + 1) * h // rows, column * w // columns : (column + 1) * w // columns] += 1
    calls = []
    for state in (x, moved):
        with recorded(model, kind, mute=True) as recorder:
            model.predict(state, torch.tensor(500.0), condition)
        calls.append(recorder.calls)
    for site in sites:
        before, after = (each[site.path][0][0] for each in calls)
        assert places_changed(before, after) == [site.image[0] + (frame * rows + row) * columns + column]


def test_a_word_of_hidream_has_three_places():
    model, word = tiny_model("hidream"), "dog"
    sites = sites_of(model, "hidream", PROMPTS[:1])
    tokens = model.pipe.tokenizer_4(PROMPTS[0]).input_ids
    alone = model.pipe.tokenizer_4(f" {word}").input_ids
    t5, llama = token_of(model, "hidream", PROMPTS[0], word), tokens.index(alone[0])
    assert Words(model).read(PROMPTS[0]).one(word).positions == (t5, 64 + llama, 128 + llama)
    found = planted_keys(model, "hidream", 128 + llama)  # the last layer stands at both places of the Llama
    for site in sites:
        assert found[site.path] == [site.text[0] + 64 + llama, site.text[0] + 128 + llama]


@pytest.mark.parametrize("kind", [kind for kind in CALLS if kind != "hidream"])
def test_word_maps_are_the_attention_at_the_planted_keys(kind: str):
    model = tiny_model(kind)
    options: dict[str, Any] = {"steps": 2, "seed": [7, 3], "size": size_of(kind), "decode": False}
    options |= guidance(kind, None)[0]
    with recorded(model, kind) as recorder:
        plain = generate(model, PROMPTS, **options)
    daam = DAAM(words=["dog", "cat"])
    seen = generate(model, PROMPTS, interventions=daam, **options)
    assert torch.equal(seen.latents, plain.latents)
    sites = [site for site in sites_of(model, kind, PROMPTS) if site.text]
    for sample, word in enumerate(("dog", "cat")):
        position = token_of(model, kind, PROMPTS[sample], word)
        keys = planted_keys(model, kind, position)
        maps = []
        for site in sites:
            image = slice(*site.image)
            if kind == "lumina2":  # behind the sample's own text
                start = len(tokens_of(model, kind, PROMPTS[sample]))
                image = slice(start, start + site.cells)
            for q, k, scale, mask in recorder.calls[site.path]:
                scores = q[sample] @ k[sample].mT * (q.shape[-1] ** -0.5 if scale is None else scale)
                if mask is not None:
                    mask = mask.expand(q.shape[0], *mask.shape[1:])[sample]
                    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
                column = scores.softmax(-1)[:, image, keys[site.path][0]]
                maps.append(column.mean(0).view(site.shape))
        expected = torch.stack(maps).mean(0)
        torch.testing.assert_close(
            daam.maps[sample].map(word, size=expected.shape[-2:]), expected, rtol=1e-4, atol=1e-7
        )
        assert expected.std() > 0
