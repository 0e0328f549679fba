"""DAAM with the original's conventions against an independent implementation of them, on the genuine pipeline.

The reference below follows the published description step by step: it replaces the cross-attention processors by ones
that materialise the probabilities of all heads, keeps the conditional half, sums every map over the steps in an
accumulator per (factor, layer, head), interpolates each accumulator bicubically, clamps it at 0 and averages over all
of them; a word is the mean over its sub-tokens at all of its occurrences, found by searching token ids.
"""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

from sfumato.explain.daam import DAAM
from sfumato.sampling import generate
from tests.tiny import tiny_model, tiny_pipeline

PROMPT = "a green cube and a small red cube on a dog"
STEPS, GUIDANCE = 4, 5.0


class Recorder:
    """A cross-attention processor of its own: textbook attention, probabilities of all heads on show."""

    def __init__(self, maps, layer, latent_cells, context):
        self.maps, self.layer, self.latent_cells, self.context = maps, layer, latent_cells, context

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        b, n, _ = hidden_states.shape
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (x.reshape(b, -1, attn.heads, x.shape[-1] // attn.heads).permute(0, 2, 1, 3) for x in (q, k, v))
        probs = torch.softmax(q @ k.transpose(-1, -2) * attn.scale, dim=-1).reshape(b * attn.heads, n, -1)
        factor = int(math.sqrt(self.latent_cells // n))
        if probs.shape[-1] == self.context and factor != 8:
            half = probs[len(probs) // 2 :]  # the conditional half of the flattened batch * heads axis
            side = int(math.sqrt(n))
            for head, each in enumerate(half):
                self.maps[factor, self.layer, head] += each.T.reshape(-1, side, side)
        out = (probs.reshape(b, attn.heads, n, -1) @ v).permute(0, 2, 1, 3).reshape(b, n, -1)
        return attn.to_out[1](attn.to_out[0](out))


def cross_attention_of(block):
    return [module for name, module in block.named_modules() if name.endswith("attn2")]


@pytest.fixture(scope="module")
def original():
    """Global token maps (77 h w) of the reference, with the final latents."""
    pipe = tiny_pipeline("sd", fresh=True)
    unet, size = pipe.unet, pipe.unet.config.sample_size
    maps = defaultdict(float)
    layers = [attn for block in [*unet.up_blocks, *unet.down_blocks] for attn in cross_attention_of(block)]
    for layer, attn in enumerate(layers):
        attn.set_processor(Recorder(maps, layer, size * size, 77))
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(3))
    options = {"latents": noise, "output_type": "latent", "height": 2 * size, "width": 2 * size}
    out = pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, **options).images
    merged = [
        F.interpolate(accumulated.unsqueeze(1), size=(size, size), mode="bicubic").clamp(min=0)
        for accumulated in maps.values()
    ]
    return torch.stack(merged).mean(0)[:, 0], out, pipe.tokenizer


@pytest.fixture(scope="module")
def ours():
    model = tiny_model("sd")
    size = model.denoiser.config.sample_size
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(3))
    daam = DAAM(reference=True)
    result = generate(model, PROMPT, steps=STEPS, guidance=GUIDANCE, latents=noise, interventions=daam, decode=False)
    return daam.maps[0], result.latents


def word_map(tokenizer, maps, word):
    """Merged occurrences: token ids of the word searched in those of the prompt, +1 for the start token."""
    ids = tokenizer(PROMPT.lower(), add_special_tokens=False).input_ids
    wanted = tokenizer(word, add_special_tokens=False).input_ids
    found = [i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted]
    assert found, word
    return maps[[1 + i + j for i in found for j in range(len(wanted))]].mean(0)


def test_token_maps(original, ours):
    maps, latents, tokenizer = original
    torch.testing.assert_close(ours[1], latents, rtol=0, atol=1e-4)
    recorded = list(ours[0].positions)
    assert recorded == list(range(len(tokenizer(PROMPT).input_ids)))
    assert len({layer.site.block for layer in ours[0].layers} & {"mid"}) == 0
    torch.testing.assert_close(ours[0].tokens(), maps[recorded], rtol=0, atol=1e-5)


@pytest.mark.parametrize("word", ["cube", "green cube", "dog", "a", "small"])
def test_word_maps(original, ours, word):
    maps, _, tokenizer = original
    expected = word_map(tokenizer, maps, word)
    torch.testing.assert_close(ours[0].map(word, size=ours[0].resolution), expected, rtol=0, atol=1e-5)


def test_normalized_by_the_tokens_of_the_prompt(original, ours):
    maps, _, tokenizer = original
    kept = maps[: len(tokenizer.tokenize(PROMPT)) + 2]
    shares = kept / (kept[1:-1].sum(0, keepdim=True) + 1e-6)
    expected = word_map(tokenizer, shares, "dog")
    maps_of_ours = ours[0].normalized("tokens")
    torch.testing.assert_close(maps_of_ours.map("dog", size=ours[0].resolution), expected, rtol=0, atol=1e-5)


def test_mask_of_the_enlarged_map(original, ours):
    maps, _, tokenizer = original
    large = F.interpolate(word_map(tokenizer, maps, "cube")[None, None], size=(32, 32), mode="bicubic")[0, 0]
    unit = (large - large.min()) / (large.max() - large.min())
    agree = (ours[0].mask("cube", 0.4) == (unit > 0.4)).float().mean()
    assert agree > 0.995  # a pixel exactly at the threshold may fall either way


def test_a_single_layer_and_head(original, ours):
    model = tiny_model("sd")
    size = model.denoiser.config.sample_size
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(3))
    some = DAAM(reference=True, heads=[1], layers=["up"])
    generate(model, PROMPT, steps=STEPS, guidance=GUIDANCE, latents=noise, interventions=some, decode=False)
    all_heads = ours[0].map("dog", layers=["up"], heads=[1])
    torch.testing.assert_close(some.maps[0].map("dog"), all_heads, rtol=0, atol=1e-5)
