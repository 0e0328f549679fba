"""Laws of the loop for states (b c f h w): what holds for pictures holds for clips."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.attention import Tap
from sfumato.errors import BadInput
from sfumato.explain.daam import explain_images
from sfumato.sampling import Intervention, Step, generate, invert, recipe_args
from sfumato.sampling.gradient import GradientGuidance, GradientParams
from sfumato.sampling.recording import Recorder, Recording, record_auxiliary
from tests.helpers import fingerprint
from tests.tiny import tiny_model

PROMPTS = ["a red cube", "a photo of a big blue dog"]
FAST: dict[str, Any] = {"steps": 2, "guidance": 3.0, "frames": 2, "decode": False}


def made(prompts: Any = PROMPTS, seed: Any = 4, **given: Any) -> torch.Tensor:
    return generate(tiny_model("animatediff"), prompts, seed=seed, **{**FAST, **given}).latents


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "lcm"])
def test_a_clip_does_not_depend_on_its_neighbours(scheduler: str):
    together = made(scheduler=scheduler)
    assert together.shape == (2, 4, 2, 16, 16)
    torch.testing.assert_close(together[1:], made(PROMPTS[1], 5, scheduler=scheduler), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made(scheduler=scheduler, batch_size=1), together, rtol=1e-4, atol=1e-4)


def test_given_latents_say_how_many_frames_and_go_on_where_they_were():
    steps: dict[int, torch.Tensor] = {}
    model = tiny_model("animatediff")
    whole = generate(model, PROMPTS, seed=4, **FAST, on_step=lambda step: steps.update({step.i: step.x})).latents
    noise = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert generate(model, PROMPTS, latents=noise, steps=1, decode=False).latents.shape == noise.shape
    given = {name: value for name, value in FAST.items() if name != "frames"}
    again = generate(model, PROMPTS, latents=steps[0], start=1, **given).latents
    assert torch.equal(again, whole)
    with pytest.raises(BadInput, match=r"3 frames of 32x32 pixels need \(b, 4, 3, 16, 16\)"):
        generate(model, PROMPTS, latents=steps[0], frames=3, steps=1)
    with pytest.raises(BadInput, match=r"it must be a tensor \(b, c, f, h, w\)"):
        generate(model, PROMPTS, latents=steps[0][:, :, 0], steps=1)


def test_a_recipe_makes_the_clip_again():
    model = tiny_model("animatediff")
    result = generate(model, PROMPTS[0], seed=4, fps=12, **{**FAST, "frames": 3})
    assert (result.recipe["frames"], result.recipe["fps"]) == (3, 12)
    again = generate(model, **recipe_args(result.recipe), decode=False)
    assert torch.equal(again.latents, result.latents)
    own = generate(model, PROMPTS[0], steps=1, decode=False)
    assert (own.recipe["frames"], own.recipe["fps"]) == (2, 8.0) and own.latents.shape[2] == 2
    assert generate(tiny_model("sd"), PROMPTS[0], steps=1, decode=False).recipe["frames"] is None


class Pull(GradientGuidance):
    """Towards zero: the gradient of -|x|^2 / 2, x as ``alpha x0 + sigma eps``."""

    Params = GradientParams

    def gradient(self, step: Step) -> torch.Tensor:
        return -step.x / step.path.scale(step.t)


@pytest.mark.parametrize("params", [{"step": "relative", "strength": 0.3}, {"on": "mean"}], ids=["score", "mean"])
def test_a_gradient_guides_every_clip_by_itself(params: dict[str, Any]):
    plain, guided = made(), made(interventions=Pull(**params))
    torch.testing.assert_close(guided[1:], made(PROMPTS[1], 5, interventions=Pull(**params)), rtol=1e-4, atol=1e-4)
    shorter = guided.flatten(1).norm(dim=1) < plain.flatten(1).norm(dim=1)
    assert shorter.all()


def test_the_gradient_of_a_loss_reaches_every_frame():
    class Look(Intervention):
        role = "steerer"

        def before_predict(self, step: Step) -> None:
            self.found = step.grad(lambda prediction: prediction.x0().square().flatten(1).mean(1))
            self.mark(step)

    look = Look()
    made(steps=1, interventions=look)
    assert look.found.shape == (2, 4, 2, 16, 16)
    assert (look.found.abs().amax((1, 3, 4)) > 0).all()


def test_a_way_back_leads_to_the_clip():
    model = tiny_model("animatediff")
    clip = made(PROMPTS[0], guidance=1.0, steps=3)
    way = invert(model, clip, PROMPTS[0], steps=6, guidance=1.0, refine=3)
    back = generate(model, PROMPTS[0], latents=way.noise, steps=6, guidance=1.0, scheduler="ddim", decode=False).latents
    assert ((back - clip).norm() / clip.norm()).item() < 0.05


def test_recordings_hold_clips_and_their_attention(tmp_path):
    model = tiny_model("animatediff")
    before = fingerprint(model)
    recorder = Recorder(lambda site, progress: site.kind == "cross" and site.block == "mid" or site.kind == "temporal")
    plain = made()
    assert torch.equal(generate(model, PROMPTS, seed=4, interventions=recorder, **FAST).latents, plain)
    recording = recorder.recording
    assert recording is not None and recording.latents.shape == (3, 2, 4, 2, 16, 16)
    assert torch.equal(recording.latents[-1], plain)
    path = recording.save(tmp_path / "clip.safetensors")
    again = Recording.load(path)
    assert torch.equal(again.at(2), plain)
    sites = {site.kind: site for site in model.sites(frames=2)}
    probs = again.call(1, sites["temporal"]).probs()
    assert probs.shape[-2:] == (2, 2)  # from frame to frame
    torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))
    assert fingerprint(model) == before


def test_another_prompt_is_recorded_beside():
    class Beside(Intervention):
        role = "path"

        def on_noise(self, run: Any, x: torch.Tensor) -> torch.Tensor:
            self.recording = record_auxiliary(run, x, [PROMPTS[1]] * len(run), Recorder())
            self.mark()
            return x

    beside = Beside()
    made(PROMPTS[0], interventions=beside)
    torch.testing.assert_close(beside.recording.latents[-1], made(PROMPTS[1]))


def test_attention_from_frame_to_frame_can_be_edited():
    """Where each frame looks at itself alone, a temporal layer gives its values of that frame."""

    class Alone(Intervention):
        role = "editor"

        def taps(self) -> list[Tap]:
            def alone(call: Any) -> torch.Tensor:
                self.mark(call.step, sites=[call.site.path])
                f = call.site.frames
                assert call.q.shape[2] == f and call.rows["cond"].stop == call.q.shape[0]
                return torch.eye(f).expand(*call.q.shape[:2], f, f)

            return [Tap(lambda site: site.kind == "temporal", edit_probs=alone, name="alone")]

    model = tiny_model("animatediff")
    before = fingerprint(model)
    path = next(site.path for site in model.sites(frames=2) if site.kind == "temporal")
    layer, found = model.denoiser.get_submodule(path), []
    handle = layer.register_forward_hook(lambda layer, args, out: found.append((args[0], out)))
    try:
        plain, alone = made(steps=1), made(steps=1, interventions=Alone())
    finally:
        handle.remove()
    (_, mixed), (x, out) = found
    by_hand = layer.to_out[0](layer.to_v(x))
    torch.testing.assert_close(out, by_hand)
    assert (mixed - by_hand).abs().max() > 1e-3 and not torch.equal(plain, alone)
    assert fingerprint(model) == before


def a_clip(f: int = 3) -> np.ndarray:
    """Frames (f h w 3) of a bright square that walks."""
    frames = np.full((f, 32, 32, 3), 60, np.uint8)
    for i in range(f):
        frames[i, 8:20, 4 * i : 4 * i + 12] = (220, 180, 40)
    return frames


def test_clips_pass_through_the_codec_frame_by_frame():
    model, clip = tiny_model("animatediff"), a_clip()
    pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    latents = model.encode_image(pixels)
    assert latents.shape == (1, 4, 3, 16, 16)
    frames = tiny_model("sd").encode_image(pixels[0].transpose(0, 1))  # the same autoencoder
    torch.testing.assert_close(latents[0].transpose(0, 1), frames)
    one, two = ([torch.Generator().manual_seed(seed) for seed in seeds] for seeds in ((1, 2), (2,)))
    drawn = model.encode_image(pixels.expand(2, -1, -1, -1, -1), one)
    assert torch.equal(drawn[1:], model.encode_image(pixels, two)) and not torch.equal(drawn[0], drawn[1])


def test_a_clip_to_begin_with():
    model, clip = tiny_model("animatediff"), a_clip()
    given = {"steps": 4, "guidance": 3.0, "seed": 4, "decode": False}
    same = generate(model, PROMPTS[0], image=clip, strength=0.0, **given).latents
    latents = generate(model, PROMPTS[0], image=clip, strength=0.5, **given).latents
    assert latents.shape == (1, 4, 3, 16, 16) and not torch.equal(latents, same)
    pictures = [Image.fromarray(frame) for frame in clip]
    assert torch.equal(generate(model, PROMPTS[0], image=pictures, strength=0.5, **given).latents, latents)
    scheduler = model.make_scheduler(None)  # by hand: encode with each sample's generator, then draw the noise
    timesteps, generator = model.timesteps(scheduler, 4), torch.Generator().manual_seed(4)
    pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    clean = model.encode_image(pixels, [generator])
    x = scheduler.add_noise(clean, torch.randn(clean.shape, generator=generator), timesteps[2:3])
    by_hand = generate(model, PROMPTS[0], latents=x, start=2, **given).latents
    torch.testing.assert_close(latents, by_hand)
    with pytest.raises(BadInput, match="frames is 4, but the clip to begin with has 3"):
        generate(model, PROMPTS[0], image=clip, frames=4)


def test_words_of_a_clip_that_exists():
    model, clip = tiny_model("animatediff"), a_clip()
    before = fingerprint(model)
    one, two = explain_images(model, [clip, clip[::-1]], PROMPTS, ["red"][:0], steps=2)
    assert one.map("cube").shape == (3, 32, 32) and two.frames == 3
    (alone,) = explain_images(model, clip[::-1], PROMPTS[1], steps=2, seed=1)
    torch.testing.assert_close(alone.map("dog"), two.map("dog"), rtol=1e-4, atol=1e-6)
    assert fingerprint(model) == before


def test_what_reads_pictures_refuses_a_model_of_clips():
    model = tiny_model("animatediff")
    for picture in (torch.zeros(1, 3, 32, 32), Image.new("RGB", (32, 32)), np.zeros((32, 32, 3), np.uint8)):
        for read in (
            lambda: generate(model, PROMPTS[0], image=picture),  # noqa: B023
            lambda: explain_images(model, picture, PROMPTS[0]),  # noqa: B023
            lambda: invert(model, picture, PROMPTS[0]),  # noqa: B023
        ):
            with pytest.raises(BadInput, match="the clip has shape|image is no clip"):
                read()
    with pytest.raises(BadInput, match=r"expected \(b c f h w\)"):
        model.predict(torch.zeros(1, 4, 16, 16), 1.0, model.encode_text("a", guidance=False))
