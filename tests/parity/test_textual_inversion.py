"""The same taught words give the same latents, bit for bit, as diffusers' own ``load_textual_inversion``; where a
pipeline has no such method, as a tokenizer and a table grown by hand."""

from __future__ import annotations

import pytest
import torch

from sfumato.adapters.word import Word, save_word
from sfumato.models.quiet import quiet
from sfumato.models.text_towers import text_towers
from sfumato.sampling import generate
from tests.tiny import tiny_model

PROMPT = "a red <rex> and a dog"


def latents(model, systems=(), prompt=PROMPT):
    given = {"steps": 1, "seed": 3, "guidance": 2.0, "decode": False}
    return generate(model, prompt, negative="a <rex>", interventions=systems, **given).latents


def taught(kind, k):
    generator = torch.Generator().manual_seed(k)
    return {t.name: torch.randn(k, t.table.shape[1], generator=generator) for t in text_towers(tiny_model(kind))}


def written(path, vectors):
    """As its user finds it: a T5 is called one, whichever encoder of the pipeline it is."""
    t5 = {name: rows for name, rows in vectors.items() if rows.shape[1] == 32}
    rest = {name: rows for name, rows in vectors.items() if name not in t5}
    return str(save_word(path, "<rex>", {**rest, **({"text_encoder_3": rows} for rows in t5.values()).__next__()})
               if t5 else save_word(path, "<rex>", rest))  # fmt: skip


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "flux"])
def test_as_load_textual_inversion(kind, k, tmp_path):
    vectors = taught(kind, k)
    file, fresh = written(tmp_path / "x.safetensors", vectors), tiny_model(kind, fresh=True)
    fresh.pipe.hf_device_map = None
    with quiet():
        for name, rows in vectors.items():
            parts = {"tokenizer": name.replace("text_encoder", "tokenizer"), "text_encoder": name}
            fresh.pipe.load_textual_inversion(
                {"<rex>": rows}, token="<rex>", **{key: getattr(fresh.pipe, part) for key, part in parts.items()}
            )
    if fresh.embeds_guidance:
        given = {"steps": 1, "seed": 3, "decode": False}
        theirs = generate(fresh, PROMPT, **given).latents
        ours = generate(tiny_model(kind), PROMPT, interventions=Word(file=file), **given).latents
    else:
        theirs, ours = latents(fresh), latents(tiny_model(kind), Word(file=file))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["sd3", "pixart"])
def test_as_tokenizers_and_tables_grown_by_hand(kind, tmp_path):
    vectors = taught(kind, 2)
    file, fresh = written(tmp_path / "x.safetensors", vectors), tiny_model(kind, fresh=True)
    with quiet(), torch.no_grad():
        for name, rows in vectors.items():
            tokenizer, encoder = (
                getattr(fresh.pipe, name.replace("text_encoder", "tokenizer")),
                getattr(fresh.pipe, name),
            )
            tokenizer.add_tokens(["<rex>", "<rex>_1"])
            encoder.resize_token_embeddings(len(tokenizer))
            encoder.get_input_embeddings().weight[-2:] = rows
    by_hand = generate(fresh, PROMPT.replace("<rex>", "<rex> <rex>_1"), steps=1, seed=3, decode=False).latents
    ours = generate(tiny_model(kind), PROMPT, steps=1, seed=3, decode=False, interventions=Word(file=file)).latents
    assert torch.equal(ours, by_hand)
