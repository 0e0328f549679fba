"""Attend-and-Excite on every family against loss and gradient by hand in float64; words, schedules, refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sfumato.attention import Site, Tap
from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported
from sfumato.models.quiet import quiet
from sfumato.sampling import Intervention, generate
from sfumato.steer.attend_excite import AttendExcite, smoothing_kernel
from sfumato.steer.attend_excite.choices import sites_of
from sfumato.steer.attend_excite.word_maps import WordMaps
from sfumato.text import Words
from tests.helpers import fingerprint
from tests.tiny import tiny_model

PROMPTS = ["a red cube and a green ball", "a dog on a small red cone"]
WORDS = ["cube", "green ball", "dog", "cone"]  # of one token and of several, one to two of each prompt


def guided(model, scale=3.0):
    return {} if model.embeds_guidance else {"guidance": scale}


class Sharp(Intervention):
    """Multiplies the scores of attention to text, so that the random weights of tiny models look at something."""

    role = "editor"

    def __init__(self, factor=8.0):
        self.factor = factor

    def taps(self):
        def sharpen(call):
            self.mark(call.step)
            return call.scores() * self.factor

        return [Tap(lambda site: site.text is not None, edit_scores=sharpen, name="sharp")]


class Watch(Intervention):
    """Latents before anything moved them (``on_noise``) and as the prediction saw them."""

    def __init__(self):
        self.seen = []

    def on_noise(self, run, x):
        self.noise = x.clone()
        return x

    def after_predict(self, step):
        self.seen.append(step.x.clone())
        self.mark(step)


class Probabilities(TorchFunctionMode):
    """Every attention probability in a forward pass, differentiable, independently of the seam."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            scores = (q.double() @ k.double().transpose(-1, -2)) / q.shape[-1] ** 0.5
            mask = kwargs.get("attn_mask")
            self.found.append((scores if mask is None else scores + mask.double()).softmax(-1))
        return func(*args, **kwargs)


def loss_by_hand(model, sites, probs, row, prompt, wanted, whole, sharpness=None):
    """The loss of one sample, word by word and token by token."""
    maps = []
    for site, each in zip(sites, probs, strict=True):
        if site.text is not None and site.grid == (8, 8):
            block = each[row][:, slice(*site.image), slice(*site.text)]
            maps.append(block / block.sum(-1, keepdim=True))
    attention = torch.cat(maps).mean(0)  # (64 t)
    words = Words(model)
    tokens = sorted({p for positions in words.tokens(prompt).values() for p in positions})
    rivals = list(range(1, attention.shape[1] - 1)) if whole else tokens
    if sharpness is None:
        held = float(attention[:, rivals].detach().sum(-1).mean())  # by the tokens that share
        sharpness = 100 * 0.1 / held if held > 0.1 else 100
    shares = torch.softmax(sharpness * attention[:, rivals], -1)
    taps = [math.exp(-1), 1, math.exp(-1)]  # exp(-(x / 2 sigma)^2) at sigma 0.5
    losses = []
    for word in wanted:
        heat = 0
        for positions in set(words.one(prompt, word).tokens.values()):
            heat = heat + sum(shares[:, rivals.index(p)] for p in positions) / len(positions)
        padded = F.pad(heat.reshape(1, 1, 8, 8), (1, 1, 1, 1), mode="reflect")[0, 0]
        smooth = sum(
            taps[i] * taps[j] / sum(taps) ** 2 * padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)
        )
        losses.append(1 - smooth.max())
    return max(losses)


KINDS = ("sd", "sd2", "sdxl", "sd3", "sd35", "sd3clip", "flux", "pixart")


@pytest.mark.parametrize("kind, sharpness", [*((kind, None) for kind in KINDS), ("sd", 100.0), ("sd3", 30.0)])
def test_one_step_is_the_gradient_by_hand(kind, sharpness):
    model = tiny_model(kind, fresh=True)
    model.to(dtype=torch.float64)
    options = dict(steps=1, seed=3, decode=False, **guided(model))
    given = {"words": WORDS, "thresholds": [], "strength": 30.0, "resolution": 8, "sharpness": sharpness}
    system, watch = AttendExcite(**given), Watch()
    generate(model, PROMPTS, interventions=[system, watch], **options)
    scheduler = model.make_scheduler(None)
    t = model.timesteps(scheduler, 1, 32, 32)[0]
    scale = float(watch.noise.std()) if kind == "sdxl" else 1.0  # Euler: latents as long as the noise level says
    condition = model.encode_text(PROMPTS, guidance=False, embedded_guidance=3.5)
    for row, wanted in enumerate([["cube", "green ball"], ["dog", "cone"]]):
        x = watch.noise[row : row + 1].detach().requires_grad_(True)
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        probs = Probabilities()
        with quiet(), probs:
            model.predict(scaled, t, condition.rows([row]))
        whole = kind in ("sd", "sd2", "sdxl")
        loss = loss_by_hand(model, model.sites(32, 32), probs.found, 0, PROMPTS[row], wanted, whole, sharpness)
        (gradient,) = torch.autograd.grad(loss, x)
        shift = watch.seen[0][row] - watch.noise[row]
        assert system.attended[row].losses == {0: [pytest.approx(float(loss.detach()), abs=1e-6)]}
        factor = 30.0
        if kind == "sdxl":
            alpha = nurse_alpha(scheduler, t)
            assert scale == pytest.approx(1 / alpha, rel=0.2)
            factor /= alpha**2
        torch.testing.assert_close(shift, -factor * gradient[0], rtol=1e-4, atol=1e-9)
        assert shift.abs().max() > 1e-6


@pytest.mark.parametrize("held", [0.05, 0.1, 0.2, 1.0])
def test_tokens_that_hold_more_attention_share_it_less_sharply(held):
    """Stable Diffusion's start token keeps most of it, for which 100 was made."""
    model = tiny_model("sd")
    reading = Words(model).read("a ball")
    site = next(site for site in model.sites(32, 32) if site.kind == "cross" and site.grid == (8, 8))

    def maps(sharpness):
        return WordMaps([reading], [reading.find("ball")], [site], "all", None, model.device, sharpness)

    found, n = maps(None), len(maps(None).columns)
    attention = torch.rand(1, 2, 64, n, generator=torch.Generator().manual_seed(0))
    by_hand = maps(min(100.0, 10.0 / held))
    found.sites = by_hand.sites = {site.path: held * attention / attention.sum(-1).mean()}
    torch.testing.assert_close(found.take([0]), by_hand.take([0]))


def nurse_alpha(scheduler, t):
    """Share of picture in latents at ``t`` of a Karras-scaled scheduler: alpha^2 + sigma^2 = 1."""
    sigma = float(scheduler.sigmas[list(scheduler.timesteps).index(t)])
    return 1 / math.sqrt(1 + sigma**2)


def test_kernels():
    def row(**options):
        return [round(v, 3) for v in smoothing_kernel(0.5, **options)[0, 0].sum(0).tolist()]

    assert row() == [0.212, 0.576, 0.212] and row(true_gaussian=True) == [0.107, 0.787, 0.107]
    assert smoothing_kernel(0.5).shape == (1, 1, 3, 3)
    assert smoothing_kernel(1.0).sum().item() == pytest.approx(1)


def losses_of(prompts, seeds, *others, model=None, **params):
    system = AttendExcite(**{"thresholds": [(0, 0.3)], "strength": 40.0, "sharpness": 100.0, **params})
    result = generate(
        model or tiny_model("sd"), prompts, seed=seeds, steps=2, scheduler="ddim", guidance=3.0, decode=False,
        interventions=[system, *others],
    )  # fmt: skip
    return [one.losses for one in system.attended], result


@pytest.fixture(scope="module")
def sharp():
    """A model whose attention is sharp by its weights."""
    model = tiny_model("sd", fresh=True)
    for name, module in model.denoiser.named_modules():
        if name.endswith("attn2.to_q"):
            module.weight.data *= 4
    return model


def test_refinement_stops_as_soon_as_the_threshold_is_met(sharp):
    [losses], _ = losses_of("a red cube and a blue ball", 3, model=sharp)
    assert list(losses) == [0] and len(losses[0]) > 2
    assert all(loss > 0.7 for loss in losses[0][:-1]) and losses[0][-1] <= 0.7
    [again], _ = losses_of("a red cube and a blue ball", 3, model=sharp, reference=True)
    assert len(again[0]) == len(losses[0]) + 1 and again[0][:-1] == losses[0]
    few = len(losses[0]) - 2
    [limited], _ = losses_of("a red cube and a blue ball", 3, model=sharp, tries=few)
    assert limited[0] == losses[0][: few + 1]
    [single], _ = losses_of("a red cube and a blue ball", 3, model=sharp, thresholds=[])
    assert single[0] == losses[0][:1]


def test_each_sample_is_refined_as_if_alone(sharp):
    prompts, seeds = ["a red cube and a blue ball", "a dog on a red ball", "a cat and a dog"], [3, 8, 5]
    together, batch = losses_of(prompts, seeds, model=sharp)
    lengths = [len(one[0]) for one in together]
    assert len(set(lengths)) > 1
    cost = 0.0
    for i in range(3):
        [alone], single = losses_of(prompts[i], seeds[i], model=sharp)
        assert [len(losses) for losses in alone.values()] == [len(losses) for losses in together[i].values()]
        torch.testing.assert_close(torch.tensor(alone[0]), torch.tensor(together[i][0]), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(batch.latents[i], single.latents[0], rtol=1e-3, atol=1e-3)
        cost += single.cost / 3
    assert batch.cost == pytest.approx(cost)  # whoever is done costs nothing any more


def test_beside_an_editor_of_attention_whole_batches_are_run():
    """Its edits apply to the extra passes, and are made for all rows."""
    prompts, seeds = ["a red cube and a blue ball", "a dog on a red ball"], [3, 8]
    together, _ = losses_of(prompts, seeds, Sharp(), thresholds=[(0, 0.1)])
    assert len(together[0][0]) != len(together[1][0])
    for i in range(2):
        [alone], _ = losses_of(prompts[i], seeds[i], Sharp(), thresholds=[(0, 0.1)])
        torch.testing.assert_close(torch.tensor(alone[0]), torch.tensor(together[i][0]), rtol=1e-3, atol=1e-4)

    class Asks(Intervention):
        role = "steerer"

        def before_predict(self, step):
            self.mark(step)
            step.grad(lambda prediction: prediction.x0().sum((1, 2, 3)), samples=[0])

    with pytest.raises(Conflict, match="while others edit attention"):
        generate(tiny_model("sd"), prompts, steps=1, interventions=[Asks(), Sharp()])


def test_gradients_of_some_samples_are_those_of_all():
    kept = {}

    class Asks(Intervention):
        role = "steerer"

        def before_predict(self, step):
            def loss(prediction):
                return prediction.x0().square().sum((1, 2, 3))

            before = step.run.cost
            kept["some"] = step.grad(loss, samples=[2, 0])
            assert step.run.cost - before == pytest.approx(2 * 2 / 3)
            kept["all"] = step.grad(loss)
            self.mark(step)

    generate(tiny_model("sdxl"), ["a cube", "a ball", "a dog"], steps=1, interventions=Asks(), decode=False)
    torch.testing.assert_close(kept["some"], kept["all"][[2, 0]], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("steps", "expected"), [(50, [0, 10, 20]), (10, [0, 2, 4])])
def test_thresholds_and_window_are_shares_of_progress(steps, expected, monkeypatch):
    system = AttendExcite()
    moved = []
    monkeypatch.setattr(AttendExcite, "_move", lambda self, step, rows, _: moved.append(step.i) or [0.0] * len(rows))
    monkeypatch.setattr(AttendExcite, "coverage", lambda self: {"calls": 1})
    model = tiny_model("sd")
    monkeypatch.setattr(
        type(model), "predict", lambda self, x, t, c, names=(), **_: torch.zeros_like(x).repeat(len(names), 1, 1, 1)
    )
    generate(
        model, "a cube and a ball", steps=steps, guidance=3.0, scheduler="ddim", interventions=system, decode=False
    )
    assert sorted(system._levels) == expected and system._levels[0] == 0.05
    assert moved == list(range(steps // 2))
    system = AttendExcite()
    generate(  # PNDM evaluates 51 times
        model, "a cube and a ball", steps=50, guidance=3.0, scheduler="pndm", interventions=system, decode=False
    )
    assert sorted(system._levels) == [0, 10, 20]


def test_step_size_falls_with_the_root():
    run = SimpleNamespace(path=SimpleNamespace(scale=lambda t: 1.0), t=0, total=50)
    sizes = []
    for i in (0, 24, 49):
        step = SimpleNamespace(**vars(run), i=i)
        sizes.append(float(-AttendExcite()._shift(step, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))))
    expected = [20 * math.sqrt(r) for r in torch.linspace(1, 0.5, 50)[[0, 24, 49]].tolist()]
    assert sizes == pytest.approx(expected) and round(sizes[1], 1) == 17.4


def test_relative_steps_move_by_a_share_of_the_latents():
    model, watch = tiny_model("sdxl"), Watch()
    system = AttendExcite(step="relative", strength=0.1, thresholds=[])
    generate(model, PROMPTS, steps=1, interventions=[system, watch], decode=False)
    shift = (watch.seen[0] - watch.noise).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(shift, 0.1 * watch.noise.square().mean((1, 2, 3)).sqrt(), rtol=1e-4, atol=0)
    still = AttendExcite(step="relative", strength=0.1, enough=0.001)  # every word has that much
    watch = Watch()
    generate(model, PROMPTS, steps=1, interventions=[still, watch], decode=False)
    assert torch.equal(watch.seen[0], watch.noise)


def test_the_nouns_of_each_prompt_by_default():
    system = AttendExcite(thresholds=[])
    prompts = ["a red cube and a cube on a dog", "a small green ball"]
    generate(tiny_model("sd"), prompts, steps=1, interventions=system, decode=False)
    assert [one.words for one in system.attended] == [("cube#1", "cube#2", "dog"), ("ball",)]
    generate(tiny_model("sd"), prompts[1:], steps=1, interventions=system, decode=False)
    assert [one.words for one in system.attended] == [("ball",)]  # a new run starts anew
    assert system.attended[0].before.shape == (1, 8, 8)


def test_pictures_show_first_and_last():
    system = AttendExcite(words=["cube", "ball"], thresholds=[])
    result = generate(tiny_model("sd"), "a red cube and a blue ball", steps=3, interventions=system, size=(48, 32))
    [picture] = system.pictures(result, 0).values()
    assert picture.width > 4 * picture.height * 48 / 32
    idle = AttendExcite(words=["cube", "ball"], strength=0)
    result = generate(tiny_model("sd"), "a red cube and a blue ball", steps=2, interventions=idle)
    assert idle.pictures(result, 0) == {} and result.coverage["attend_excite"]["cost"] == 0


@pytest.mark.parametrize(
    ("grids", "expected"),
    [
        ([(64, 64), (32, 32), (16, 16), (8, 8)], (16, 16)),  # Stable Diffusion at 512 pixels
        ([(64, 96), (32, 48), (16, 24), (8, 12)], (16, 24)),
        ([(128, 128), (64, 64), (32, 32)], (32, 32)),  # SDXL at 1024
        ([(16, 16), (8, 8), (4, 4)], (8, 8)),  # toy-sd at 64
        ([(64, 64)], (64, 64)),  # joint attention has one size
        ([(4, 4)], (4, 4)),
    ],
)
def test_maps_of_a_quarter_of_the_latents_are_read(grids, expected):
    sites = [Site(f"s{i}", "cross", g, (0, 77), (0, g[0] * g[1]), 8, f"down.{i}", i) for i, g in enumerate(grids)]
    chosen = sites_of(sites, [], None, "m")
    assert [site.grid for site in chosen] == [expected]


def test_only_the_layers_up_to_the_last_one_read_are_run():
    model = tiny_model("sd")
    system = AttendExcite(layers=["down"], thresholds=[], window=(0.0, 0.5))
    result = generate(model, PROMPTS, steps=2, scheduler="ddim", guidance=3.0, interventions=system, decode=False)
    sites = model.sites(32, 32)
    part = (max(s.index for s in sites if s.block == "down.0" and s.kind == "cross") + 1) / len(sites)
    assert result.coverage["attend_excite"]["cost"] == pytest.approx(2 * part) and part < 0.5
    assert {path.split(".")[0] for path in result.coverage["attend_excite"]["sites"]} == {"down_blocks"}
    assert result.cost == pytest.approx(4 + 2 * part)


def test_weights_are_frozen_meanwhile_and_thawed_afterwards():
    model = tiny_model("sd", fresh=True)
    for module in model.modules.values():
        module.requires_grad_(True)
    before = fingerprint(model)
    generate(model, PROMPTS, steps=1, interventions=AttendExcite(thresholds=[]), decode=False)
    assert fingerprint(model) == before


def test_small_steps_give_the_most_neglected_word_more_and_more_attention(sharp):
    losses, _ = losses_of(["a red cube and a blue ball", "a dog"], 3, model=sharp, strength=0.3, thresholds=[(0, 1.0)])
    for one in losses:
        assert len(one[0]) == 21 and all(later < earlier for earlier, later in zip(one[0], one[0][1:], strict=False))


def test_refusals():
    model = tiny_model("sd")

    def run(prompt="a red cube and a ball", **params):
        generate(model, prompt, steps=1, interventions=AttendExcite(**params), decode=False)

    with pytest.raises(NoMatch, match="'cubes' is not in the prompt. Did you mean 'cube'"):
        run(words=["cubes"])
    with pytest.raises(NoMatch, match="the prompt 'a dog' has none of .'cube'.; name words of it. Its words: a, dog"):
        run(["a cube", "a dog"], words=["cube"])
    with pytest.raises(NoMatch, match="has no noun that is recognised; name words of it. Its words: and, of"):
        run("and of")
    with pytest.raises(NoMatch, match="resolution=5 of attend_excite: at this size tiny-sd attends to text at 16, 8"):
        run(resolution=5)
    with pytest.raises(NoMatch, match=r"layers=\['top'\] of attend_excite match none of tiny-sd's: down.0, mid, up.1"):
        run(layers=["top"])
    with pytest.raises(BadInput, match=r"window of attend_excite is \(0.5, 0.2\)"):
        run(window=(0.5, 0.2))
    with pytest.raises(BadInput, match=r"thresholds of attend_excite have \(10, 0.5\); progress is from 0"):
        run(thresholds=[(10, 0.5)])
    with pytest.raises(BadInput, match="scale_range of attend_excite"):
        run(scale_range=(1, -1))
    with pytest.raises(BadInput, match="special tokens are no things"):
        run(words=["cube", "<end>"])
    with pytest.raises(BadInput, match="strength of attend_excite is -1"):
        run(strength=-1)
    sites = [Site("s", "self", (8, 8), None, (0, 64), 8, "down.0", 0)]
    with pytest.raises(NotSupported, match="m has none"):
        sites_of(sites, [], None, "m")


def test_attention_that_another_system_holds_is_a_conflict_that_names_it():
    model = tiny_model("sd")
    held = PromptToPrompt(source="a red cube", cross_replace=[1.0])
    with pytest.raises(Conflict, match="prompt_to_prompt replaces that attention"):
        generate(model, "a red ball", steps=2, interventions=[AttendExcite(words=["ball"]), held], decode=False)


# -- clips ------------------------------------------------------------------------------------------------------------


def test_one_step_of_a_clip_is_the_gradient_by_hand():
    """A word's loss is the mean over the frames of how far each is from attending to it; the worst word counts."""
    model, frames = tiny_model("animatediff", fresh=True), 3
    model.to(dtype=torch.float64)
    options = dict(steps=1, seed=3, frames=frames, guidance=3.0, decode=False)
    given = {"words": WORDS, "thresholds": [], "strength": 30.0, "resolution": 8, "sharpness": 100.0}
    system, watch = AttendExcite(**given), Watch()
    generate(model, PROMPTS, interventions=[system, watch], **options)
    scheduler = model.make_scheduler(None)
    t = model.timesteps(scheduler, 1, 32, 32)[0]
    condition = model.encode_text(PROMPTS, guidance=False)
    for row, wanted in enumerate([["cube", "green ball"], ["dog", "cone"]]):
        x = watch.noise[row : row + 1].detach().requires_grad_(True)
        probs = Probabilities()
        with quiet(), probs:
            model.predict(x, t, condition.rows([row]))
        sites = model.sites(32, 32, frames=frames)
        by_word = []
        for word in wanted:
            by_frame = [
                loss_by_hand(model, sites, probs.found, f, PROMPTS[row], [word], True, 100.0) for f in range(frames)
            ]
            by_word.append(sum(by_frame) / frames)
        loss = max(by_word)
        (gradient,) = torch.autograd.grad(loss, x)
        assert system.attended[row].losses == {0: [pytest.approx(float(loss.detach()), abs=1e-6)]}
        assert system.attended[row].before.shape == (2, frames, 8, 8)
        shift = watch.seen[0][row] - watch.noise[row]
        torch.testing.assert_close(shift, -30.0 * gradient[0], rtol=1e-4, atol=1e-9)
        assert (shift.abs().amax((0, 2, 3)) > 1e-7).all()  # every frame is moved


def test_clips_are_independent_and_strength_0_changes_nothing():
    model = tiny_model("animatediff")
    before = fingerprint(model)
    options = dict(steps=2, guidance=3.0, frames=2, decode=False)
    plain = generate(model, PROMPTS, seed=4, **options).latents
    idle = generate(model, PROMPTS, seed=4, interventions=AttendExcite(words=WORDS, strength=0), **options).latents
    assert torch.equal(plain, idle)
    given = {"words": ["red"], "thresholds": [], "step": "relative", "strength": 0.1}
    together = generate(model, PROMPTS, seed=4, interventions=AttendExcite(**given), **options).latents
    alone = generate(model, PROMPTS[1], seed=5, interventions=AttendExcite(**given), **options).latents
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)
    assert (together - plain).flatten(1).abs().amax(1).min() > 1e-3
    system = AttendExcite(words=["cube", "ball"], thresholds=[])
    result = generate(model, PROMPTS[0], steps=2, frames=2, interventions=system)
    assert system.pictures(result, 0)["attended"].height > 2 * 192
    assert fingerprint(model) == before
