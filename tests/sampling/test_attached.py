"""Systems attached to a pipeline: what they see is what the pipeline computed, and afterwards nothing is left."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import sfumato
from sfumato.adapters.lora import LoRA
from sfumato.cards import build
from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported, SfumatoError, UnknownName
from sfumato.explain.daam import DAAM
from sfumato.models import Model
from sfumato.models.hooks import running
from sfumato.sampling import Intervention, generate
from sfumato.sampling.attached import attached
from sfumato.sampling.recording import Recorder
from tests.contract.systems import SYSTEMS
from tests.examples import write_adapters
from tests.experts import write_expert
from tests.helpers import fingerprint
from tests.pipelines import BUILDERS, PROMPT, SIZE, Renamed, assert_same_maps, draw, mine, pipeline_of
from tests.tiny import length_of, tiny_model, tiny_pipeline

OWN = {
    "sd": {"guidance_scale": 5.0},
    "sdxl": {"guidance_scale": 5.0},
    "sd35": {"guidance_scale": 5.0},
    "flux": {"guidance_scale": 3.5},
    "qwenimage": {"true_cfg_scale": 3.5, "negative_prompt": " "},
    "pixart": {"guidance_scale": 5.0, "use_resolution_binning": False, "clean_caption": False},
    "animatediff": {"guidance_scale": 5.0, "num_frames": 2},
}
"""Kinds that both our loop and their own pipeline can draw, with what their call is told; younger families are held to
their pipelines in `tests/parity/test_families.py`, attached systems included."""


STEPS_SEEN = {"sd img2img": [1, 2], "sdxl img2img": [1], "sdxl inpaint": [1]}
"""Pipelines that begin on the way; PNDM says its second timestep twice."""


class Reference(TorchFunctionMode):
    """The map of one word by the plain formula: softmax of the scores of given rows and queries, mean over heads, calls
    and sites, each site upscaled to the finest grid."""

    def __init__(self, stack: list[Any], row: int, queries: slice, columns: list[int], grids: dict[int, Any]):
        super().__init__()
        self.stack, self.row, self.queries, self.columns, self.grids = stack, row, queries, columns, grids
        self.maps: dict[str, list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.stack:
            q, k, _ = (list(args) + [kwargs.get(name) for name in ("query", "key", "value")])[:3]
            q = q[self.row % len(q), :, self.queries].double()
            if k.shape[2] >= 77 and q.shape[1] in self.grids:
                probs = (q @ k[self.row % len(k)].double().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
                maps = probs[..., self.columns].mean((0, 2)).unflatten(0, self.grids[q.shape[1]])
                self.maps.setdefault(self.stack[-1].path, []).append(maps)
        return func(*args, **kwargs)

    def map(self) -> Tensor:
        means = [torch.stack(maps).mean(0) for maps in self.maps.values()]
        finest = max((m.shape for m in means), key=lambda shape: shape[0])
        up = [F.interpolate(m[None, None], finest, mode="bicubic")[0, 0].clamp_min(0) for m in means]
        return torch.stack(up).mean(0).float()


# --- pipelines that no loop of ours replaces --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDERS)
def test_own_pipelines(kind):
    pipe, own = pipeline_of(kind), type(pipeline_of(kind))
    steps = 2 if "strength" in BUILDERS[kind][1] else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = draw(pipe, kind, steps)
        before = fingerprint(pipe)  # after a call: pipelines hang things of their own on networks in the first
        torch.manual_seed(0)
        with attached(pipe, DAAM(words=["cube", "ball"])) as run:
            assert torch.equal(draw(pipe, kind, steps), plain)
            assert isinstance(pipe, own)
        assert fingerprint(pipe) == before
    assert type(pipe) is own and "step" not in vars(pipe.scheduler)
    maps = run.maps[0]
    assert maps.size[0] == maps.size[1] >= SIZE
    assert not torch.equal(maps.map("cube"), maps.map("ball"))
    assert run.coverage["daam"]["steps"] == STEPS_SEEN.get(kind, [*range(steps)])


WHERE = {  # row of the conditional branch, image queries, where the text begins, grids by number of queries
    "sd controlnet": (1, slice(None), 0, {256: (16, 16), 64: (8, 8)}),
    "sd pix2pix": (0, slice(None), 0, {256: (16, 16), 64: (8, 8)}),
    "sd pag": (1, slice(None), 0, {256: (16, 16), 64: (8, 8)}),
    "flux kontext": (0, slice(512, 576), 0, {64: (8, 8)}),
    "sd3 controlnet": (1, slice(0, 64), 64, {64: (8, 8)}),
    "mine": (0, slice(0, 48), 48, {48: (8, 6)}),
}


@pytest.mark.parametrize("kind", WHERE)
def test_maps_are_those_of_the_plain_formula(kind):
    row, queries, first, grids = WHERE[kind]
    pipe = mine() if kind == "mine" else pipeline_of(kind)
    with attached(pipe, DAAM(words=["cube"])) as run:
        draw(pipe, kind if kind in BUILDERS else "")
    found = run.maps[0]
    span = found.reading.one("cube")
    streams = {"sd3 controlnet": ["clip", "clip2"]}.get(kind, list(span.tokens))
    columns = sorted({first + p for name in streams for p in span.tokens[name]})
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    with running(denoiser) as stack, Reference(stack, row, queries, columns, grids) as expected:
        draw(pipe, kind if kind in BUILDERS else "")
    kept = {layer.site.path for layer in found.layers}
    expected.maps = {path: maps for path, maps in expected.maps.items() if path in kept}
    assert kept == set(expected.maps)
    stream = {"sd3 controlnet": "clip"}.get(kind)
    got = found.map("cube", size=found.resolution, stream=stream)
    torch.testing.assert_close(got, expected.map(), atol=2e-6, rtol=2e-4)


def test_unknown_classes():
    """Where the text lies is found by what moves with it; where it cannot be, help is asked for."""
    pipe = mine()
    with attached(pipe, DAAM(words=["cube"])) as run:
        draw(pipe)
    site = run.maps[0].layers[0].site
    assert (site.kind, site.text, site.image, site.grid) == ("joint", (48, 125), (0, 48), (8, 6))
    with attached(pipe, DAAM(words=["cube"]), text="last 77") as told:
        draw(pipe)
    assert torch.equal(told.maps[0].map("cube"), run.maps[0].map("cube"))
    for text, why in (("first 77", "keys 0:77"), ("first 70", "77 text positions"), ("all", "'last 77'")):
        with pytest.raises(BadInput, match=why), attached(pipe, DAAM(), text=text):
            draw(pipe)
    for changed, why in (({"template": "a photo of {}"}, "encodes prompts"), ({"guided": True}, "encodes prompts")):
        pipe = mine(**changed)
        with pytest.raises(NotSupported, match=why), attached(pipe, DAAM()):
            draw(pipe)


def test_text_that_moves_everything_needs_help():
    """Some networks put a mean of the text into every token: then the experiment says nothing, and says so."""
    pipe = mine()
    real = pipe.transformer.forward

    def mixed(*args: Any, **kwargs: Any) -> Any:
        kwargs["pooled_projections"] = kwargs["encoder_hidden_states"].mean(1)[:, :1].expand(-1, 40)
        return real(*args, **kwargs)

    pipe.transformer.forward = mixed
    mixed.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    with pytest.raises(NotSupported, match="cannot be determined.*attached.*text='first 512'"), attached(pipe, DAAM()):
        draw(pipe)
    with attached(pipe, DAAM(words=["cube"]), text="last 77") as run:
        draw(pipe)
    assert run.maps[0].layers[0].site.text == (48, 125)


def test_classes_that_derive_from_known_ones():
    parts = {name: part for name, part in tiny_pipeline("sd").components.items()}
    pipe = Renamed(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with attached(pipe, DAAM()) as run:
        draw(pipe)
    with attached(tiny_pipeline("sd"), DAAM()) as own:
        draw(tiny_pipeline("sd"))
    assert torch.equal(run.maps[0].map("cube"), own.maps[0].map("cube"))


class Around(torch.nn.Module):
    """A user's own module around a denoiser."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_modules_around_a_denoiser_are_looked_through():
    plain, pipe, own = tiny_pipeline("sd3"), tiny_pipeline("sd3", fresh=True), mine()
    pipe.transformer, own.transformer = Around(pipe.transformer), Around(own.transformer)
    maps = []
    for each in (plain, pipe):
        with attached(each, DAAM(words=["cube"])) as run:
            draw(each)
        maps.append(run.maps)
    assert_same_maps(*maps)
    with attached(own, DAAM(words=["cube"])) as run:  # of a class of the user's, found by the experiment
        draw(own)
    assert run.maps[0].layers[0].site.path.startswith("inner.transformer_blocks")


class Twofold(diffusers.StableDiffusionPipeline):
    """Draws with the mean of two denoisers."""

    second: Any

    @torch.no_grad()
    def __call__(self, prompt: str, **how: Any) -> Any:
        own = self.unet.forward

        def both(*args: Any, **given: Any) -> Any:
            return ((own(*args, **given)[0] + self.second(*args, **given)[0]) / 2,)

        self.unet.forward = both
        try:
            return super().__call__(prompt, **how)
        finally:
            self.unet.forward = own


class Spoken(diffusers.StableDiffusionPipeline):
    """Calls the prompt by another name."""

    def __call__(self, speech: str, prompt: None = None, **how: Any) -> Any:
        return super().__call__(speech, **how)


def test_pipelines_made_at_home():
    parts = {**tiny_pipeline("sd").components, "requires_safety_checker": False}
    two, spoken = Twofold(**parts), Spoken(**parts)
    vars(two)["second"] = tiny_pipeline("sd", fresh=True).unet
    with pytest.raises(NotSupported, match="Twofold draws with second beside its unet"), attached(two, DAAM()):
        draw(two)
    two.register_modules(second=two.second)
    with pytest.raises(NotSupported, match="components that its __init__ does not take"), attached(two, DAAM()):
        pass
    with pytest.raises(NotSupported, match="text under another name.*prompt='...'"), attached(spoken, DAAM()):
        draw(spoken, prompt=None, speech=PROMPT)
    with attached(spoken, DAAM(words=["cube"]), prompt="a cube") as run:
        draw(spoken, prompt=None, speech=PROMPT)
    assert run.maps[0].prompt == PROMPT  # what was really encoded


# --- equal to our own loop --------------------------------------------------------------------------------------------


def both(kind: str, systems: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Latents of our loop, those of the pipeline with systems attached, and what they are held by."""
    model, pipe = tiny_model(kind), tiny_pipeline(kind)
    frames = {"frames": 2} if kind == "animatediff" else {}
    noise = torch.randn(2, *model.latent_shape(SIZE, SIZE, frames.get("frames")), generator=torch.manual_seed(3))
    prompts = [PROMPT, "a blue ball and a red cube"]
    guidance = OWN[kind].get("guidance_scale", 3.5)
    ours = systems()
    made = generate(
        model, prompts, latents=noise, steps=2, guidance=guidance, size=(SIZE, SIZE), decode=False, interventions=ours,
        **frames,
    )  # fmt: skip
    packed = noise
    if kind in ("flux", "qwenimage"):
        packed = pipe._pack_latents(noise, 2, *noise.shape[1:])
    theirs = systems()
    with attached(pipe, theirs) as run:
        drawn = draw(pipe, steps=2, latents=packed, **{**OWN[kind], "prompt": prompts}, **length_of(model), **options)
    if kind in ("flux", "qwenimage"):
        drawn = pipe._unpack_latents(drawn, SIZE, SIZE, 2).reshape(made.latents.shape)
    return made, drawn, (ours, theirs, run)


@pytest.mark.parametrize("kind", OWN)
def test_maps_equal_to_our_loop(kind):
    made, drawn, (ours, theirs, run) = both(kind, lambda: DAAM(per_head=True))
    if kind != "animatediff":
        assert torch.equal(made.latents, drawn)
    assert len(theirs.maps) == 2 and run.maps is theirs.maps
    assert_same_maps(ours.maps, theirs.maps)
    assert made.coverage == run.coverage


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = write_adapters(tmp_path_factory.mktemp("examples"))
    for i, ends in enumerate(((0, 500), (500, 1000))):
        write_expert(folder, "sd", f"tiny-sd-expert-1-{i}", ends, i)
    return folder


@pytest.fixture
def examples(written, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(written))


ACTS = [("paint_with_words", "sd"), ("paint_with_words", "flux"), ("structured_guidance", "sd"), ("experts", "sd")]
ACTS += [("lora", "sd"), ("lora", "sd35"), ("word", "sd35"), ("weights", "sd35")]
NEEDS_US = {
    "attend_excite": "moves the latents",
    "blend": "replaces the trajectory",
    "clip_guidance": "gradients",
    "conceptor": "changes the texts",
    "inject_fusion": "moves the latents",
    "inpaint": "replaces the trajectory",
    "latent_geometry": "derivatives",
    "mgad": "gradients",
    "no_token_left_behind": "gradients",
    "prompt_to_prompt": "second picture",
    "pullback": "moves the latents",
    "shape_guided": "changed the texts",
}


def test_every_system_is_tried_attached():
    assert set(SYSTEMS) == {"daam", "concept_attention", *NEEDS_US, *(key for key, _ in ACTS)}


@pytest.mark.parametrize(("key", "kind"), ACTS)
def test_editors_and_adapters_act_as_in_our_loop(key, kind, examples):
    text = SYSTEMS[key].example
    if key == "experts":
        text = f"experts:models=[tiny-{kind}-expert-1-0|tiny-{kind}-expert-1-1]"
    made, drawn, (_, _, run) = both(kind, lambda: [build(text), DAAM(words=["cube"])])
    assert torch.equal(made.latents, drawn)
    assert run.coverage == made.coverage and run.coverage[key]["calls"]


@pytest.mark.parametrize("key", NEEDS_US)
def test_what_needs_our_loop_is_refused_with_the_reason(key):
    pipe = tiny_pipeline("sd")
    before = fingerprint(pipe)
    with pytest.raises(NotSupported, match=f"{NEEDS_US[key]}.*(generate|draws by)"):
        with attached(pipe, build(SYSTEMS[key].example)):
            draw(pipe)
    assert fingerprint(pipe) == before


def test_an_edit_of_a_recorded_picture_is_a_guest():
    """Prompt-to-Prompt draws nothing beside the picture where the source was recorded, so it can be attached."""
    pipe = pipeline_of("sd controlnet")
    recorder = Recorder(lambda site, progress: site.kind == "cross")
    with attached(pipe, recorder):
        plain = draw(pipe, "sd controlnet")
    assert recorder.recording is not None
    edit = {"self_replace": 0.0, "cross_replace": 1.0}
    with attached(pipe, PromptToPrompt(recorder.recording, **edit)) as run:
        edited = draw(pipe, "sd controlnet", prompt=PROMPT.replace("red", "big"))
    assert run.coverage["prompt_to_prompt"]["steps"] == [0]
    assert not torch.equal(edited, plain)
    with attached(pipe, PromptToPrompt(recorder.recording, **edit)):
        assert torch.equal(draw(pipe, "sd controlnet"), plain)


# --- what a user may write --------------------------------------------------------------------------------------------


class Look(Intervention):
    """Notes what steps look like, and does once what it is told."""

    def __init__(self, at: str = "", act: Any = None, **has: Any):
        self.at, self.act, self.seen = at, act, []
        vars(self).update(has)

    def _now(self, at: str, step: Any) -> None:
        self.mark(step)
        if at == self.at:
            self.act(step)

    def before_predict(self, step: Any) -> None:
        self._now("before", step)

    def after_predict(self, step: Any) -> None:
        self.seen.append((step.i, step.x.clone(), step.x0.clone(), dict(step.outputs), step.output))
        self._now("predicted", step)

    def after_step(self, step: Any) -> None:
        self._now("after", step)


def _set(name: str) -> Any:
    return lambda step: setattr(step, name, getattr(step, name) + 1)


@pytest.mark.parametrize(
    ("at", "act", "why"),
    [
        ("before", _set("x"), "changed the latents"),
        ("predicted", _set("output"), "changed the prediction"),
        ("after", _set("x"), "changed the latents"),
        ("predicted", lambda step: step.predict(step.x + 1), "other latents"),
        ("before", lambda step: step.grad(lambda prediction: prediction.x0().sum()), "gradient with respect"),
    ],
)
def test_changes_that_only_our_loop_can_make_are_refused(at, act, why):
    pipe = tiny_pipeline("sd")
    before = fingerprint(pipe)
    with pytest.raises(NotSupported, match=f"Look .*{why}.*generate"), attached(pipe, Look(at, act)):
        draw(pipe)
    assert fingerprint(pipe) == before and type(pipe).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_steps_hold_what_they_hold_in_our_loop(kind):
    made, _, (ours, theirs, _) = both(kind, Look)
    assert len(ours.seen) == len(theirs.seen) == 2
    for (i, x, x0, outputs, output), (j, y, y0, others, other) in zip(ours.seen, theirs.seen, strict=True):
        assert i == j and torch.equal(x, y) and torch.equal(x0, y0) and outputs.keys() == others.keys()
        torch.testing.assert_close(output, other, atol=1e-6, rtol=1e-6)
        for name in outputs:
            assert torch.equal(outputs[name], others[name])


# --- nothing stays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "error"), [("predicted", KeyboardInterrupt), ("encoder", RuntimeError), ("denoiser", KeyboardInterrupt)]
)
def test_an_exception_leaves_nothing(at, error, examples):
    pipe = tiny_pipeline("sd", fresh=True)
    before, plain = fingerprint(pipe), draw(pipe)

    def fail(*_: Any) -> None:
        raise error

    where = {"encoder": pipe.text_encoder, "denoiser": pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2}
    handle = where[at].register_forward_hook(fail) if at in where else None
    systems = [DAAM(), LoRA(file="example-lora", partial=True)] + ([Look("predicted", fail)] if at not in where else [])
    with pytest.raises(error), attached(pipe, systems):
        draw(pipe)
    if handle is not None:
        handle.remove()
    assert type(pipe).__name__ == "StableDiffusionPipeline" and "step" not in vars(pipe.scheduler)
    assert fingerprint(pipe) == before and torch.equal(draw(pipe), plain)


def test_a_call_that_failed_does_not_count():
    pipe = tiny_pipeline("sd")
    with attached(pipe, DAAM(words=["cube"])) as run:
        with pytest.raises(NoMatch, match="'cube'"):
            draw(pipe, prompt="a dog")
        draw(pipe)
    assert (run.calls, len(run.maps)) == (1, 1)


# --- called otherwise than once ---------------------------------------------------------------------------------------


def test_two_calls_are_two_batches():
    pipe = tiny_pipeline("sd")
    with attached(pipe, DAAM()) as run:
        draw(pipe)
        draw(pipe, prompt=["a dog", "a cat on a cube"], num_images_per_prompt=2)
    assert [maps.prompt for maps in run.maps] == [PROMPT, "a dog", "a dog", "a cat on a cube", "a cat on a cube"]
    with attached(pipe, DAAM()) as alone:
        draw(pipe)
    assert torch.equal(run.maps[0].map("cube"), alone.maps[0].map("cube"))
    with pytest.raises(NotSupported, match="holds one batch"), attached(pipe, Recorder()):
        draw(pipe)
        draw(pipe)


def test_never_called():
    pipe = tiny_pipeline("sd")
    with pytest.raises(NoMatch, match="was not called"), attached(pipe, DAAM()):
        pass


def test_two_guests_at_once():
    pipe = tiny_pipeline("sd")
    with attached(pipe, DAAM()):
        with pytest.raises(Conflict, match="attached already"), attached(pipe, DAAM()):
            pass
        draw(pipe)
    with attached(pipe, [DAAM(), DAAM(words=["cube"])]) as run:
        draw(pipe)
    assert run["daam 2"].maps[0].words == ("cube",)
    with pytest.raises(BadInput, match="run\\['daam'\\].maps"):
        run.maps  # noqa: B018
    with pytest.raises(UnknownName, match="daam 2"):
        run["daam 3"]


def test_attached_and_our_loop():
    """Our loop does not ignore an attached system; one attached in the middle of our loop sees its own call alone."""
    model = tiny_model("sd")
    with pytest.raises(Conflict, match="interventions"), attached(model, DAAM()):
        generate(model, PROMPT, steps=1, decode=False)
    found: list[Any] = []

    def on_step(step: Any) -> None:
        if step.i == 0:
            with attached(model.pipe, DAAM()) as run:
                draw(model.pipe)
            found.append(run.maps[0].map("cube"))

    ours, alone = DAAM(), DAAM()
    given = {"steps": 2, "decode": False, "size": (SIZE, SIZE)}
    with_guest = generate(model, "a cube", interventions=ours, on_step=on_step, **given)
    assert torch.equal(with_guest.latents, generate(model, "a cube", interventions=alone, **given).latents)
    assert torch.equal(ours.maps[0].map("cube"), alone.maps[0].map("cube"))
    with attached(model.pipe, DAAM()) as run:
        draw(model.pipe)
    assert torch.equal(found[0], run.maps[0].map("cube"))


def test_two_threads():
    """One call after the other: the denoiser of the one would be taken for that of the other."""
    pipe, raised = tiny_pipeline("sd"), []

    def other() -> None:
        try:
            draw(pipe)
        except Conflict as error:
            raised.append(str(error))

    def on_step(_: Any, __: int, ___: Any, kept: Any) -> Any:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return kept

    with attached(pipe, DAAM()) as run:
        draw(pipe, callback_on_step_end=on_step)
    assert len(run.maps) == 1 and "called by another thread" in raised[0]


def test_a_call_inside_a_call():
    """The denoiser of the one would be taken for that of the other: of the pipeline itself, of another one with the
    same network, attached or not. Other networks do not mind."""
    pipe, other = tiny_pipeline("sd", fresh=True), tiny_pipeline("sd3")
    sharing = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    before = fingerprint(Model(pipe))

    def drawing(inner: Any, steps: int = 1) -> Any:
        def on_step(_: Any, i: int, __: Any, kept: Any) -> Any:
            if i == 0:
                draw(inner, steps=steps)
            return kept

        return on_step

    with pytest.raises(Conflict, match="inside its own call"), attached(pipe, DAAM()):
        draw(pipe, callback_on_step_end=drawing(pipe))
    for steps, why in ((1, "walks beyond the 1 levels"), (2, "steps at t = 501")):
        with pytest.raises(NotSupported, match=f"{why}.*; if another pipeline draws with its unet meanwhile"):
            with attached(pipe, DAAM()):
                draw(pipe, steps=steps, callback_on_step_end=drawing(sharing, steps))
    with pytest.raises(Conflict, match="while another pipeline draws with the same unet"):
        with attached(pipe, DAAM()), attached(sharing, DAAM()):
            draw(pipe, callback_on_step_end=drawing(sharing))
    assert fingerprint(Model(pipe)) == before
    with attached(pipe, DAAM()) as run, attached(other, DAAM()) as inner:
        draw(pipe, callback_on_step_end=drawing(other))
    assert len(run.maps) == len(inner.maps) == 1
    with attached(pipe, DAAM()) as alone:
        draw(pipe)
    assert torch.equal(run.maps[0].map("cube"), alone.maps[0].map("cube"))


# --- networks and calls that cannot be seen through -------------------------------------------------------------------


def _compiled(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def _compiled_in_place(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


def _compiled_forward(pipe: Any) -> None:
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.forward = torch.compile(attention.forward, backend="eager")


def _cached(**how: Any) -> Any:
    ((name, given),) = how.items()
    return lambda pipe: pipe.transformer.enable_cache(getattr(diffusers, f"{name}Config")(**given))


CACHES = [
    _cached(FirstBlockCache={"threshold": 0.1}),
    _cached(PyramidAttentionBroadcast={"spatial_attention_block_skip_range": 2, "current_timestep_callback": int}),
    _cached(FasterCache={"current_timestep_callback": int}),
    _cached(TaylorSeerCache={}),
    _cached(MagCache={"mag_ratios": [1.0, 1.0], "num_inference_steps": 2}),
    _cached(SeaCache={"raw_vision_callback": print}),
    _cached(TextKVCache={}),
]


def _flash(pipe: Any) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    for module in pipe.transformer.modules():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = AttentionBackendName.FLASH


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_compiled, "compiled by torch.compile"),
        (_compiled_in_place, "compiled by torch.compile"),
        (_compiled_forward, "compiled by torch.compile"),
        *((cached, r"disable_cache\(\)") for cached in CACHES),
        (_flash, r"set_attention_backend\('native'\)"),
    ],
)
def test_attention_that_cannot_be_seen_is_refused(change, why):
    pipe = tiny_pipeline("flux", fresh=True)
    change(pipe)
    own = dict(vars(pipe.transformer))
    with pytest.raises(NotSupported, match=why), attached(pipe, DAAM()):
        draw(pipe)
    left = vars(pipe.transformer).keys() - {"_diffusers_hook"}  # which the pipeline itself may hang there
    assert left == own.keys() - {"_diffusers_hook"} and type(pipe).__name__ == "FluxPipeline"


class Coded(torch.nn.Linear):
    """A layer whose weights are bytes and a scale, as those of quantizers are."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.register_buffer("scale", layer.weight.abs().amax() / 127)
        self.weight = torch.nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float() * self.scale, self.bias)


def test_quantized_networks(examples):
    """Seen as their whole weights would be; an adapter that would meet codes is refused."""
    coded, whole = (tiny_pipeline("sd", fresh=True) for _ in range(2))
    for path, layer in list(whole.unet.named_modules()):
        if path.endswith((".to_q", ".to_k", ".to_v")):
            other = Coded(layer)
            parent, _, name = path.rpartition(".")
            setattr(coded.unet.get_submodule(parent), name, other)
            layer.weight.data = other.weight.float() * other.scale
    maps = []
    for pipe in (coded, whole):
        with attached(pipe, DAAM(words=["cube"])) as run:
            draw(pipe)
        maps.append(run.maps)
    assert_same_maps(*maps)
    before = fingerprint(coded)
    with (
        pytest.raises(NotSupported, match="quantized .Coded.*whole weights"),
        attached(coded, LoRA(file="example-lora", partial=True)),
    ):
        draw(coded)
    assert fingerprint(coded) == before


class Int8(Tensor):
    """Codes and a scale in a tensor's place, as torchao's: it says float, and knows linear maps alone."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], _: None, size: Any, stride: Any) -> Any:
        return Int8(**parts)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.codes * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"Int8 knows no {func}")


def test_networks_quantized_by_tensors_of_their_own(examples):
    """Read, and adapted by LoRA, which adds to outputs; what would need the weights themselves is refused by name."""
    coded, whole = (tiny_pipeline("sd", fresh=True) for _ in range(2))
    for path, layer in list(whole.unet.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            scale = layer.weight.abs().amax() / 127
            codes = (layer.weight / scale).round().to(torch.int8)
            coded.unet.get_submodule(path).weight = torch.nn.Parameter(Int8(codes, scale), requires_grad=False)
            layer.weight.data = codes * scale
    for systems in (lambda: DAAM(words=["cube"]), lambda: LoRA(file="example-lora", partial=True)):
        found = []
        for pipe in (coded, whole):
            with attached(pipe, systems()):
                found.append(draw(pipe))
        assert torch.equal(*found)
    for change in (
        lambda: build("weights:file=example-weights,partial=true").weights(Model(coded)),
        lambda: LoRA(file="example-lora", partial=True).merge(Model(coded)),
    ):
        with pytest.raises(NotSupported, match="is quantized .Int8, torch.float32.*neither exchanged nor merged"):
            change()
    before = Model(coded).weight_hash
    coded.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.codes[0] += 1
    assert Model(coded).weight_hash != before


def test_a_pipeline_that_reads_other_texts():
    """The latent upscaler reads no prompt where it is not guided: no map may be drawn of words that nobody read."""
    pipe = pipeline_of("sd latent upscale")
    with attached(pipe, DAAM(words=["cube"])):
        with pytest.raises(NoMatch, match="cube"):
            draw(pipe, "sd latent upscale", guidance_scale=0.0)
        draw(pipe, "sd latent upscale")


def test_embeddings_in_place_of_a_prompt():
    pipe = tiny_pipeline("sd")
    embeds = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    with pytest.raises(NotSupported, match="attached.*prompt='...'"), attached(pipe, DAAM()):
        draw(pipe, **given)
    with attached(pipe, DAAM(), prompt=PROMPT) as run:
        draw(pipe, **given)
    with attached(pipe, DAAM()) as own:
        draw(pipe)
    assert torch.equal(run.maps[0].map("cube"), own.maps[0].map("cube"))
    given["prompt_embeds"] = torch.cat([embeds[0], embeds[0]], 1)
    given["negative_prompt_embeds"] = torch.cat([embeds[1], embeds[1]], 1)
    with pytest.raises(NotSupported, match="154 text positions"), attached(pipe, DAAM(), prompt=PROMPT):
        draw(pipe, **given)


def test_prompts_of_several_encoders():
    with pytest.raises(NotSupported, match="different prompts"), attached(tiny_pipeline("sdxl"), DAAM()):
        draw(tiny_pipeline("sdxl"), prompt_2="a dog")
    with attached(tiny_pipeline("flux"), DAAM(words=["ball"])) as run:  # only its T5 is seen by attention
        draw(tiny_pipeline("flux"), prompt="a dog", prompt_2="a blue ball")
    assert run.maps[0].prompt == "a blue ball"


def test_negative_prompts_and_windows():
    pipe = tiny_pipeline("sd")
    with attached(pipe, DAAM(negative=True)) as run:
        draw(pipe, negative_prompt="a dog")
    assert run.maps[0].words == ("a", "dog")
    with pytest.raises(BadInput, match="no negative prompt"), attached(pipe, DAAM(negative=True)):
        draw(pipe)
    pipe = pipeline_of("sd img2img")
    with attached(pipe, DAAM(window=(0.5, 1.0))) as run:
        draw(pipe, "sd img2img", steps=4)
    assert run.coverage["daam"]["steps"] == [3, 4]  # of five timesteps, of which PNDM says the second twice


def test_what_is_no_pipeline():
    for what in (print, tiny_pipeline("sd").unet, "sd"):
        with pytest.raises(BadInput, match="takes a diffusers pipeline"), attached(what, DAAM()):
            pass
    with pytest.raises(BadInput, match="leave it out"), attached(tiny_pipeline("sd"), DAAM(), text="last 77"):
        draw(tiny_pipeline("sd"))


def test_the_public_face_takes_texts():
    pipe = tiny_pipeline("sd")
    with sfumato.attached(pipe, "daam:words=[cube]") as run:
        draw(pipe)
    assert run.maps[0].words == ("cube",)
    with pytest.raises(SfumatoError, match="daam"), sfumato.attached(pipe, "dam"):
        pass
