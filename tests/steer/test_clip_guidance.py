"""CLIP guidance against a loop written out by hand with transformers and diffusers alone; choices and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPModel

from sfumato import registry
from sfumato.errors import BadInput, NotFinite, NotSupported, UnknownName
from sfumato.models import load
from sfumato.models.quiet import quiet
from sfumato.models.readers import load_clip
from sfumato.sampling import generate
from sfumato.steer.clip_guidance import ClipGuidance
from tests.helpers import fingerprint
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"
needs_noisy = pytest.mark.skipif(registry.find("toy-clip-noisy") is None, reason="toy-clip-noisy is not trained yet")


def made(model, system=(), prompt=PROMPT, **options):
    given = {"steps": 3, "guidance": 3.0, "seed": 4, "decode": False, **options}
    return generate(model, prompt, interventions=system, **given).latents


def plain_clip():
    folder = registry.find("toy-clip")
    with quiet():
        return CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def by_hand(model, gain):
    """DDIM with classifier-free guidance 3; ``gain(picture (1 3 64 64) in [-1, 1])`` steers the noise."""
    scheduler = model.make_scheduler("ddim")
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    condition = model.encode_text([PROMPT])
    vae = model.pipe.vae
    for t in model.timesteps(scheduler, 3):
        alpha = scheduler.alphas_cumprod[t]
        x = x.detach().requires_grad_(True)
        uncond, cond = model.predict(x, t, condition).chunk(2)
        eps = uncond + 3 * (cond - uncond)
        x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        pixels = vae.decode(x0 / vae.config.scaling_factor).sample
        pixels = F.interpolate(pixels, (64, 64), mode="bicubic", antialias=True)
        (gradient,) = torch.autograd.grad(gain(pixels), x)
        with torch.no_grad():
            x = scheduler.step(eps - (1 - alpha).sqrt() * gradient, t, x).prev_sample
    return x.detach()


def test_a_clip_of_pictures_by_hand():
    model = tiny_model("sd")
    clip, tokenizer = plain_clip()
    tokens = tokenizer([PROMPT], return_tensors="pt")

    def gain(pixels):
        out = clip(pixel_values=pixels, **tokens)  # mean and spread of 0.5 undo the way to [0, 1]
        return 2.0 * out.logits_per_image[0, 0]

    ours = made(model, ClipGuidance(clip="toy-clip", strength=2.0), scheduler="ddim")
    theirs = by_hand(model, gain)
    bare = made(model, scheduler="ddim")
    moved = (theirs - bare).abs().max()
    assert moved > 1e-3
    assert (ours - theirs).abs().max() < 1e-2 * moved


def test_classifier_guidance_by_hand():
    model = tiny_model("sd")
    clip, tokenizer = plain_clip()
    tokens = tokenizer(["a red cube", "a blue ball", "the grass"], padding=True, return_tensors="pt")

    def gain(pixels):
        return -200.0 * F.cross_entropy(clip(pixel_values=pixels, **tokens).logits_per_image, torch.tensor([0]))

    options = {"texts": ["a red cube"], "against": ["a blue ball", "the grass"]}  # it is nearly certain of its answer
    system = ClipGuidance(clip="toy-clip", strength=200.0, **options)
    theirs = by_hand(model, gain)
    moved = (theirs - made(model, scheduler="ddim")).abs().max()
    assert moved > 1e-4
    assert (made(model, system, scheduler="ddim") - theirs).abs().max() < 1e-2 * moved


@pytest.mark.parametrize("through", ["denoiser", "decoder"])
def test_the_picture_comes_closer_to_the_text(through):
    model = tiny_model("sd", fresh=True)
    before = fingerprint(model)
    options = {"steps": 4, "guidance": 1.0, "prompt": ["a dog", "a cat"], "scheduler": "ddim"}
    weak = ClipGuidance(clip="toy-clip", texts=["a red ball"], strength=1e-6, through=through)
    strong = ClipGuidance(clip="toy-clip", texts=["a red ball"], strength=0.3, step="relative", through=through)
    made(model, weak, **options)
    made(model, strong, **options)
    assert fingerprint(model) == before
    assert list(strong.scores) == [0, 1, 2, 3] and len(strong.scores[3]) == 2
    assert all(s > w for s, w in zip(strong.scores[3], weak.scores[3], strict=True))


def test_every_prompt_pulls_its_own_picture():
    model = tiny_model("sd3")
    prompts = ["a red ball", "a blue cube"]
    by_prompt = made(model, ClipGuidance(clip="toy-clip"), prompt=prompts)
    for row, prompt in enumerate(prompts):
        alone = made(model, ClipGuidance(clip="toy-clip", texts=[prompt]), prompt=prompt, seed=4 + row)
        assert (by_prompt[row] - alone[0]).abs().max() < 1e-3 * alone.abs().max()  # batched kernels round otherwise


@needs_noisy
@pytest.mark.parametrize(
    ("name", "dtype"), [("toy-sd", torch.float32), ("toy-sd3", torch.float32), ("toy-sd3", torch.bfloat16)]
)
def test_the_noise_aware_clip_guides_both_toy_models(name, dtype):
    model = load(name).to(dtype=dtype)
    assert load_clip("toy-clip-noisy").fits(model)
    steps = 4 if dtype == torch.float32 else 3  # some processors are slow in bfloat16
    weak, strong = ClipGuidance(strength=1e-6), ClipGuidance(strength=1)  # more oversteps in so few steps
    for system in (weak, strong):
        latents = made(model, system, prompt=["a red ball", "a blue cube"], steps=steps, guidance=1.0)
        assert torch.isfinite(latents).all() and latents.dtype == dtype
    last = max(weak.scores)
    assert sum(strong.scores[last]) > sum(weak.scores[last])
    assert len(strong.coverage()["steps"]) >= steps - 1  # a flow begins in pure noise


@needs_noisy
def test_the_gradient_of_the_noise_aware_clip_by_hand():
    model = load("toy-sd")
    folder = registry.find("toy-clip-noisy")
    with quiet():
        clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = tokenizer([PROMPT], return_tensors="pt")
    scheduler = model.make_scheduler("ddim")
    t = model.timesteps(scheduler, 1)[0]
    alpha = scheduler.alphas_cumprod[t].double()
    shape = model.latent_shape(*model.default_size)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
    level = torch.atan2((1 - alpha).sqrt(), alpha.sqrt()) / (torch.pi / 2)
    planes = torch.stack([torch.cos(torch.pi * k * level) for k in range(8)]).float()
    given = torch.cat([x, planes.view(1, 8, 1, 1).expand(1, 8, 16, 16)], 1)
    (gradient,) = torch.autograd.grad(clip(pixel_values=given, **text).logits_per_image.sum(), x)
    with torch.no_grad():
        out = model.predict(x, t, model.encode_text([PROMPT], guidance=False))
        less = 5 * (1 - alpha).sqrt().float() * gradient  # noise, of which a velocity has 1 / alpha
        less = less / alpha.sqrt().float() if model.prediction() == "v_prediction" else less
        wanted = scheduler.step(out - less, t, x).prev_sample
    ours = made(model, ClipGuidance(strength=5.0), steps=1, guidance=1.0, scheduler="ddim")
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


@needs_noisy
def test_a_noise_aware_clip_on_other_latents_is_refused():
    with pytest.raises(NotSupported, match="another autoencoder"):
        made(tiny_model("sd"), ClipGuidance(clip="toy-clip-noisy"))


def test_bad_input():
    model = tiny_model("sd")
    with pytest.raises(NotSupported, match="clip=FOLDER"):
        made(model, ClipGuidance())
    with pytest.raises(UnknownName, match="toy-clip"):
        made(model, ClipGuidance(clip="toy-clop"))
    with pytest.raises(BadInput, match="empty text"):
        ClipGuidance(texts=[" "])
    with pytest.raises(BadInput, match="must hold {} once"):
        ClipGuidance(clip="toy-clip", templates=["a photo"])
    with pytest.raises(NotFinite, match="step") as caught:
        made(model, ClipGuidance(clip="toy-clip", strength=1e38))
    assert "\n" not in str(caught.value)
