"""ConceptAttention against the formulas of the paper, spelt out block by block, and attached to pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.errors import BadInput, NoMatch, NotSupported
from sfumato.explain.concept_attention import ConceptAttention, explain_image, explain_images, normalised
from sfumato.explain.daam import DAAM
from sfumato.models.hooks import running
from sfumato.sampling import generate
from sfumato.sampling.attached import attached
from tests.pipelines import PROMPT, SIZE, draw, mine, picture, pipeline_of
from tests.tiny import length_of, tiny_model, tiny_pipeline

CONCEPTS = ["cone", "a big dog", "cube"]


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(attn: Any, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(queries of the picture, keys of the text, outputs of picture and of text), before the output projections, by the
    plain formula."""
    q, k, v = (split(layer(image), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v))
    tq, tk, tv = (split(layer(text), attn.heads) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    if attn.norm_q is not None:
        q, k, tq, tk = attn.norm_q(q), attn.norm_k(k), attn.norm_added_q(tq), attn.norm_added_k(tk)
    scores = torch.cat([q, tq], 2) @ torch.cat([k, tk], 2).transpose(-1, -2) * q.shape[-1] ** -0.5
    out = scores.softmax(-1) @ torch.cat([v, tv], 2)
    return q, tk, out[:, :, : q.shape[2]], out[:, :, q.shape[2] :]


def by_the_paper(
    model: Any, blocks: list[Any], concepts: Tensor, space: str, last: int, normalise: bool
) -> list[Tensor]:
    """Scores (b n c) at every block up to ``last``: concepts beside the prompt, through each block's own weights for
    text. ``blocks``: what each block of the real pass was called with."""
    found = []
    for i, (block, given) in enumerate(zip(model.denoiser.transformer_blocks, blocks, strict=True)):
        hidden, text, temb = given["hidden_states"], given["encoder_hidden_states"], given["temb"]
        image = block.norm1(hidden, emb=temb)[0]
        if block.context_pre_only:
            shown, rest = block.norm1_context(concepts, temb), ()
        else:
            shown, *rest = block.norm1_context(concepts, emb=temb)
        seen = block.norm1_context(text, temb) if block.context_pre_only else block.norm1_context(text, emb=temb)[0]
        q, _, of_image, _ = attention(block.attn, image, seen)
        _, k, _, of_concepts = attention(block.attn, image, shown)
        places, names = (of_image, of_concepts) if space == "output" else (q, k * q.shape[-1] ** -0.5 / q.shape[1])
        if normalise:
            least = names.min(2, keepdim=True).values
            names = (names - least) / (names - least).sum(2, keepdim=True)
        found.append(torch.einsum("bknd,bkcd->bnc", places, names))
        if i == last or block.context_pre_only:
            break
        gate, shift, scale, gate_mlp = rest
        out = block.attn.to_add_out(of_concepts.transpose(1, 2).flatten(2))
        concepts = concepts + gate[:, None] * out
        normed = block.norm2_context(concepts) * (1 + scale[:, None]) + shift[:, None]
        concepts = concepts + gate_mlp[:, None] * block.ff_context(normed)
    return found


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("space", ["output", "attention"])
@pytest.mark.parametrize("kind", ["sd3", "sd35"])
def test_scores_are_those_of_the_paper(kind, space, normalise):
    model = tiny_model(kind)
    blocks: list[Any] = []

    def note(part: Any, output: Any) -> None:
        if part.path.startswith("transformer_blocks.") and part.path.count(".") == 1 and len(blocks) < 2:
            blocks.append(part.kwargs)

    options = {"share": False, "space": space, "normalise": normalise}
    look = ConceptAttention(concepts=CONCEPTS, layers=["joint"], per_step=True, **options)
    given = {"steps": 1, "seed": 2, "guidance": 1.0, "size": (SIZE, SIZE), "decode": False}
    with running(model.denoiser, note):
        generate(model, PROMPT, interventions=look, **given)
    t5 = next(stream for stream in model.tokenizers if stream.name == "t5")
    vectors = model.encode_text(CONCEPTS, None, False).cond["embeds"][:, t5.offset]
    with torch.no_grad():
        vectors = model.denoiser.context_embedder(vectors[None])
        expected = by_the_paper(model, blocks, vectors, space, 1, normalise)
    for layer, scores in zip(look.maps[0].layers, expected, strict=True):
        got = layer.maps[0, 0].flatten(1).T
        torch.testing.assert_close(got, scores[0], atol=1e-5, rtol=1e-4)


def test_shares_and_names():
    model = tiny_model("sd3")
    given = {"steps": 2, "size": (SIZE, 16), "decode": False}
    plain = generate(model, [PROMPT, "a dog"], **given)
    look, daam = ConceptAttention(concepts=CONCEPTS), DAAM(words=["a"])
    made = generate(model, [PROMPT, "a dog"], interventions=[look, daam], **given)
    assert torch.equal(made.latents, plain.latents)
    assert made.cost == plain.cost + 2 and made.coverage["concept_attention"]["cost"] == 2
    alone = DAAM(words=["a"])
    generate(model, [PROMPT, "a dog"], interventions=alone, **given)
    assert torch.equal(daam.maps[0].map("a", merge=True), alone.maps[0].map("a", merge=True))
    assert len(look.maps) == 2 and look.maps[0].words == tuple(CONCEPTS)
    for maps in look.maps:
        assert len(maps.layers) == 2  # all of them
        torch.testing.assert_close(maps.tokens().sum(0), torch.ones(4, 8))
        assert maps.map("a big dog").shape == (16, SIZE)
    single = ConceptAttention(concepts=CONCEPTS)
    generate(model, "a dog", seed=1, interventions=single, **given)
    torch.testing.assert_close(single.maps[0].map("cone"), look.maps[1].map("cone"), atol=1e-6, rtol=1e-5)


def test_normalised_channels_sum_to_one_over_the_concepts_and_a_single_concept_is_itself():
    concepts = torch.randn(2, 3, 4, 5, generator=torch.manual_seed(0))
    made = normalised(concepts)
    assert made.min() == 0 and torch.equal(normalised(concepts[:, :, :1]), concepts[:, :, :1])
    torch.testing.assert_close(made.sum(2), torch.ones(2, 3, 5))
    torch.testing.assert_close(normalised(3 * concepts + 1), made)  # length does not count, nor what all have
    assert not normalised(torch.ones_like(concepts)).any()


def test_pictures_that_exist():
    model = tiny_model("flux")
    found = explain_image(model, picture(), "", ["cone", "dog"], steps=2, size=(SIZE, SIZE))
    assert len(found.layers) == 1  # the last fifth of the two that have weights of their own for the text
    both = explain_images(
        model, [picture(), picture((0, 0, 9))], "", concepts=["cone", "dog"], steps=2, seed=[0, 5], size=(SIZE, SIZE)
    )
    torch.testing.assert_close(found.map("cone"), both[0].map("cone"), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found.map("cone"), both[1].map("cone"))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_attached_it_sees_what_it_sees_in_our_loop(kind):
    model, pipe = tiny_model(kind), tiny_pipeline(kind)
    noise = torch.randn(1, *model.latent_shape(SIZE, SIZE), generator=torch.manual_seed(3))
    ours, theirs = ConceptAttention(concepts=CONCEPTS), ConceptAttention(concepts=CONCEPTS)
    generate(model, PROMPT, latents=noise, steps=2, guidance=4.0, size=(SIZE, SIZE), decode=False, interventions=ours)
    packed = pipe._pack_latents(noise, 1, *noise.shape[1:]) if kind == "flux" else noise
    with attached(pipe, theirs) as run:
        drawn = draw(pipe, steps=2, latents=packed, guidance_scale=4.0, **length_of(model))
    assert torch.equal(drawn, draw(pipe, steps=2, latents=packed, guidance_scale=4.0, **length_of(model)))
    for one, other in zip(ours.maps[0].layers, theirs.maps[0].layers, strict=True):
        torch.testing.assert_close(one.maps, other.maps, atol=1e-6, rtol=1e-5)
    assert run.coverage["concept_attention"]["steps"] == [0, 1]


@pytest.mark.parametrize("kind", ["flux kontext", "sd3 controlnet"])
def test_attached_to_pipelines_without_a_family(kind):
    pipe = pipeline_of(kind)
    with attached(pipe, ConceptAttention(concepts=CONCEPTS)) as run:
        drawn = draw(pipe, kind)
    assert torch.equal(drawn, draw(pipe, kind))
    torch.testing.assert_close(run.maps[0].tokens().sum(0), torch.ones(8, 8))


def test_bad_input():
    for concepts, why in (([], "names"), (["dog", "Dog"], "each once"), (["dog"], "share=false"), ([" "], "names")):
        with pytest.raises(BadInput, match=why):
            ConceptAttention(concepts=concepts)
    ConceptAttention(concepts=["dog"], share=False)
    with pytest.raises(NotSupported, match="one sequence"):
        generate(tiny_model("sd"), PROMPT, interventions=ConceptAttention(concepts=CONCEPTS), steps=1)
    with pytest.raises(NoMatch, match="joint.0"):
        generate(tiny_model("sd3"), PROMPT, interventions=ConceptAttention(concepts=CONCEPTS, layers=["up"]), steps=1)
    pipe = mine()
    with pytest.raises(NotSupported, match="encodes texts"), attached(pipe, ConceptAttention(concepts=CONCEPTS)):
        draw(pipe)
