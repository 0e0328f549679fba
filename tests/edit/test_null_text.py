"""Null-text inversion against the paper's algorithm in plain formulas; it leads back, is kept, composes, refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfumato.edit.null_text import NullText, null_text
from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.errors import BadInput
from sfumato.models.quiet import quiet
from sfumato.sampling import generate, invert
from sfumato.sampling.recording import Recorder
from tests.helpers import fingerprint
from tests.tiny import tiny_model

PROMPT, OTHER = "a red cube on a dog", "a green cube on a dog"
STEPS, SCALE, INNER = 3, 20.0, 5  # random networks hear the text faintly


def clean(model):
    return torch.randn(1, *model.latent_shape(*model.default_size), generator=torch.Generator().manual_seed(0))


def distance(a, b):
    return float((a - b).square().mean().sqrt())


def reference(model, trajectory):
    """Mokady et al. 2022, algorithm 1, with DDIM in closed form; returns (latents, losses)."""
    scheduler = model.make_scheduler("ddim")
    scheduler.set_timesteps(STEPS)
    levels = scheduler.alphas_cumprod
    with quiet(), torch.no_grad():
        condition = model.encode_text([PROMPT], None, guidance=True)
    c, u = condition.cond["embeds"], condition.uncond["embeds"].clone()
    unet = model.denoiser
    x, losses = trajectory.latents[0], []
    for i, t in enumerate(scheduler.timesteps):
        before = t - 1000 // STEPS
        a, a_next = levels[t], levels[before] if before >= 0 else scheduler.final_alpha_cumprod

        def step(out, x=x, a=a, a_next=a_next):
            if scheduler.config.prediction_type == "v_prediction":
                x0, eps = a.sqrt() * x - (1 - a).sqrt() * out, a.sqrt() * out + (1 - a).sqrt() * x
            else:
                x0, eps = (x - (1 - a).sqrt() * out) / a.sqrt(), out
            return a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps

        with torch.no_grad():
            out_c = unet(x, t, encoder_hidden_states=c, return_dict=False)[0]
        u = u.detach().clone().requires_grad_(True)
        optimizer = torch.optim.Adam([u], lr=1e-2 * (1 - i / STEPS / 2))
        tried = []
        for k in range(INNER + 1):
            out_u = unet(x, t, encoder_hidden_states=u, return_dict=False)[0]
            landed = step(out_u + SCALE * (out_c - out_u))
            loss = F.mse_loss(landed, trajectory.latents[i + 1])
            tried.append((loss.item(), u.detach().clone(), landed.detach()))
            if k == INNER or loss < 1e-5 + 1e-3 * i / STEPS:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss, u, x = min(tried, key=lambda each: each[0])
        losses.append(loss)
    return x, losses


@pytest.mark.parametrize("kind", ["sd", "sd2"])
def test_the_optimisation_is_that_of_the_paper(kind):
    """Noise and velocity prediction."""
    model = tiny_model(kind)
    trajectory = invert(model, clean(model), PROMPT, steps=STEPS)
    expected, losses = reference(model, trajectory)
    before = fingerprint(model)
    found = null_text(model, trajectory, guidance=SCALE, inner=INNER)
    assert fingerprint(model) == before
    assert found.embeds.shape == (STEPS, 77, model.denoiser.config.cross_attention_dim)
    torch.testing.assert_close(found.losses, torch.tensor(losses), rtol=0.02, atol=1e-7)
    again = generate(model, PROMPT, guidance=SCALE, decode=False, interventions=found, **trajectory.settings).latents
    assert distance(again, expected) < 0.02 * distance(expected, trajectory.noise)
    torch.testing.assert_close(again, expected, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_it_leads_back_to_the_picture(kind):
    model = tiny_model(kind)
    x0 = clean(model)
    trajectory = invert(model, x0, PROMPT, steps=STEPS)
    settings = {"guidance": SCALE, "decode": False, **trajectory.settings}
    plain = generate(model, PROMPT, **settings).latents
    found = null_text(model, trajectory, guidance=SCALE, inner=8, learning_rate=0.1, tolerance=0.0)
    again = generate(model, PROMPT, interventions=found, **settings)
    assert distance(again.latents, x0) < 0.8 * distance(plain, x0)
    assert again.coverage["null_text"]["steps"] == list(range(STEPS))
    none = null_text(model, trajectory, guidance=SCALE, inner=0)  # no iteration: the empty prompt's own embedding
    assert torch.equal(generate(model, PROMPT, interventions=none, **settings).latents, plain)


def test_a_flow_model_is_led_by_its_pooled_text_too(tmp_path):
    """Each part moves as its own scale allows, and both are kept in the file."""
    model = tiny_model("sd3")
    trajectory = invert(model, clean(model), PROMPT, steps=STEPS)
    found = null_text(model, trajectory, guidance=SCALE, inner=3)
    settings = {"guidance": SCALE, "decode": False, **trajectory.settings}
    with torch.no_grad():
        plain = model.encode_text([""], None, guidance=False).cond
    assert found.pooled.shape == (STEPS, plain["pooled"].shape[-1])
    for own, at_first in ((found.embeds, plain["embeds"]), (found.pooled, plain["pooled"])):
        moved = (own[-1] - at_first[0]).square().mean().sqrt() / at_first.square().mean().sqrt()
        assert 0.02 < moved < 1.5
    again = generate(model, PROMPT, interventions=NullText.load(found.save(tmp_path / "n")), **settings).latents
    assert torch.equal(again, generate(model, PROMPT, interventions=found, **settings).latents)
    only = NullText(found.embeds)
    assert not torch.equal(generate(model, PROMPT, interventions=only, **settings).latents, again)


def test_kept_in_a_file_and_edited(tmp_path):
    model = tiny_model("sd")
    trajectory = invert(model, clean(model), PROMPT, steps=STEPS)
    found = null_text(model, trajectory, guidance=SCALE, inner=2)
    path = found.save(tmp_path / "null.safetensors")
    loaded = NullText.load(path)
    assert torch.equal(loaded.embeds, found.embeds) and loaded.facts["prompt"] == PROMPT
    settings = {"guidance": SCALE, "decode": False, **trajectory.settings}
    recorder = Recorder(PromptToPrompt(source=PROMPT).wants(model.sites(32, 32), (16, 16)))
    source = generate(model, PROMPT, interventions=[loaded, recorder], **settings).latents

    def edited(prompt):
        edit = PromptToPrompt(recorder.recording)
        return generate(model, prompt, interventions=[edit, found], **settings).latents

    assert torch.equal(edited(PROMPT), source) and not torch.equal(edited(OTHER), source)
    with pytest.raises(BadInput, match="are for 3 steps"):
        generate(model, PROMPT, guidance=SCALE, steps=2, scheduler="ddim", decode=False, interventions=found)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadInput, match="damaged"):
        NullText.load(path)


def test_refusals():
    model = tiny_model("sd")
    one = invert(model, clean(model), PROMPT, steps=2)
    two = invert(model, clean(model).repeat(2, 1, 1, 1), PROMPT, steps=2)
    with pytest.raises(BadInput, match="guidance above 1"):
        null_text(model, one, guidance=1.0)
    with pytest.raises(BadInput, match="takes one picture; this trajectory has 2"):
        null_text(model, two)
    flux = tiny_model("flux")
    with pytest.raises(BadInput, match="guidance above 1"):
        null_text(flux, invert(flux, clean(flux), PROMPT, steps=2))
    with pytest.raises(BadInput, match="inner"):
        null_text(model, one, inner=-1)
