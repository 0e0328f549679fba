"""The loop's own promises: arguments, batches, interruption, recipes, detachment after every kind of ending."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfumato import cards
from sfumato.errors import BadInput, Conflict, NotSupported, SfumatoError, UnknownName, WorkInterrupted
from sfumato.sampling import Guidance, Intervention, Run, Step, generate, recipe_args
from tests.helpers import fingerprint
from tests.tiny import tiny_model

SHORT: dict[str, Any] = {"steps": 2, "scheduler": "ddim"}


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"prompt": []}, BadInput, "prompt is"),
        ({"prompt": 3}, BadInput, "prompt is 3"),
        ({"prompt": ["a", None]}, BadInput, "prompt is"),
        ({"steps": 0}, BadInput, "steps is 0: .*greater than or equal to 1"),
        ({"steps": -4}, BadInput, "steps is -4"),
        ({"steps": 2.5}, BadInput, "steps is 2.5"),
        ({"steps": 10**6}, BadInput, "steps is 1000000"),
        ({"steps": 60, "scheduler": "lcm"}, BadInput, "steps is 60, which LCMScheduler refuses"),
        ({"seed": -1}, BadInput, "seed is -1"),
        ({"seed": 2**63}, BadInput, "seed is"),
        ({"seed": "seven"}, BadInput, "seed is 'seven'"),
        ({"seed": [1, 2, 3]}, BadInput, "3 entries for 1 sample"),
        ({"n": 0}, BadInput, "n is 0"),
        ({"guidance": math.nan}, BadInput, "guidance is nan"),
        ({"guidance": math.inf}, BadInput, "guidance is inf"),
        ({"guidance": -2}, BadInput, "guidance is -2"),
        ({"guidance": Guidance(3.0), "rescale": 0.5}, BadInput, "rescale is given twice"),
        ({"true_guidance": 2.0}, BadInput, "guidance-distilled"),
        ({"rescale": 2}, BadInput, "rescale is 2"),
        ({"size": (100, 64)}, BadInput, "size is 100x64; .*multiples of 8. Nearest: 96x64 or 104x64"),
        ({"size": (0, 64)}, BadInput, r"size is \(0, 64\)"),
        ({"size": (-8, 64)}, BadInput, r"size is \(-8, 64\)"),
        ({"size": (10**7, 64)}, BadInput, "between 1 and 8192"),
        ({"size": 64}, BadInput, "size is .*64.*: it must be"),
        ({"strength": 0.5}, BadInput, "no image is given"),
        ({"image": Image.new("RGB", (32, 32)), "strength": 1.2}, BadInput, "strength is 1.2"),
        ({"image": Image.new("RGB", (32, 32)), "strength": math.nan}, BadInput, "strength is nan"),
        (
            {"image": Image.new("RGB", (32, 32)), "strength": 0.3},
            BadInput,
            "leaves no step out of 2; give at least 0.5",
        ),
        ({"image": Image.new("RGB", (33, 32))}, BadInput, "the picture, without size, is 33x32"),
        ({"image": []}, BadInput, "image is"),
        ({"image": "picture.png"}, BadInput, "image is 'picture.png'"),
        ({"image": torch.zeros(1, 4, 32, 32)}, BadInput, r"image has shape \(1, 4, 32, 32\)"),
        ({"image": torch.full((1, 3, 32, 32), math.nan)}, BadInput, "not finite"),
        ({"image": torch.zeros(3, 3, 32, 32)}, BadInput, "image has 3 rows for 1 sample"),
        ({"image": torch.zeros(1, 3, 32, 32), "latents": torch.zeros(1, 4, 16, 16)}, BadInput, "both given"),
        ({"latents": torch.zeros(4, 16, 16)}, BadInput, r"latents has shape \(4, 16, 16\)"),
        ({"latents": torch.zeros(1, 4, 16, 15)}, BadInput, "size is 30x32"),
        ({"latents": torch.zeros(1, 3, 16, 16)}, BadInput, r"32x32 pixels need \(b, 4, 16, 16\)"),
        ({"latents": torch.zeros(2, 4, 16, 16)}, BadInput, "latents has 2 rows for 1 sample"),
        ({"latents": torch.full((1, 4, 16, 16), math.inf)}, BadInput, "not finite"),
        ({"start": 1}, BadInput, "no latents are given to start from"),
        ({"start": 2, "latents": torch.zeros(1, 4, 16, 16)}, BadInput, "start is 2.*between 0 and 1"),
        ({"scheduler": "dimm"}, UnknownName, "Did you mean 'ddim'"),
        ({"scheduler": "flow_euler"}, NotSupported, "does not fit a diffusion model"),
        ({"scheduler": "euler", "eta": 0.5}, BadInput, "eta is 0.5.*'ddim'"),
        ({"eta": 2.0}, BadInput, "eta is 2.0"),
        ({"temperature": 1.0}, BadInput, "temperature means nothing to tiny-sd, which draws by diffusion"),
        ({"guidance_interval": (0.5, 0.2)}, BadInput, "guidance_interval is .*start < end"),
        ({"guidanse": 2.0}, UnknownName, "Did you mean 'guidance'"),
        ({"negative": ["a", "b", "c"]}, BadInput, "negative has 3 texts for 1 prompt"),
        ({"negative": "green", "guidance": 1.0}, BadInput, "negative has no effect"),
        ({"batch_size": 0}, BadInput, "batch_size is 0"),
        ({"interventions": 5}, BadInput, "interventions holds 5"),
        ({"compose": [("a dog",)]}, BadInput, "compose"),
    ],
    ids=lambda value: "-".join(f"{k}={str(v)[:12]}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_in_one_line(given: dict[str, Any], error: type[Exception], words: str):
    model = tiny_model("sd")
    with pytest.raises(error, match=words) as caught:
        generate(model, **{"prompt": "a dog", **SHORT, **given})
    assert isinstance(caught.value, SfumatoError) and "\n" not in str(caught.value) and len(str(caught.value)) < 320


def test_guidance_of_distilled_models():
    model = tiny_model("flux")
    with pytest.raises(BadInput, match="give true_guidance above 1"):
        generate(model, "a dog", steps=1, negative="green")
    with pytest.raises(BadInput, match="must be a number"):
        generate(model, "a dog", steps=1, guidance=Guidance(3.0))
    weak, strong = (generate(model, "a dog", steps=1, guidance=g, decode=False).latents for g in (1.0, 9.0))
    assert not torch.equal(weak, strong)
    with pytest.raises(NotSupported, match="does not fit a flow model"):
        generate(model, "a dog", steps=1, scheduler="ddim")
    assert generate(tiny_model("schnell"), "a dog", decode=False).cost == 4  # its own choice: few steps, no guidance


def test_sides_beyond_the_position_embedding_are_refused():
    with pytest.raises(BadInput, match="width=256 is too long for tiny-sd3: 128 pixels at most"):
        generate(tiny_model("sd3"), "a dog", steps=1, size=(256, 32))


def test_empty_prompt_and_one_step():
    for kind in ("sd", "sd3", "flux", "pixart"):
        result = generate(tiny_model(kind), "", steps=1)
        assert torch.isfinite(result.latents).all() and result.images[0].size == (32, 32)


@pytest.mark.parametrize("name", tiny_model("sd").schedulers)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_scheduler_survives_a_single_step(name: str):
    result = generate(tiny_model("sd"), "a dog", steps=1, scheduler=name, decode=False)
    assert torch.isfinite(result.latents).all()


def test_seeds():
    model = tiny_model("sd")
    result = generate(model, ["a dog", "a cat"], n=2, seed=7, decode=False, **SHORT)
    assert result.seeds == [7, 8, 9, 10] and result.prompts == ["a dog", "a dog", "a cat", "a cat"]
    drawn = generate(model, "a dog", seed=None, decode=False, **SHORT)
    again = generate(model, "a dog", seed=np.int64(drawn.seeds[0]), decode=False, **SHORT)
    assert torch.equal(drawn.latents, again.latents)
    assert generate(model, "a dog", seed=None, decode=False, **SHORT).seeds != drawn.seeds


def test_pixels_and_images_agree():
    result = generate(tiny_model("sd"), "a dog", size=(40, 24), **SHORT)
    assert result.pixels is not None and result.pixels.shape == (1, 3, 24, 40)
    expected = ((result.pixels[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).byte().numpy()
    assert np.abs(np.asarray(result.images[0]).astype(int) - expected.astype(int)).max() <= 1
    assert generate(tiny_model("sd"), "a dog", decode=False, **SHORT).images == []


def test_image_to_image_keeps_what_strength_leaves():
    model = tiny_model("sd")
    picture = Image.effect_noise((32, 32), 60).convert("RGBA")
    same = generate(model, "a dog", image=picture, strength=0.0, **SHORT)
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
        encoded = model.encode_image(pixels, [torch.Generator().manual_seed(0)])
    torch.testing.assert_close(same.latents, encoded, rtol=1e-5, atol=1e-5)
    assert same.cost == 0
    resized = generate(model, ["a dog", "a cat"], image=picture, size=(48, 32), **SHORT)
    assert resized.images[1].size == (48, 32)
    by_default = generate(model, "a dog", image=picture, steps=10, scheduler="ddim", decode=False)
    assert by_default.cost == 2 * 8


class Break(Intervention):
    """Attaches to everything and fails at a chosen moment."""

    def __init__(self, moment: str, error: BaseException):
        self.moment, self.error = moment, error

    def start(self, run: Run) -> None:
        self.mark()
        weight = next(run.model.denoiser.parameters())
        weight.data.add_(1)
        run.defer(lambda: weight.data.sub_(1))
        hook = run.model.denoiser.register_forward_hook(lambda *_: None)
        run.defer(hook.remove)
        run.freeze()
        torch.rand(3)
        self._fail("start")

    def on_text(self, run: Run, condition: Any) -> Any:
        self._fail("on_text")
        return condition

    def taps(self) -> list[Any]:
        from sfumato.attention.tap import Tap

        return [Tap(observe=lambda call: self._fail("tap"))]

    def before_predict(self, step: Step) -> None:
        def loss(prediction: Any) -> Tensor:
            self._fail("loss")
            return prediction.x0().sum()

        step.grad(loss)
        if step.i == 1:
            self._fail("before_predict")

    def on_decode(self, run: Run, pixels: Tensor) -> Tensor:
        self._fail("on_decode")
        return pixels

    def finish(self, run: Run) -> None:
        self._fail("finish")

    def _fail(self, moment: str) -> None:
        if moment == self.moment:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize(
    "moment", ["start", "on_text", "tap", "loss", "before_predict", "on_decode", "finish", "on_step", "never"]
)
def test_the_model_is_as_it_was_whatever_happens(moment: str, error: BaseException):
    model = tiny_model("sd", fresh=True)
    model.denoiser.requires_grad_(True)
    model.denoiser.mid_block.train()
    before = fingerprint(model)
    part = Break(moment, error)

    def told(step: Step) -> None:
        assert not model.denoiser.mid_block.training
        part._fail("on_step")

    def make() -> None:
        generate(model, "a dog", interventions=part, on_step=told, **SHORT)

    if moment == "never":
        make()
    else:
        with pytest.raises(WorkInterrupted if isinstance(error, KeyboardInterrupt) else RuntimeError):
            make()
    after = fingerprint(model)
    # adding and subtracting 1 rounds; everything else is the same to the bit
    _forget_first_weight(before), _forget_first_weight(after)
    assert after == before


def _forget_first_weight(found: dict[str, Any]) -> None:
    facts = found["0.unet"]["conv_in"]
    found["0.unet"]["conv_in"] = (*facts[:6], facts[6][1:], facts[7])


def test_interruption_keeps_finished_batches():
    model = tiny_model("sd")
    prompts, calls = ["a dog", "a cat", "a ball"], []

    def stop_in_the_third_batch(step: Step) -> None:
        calls.append(step.run.samples)
        if len(calls) == 5:
            raise KeyboardInterrupt

    whole = generate(model, prompts, seed=3, batch_size=1, **SHORT)
    with pytest.raises(WorkInterrupted, match="first 2 of 3 samples are finished and kept") as stopped:
        generate(model, prompts, seed=3, batch_size=1, on_step=stop_in_the_third_batch, **SHORT)
    kept: Any = stopped.value.result
    assert kept.prompts == prompts[:2] and kept.seeds == [3, 4] and len(kept.images) == len(kept.recipes) == 2
    assert torch.equal(kept.latents, whole.latents[:2])
    assert calls[::2] == [range(0, 1), range(1, 2), range(2, 3)]

    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(WorkInterrupted, match="nothing was finished") as stopped:
        generate(model, prompts, on_step=stop, **SHORT)
    assert stopped.value.result is None


class Couple(Intervention):
    couples_samples = True

    def start(self, run: Run) -> None:
        self.mark()


def test_samples_that_belong_together_are_not_separated():
    model = tiny_model("sd")
    generate(model, ["a", "b"], interventions=Couple(), decode=False, **SHORT)
    with pytest.raises(Conflict, match="Couple couples the samples.*at least 2"):
        generate(model, ["a", "b"], interventions=Couple(), batch_size=1, **SHORT)


def test_non_finite_latents_name_the_step():
    class Explode(Intervention):
        def after_step(self, step: Step) -> None:
            self.mark(step)
            if step.i == 2:
                step.x = step.x / 0

    with pytest.raises(SfumatoError, match=r"stopped being finite at step 3 of 5 \(t = 401\)"):
        generate(tiny_model("sd"), "a dog", steps=5, scheduler="ddim", interventions=Explode())


# --- recipes ---------------------------------------------------------------------------------------------------------


@cards.register
class Brighten(Intervention):
    """Adds a constant to the clean latents."""

    CARD = cards.Card(
        key="brighten_for_tests", title="", authors="", year=2024, verb="edit", needs=(), defaults_from="", cost="",
        summary="",
    )  # fmt: skip

    class Params(cards.Params):
        strength: float = 0.5

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def after_step(self, step: Step) -> None:
        self.mark(step)
        step.x = step.x + self.params.strength


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("sd", {"negative": "green", "guidance": Guidance(4.0, 0.3, (0.0, 0.5)), "size": (48, 32), "eta": 0.5}),
        ("sd", {"compose": [("a cat", 2.0)], "scheduler": "euler_a", "rescale": 0.2}),
        ("sd3", {"interventions": [Brighten(strength=0.25)], "scheduler": None}),
        ("flux", {"guidance": 2.0, "true_guidance": 3.0, "negative": "red", "scheduler": None}),
    ],
)
def test_a_recipe_repeats_the_picture(kind: str, given: dict[str, Any]):
    model = tiny_model(kind)
    first = generate(model, ["a dog", "a red cube"], seed=5, batch_size=1, **{**SHORT, **given})
    recipe = json.loads(json.dumps(first.recipes[1], allow_nan=False))
    assert recipe["prompt"] == "a red cube" and recipe["seed"] == 6 and recipe["hash"] == model.weight_hash
    again = generate(model, **recipe_args(recipe))
    assert torch.equal(again.latents[0], first.latents[1])
    assert again.images[0].tobytes() == first.images[1].tobytes()
    assert again.recipe == first.recipes[1]


def test_recipes_that_begin_from_a_picture_or_latents_ask_for_it():
    model = tiny_model("sd")
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    first = generate(model, "a dog", image=image, strength=0.5, **SHORT)
    with pytest.raises(BadInput, match="image must be given"):
        recipe_args(first.recipe)
    again = generate(model, **recipe_args(first.recipe, image=image))
    assert torch.equal(again.latents, first.latents)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    from_noise = generate(model, "a dog", latents=noise, **SHORT)
    assert torch.equal(generate(model, **recipe_args(from_noise.recipe, latents=noise)).latents, from_noise.latents)
    other = generate(model, "a dog", latents=noise + 1, **SHORT)
    assert other.recipe["latents"] != from_noise.recipe["latents"]


def test_a_scheduler_object_is_described():
    model = tiny_model("sd")
    scheduler = model.make_scheduler("dpm++_karras")
    first = generate(model, "a dog", steps=3, scheduler=scheduler)
    recipe = json.loads(json.dumps(first.recipe))
    assert torch.equal(generate(model, **recipe_args(recipe)).latents, first.latents)


# --- gradients through the whole loop --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_gradients_through_the_loop(kind: str):
    """Against central differences of the final pixels with respect to the initial noise, in float64."""
    model = tiny_model(kind, fresh=True)
    for module in model.modules.values():
        module.double()
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *model.latent_shape(32, 32), generator=draw, dtype=torch.float64)
    weights = torch.randn(1, 3, 32, 32, generator=draw, dtype=torch.float64)
    scheduler = "ddim" if kind == "sd" else None

    def score(latents: Tensor) -> Tensor:
        pixels = generate(model, "a dog", latents=latents, grad=True, steps=2, scheduler=scheduler).pixels
        assert pixels is not None
        return (pixels * weights).sum()

    (gradient,) = torch.autograd.grad(score(noise.requires_grad_(True)), noise)
    direction = torch.randn(noise.shape, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        slope = (score(noise + 1e-4 * direction) - score(noise - 1e-4 * direction)) / 2e-4
    # flow schedulers step in float32
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4 if kind == "sd" else 2e-2, atol=1e-4)
    assert not generate(model, "a dog", latents=noise, steps=1, scheduler=scheduler).latents.requires_grad
