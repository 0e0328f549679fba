"""Structured guidance against the explicit sum over values or keys, by processors of their own; refusals."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported
from sfumato.models import Model
from sfumato.models.quiet import quiet
from sfumato.sampling import Intervention, generate
from sfumato.steer.structured_guidance import StructuredGuidance
from sfumato.text import Words
from tests.tiny import tiny_model

PROMPT = "a red cube and a green ball"  # 8 tokens in all, "green" being several
PHRASES = ["a red cube", "a green ball"]


def double(kind, seed=0):
    model = tiny_model(kind, seed, fresh=True)
    return model.to(dtype=torch.float64)


def find(haystack, needle):
    """Where a list of token ids stands in another one."""
    return next(i for i in range(len(haystack)) if haystack[i : i + len(needle)] == needle)


def sequences_by_hand(model, prompt, phrases):
    """W_p with each phrase's own embeddings in its place, found by token ids; and with all of them."""
    tokenizer = model.tokenizers[0].tokenizer
    full = model.encode_text(prompt, guidance=False).cond["embeds"]
    ids, single, together = tokenizer(prompt).input_ids, [], full.clone()
    for phrase in phrases:
        own = tokenizer(phrase).input_ids[1:-1]
        at = find(ids, own)
        alone = model.encode_text(phrase, guidance=False).cond["embeds"]
        copy = full.clone()
        copy[:, at : at + len(own)] = alone[:, 1 : 1 + len(own)]
        together[:, at : at + len(own)] = alone[:, 1 : 1 + len(own)]
        single.append(copy)
    return full, single, together


class ManyContexts:
    """A cross-attention processor that writes the paper's sum out: the mean of softmax(Q K_i) V_j over all pairs."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        def heads(x):
            return x.reshape(x.shape[0], -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

        q = heads(attn.to_q(hidden_states))
        outs = []
        for row, branch in enumerate(["uncond", "cond"] if len(q) == 2 else ["cond"]):
            own = encoder_hidden_states[row : row + 1]
            ks, vs = (self.keys, self.values) if branch == "cond" else ([own], [own])
            pairs = [(k, v) for k in ks for v in vs] if min(len(ks), len(vs)) == 1 else list(zip(ks, vs, strict=True))
            out = 0
            for k, v in pairs:
                scores = q[row : row + 1] @ heads(attn.to_k(k)).transpose(-1, -2) * attn.scale
                out = out + scores.softmax(-1) @ heads(attn.to_v(v))
            outs.append(out / len(pairs))
        out = torch.cat(outs).transpose(1, 2).reshape(*hidden_states.shape[:2], -1)
        return attn.to_out[1](attn.to_out[0](out))


def by_hand(model, keys, values, **options):
    unet = model.pipe.unet
    before = dict(unet.attn_processors)
    crossing = {name: ManyContexts(keys, values) for name in before if name.endswith("attn2.processor")}
    assert crossing
    unet.set_attn_processor(before | crossing)
    try:
        return generate(model, PROMPT, **options).latents
    finally:
        unet.set_attn_processor(before)


OPTIONS = {"steps": 2, "seed": 3, "guidance": 4.0, "scheduler": "ddim", "decode": False}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_values_of_the_mean_are_the_mean_of_values(kind):
    model = double(kind)
    full, single, _ = sequences_by_hand(model, PROMPT, PHRASES)
    expected = by_hand(model, [full], [full, *single], **OPTIONS)
    ours = generate(model, PROMPT, interventions=StructuredGuidance(), **OPTIONS).latents
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    plain = generate(model, PROMPT, **OPTIONS).latents
    assert (ours - plain).abs().max() > 1e-4
    named = generate(model, PROMPT, interventions=StructuredGuidance(phrases=PHRASES), **OPTIONS).latents
    assert torch.equal(named, ours)


@pytest.mark.parametrize("reference", [False, True])
def test_conjunction_is_the_mean_over_keys(reference):
    """The paper's first key is the whole prompt; the original's code has overwritten it with all phrases."""
    model = double("sd")
    full, single, together = sequences_by_hand(model, PROMPT, PHRASES)
    expected = by_hand(model, [together if reference else full, *single], [together], **OPTIONS)
    system = StructuredGuidance(mode="conjunction", reference=reference)
    ours = generate(model, PROMPT, interventions=system, **OPTIONS).latents
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    other = StructuredGuidance(mode="conjunction", reference=not reference)
    assert (generate(model, PROMPT, interventions=other, **OPTIONS).latents - ours).abs().max() > 1e-6


def test_weights_of_the_mean():
    model = double("sd")
    full, single, _ = sequences_by_hand(model, PROMPT, PHRASES)
    for weight, values in ((0.0, single), (2.0, [full, full, *single])):
        expected = by_hand(model, [full], values, **OPTIONS)
        ours = generate(model, PROMPT, interventions=StructuredGuidance(full_weight=weight), **OPTIONS).latents
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    half = by_hand(model, [full], [full] * 4 + single, **OPTIONS)  # halfway between 1 : 0 and 1 : 1 : 1
    ours = generate(model, PROMPT, interventions=StructuredGuidance(strength=0.5), **OPTIONS).latents
    torch.testing.assert_close(ours, half, rtol=0, atol=1e-6)


class Outputs(Intervention):
    def __init__(self):
        self.seen = []

    def after_predict(self, step):
        self.seen.append({name: out.clone() for name, out in step.outputs.items()})
        self.mark(step)


@pytest.mark.parametrize(("mode", "tolerance"), [("values", 0.0), ("conjunction", 1e-5)])
def test_the_unconditional_branch_is_left_alone(mode, tolerance):
    model, watched, plain = tiny_model("sd"), Outputs(), Outputs()
    options = {**OPTIONS, "steps": 1, "guidance": 3.0}
    generate(model, PROMPT, negative="a dog", interventions=[StructuredGuidance(mode=mode), watched], **options)
    generate(model, PROMPT, negative="a dog", interventions=plain, **options)
    torch.testing.assert_close(watched.seen[0]["uncond"], plain.seen[0]["uncond"], rtol=0, atol=tolerance)
    assert not torch.allclose(watched.seen[0]["cond"], plain.seen[0]["cond"], rtol=0, atol=1e-3)


def sequences_of(system, model, prompts, **options):
    """What a system made of prompts (i b t d), with its weights (i b)."""
    kept = {}

    class Peek(Intervention):
        role = "observer"

        def before_predict(self, step):
            kept.update(keys=system._keys, weights=system._weights[..., 0, 0], full=step.condition.cond["embeds"])
            self.mark(step)

    generate(model, prompts, steps=1, guidance=1.0, interventions=[system, Peek()], decode=False, **options)
    return kept["keys"], kept["weights"], kept["full"]


def test_a_causal_encoder_has_nothing_to_repair_in_the_first_phrase():
    """Its tokens have seen nothing else; those of later phrases have."""
    keys, weights, full = sequences_of(StructuredGuidance(), tiny_model("sd"), PROMPT)
    torch.testing.assert_close(keys[1], full, rtol=1e-5, atol=1e-6)
    moved = (keys[2] - full).abs().amax((0, 2)).nonzero().flatten().tolist()
    words = Words(tiny_model("sd"))
    assert tuple(moved) == words.one(PROMPT, "a green ball").positions
    assert weights[:, 0].tolist() == pytest.approx([1 / 3] * 3)


def test_without_context_there_is_nothing_to_repair(monkeypatch):
    """An encoder that gives each token its own vector, wherever it stands: structure changes nothing."""
    model = tiny_model("sd", fresh=True)
    table = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))

    def encode(prompts, negatives, guidance):
        def rows(texts):
            made = model.pipe.tokenizer(list(texts), padding="max_length", return_tensors="pt")
            return {"embeds": table[made.input_ids % 1000]}

        return rows(prompts), rows(negatives or [""] * len(prompts)) if guidance else None

    monkeypatch.setattr(model.family, "encode", encode)
    plain = generate(model, PROMPT, **OPTIONS).latents
    for mode in ("values", "conjunction"):
        ours = generate(model, PROMPT, interventions=StructuredGuidance(mode=mode), **OPTIONS).latents
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_batches_of_different_structure():
    model = tiny_model("sdxl")
    prompts = ["a red cube and a green ball", "a dog on a small cat, a red cube and a big ball"]
    system = StructuredGuidance()
    keys, weights, full = sequences_of(system, model, prompts)
    assert system.phrases == [
        ["a red cube", "a green ball"],
        ["a dog on a small cat", "a dog", "a small cat", "a red cube", "a big ball"],
    ]
    assert len(keys) == 6 and weights[:, 0].tolist() == pytest.approx([1 / 3] * 3 + [0] * 3)
    assert weights[:, 1].tolist() == pytest.approx([1 / 6] * 6)
    alone, _, _ = sequences_of(StructuredGuidance(), model, prompts[1])
    torch.testing.assert_close(alone[:, 0], keys[:, 1], rtol=1e-4, atol=1e-5)
    for mode in ("values", "conjunction"):
        options = {"steps": 1, "guidance": 3.0, "decode": False}
        together = generate(model, prompts, seed=[3, 4], interventions=StructuredGuidance(mode=mode), **options).latents
        for i in range(2):
            one = generate(model, prompts[i], seed=3 + i, interventions=StructuredGuidance(mode=mode), **options)
            torch.testing.assert_close(one.latents[0], together[i], rtol=1e-3, atol=1e-4)


def test_the_same_phrase_twice_is_two_phrases():
    model, prompt = tiny_model("sd"), "a dog and a red ball and a red ball"
    system = StructuredGuidance(phrases=["a red ball"])
    keys, _, full = sequences_of(system, model, prompt)
    assert system.phrases == [["a red ball", "a red ball"]]
    first, second = ((keys[i] - full).abs().amax((0, 2)).nonzero().flatten().tolist() for i in (1, 2))
    assert len(first) == len(second) == 3 and min(second) - min(first) == 4


def test_nesting():
    prompt = "a red ball on a blue cube and a dog next to a cat"
    model, found = tiny_model("sd"), {}
    for nesting in ("all", "highest", "lowest"):
        system = StructuredGuidance(nesting=nesting)
        generate(model, prompt, steps=1, interventions=system, decode=False)
        found[nesting] = system.phrases[0]
    assert found["highest"] == ["a red ball on a blue cube", "a dog next to a cat"]
    assert found["lowest"] == ["a red ball", "a blue cube", "a dog", "a cat"]
    assert set(found["all"]) == {*found["highest"], *found["lowest"]} and len(found["all"]) == 6
    generate(model, "a red cube and a dog", steps=1, interventions=system, decode=False)
    assert system.phrases == [["a red cube", "a dog"]]  # a new run starts anew


def test_phrases_behind_the_end_are_left_out_and_cut_ones_used_as_far_as_seen():
    model = tiny_model("sd")
    prompt = "a red cube and " + "a dog " * 34 + "on a small red ball and a blue cube"
    system = StructuredGuidance(phrases=["a red cube", "a small red ball"])
    with quiet(), pytest.warns(UserWarning):
        keys, _, full = sequences_of(system, model, prompt, long_prompts="cut")
    moved = (keys[2] - full).abs().amax((0, 2)).nonzero().flatten().tolist()
    assert moved and max(moved) <= 75 and len(moved) < len(Words(model).read("a small red ball").tokens()["clip"])


def test_refusals():
    def run(kind="sd", prompt=PROMPT, options=(), **params):
        generate(
            tiny_model(kind), prompt, steps=1, interventions=StructuredGuidance(**params), decode=False, **dict(options)
        )

    with pytest.raises(NoMatch, match="'a red cub' is not in the prompt. Did you mean"):
        run(phrases=["a red cub"])
    with pytest.raises(NoMatch, match="the prompt 'cube' has no noun phrase of several words besides itself"):
        run(prompt="cube")
    with pytest.raises(NoMatch, match="the prompt 'a dog' has none of .'a cat'."):
        run(prompt=["a cat", "a dog"], phrases=["a cat"])
    for kind in ("sd3", "flux"):
        with pytest.raises(NotSupported, match="linear function of the text's embeddings.*; tiny-"):
            run(kind)
    with pytest.raises(NotSupported, match="linear function of the text's embeddings; tiny-pixart"):
        run("pixart")
    with pytest.raises(Conflict, match="compose both say"):
        run(options={"compose": [("a dog", 1.0)]})
    with pytest.raises(BadInput, match="window of structured_guidance"):
        run(window=(0.5, 0.5))
    with pytest.raises(BadInput, match="differs in mode=conjunction only"):
        run(reference=True)
    with pytest.raises(BadInput, match="special tokens are no phrases"):
        run(phrases=["<start>"])
    with pytest.raises(BadInput, match="strength of structured_guidance is 2"):
        run(strength=2)


def test_adapters_in_the_projections_are_seen():
    """Values come from the module itself, whatever was put into it."""
    model = tiny_model("sd", fresh=True)
    before = generate(model, PROMPT, interventions=StructuredGuidance(), **OPTIONS).latents
    for name, module in model.denoiser.named_modules():
        if name.endswith("attn2.to_v"):
            module.register_forward_hook(lambda module, args, out: out * 1.5)
    after = generate(model, PROMPT, interventions=StructuredGuidance(), **OPTIONS).latents
    assert isinstance(model, Model) and (after - before).abs().max() > 1e-4
