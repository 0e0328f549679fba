"""Inpainting against the genuine pipeline, what is kept, what the denoiser is told, limits and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_fill as flux_fill
from PIL import Image

from sfumato.edit.blend import Blend
from sfumato.edit.inpaint import Inpaint
from sfumato.errors import BadInput, Conflict, NotSupported
from sfumato.explain.daam import DAAM
from sfumato.masks import MaskWarning
from sfumato.models import load
from sfumato.models.quiet import quiet
from sfumato.sampling import generate
from sfumato.steer.attend_excite import AttendExcite
from tests.tiny import length_of, tiny_model, tiny_pipeline

PROMPT = "a red cube and a blue ball"
LEFT = torch.zeros(32, 32)
LEFT[:, :12] = 1


@pytest.fixture
def model():
    return tiny_model("inpaint")


def picture(n=1):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1


def options(**more):
    return {"steps": 3, "seed": 2, "guidance": 3.0, "strength": 1.0, "image": picture(), **more}


@torch.no_grad()
def peer(model, prompt=PROMPT, mask=LEFT, **more):
    """The genuine pipeline. It draws the masked latents from their posterior; here it is given their mean, as ours."""
    pipe = model.pipe
    image = picture()
    known = model.encode_image(image * (1 - mask))
    given = {"num_inference_steps": 3, "guidance_scale": 3.0, "strength": 1.0, "output_type": "latent", **more}
    return pipe(
        prompt, image=(image + 1) / 2, mask_image=mask[None, None], masked_image_latents=known, height=32, width=32,
        generator=torch.Generator().manual_seed(2), **given,
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_it_is_the_genuine_pipeline(model, guidance, strength):
    free = Inpaint(mask=LEFT, hold=False)
    given = options(decode=False, guidance=guidance, strength=strength)
    ours = generate(model, PROMPT, interventions=free, **given)
    theirs = peer(model, guidance_scale=guidance, strength=strength)
    assert torch.equal(ours.latents, theirs)


@torch.no_grad()
def test_without_a_mask_everything_is_the_hole(model):
    """An inpainting model makes pictures from prompts: the pipeline's, with a white mask and no picture to see."""
    ours = generate(model, PROMPT, steps=3, seed=2, guidance=3.0, decode=False)
    theirs = peer(model, mask=torch.ones(32, 32))
    assert torch.equal(ours.latents, theirs)


def test_flux_fill_is_its_pipeline(monkeypatch):
    model = tiny_model("fill")
    rng = np.random.default_rng(3)
    shown = Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8))
    mask = torch.zeros(32, 48)
    mask[5:21, 9:30] = 1
    monkeypatch.setattr(flux_fill, "retrieve_latents", lambda found, generator=None: found.latent_dist.mode())
    theirs = model.pipe(
        PROMPT, image=shown, mask_image=Image.fromarray((mask.numpy() * 255).astype(np.uint8)), width=48, height=32,
        num_inference_steps=2, generator=torch.Generator().manual_seed(2), output_type="latent", **length_of(model),
    ).images  # fmt: skip
    given = {"steps": 2, "seed": 2, "image": shown, "strength": 1.0, "decode": False}
    ours = generate(model, PROMPT, interventions=Inpaint(mask=mask, hold=False), **given)
    assert torch.equal(ours.latents, model.pipe._unpack_latents(theirs, 32, 48, 2))
    traced = DAAM(words=["cube"])
    assert torch.equal(generate(model, PROMPT, interventions=[Inpaint(mask=mask, hold=False), traced], **given).latents,
                       ours.latents)  # fmt: skip
    assert traced.maps[0].map("cube").std() > 0
    whole = generate(model, PROMPT, steps=2, seed=2, size=(48, 32), decode=False)  # without a mask: all of it
    assert not torch.equal(whole.latents, ours.latents) and whole.latents.isfinite().all()


def test_an_inpainting_folder_loads_and_runs(tmp_path):
    with quiet():
        tiny_pipeline("inpaint").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.family.name == "sd_inpaint" and model.family.takes_mask
    assert model.latent_shape(32, 48) == (4, 16, 24)
    assert {site.kind for site in model.sites(32, 32)} == {"self", "cross"}
    again = generate(model, PROMPT, interventions=Inpaint(mask=LEFT), **options())
    ours = generate(tiny_model("inpaint"), PROMPT, interventions=Inpaint(mask=LEFT), **options())
    assert torch.equal(again.latents, ours.latents)


def test_what_is_known_is_held_and_pixels_outside_are_the_picture(model):
    image = picture()
    result = generate(model, PROMPT, interventions=Inpaint(mask=LEFT), **options())
    assert torch.equal(result.pixels[..., 12:], image[..., 12:])
    # the last step of this schedule goes to a small noise level, where the prediction is all but the picture
    clean = model.encode_image(image)
    free = generate(model, PROMPT, interventions=Inpaint(mask=LEFT, hold=False), **options())
    away = [(each.latents - clean)[..., 6:].abs().mean() for each in (result, free)]
    assert away[0] < 0.1 * away[1]
    raw = generate(model, PROMPT, interventions=Inpaint(mask=LEFT, paste=None), **options())
    assert torch.equal(raw.latents, result.latents) and torch.equal(raw.pixels, model.decode(raw.latents))
    soft = generate(model, PROMPT, interventions=Inpaint(mask=LEFT, paste=4.0), **options()).pixels
    share = (1 - torch.arange(1, 5) / 4).clamp(0, 1)
    torch.testing.assert_close(
        soft[..., 12:16], share * raw.pixels[..., 12:16] + (1 - share) * image[..., 12:16], rtol=1e-4, atol=1e-5
    )


def test_latents_touched_by_the_region_are_drawn_anew_where_a_model_was_trained_so(model, monkeypatch):
    thin = torch.zeros(32, 32)
    thin[:, :13] = 1  # half of the seventh column of cells
    holes = []
    handle = model.denoiser.register_forward_pre_hook(lambda _, args: holes.append(args[0][0, 4].sum(1)))
    try:
        for given in ({"level": 0.6}, {"level": 0.6, "coverage": 0.1}, {"level": 0.6, "coverage": 0.6}):
            made = generate(model, PROMPT, interventions=Inpaint(mask=thin, **given), **options(steps=1))
            assert torch.equal(made.pixels[..., 13:], picture()[..., 13:])  # pixels go by level
        monkeypatch.setattr(model, "card", {"recipe": {"loss": {"coverage": 0.1}}})
        generate(model, PROMPT, interventions=Inpaint(mask=thin, level=0.6), **options(steps=1))
    finally:
        handle.remove()
    assert [float(hole[0]) for hole in holes] == [6, 7, 6, 7]


def test_the_denoiser_is_told_mask_and_masked_picture_in_every_branch(model):
    seen = []
    handle = model.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        given = options(compose=[("a small cone", 1.5)], scheduler="ddim")
        generate(model, PROMPT, interventions=Inpaint(mask=LEFT), **given)
    finally:
        handle.remove()
    cells = (torch.arange(16) < 6).float().expand(16, 16)
    known = model.encode_image(picture() * (1 - LEFT))[0]
    assert len(seen) == 6 and sum(len(x) for x in seen) == 9  # both branches, then the composed text
    for x in seen:
        for row in x:
            assert torch.equal(row[4], cells) and torch.equal(row[5:], known)


def test_every_sample_may_have_its_own_mask(model):
    images, right = picture(2), LEFT.flip(1)
    given = options(image=images, n=2)
    both = generate(model, PROMPT, interventions=Inpaint(mask=[LEFT, right], each=True), **given)
    for i, mask in enumerate((LEFT, right)):
        alone = generate(
            model, PROMPT, interventions=Inpaint(mask=mask), **options(image=images[i : i + 1], seed=2 + i)
        )
        torch.testing.assert_close(both.latents[i : i + 1], alone.latents, rtol=1e-3, atol=1e-4)
    one_by_one = generate(model, PROMPT, interventions=Inpaint(mask=[LEFT, right], each=True), batch_size=1, **given)
    torch.testing.assert_close(both.latents, one_by_one.latents, rtol=1e-3, atol=1e-4)
    with pytest.raises(BadInput, match="2 masks for 1 samples"):
        generate(model, PROMPT, interventions=Inpaint(mask=[LEFT, right], each=True), **options())


def test_it_composes_with_what_watches_and_steers(model):
    daam, excite = DAAM(words=["cube"]), AttendExcite(words=["cube", "ball"])
    result = generate(model, PROMPT, interventions=[Inpaint(mask=LEFT), daam, excite], **options())
    assert all(told["calls"] for told in result.coverage.values()) and len(daam.maps) == 1
    with pytest.raises(Conflict, match="trajectory"):
        generate(model, PROMPT, interventions=[Inpaint(mask=LEFT), Blend(mask=LEFT)], **options())


def test_refusals(model):
    with pytest.raises(NotSupported, match="sees a mask.*blend"):
        generate(tiny_model("sd"), PROMPT, interventions=Inpaint(mask=LEFT), **options())
    with pytest.raises(BadInput, match="needs a region"):
        generate(model, PROMPT, interventions=Inpaint(), **options())
    with pytest.raises(BadInput, match="keeps a picture"):
        generate(model, PROMPT, interventions=Inpaint(mask=LEFT), steps=2)
    with pytest.raises(BadInput, match="not both"):
        generate(model, PROMPT, interventions=Inpaint(mask=LEFT, source="a cone"), **options())
    with pytest.raises(BadInput, match="paste of inpaint"):
        Inpaint(mask=LEFT, paste=-1)
    with pytest.warns(MaskWarning, match="nothing is drawn anew"):
        kept = generate(model, PROMPT, interventions=Inpaint(mask=torch.zeros(8, 8)), **options())
    assert torch.equal(kept.pixels, picture())


def test_half_precision_pictures_of_other_sizes(model):
    photo = Image.effect_noise((64, 32), 80).convert("RGB")
    result = generate(
        tiny_model("inpaint", fresh=True).to(dtype=torch.bfloat16), PROMPT, image=photo, strength=1.0, steps=2, seed=0,
        interventions=Inpaint(box=[0.5, 0, 1, 1]),
    )  # fmt: skip
    assert result.latents.shape == (1, 4, 16, 32) and torch.isfinite(result.latents).all()
