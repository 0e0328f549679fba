"""Blending against the algorithm written out by hand, its limits, resampling, pasting, refusals."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from sfumato.edit.blend import Blend, renoised
from sfumato.errors import BadInput, Conflict, NotSupported
from sfumato.masks import MaskWarning
from sfumato.sampling import Path, generate
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"
KINDS = ["sd", "sdxl", "sd3", "pixart"]
LEFT = torch.zeros(32, 32)
LEFT[:, :12] = 1


def picture(model, n=1):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1


def options(model, **more):
    guided = {} if model.embeds_guidance else {"guidance": 3.0}
    return {"steps": 3, "seed": 2, "decode": False, **guided, **more}


@pytest.mark.parametrize("kind", KINDS)
def test_the_surroundings_are_the_picture_and_the_region_is_not(kind):
    model = tiny_model(kind)
    image = picture(model)
    clean = model.encode_image(image)
    result = generate(model, PROMPT, image=image, strength=1.0, interventions=Blend(mask=LEFT), **options(model))
    assert torch.equal(result.latents[..., 6:], clean[..., 6:])
    assert (result.latents[..., :6] - clean[..., :6]).abs().amax() > 1e-2
    assert result.coverage["blend"]["calls"] == len(model_timesteps(model))


def model_timesteps(model):
    return model.timesteps(model.make_scheduler(), 3)


@pytest.mark.parametrize("kind", ["sd", "sd3", "sdxl"])
def test_nothing_or_everything_drawn_anew(kind):
    model = tiny_model(kind)
    image = picture(model)
    given = options(model, image=image, strength=0.9)
    with pytest.warns(MaskWarning, match="nothing is drawn"):
        kept = generate(model, PROMPT, interventions=Blend(box=[0, 0, 1, 1], invert=True), **given)
    assert torch.equal(kept.latents, model.encode_image(image))
    with pytest.warns(MaskWarning, match="nothing of the picture"):
        free = generate(model, PROMPT, interventions=Blend(box=[0, 0, 1, 1]), **given)
    plain = generate(model, PROMPT, **given)
    assert torch.equal(free.latents, plain.latents)
    weak = generate(model, PROMPT, interventions=Blend(mask=LEFT, strength=0), **given)
    assert torch.equal(weak.latents, plain.latents)


@pytest.mark.parametrize(("kind", "scheduler"), [("sd", "ddim"), ("sd2", "euler"), ("sd3", "flow_euler")])
def test_it_is_algorithm_one(kind, scheduler):
    """The loop written out with diffusers' own noising, for one noise that is kept."""
    model = tiny_model(kind)
    image, soft = picture(model), torch.linspace(0, 1, 16).expand(16, 16)
    blend = Blend(mask=soft, soft=True, noise="same")
    given = options(model, scheduler=scheduler)
    result = generate(model, PROMPT, image=image, strength=1.0, interventions=blend, **given)

    clean, noise, share = model.encode_image(image), blend._noise, soft.expand(1, 4, 16, 16)
    start = model.encode_image(image, [torch.Generator().manual_seed(2)])
    generator = torch.Generator().manual_seed(2)
    torch.randn(start.shape, generator=generator)  # the encoder's draw comes first
    own = torch.randn(start.shape, generator=generator)
    run_scheduler, levels = model.make_scheduler(scheduler), model.make_scheduler(scheduler)
    ts = model.timesteps(run_scheduler, 3)
    model.timesteps(levels, 3)

    def noised(latents, eps, i):
        if i == len(ts):
            return latents
        if hasattr(levels, "scale_noise"):
            return levels.scale_noise(latents, ts[i : i + 1], eps)
        return levels.add_noise(latents, eps, ts[i : i + 1])

    condition = model.encode_text(PROMPT)
    x = share * noised(start, own, 0) + (1 - share) * noised(clean, noise, 0)
    for i, t in enumerate(ts):
        scaled = run_scheduler.scale_model_input(x, t) if hasattr(run_scheduler, "scale_model_input") else x
        uncond, cond = model.predict(scaled, t, condition).chunk(2)
        x = run_scheduler.step(uncond + 3.0 * (cond - uncond), t, x, return_dict=False)[0]
        x = share * x + (1 - share) * noised(clean, noise, i + 1)
    torch.testing.assert_close(result.latents, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_without_a_picture_the_source_prompt_draws_it(kind):
    model = tiny_model(kind)
    given = options(model)
    source = generate(model, "a small green cone", **given)
    result = generate(model, PROMPT, interventions=Blend(mask=LEFT, source="a small green cone"), **given)
    assert torch.equal(result.latents[..., 6:], source.latents[..., 6:])
    assert not torch.allclose(result.latents[..., :6], source.latents[..., :6], atol=1e-2)
    plain = generate(model, PROMPT, **given)
    assert result.cost == pytest.approx(2 * plain.cost)


def test_samples_have_their_own_pictures_seeds_and_regions_of_any_size():
    model = tiny_model("sd")
    images = picture(model, 2)
    big = torch.nn.functional.interpolate(LEFT[None, None], (333, 77))[0, 0]
    given = options(model, strength=1.0)
    both = generate(model, PROMPT, n=2, image=images, interventions=Blend(mask=big), **given)
    second = generate(model, PROMPT, image=images[1:], interventions=Blend(mask=LEFT), **{**given, "seed": 3})
    torch.testing.assert_close(both.latents[1:], second.latents, rtol=1e-3, atol=1e-4)
    one_by_one = generate(model, PROMPT, n=2, image=images, batch_size=1, interventions=Blend(mask=LEFT), **given)
    torch.testing.assert_close(both.latents, one_by_one.latents, rtol=1e-3, atol=1e-4)


def test_the_original_pixels_come_back_outside_the_feather():
    model = tiny_model("sd")
    image = picture(model)
    given = options(model, image=image, strength=1.0, decode=True)
    pasted = generate(model, PROMPT, interventions=Blend(mask=LEFT, paste=4), **given).pixels
    plain = generate(model, PROMPT, interventions=Blend(mask=LEFT), **given).pixels
    assert torch.equal(pasted[..., 16:], image[..., 16:]) and torch.equal(pasted[..., :12], plain[..., :12])
    share = torch.tensor([0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(pasted[..., 12:16], share * plain[..., 12:16] + (1 - share) * image[..., 12:16])
    hard = generate(model, PROMPT, interventions=Blend(mask=LEFT, paste=0), **given).pixels
    assert torch.equal(hard[..., 12:], image[..., 12:])


def test_a_growing_region_shrinks_to_its_own():
    model = tiny_model("sd")
    image = picture(model)
    clean = model.encode_image(image)
    seen = []
    generate(
        model, PROMPT, image=image, strength=1.0, interventions=Blend(mask=LEFT, shrink=3, noise="same"),
        on_step=lambda step: seen.append(step.x.clone()), **options(model, scheduler="ddim"),
    )  # fmt: skip
    assert torch.equal(seen[-1][..., 6:], clean[..., 6:])
    # at the first of three steps the region still reaches ceil(3 * 2 / 3) cells further
    blend = Blend(mask=LEFT, shrink=3)
    blend._region = LEFT

    class Grid:
        grid = (16, 16)

    assert [blend._share(Grid(), i / 3)[0].sum().item() for i in (0, 1, 2, 3)] == [9, 8, 7, 6]


@pytest.mark.parametrize(("kind", "scheduler"), [("sd", "ddim"), ("sd", "euler"), ("sd3", None)])
def test_noising_up_composes_to_the_forward_process(kind, scheduler):
    model = tiny_model(kind)
    made = model.make_scheduler(scheduler)
    ts = model.timesteps(made, 6)
    path = Path(made)
    high, low = ts[1], ts[4]
    (a_high, s_high), (a_low, s_low) = path.alpha_sigma(high), path.alpha_sigma(low)
    one, nothing = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    # linear in (x0, eps, fresh noise): its coefficients are those of q(x_high | x0), variances added
    x0 = renoised(path, path.add_noise(one, nothing, low), nothing, low, high).item() / path.scale(high)
    eps = renoised(path, path.add_noise(nothing, one, low), nothing, low, high).item() / path.scale(high)
    fresh = renoised(path, nothing, one, low, high).item() / path.scale(high)
    assert x0 == pytest.approx(a_high) and eps**2 + fresh**2 == pytest.approx(s_high**2) and fresh > 0
    assert s_low < s_high and a_low > a_high


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_resampling_runs_each_stretch_again(kind):
    model = tiny_model(kind)
    image = picture(model)
    walked = []
    given = options(model, steps=5, scheduler=None if kind == "sd3" else "ddim")
    result = generate(
        model, PROMPT, image=image, strength=1.0, interventions=Blend(mask=LEFT, resample=3, jump=2),
        on_step=lambda step: walked.append(step.i), **given,
    )  # fmt: skip
    assert walked == [0, 1] * 3 + [2, 3] * 3 + [4]
    assert torch.equal(result.latents[..., 6:], model.encode_image(image)[..., 6:])
    with pytest.raises(NotSupported, match="ddim" if kind == "sd" else "flow_euler"):
        given["scheduler"] = "heun" if kind == "sd" else "flow_heun"
        generate(model, PROMPT, image=image, strength=1.0, interventions=Blend(mask=LEFT, resample=2), **given)


def test_refusals_are_one_line(tmp_path):
    model = tiny_model("sd")
    image = Image.new("RGB", (32, 32))
    for given, run, said in (
        ({}, {"image": image}, "needs a region"),
        ({"mask": LEFT}, {}, "keeps a picture"),
        ({"mask": LEFT, "source": "a dog"}, {"image": image}, "not both"),
        ({"box": [4, 4, 90, 20]}, {"image": image}, "x0|y0|x1|y1"),
    ):
        with pytest.raises(BadInput) as caught:
            generate(model, PROMPT, interventions=Blend(**given), **run, **options(model))
        assert said in str(caught.value) and "\n" not in str(caught.value)
    for given, said in (({"mask": tmp_path / "none.png"}, "is no file"), ({"mask": LEFT, "strength": 2}, "strength")):
        with pytest.raises(BadInput, match=said):
            Blend(**given)
    with pytest.raises(Conflict, match="replace the trajectory"):
        two = [Blend(mask=LEFT), Blend(mask=LEFT)]
        generate(model, PROMPT, image=image, interventions=two, **options(model))
