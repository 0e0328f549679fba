"""aMUSEd: the tokens, pictures and word maps of the genuine pipeline, bit for bit on a CPU.

The pipeline draws a batch's noise from one generator; here each sample has its own, so it is called once per sample.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AmusedImg2ImgPipeline
from PIL import Image
from torch import Tensor

from sfumato.attention.seam import Call, Tap
from sfumato.errors import BadInput
from sfumato.explain.daam import DAAM
from sfumato.models import Model, load, quiet
from sfumato.sampling import Intervention, Run, generate
from tests.tiny import tiny_model, tiny_pipeline

PROMPTS = ["a red cube", "a photo of a big blue dog on the left"]


def pipeline_tokens(model: Model, prompts: list[str], seeds: list[int], size: tuple[int, int], **given: Any) -> Tensor:
    """Final tokens (b h w) of the diffusers pipeline, sample by sample."""
    with quiet():
        return torch.cat(
            [
                model.pipe(
                    prompt, width=size[0], height=size[1], generator=torch.Generator().manual_seed(seed),
                    output_type="latent", **given,
                ).images
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
        )  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"guidance_scale": 1.0}, {"guidance": 1.0}),
        ({}, {}),
        ({"guidance_scale": 3.0, "negative_prompt": "green"}, {"guidance": 3.0, "negative": "green"}),
        ({"guidance_scale": 3.0, "temperature": (4, 1)}, {"guidance": 3.0, "temperature": (4.0, 1.0)}),
        ({"guidance_scale": 3.0, "temperature": 3}, {"guidance": 3.0, "temperature": 3.0}),
    ],
    ids=["unguided", "defaults", "negative", "temperatures", "temperature"],
)
@pytest.mark.parametrize(("kind", "size"), [("amused", (48, 32)), ("amused_down", (32, 32))])
def test_tokens(kind: str, size: tuple[int, int], theirs: dict[str, Any], ours: dict[str, Any]):
    model = tiny_model(kind)
    steps = {"num_inference_steps": 4} if theirs else {}
    peer = pipeline_tokens(model, PROMPTS, [7, 3], size, **theirs, **steps)
    own = {"steps": 4} if theirs else {}
    result = generate(model, PROMPTS, seed=[7, 3], size=size, batch_size=1, decode=False, **ours, **own)
    assert torch.equal(result.latents, peer) and len(result.latents.unique()) > 9
    assert result.cost == (4 if theirs else 12) * (1 if ours.get("guidance") == 1 else 2)


class MicroConditions(Intervention):
    """Other micro-conditions, in every branch."""

    def __init__(self, values: list[float]):
        self.values = values

    def on_text(self, run: Run, condition: Any) -> Any:
        self.mark()
        for rows in (condition.cond, condition.uncond):
            rows["micro"] = torch.tensor(self.values).expand(len(condition), -1)
        return condition


def test_micro_conditions():
    model = tiny_model("amused")
    given = {"num_inference_steps": 3, "micro_conditioning_aesthetic_score": 2, "micro_conditioning_crop_coord": (8, 4)}
    peer = pipeline_tokens(model, PROMPTS[:1], [7], (48, 32), **given)
    plain, told = (
        generate(model, PROMPTS[0], seed=7, size=(48, 32), steps=3, interventions=parts, decode=False).latents
        for parts in ((), MicroConditions([48, 32, 8, 4, 2]))
    )
    assert torch.equal(told, peer) and not torch.equal(plain, peer)


def test_pictures():
    model = tiny_model("amused")
    with quiet():
        peer = model.pipe(
            PROMPTS[0], num_inference_steps=3, width=48, height=32, generator=torch.Generator().manual_seed(4)
        ).images[0]  # fmt: skip
    ours = generate(model, PROMPTS[0], steps=3, seed=4, size=(48, 32)).images[0]
    assert ours.size == (48, 32) and ours.tobytes() == peer.tobytes()


def picture(seed: int) -> Image.Image:
    noise = torch.randint(0, 256, (32, 48, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


@pytest.mark.parametrize("strength", [0.4, 0.75])
def test_image_to_image(strength: float):
    model = tiny_model("amused")
    with quiet():
        variant = AmusedImg2ImgPipeline(**model.pipe.components)
        variant.set_progress_bar_config(disable=True)
        peer = variant(
            PROMPTS[0], image=picture(1), strength=strength, num_inference_steps=6, guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5), output_type="latent",
        ).images  # fmt: skip
    ours = generate(model, PROMPTS[0], image=picture(1), strength=strength, steps=6, guidance=3.0, seed=5, decode=False)
    assert torch.equal(ours.latents, peer)


def test_the_ends_of_strength():
    model, given = tiny_model("amused"), {"steps": 4, "seed": 3, "decode": False}
    with torch.no_grad():
        pixels = 2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
        tokens = model.encode_image(pixels)
    same = generate(model, "a dog", image=pixels, strength=0.0, **given)
    assert torch.equal(same.latents, tokens) and same.cost == 0
    anew = generate(model, "a dog", image=pixels, strength=1.0, **given)
    assert torch.equal(anew.latents, generate(model, "a dog", size=(32, 32), **given).latents)
    with pytest.raises(BadInput, match="leaves no step"):
        generate(model, "a dog", image=pixels, strength=0.1, **given)


def test_a_saved_folder_loads_and_draws_the_same(tmp_path: Any):
    with quiet():
        tiny_pipeline("amused").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.family.name == "amused"
    given = {"steps": 3, "size": (32, 32), "decode": False}
    assert torch.equal(
        generate(model, "a dog", **given).latents, generate(tiny_model("amused"), "a dog", **given).latents
    )
    (tmp_path / "vqvae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(Exception, match="vqvae"):
        load(tmp_path)


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["amused", "amused_down"])
def test_sites_are_those_that_run_and_their_rows_sum_to_one(kind: str):
    model, seen = tiny_model(kind), []

    def look(call: Call) -> None:
        probs = call.branch("cond").probs()
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))
        seen.append((call.site.path, call.site.kind, call.q.shape[2], call.k.shape[2]))

    class Look(Intervention):
        def taps(self) -> list[Tap]:
            self.mark()
            return [Tap(observe=look)]

    generate(model, "a red cube", size=(48, 32), steps=1, interventions=Look(), decode=False)
    n = 16 * 24 // (4 if kind == "amused_down" else 1)
    sites = model.sites(32, 48)
    assert [path for path, *_ in seen] == [site.path for site in sites]
    assert [(kind, q, k) for _, kind, q, k in seen] == [(s.kind, n, 77 if s.kind == "cross" else n) for s in sites]
    assert [site.kind for site in sites] == ["cross", "cross", "self", "cross", "self", "cross", "cross", "cross"]


def test_daam_maps_are_the_mean_of_the_pipelines_own_attention():
    """Against processors that write probabilities down, in the genuine pipeline."""
    model, found = tiny_model("amused", fresh=True), []
    daam = DAAM(words=["red", "cube"])
    generate(model, "a red cube", seed=3, steps=3, size=(32, 32), interventions=daam, decode=False)

    class Write:
        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
            q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
            probs = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
            if encoder_hidden_states is not None:
                found.append(probs[1].mean(0))  # the conditional half of one sample
            return attn.to_out[1](attn.to_out[0]((probs @ v).transpose(1, 2).flatten(2)))

    model.denoiser.set_attn_processor(Write())
    pipeline_tokens(model, ["a red cube"], [3], (32, 32), num_inference_steps=3)
    expected = torch.stack(found).mean(0)
    assert len(found) == 3 * 6
    for word, column in (("red", 2), ("cube", 3)):  # one token each, behind "<start>" and "a"
        torch.testing.assert_close(
            daam.maps[0].map(word, size=(16, 16)), expected[:, column].view(16, 16), rtol=1e-4, atol=1e-6
        )


class Plant(Intervention):
    """Makes the left half of the picture attend to the third word alone."""

    role = "editor"

    def taps(self) -> list[Tap]:
        return [Tap(lambda site: site.kind == "cross", edit_scores=self._edit)]

    def _edit(self, call: Call) -> Tensor:
        self.mark(call.step, sites=[call.site.path])
        h, w = call.site.grid
        scores = call.scores().unflatten(2, (h, w)).clone()
        scores[:, :, :, : w // 2, 3] += 50
        return scores.flatten(2, 3)


def test_daam_finds_what_was_planted():
    daam = DAAM(words=["cube"])
    generate(tiny_model("amused"), "a red cube", steps=2, size=(32, 32), interventions=[Plant(), daam], decode=False)
    heat = daam.maps[0].map("cube", size=(16, 16))
    assert heat[:, :8].min() > 0.99 and heat[:, 8:].max() < 0.5
