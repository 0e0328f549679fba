"""InjectFusion against the paper's equations written out by hand, and what it promises about content and masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from sfumato import app
from sfumato.edit.inject_fusion import InjectFusion
from sfumato.errors import BadInput, NoMatch, NotSupported, UnknownName
from sfumato.sampling import generate, invert, recipe_args
from tests.tiny import tiny_model

STYLE, CONTENT = "a blue ball", "a red cube"
SETTINGS = {"steps": 3, "scheduler": "ddim", "guidance": 1.0, "seed": 4, "decode": False}


def drawn(model, systems=(), prompt=STYLE, **given):
    return generate(model, prompt, interventions=systems, **{**SETTINGS, **given})


def by_hand(model, share, calibration=None, symmetric=False, last=2):
    """Two DDIM walks in plain diffusers: the content's h kept at every step, the style's turned towards it in the first
    ``last`` steps."""
    unet, pipe = model.denoiser, model.pipe
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(3)
    start = torch.randn(1, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(4))
    told = {text: model.encode_text([text], guidance=False).cond["embeds"] for text in (STYLE, CONTENT)}
    alphas = scheduler.alphas_cumprod

    def eps(x, t, text, h=None, kept=None):
        def hook(module, args, out):
            if kept is not None:
                kept.append(out)
            if h is None:
                return None
            a, b = out.flatten().double(), h.flatten().double()
            b = b * a.norm() / b.norm()
            w = torch.acos((a @ b) / a.norm() ** 2)
            return ((torch.sin((1 - share) * w) * a + torch.sin(share * w) * b) / torch.sin(w)).view_as(out).float()

        handle = unet.mid_block.register_forward_hook(hook)
        out = unet(x, t, told[text]).sample
        handle.remove()
        return out

    kept, x = [], start
    for t in scheduler.timesteps:
        x = scheduler.step(eps(x, t, CONTENT, kept=kept), t, x).prev_sample
    x = start
    for i, t in enumerate(scheduler.timesteps):
        a = alphas[t]
        following = scheduler.timesteps[i + 1] if i < 2 else None
        a_next = alphas[following] if following is not None else scheduler.final_alpha_cumprod
        plain = eps(x, t, STYLE)
        turned = eps(x, t, STYLE, h=kept[i]) if i < last else plain

        def clean(e, x=x, a=a):
            return (x - (1 - a).sqrt() * e) / a.sqrt()

        if calibration is not None and i < last:
            was, now = clean(plain), clean(turned)
            now = now.mean() + (now - now.mean()) * was.std() / now.std()
            x = x + a.sqrt() * (now - was) + calibration * (1 - a).sqrt() * (turned - plain)
            turned = plain = eps(x, t, STYLE)
            x = a_next.sqrt() * (x - (1 - a).sqrt() * plain) / a.sqrt() + (1 - a_next).sqrt() * plain
            continue
        x = a_next.sqrt() * clean(turned) + (1 - a_next).sqrt() * (turned if symmetric else plain)
    return x


@pytest.mark.parametrize(
    "given", [{}, {"strength": 1.0}, {"process": "symmetric"}, {"calibration": 0.5}], ids=lambda given: str(given)
)
@torch.no_grad()
def test_the_papers_equations(given):
    model = tiny_model("sd")
    ours = drawn(model, InjectFusion(content=CONTENT, **{"strength": 0.6, **given})).latents
    share = given.get("strength", 0.6)
    truth = by_hand(model, share, given.get("calibration"), given.get("process") == "symmetric")
    plain = drawn(model).latents
    assert (ours - truth).abs().max() < 0.02 * (ours - plain).abs().max()


def test_the_same_picture_injected_into_itself_is_itself():
    model = tiny_model("sd2")
    for given in ({}, {"calibration": 1.0}, {"process": "symmetric"}):
        again = drawn(model, InjectFusion(content=STYLE, strength=0.9, **given), guidance=3.0)
        assert torch.allclose(again.latents, drawn(model, guidance=3.0).latents, atol=1e-4)


def test_content_is_what_its_own_prompt_and_seed_draw():
    model = tiny_model("sd")
    system = InjectFusion(content=CONTENT, content_seed=9)
    result = drawn(model, system, prompt=[STYLE, "a dog"], guidance=3.0, decode=True)
    alone = drawn(model, prompt=CONTENT, seed=9, guidance=3.0, decode=True)
    assert torch.allclose(system.contents, alone.latents.expand(2, -1, -1, -1), atol=1e-5)
    shown = system.pictures(result, 1)["content"]
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(alone.images[0])).max() <= 1
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawn(model, system, image=image, strength=0.7, guidance=3.0)  # the content begins from noise all the same
    assert torch.allclose(system.contents, alone.latents, atol=1e-5)


def test_a_picture_is_inverted_and_its_recipe_holds_it(tmp_path):
    model = tiny_model("sd")
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    system = InjectFusion(content=CONTENT, content_image=picture, strength=0.8)
    first = drawn(model, system)
    again = generate(model, **recipe_args(json.loads(json.dumps(first.recipe))), decode=False)
    assert torch.equal(first.latents, again.latents)
    picture.save(tmp_path / "c.png")
    from_file = drawn(model, InjectFusion(content=CONTENT, content_image=str(tmp_path / "c.png"), strength=0.8))
    assert torch.equal(from_file.latents, first.latents)
    from PIL import ImageOps

    fitted = ImageOps.fit(picture, (32, 32), Image.Resampling.LANCZOS)
    trajectory = invert(model, fitted, CONTENT, steps=3)
    assert torch.equal(system.contents, trajectory.latents[-1])
    assert first.cost > drawn(model, InjectFusion(content=CONTENT, strength=0.0)).cost + 3


def test_a_picture_of_ours_brings_its_prompt(tmp_path):
    from sfumato import files

    model = tiny_model("sd")
    made = generate(model, CONTENT, steps=2, seed=1)
    path = files.save_png(tmp_path / "made.png", made.images[0], made.recipe)
    named = drawn(model, InjectFusion(content=CONTENT, content_image=path)).latents
    assert torch.equal(drawn(model, InjectFusion(content_image=path)).latents, named)
    bare = tmp_path / "bare.png"
    made.images[0].save(bare)
    assert not torch.equal(drawn(model, InjectFusion(content_image=bare)).latents, named)


def test_masks():
    model = tiny_model("sd")
    everywhere = drawn(model, InjectFusion(content=CONTENT, mask=torch.ones(8, 8))).latents
    assert torch.allclose(everywhere, drawn(model, InjectFusion(content=CONTENT)).latents, atol=1e-5)
    system = InjectFusion(content=CONTENT, box=[0, 0, 0.5, 1], strength=0.5)
    drawn(model, system)
    h, content = torch.randn(2, 3, 6, 4, 4, generator=torch.Generator().manual_seed(2))
    turned = system._turned(h, content)
    assert torch.equal(turned[..., 2:], h[..., 2:]) and not torch.allclose(turned[..., :2], h[..., :2])
    norms = [each[..., :2].flatten(1).norm(dim=1) for each in (turned, h)]
    assert torch.allclose(*norms, rtol=1e-5)  # matched within the region
    with pytest.raises(NoMatch, match="mask of inject_fusion is empty"):
        drawn(model, InjectFusion(content=CONTENT, mask=torch.zeros(8, 8)))


def test_windows_and_injections():
    model = tiny_model("sd")
    system = InjectFusion(content=CONTENT, window=[0.2, 0.7], injections=5)
    steps = drawn(model, system, steps=10).coverage["inject_fusion"]["steps"]
    assert steps == [2, 4, 6]
    with pytest.raises(NoMatch, match="did nothing"):
        drawn(model, InjectFusion(content=CONTENT, window=[0.9, 1.0]))


def test_boost_draws_noise_at_the_end_only():
    model, seen = tiny_model("sd"), []
    fresh = InjectFusion(content=CONTENT, boost=0.67)
    one = drawn(model, fresh, on_step=lambda step: seen.append(step.x.clone()))
    two = drawn(model, InjectFusion(content=CONTENT, boost=0.67))
    plain = []
    drawn(model, InjectFusion(content=CONTENT), on_step=lambda step: plain.append(step.x.clone()))
    assert torch.equal(one.latents, two.latents)
    assert [torch.equal(a, b) for a, b in zip(seen, plain, strict=True)] == [True, False, False]
    with pytest.raises(NotSupported, match="use ddim"):
        drawn(model, InjectFusion(content=CONTENT, boost=0.5), scheduler="euler")


def test_an_edited_file_takes_the_content_alone(tmp_path):
    """`edit` leaves the editing to the system named."""
    from sfumato import files

    model = tiny_model("sd")
    made = generate(model, STYLE, steps=3, seed=4, scheduler="ddim", guidance=3.0)
    path = files.save_png(tmp_path / "made.png", made.images[0], made.recipe)
    same = app.edit(path, STYLE, model=model, with_=[{"method": "inject_fusion", "params": {"content": CONTENT}}])
    direct = generate(model, STYLE, steps=3, seed=4, scheduler="ddim", guidance=3.0,
                      interventions=InjectFusion(content=CONTENT))  # fmt: skip
    assert torch.equal(same.results[0].latents, direct.latents)
    assert set(same.results[0].coverage) == {"inject_fusion"}


def test_refusals_are_one_line():
    model = tiny_model("sd")
    cases = (
        (BadInput, "needs a content picture", {}),
        (BadInput, "Choose", {"content_seed": 1, "content_image": Image.new("RGB", (8, 8))}),
        (BadInput, "start below an end", {"content": CONTENT, "window": [0.5, 0.5]}),
        (BadInput, "strength", {"content": CONTENT, "strength": 1.5}),
        (BadInput, "no file", {"content_image": "nowhere.png"}),
        (UnknownName, "gamma", {"content": CONTENT, "gamma": 1}),
    )
    for error, said, given in cases:
        with pytest.raises(error) as caught:
            InjectFusion(**given)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UnknownName, match=r"up\.0"):
        drawn(model, InjectFusion(content=CONTENT, layer="up0"))
    for kind in ("sd3", "flux"):
        with pytest.raises(NotSupported, match="needs a U-Net with a middle block"):
            generate(tiny_model(kind), STYLE, steps=2, interventions=InjectFusion(content=CONTENT))
