"""One loop for every process: what generation promises holds for latents, masked tokens, token by token, one pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.errors import BadInput, NotSupported, SfumatoError, WorkInterrupted
from sfumato.models import Model
from sfumato.sampling import Intervention, Run, Step, generate, invert, recipe_args
from sfumato.sampling.process.autoregressive import drawn
from sfumato.sampling.recording import Recorder, Recording, record_auxiliary
from tests.helpers import fingerprint
from tests.processes import generator_model, tokens_model
from tests.tiny import tiny_model

MODELS: dict[str, Callable[[], Model]] = {
    "diffusion": lambda: tiny_model("sd"),
    "masked": lambda: tiny_model("amused"),
    "autoregressive": tokens_model,
    "onepass": generator_model,
}
STEPS = {"diffusion": 3, "masked": 4, "autoregressive": 16, "onepass": 1}
GIVEN: dict[str, dict[str, Any]] = {
    "diffusion": {"steps": 3, "scheduler": "euler_a"}, "masked": {"steps": 4}, "autoregressive": {}, "onepass": {},
}  # fmt: skip
TOKENS = ("masked", "autoregressive")
every = pytest.mark.parametrize("kind", MODELS)
pytestmark = pytest.mark.filterwarnings("ignore::sfumato.sampling.request.GuidanceCosts")  # as it is meant here


class Watch(Intervention):
    """Writes down what the loop calls and what it holds."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.progress: list[float] = []
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def start(self, run: Run) -> None:
        self.called.append("start")

    def on_text(self, run: Run, condition: Any) -> Any:
        self.called.append("on_text")
        return condition

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        self.called.append("on_noise")
        return x

    def before_predict(self, step: Step) -> None:
        self.called.append("before_predict")
        self.progress.append(step.progress)
        self.before = tuple(step.x.shape)

    def after_predict(self, step: Step) -> None:
        self.called.append("after_predict")
        self.shapes.append((self.before, tuple(step.output.shape)))

    def after_step(self, step: Step) -> None:
        self.called.append("after_step")
        self.mark(step)

    def on_decode(self, run: Run, pixels: Tensor) -> Tensor:
        self.called.append("on_decode")
        return pixels

    def finish(self, run: Run) -> None:
        self.called.append("finish")


@every
def test_interventions_are_called_and_leave_no_trace(kind: str):
    model, watch = MODELS[kind](), Watch()
    before = fingerprint(model)
    result = generate(model, ["a red cube", "a dog"], interventions=watch, guidance=2.0, **GIVEN[kind])
    step = ["before_predict", "after_predict", "after_step"]
    assert watch.called == ["start", "on_text", "on_noise", *step * STEPS[kind], "on_decode", "finish"]
    assert watch.progress == [i / STEPS[kind] for i in range(STEPS[kind])]
    expected = {
        "diffusion": ((2, 4, 16, 16), (2, 4, 16, 16)),
        "masked": ((2, 16, 16), (2, 32, 16, 16)),
        "autoregressive": ((2, 16), (2, 32)),
        "onepass": ((2, 6), (2, 3, 8, 8)),
    }
    assert set(watch.shapes) == {expected[kind]}
    assert result.coverage["Watch"]["steps"] == list(range(STEPS[kind]))
    assert result.cost == 2 * STEPS[kind]
    assert [image.size for image in result.images] == [(model.default_size[1], model.default_size[0])] * 2
    assert fingerprint(model) == before


@every
def test_a_sample_depends_on_its_own_seed_only(kind: str):
    """Among two kinds of neighbours, in batches of one, and after somebody else drew random numbers."""
    model = MODELS[kind]()
    given = {**GIVEN[kind], "guidance": 2.0, "decode": False}
    one = generate(model, ["a red cube", "a dog", "a cat"], seed=[5, 6, 7], **given).latents
    other = generate(model, ["a red cube", "a ball", "a cone"], seed=[5, 90, 91], **given).latents
    torch.rand(7)
    apart = generate(model, ["a red cube", "a dog", "a cat"], seed=5, batch_size=1, **given).latents
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    assert torch.equal(one, apart) if kind in TOKENS else torch.allclose(one, apart, rtol=1e-4, atol=1e-4)
    same = generate(model, "a dog", seed=[1, 2], n=2, **given).latents
    assert not torch.equal(same[0], same[1])


@every
def test_a_recipe_repeats_the_sample(kind: str):
    model = MODELS[kind]()
    given: dict[str, Any] = {"diffusion": {"eta": 0.0}, "masked": {"temperature": (3.0, 0.5)}, "onepass": {}}.get(
        kind, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}
    )
    first = generate(
        model, ["a dog", "a red cube"], negative="green", guidance=2.5, seed=5, batch_size=1, **GIVEN[kind], **given
    )
    recipe = json.loads(json.dumps(first.recipes[1], allow_nan=False))
    assert recipe["steps"] == STEPS[kind] and recipe["seed"] == 6
    again = generate(model, **recipe_args(recipe))
    assert torch.equal(again.latents[0], first.latents[1]) and again.recipe == first.recipes[1]
    assert again.images[0].tobytes() == first.images[1].tobytes()


@every
def test_an_interruption_keeps_finished_batches(kind: str):
    model, prompts = MODELS[kind](), ["a dog", "a cat", "a ball"]
    whole = generate(model, prompts, seed=3, batch_size=1, **GIVEN[kind])

    def stop(step: Step) -> None:
        if step.run.samples.start == 2:
            raise KeyboardInterrupt

    with pytest.raises(WorkInterrupted, match="first 2 of 3 samples") as stopped:
        generate(model, prompts, seed=3, batch_size=1, on_step=stop, **GIVEN[kind])
    kept: Any = stopped.value.result
    assert torch.equal(kept.latents, whole.latents[:2]) and len(kept.images) == 2


@every
def test_guidance_and_negative_prompts_act(kind: str):
    model = MODELS[kind]()
    given = {**GIVEN[kind], "decode": False, "seed": 2}
    plain, guided, away = (
        generate(model, "a red cube", **given, **more)
        for more in ({"guidance": 1.0}, {"guidance": 6.0}, {"guidance": 6.0, "negative": "green"})
    )
    assert not torch.equal(plain.latents, guided.latents) and not torch.equal(guided.latents, away.latents)
    assert (plain.cost, guided.cost) == (STEPS[kind], 2 * STEPS[kind])
    composed = generate(model, "a red cube", guidance=2.0, compose=[("a dog", 2.0)], **given)
    assert composed.cost == 3 * STEPS[kind]


class Ask(Intervention):
    """Asks in ``after_predict`` for something that not every process has."""

    def __init__(self, ask: Callable[[Step], Any]):
        self.ask = ask

    def after_predict(self, step: Step) -> None:
        self.ask(step)
        self.mark(step)


class Graph(Watch):
    keeps_graph = True


@pytest.mark.parametrize("kind", ["masked", "autoregressive", "onepass"])
@pytest.mark.parametrize("what", ["path", "x0", "eps", "prediction", "steps", "scheduler", "eta", "image", "invert"])
def test_what_a_process_lacks_is_refused(kind: str, what: str):
    model = MODELS[kind]()
    asked: dict[str, Callable[[Step], Any]] = {
        "path": lambda step: step.path,
        "x0": lambda step: step.x0,
        "eps": lambda step: step.eps,
        "prediction": lambda step: step.predict().x0(),
    }
    title = {"masked": "masked tokens", "autoregressive": "autoregressive tokens", "onepass": "one pass"}[kind]
    if what in asked:
        with pytest.raises(NotSupported, match=f"noise path.*{model.name} draws by {title}"):
            generate(model, "a dog", interventions=Ask(asked[what]), **GIVEN[kind])
    elif what == "invert":
        with pytest.raises(NotSupported, match=f"invert needs a noise path.*draws by {title}"):
            invert(model, torch.zeros(1, 3, 8, 8), "a dog")
    elif what == "steps" and kind == "masked":
        assert generate(model, "a dog", steps=2, decode=False).cost == 4
    else:
        if what == "image" and kind == "masked":
            return  # it begins from pictures: tests/parity
        value = {"steps": 7, "scheduler": "ddim", "eta": 0.5, "image": torch.zeros(1, 3, 8, 8)}[what]
        with pytest.raises(BadInput, match=what):
            generate(model, "a dog", **{what: value})


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_have_no_gradients(kind: str):
    model = MODELS[kind]()
    with pytest.raises(NotSupported, match="Ask needs a gradient with respect to the state"):
        generate(model, "a dog", interventions=Ask(lambda step: step.grad(lambda p: p.output().sum())), **GIVEN[kind])
    with pytest.raises(NotSupported, match="Graph needs a gradient"):
        generate(model, "a dog", interventions=Graph(), **GIVEN[kind])
    with pytest.raises(NotSupported, match="grad needs a gradient"):
        generate(model, "a dog", grad=True, **GIVEN[kind])


def test_noise_of_a_generator_has_gradients():
    model, found = generator_model(), []
    ask = Ask(lambda step: found.append(step.grad(lambda p: p.output().square().sum())))
    generate(model, "a dog", interventions=ask)
    assert found[0].shape == (1, 6) and found[0].abs().min() > 0
    z = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    pixels = generate(model, "a dog", latents=z, grad=True).pixels
    assert pixels is not None
    (gradient,) = torch.autograd.grad(pixels.square().sum(), z)
    torch.testing.assert_close(gradient, found[0])


class Spoil(Intervention):
    def __init__(self, change: Callable[[Tensor], Tensor], moment: str):
        self.change, self.moment = change, moment

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        self.mark()
        return self.change(x) if self.moment == "on_noise" else x

    def before_predict(self, step: Step) -> None:
        step.x = self.change(step.x) if self.moment == "before_predict" else step.x

    def after_step(self, step: Step) -> None:
        step.x = self.change(step.x) if self.moment == "after_step" else step.x


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("moment", ["on_noise", "before_predict", "after_step"])
def test_a_state_that_is_no_tokens_is_refused(kind: str, moment: str):
    model = MODELS[kind]()
    for change, words in (
        (lambda x: x + 0.5, "Spoil made the state torch.float32"),
        (lambda x: x + 999, "put the tok"),
    ):
        with pytest.raises(BadInput, match=words):
            generate(model, "a dog", interventions=Spoil(change, moment), **GIVEN[kind])
    with pytest.raises(BadInput, match="latents made the state torch.float32"):
        generate(model, "a dog", latents=torch.zeros(1, *model.latent_shape(*model.default_size)))
    with pytest.raises(BadInput, match="it must be a tensor"):
        generate(model, "a dog", latents=torch.zeros(1, 2, 3, 4, 5))


def test_given_tokens_stay_as_they_are():
    model = tiny_model("amused")
    given = torch.full((1, 16, 16), 33)
    given[:, :8] = torch.arange(16)
    result = generate(model, "a dog", latents=given, start=1, steps=4, decode=False)
    assert torch.equal(result.latents[:, :8], given[:, :8]) and (result.latents[:, 8:] < 32).all()
    tokens = tokens_model()
    first = generate(tokens, "a dog", temperature=0.0, decode=False)
    rest = generate(tokens, "a dog", temperature=0.0, latents=first.latents, start=9, decode=False)
    assert torch.equal(rest.latents, first.latents) and rest.cost == 2 * 7
    with pytest.raises(BadInput, match="not drawn among the first 9"):
        generate(tokens, "a dog", latents=torch.full((1, 16), -1), start=9)


class Restart(Intervention):
    """Goes back once and masks everything again."""

    role = "path"

    def start(self, run: Run) -> None:
        self.left = 1

    def after_step(self, step: Step) -> None:
        if step.i == 2 and self.left:
            self.left, step.x = 0, torch.full_like(step.x, 33)
            step.goto(0)
            self.mark(step)


def test_a_walk_over_tokens_may_go_back():
    result = generate(tiny_model("amused"), "a dog", interventions=Restart(), steps=4, guidance=1.0, decode=False)
    assert result.cost == 3 + 4 and (result.latents < 32).all()


@pytest.mark.parametrize("kind", TOKENS)
def test_recordings_hold_tokens(kind: str, tmp_path: Any):
    recorder = Recorder(lambda site, progress: site.kind == "cross")
    result = generate(MODELS[kind](), "a dog", interventions=recorder, **GIVEN[kind])
    assert recorder.recording is not None
    again = Recording.load(recorder.recording.save(tmp_path / "run.safetensors"))
    assert torch.equal(again.latents[-1], result.latents) and len(again.latents) == STEPS[kind] + 1
    assert any(name.endswith("|q") for name in again.tensors)


def test_one_pass_has_nothing_to_record():
    with pytest.raises(NotSupported, match="Recorder needs a state that keeps its shape"):
        generate(generator_model(), "a dog", interventions=Recorder())


class Beside(Intervention):
    """Walks another prompt beside the run, with the same noise."""

    role = "path"

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        self.mark()
        self.recording = record_auxiliary(run, x, ["a blue dog"] * len(run), Recorder())
        return x


@pytest.mark.parametrize("kind", ["diffusion", *TOKENS])
def test_a_walk_beside_has_the_same_randomness_and_takes_none(kind: str):
    model, beside = MODELS[kind](), Beside()
    given = {**GIVEN[kind], "seed": 4, "decode": False}
    result = generate(model, "a red cube", interventions=beside, **given)
    assert torch.equal(result.latents, generate(model, "a red cube", **given).latents)
    assert torch.equal(beside.recording.latents[-1], generate(model, "a blue dog", **given).latents)
    assert result.cost == 2 * result.request.steps * (2 if result.request.guidance.on else 1)


def test_drawn_tokens_follow_the_distribution():
    """Against the probabilities themselves, over many seeds; within four standard errors."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]

    def share(**given: Any) -> Tensor:
        tokens = drawn(logits.expand(4000, 5), generators, **given)
        return torch.bincount(tokens, minlength=5) / 4000

    def close(found: Tensor, p: Tensor) -> bool:
        return bool(((found - p).abs() <= 4 * (p * (1 - p) / 4000).sqrt() + 1e-9).all())

    assert close(share(), logits.softmax(0))
    assert close(share(temperature=2.0), (logits / 2).softmax(0))
    two = torch.where(torch.arange(5) < 2, logits, -torch.inf).softmax(0)
    assert close(share(top_k=2), two)
    assert close(share(top_p=0.8), two)  # the first holds 0.636, the first two 0.871
    assert share(top_p=0.5)[0] == 1 and share(temperature=0.0)[0] == 1


def test_a_family_without_a_process_is_refused():
    model = tokens_model()
    kind = type(model.family)
    odd = type("Odd", (kind,), {"process": "dreaming", "pipeline_classes": ()})
    other = Model(model.pipe, name="odd")
    other.family = odd(model.pipe)
    with pytest.raises(SfumatoError, match="unknown process of family tiny_tokens 'dreaming'"):
        generate(other, "a dog")
