"""The protocol: order, conflicts, what a step offers, gradients, cost, coverage - on small genuine pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.attention.tap import Tap
from sfumato.errors import BadInput, Conflict, NoMatch, UnknownName
from sfumato.sampling import ROLES, Intervention, Run, Stack, Step, generate
from sfumato.sampling.intervention import arrange, distinct_names
from tests.helpers import fingerprint
from tests.tiny import tiny_model

SHORT: dict[str, Any] = {"steps": 3, "seed": 1, "guidance": 4.0, "decode": False}


class Named(Intervention):
    """Does nothing but tell which method was called when."""

    def __init__(self, name: str, role: str = "observer", log: list[str] | None = None):
        self.label, self.role, self.log = name, role, [] if log is None else log

    @property
    def name(self) -> str:
        return self.label

    def _say(self, what: str) -> None:
        self.log.append(f"{self.label}.{what}")
        self.mark()

    def start(self, run: Run) -> None:
        self._say("start")

    def on_text(self, run: Run, condition: Any) -> Any:
        self._say("on_text")
        return condition

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        self._say("on_noise")
        return x

    def before_predict(self, step: Step) -> None:
        self._say(f"before_predict {step.i}")

    def taps(self) -> list[Tap]:
        self._say("taps")
        return []

    def after_predict(self, step: Step) -> None:
        self._say(f"after_predict {step.i}")

    def after_step(self, step: Step) -> None:
        self._say(f"after_step {step.i}")

    def on_decode(self, run: Run, pixels: Tensor) -> Tensor:
        self._say("on_decode")
        return pixels

    def finish(self, run: Run) -> None:
        self._say("finish")


def test_methods_are_called_in_order_and_by_role():
    log: list[str] = []
    parts = [Named("watch", "observer", log), [Named("move", "steerer", log)], Stack(Named("text", "conditioner", log))]
    generate(tiny_model("sd"), "a red cube", steps=1, interventions=parts, scheduler="ddim")
    methods = ["start", "on_text", "taps", "on_noise", "before_predict 0", "after_predict 0", "after_step 0"]
    assert log == [f"{n}.{m}" for m in [*methods, "on_decode", "finish"] for n in ("text", "move", "watch")]


def test_arranging():
    parts = [Named(role, role) for role in reversed(ROLES)]
    assert [part.name for part in arrange(parts)] == list(ROLES)
    first, second = Named("a", "editor"), Named("b", "editor")
    assert arrange([second, (first,)]) == (second, first)
    assert arrange(first + second + [Named("c", "adapter")])[1:] == (first, second)
    assert distinct_names([first, second, Named("a")]) == ["a", "b", "a 2"]
    with pytest.raises(Conflict, match="x and y each replace the trajectory"):
        arrange([Named("x", "path"), Named("y", "path")])
    with pytest.raises(Conflict, match="twice"):
        arrange([first, [first]])
    with pytest.raises(BadInput, match="'daam'"):
        arrange(["daam"])
    with pytest.raises(UnknownName, match="observer"):
        arrange([Named("x", "observers")])


def test_an_intervention_that_changes_nothing_changes_no_bit():
    for kind in ("sd", "sd3"):
        model = tiny_model(kind)
        plain = generate(model, "a red cube", **SHORT).latents
        assert torch.equal(generate(model, "a red cube", interventions=[Named("idle")], **SHORT).latents, plain)


class Silent(Intervention):
    strength = 1.0  # type: ignore[assignment]


def test_doing_nothing_is_an_error_that_lists_the_sites():
    with pytest.raises(NoMatch, match=r"Silent did nothing.*cross down.0, .*mid"):
        generate(tiny_model("sd"), "a red cube", interventions=[Silent()], **SHORT)
    harmless = Silent()
    harmless.strength = 0.0
    result = generate(tiny_model("sd"), "a red cube", interventions=[harmless], **SHORT)
    assert result.coverage == {"Silent": {"calls": 0, "sites": [], "tokens": [], "steps": [], "cost": 0.0}}


class Window(Intervention):
    window = (0.25, 0.75)

    def before_predict(self, step: Step) -> None:
        self.mark(step, sites=["mid"], tokens=["cube"])


def test_window_of_progress_and_coverage():
    part = Window()
    result = generate(
        tiny_model("sd"), "a red cube", interventions=part, steps=8, scheduler="ddim", decode=False, n=3, batch_size=2
    )
    assert result.coverage["Window"] == {
        "calls": 8, "sites": ["mid"], "tokens": ["cube"], "steps": [2, 3, 4, 5], "cost": 0.0
    }  # fmt: skip


class Edit(Intervention):
    """Every place where a step may be changed, with effects that can be computed by hand."""

    role = "guider"

    def __init__(self, where: str):
        self.where = where

    def before_predict(self, step: Step) -> None:
        self.mark(step)
        if self.where == "x":
            step.x = step.x * 0
        if self.where == "condition":
            step.condition = step.run.model.encode_text(["a dog"], guidance=True)

    def after_predict(self, step: Step) -> None:
        if self.where == "outputs":
            step.outputs["cond"] = step.outputs["uncond"]
        if self.where == "output":
            step.output = step.outputs["uncond"]

    def after_step(self, step: Step) -> None:
        if self.where == "after":
            step.x = step.x * 0 + 0.5


def test_what_a_step_lets_one_change():
    model = tiny_model("sd")
    short = {**SHORT, "scheduler": "ddim"}
    run = lambda where, **given: generate(model, "a red cube", interventions=[Edit(where)], **{**short, **given})  # noqa: E731
    dog = generate(model, "a dog", **short).latents
    assert torch.equal(run("condition").latents, dog)
    unguided = run("output").latents
    torch.testing.assert_close(run("outputs").latents, unguided)
    torch.testing.assert_close(unguided, generate(model, "", **{**short, "guidance": 1.0}).latents)
    assert torch.equal(run("after").latents, torch.full_like(dog, 0.5))
    assert torch.equal(run("x", seed=1).latents, run("x", seed=2).latents)


def test_a_step_knows_its_place():
    model = tiny_model("sd")
    seen: list[Step] = []
    result = generate(model, ["a dog", "a cat"], on_step=seen.append, **{**SHORT, "scheduler": "ddim"})
    assert [(step.i, step.total, round(step.progress, 3)) for step in seen] == [(0, 3, 0), (1, 3, 0.333), (2, 3, 0.667)]
    assert [step.t_next is None for step in seen] == [False, False, True]
    assert all(torch.equal(a.t_next, b.t) for a, b in zip(seen[:-1], seen[1:], strict=True))
    step = seen[-1]
    assert (step.rows("uncond"), step.rows("cond")) == (slice(0, 2), slice(2, 4))
    torch.testing.assert_close(result.latents, step.x0)  # DDIM ends where it sees the picture
    alpha, sigma = seen[1].path.alpha_sigma(seen[1].t)
    torch.testing.assert_close(seen[0].x, alpha * seen[0].x0 + sigma * seen[0].eps, rtol=1e-4, atol=1e-4)
    with pytest.raises(BadInput, match="'third'.*uncond, cond"):
        step.rows("third")


@pytest.mark.filterwarnings("ignore::sfumato.sampling.request.GuidanceCosts")
def test_flux_runs_its_branches_one_by_one():
    seen: list[Step] = []
    generate(tiny_model("schnell"), ["a dog", "a cat"], on_step=seen.append, **SHORT)
    assert seen[0].rows("uncond") == seen[0].rows("cond") == slice(0, 2)


class Pull(Intervention):
    """Moves latents against the gradient of a loss on x0."""

    role = "steerer"

    def __init__(self, rate: float, keep: bool = False, target: float = 2.0, branch: str = "cond"):
        self.rate, self.keeps_graph, self.target, self.branch = rate, keep, target, branch
        self.gradients: list[Tensor] = []
        self.losses: list[Tensor] = []

    @property
    def strength(self) -> float:
        return self.rate

    def loss(self, prediction: Any) -> Tensor:
        each = (prediction.x0(self.branch) - self.target).square().mean((1, 2, 3))
        self.losses.append(each.detach())
        return each

    def before_predict(self, step: Step) -> None:
        if not self.keeps_graph:
            self._pull(step)
            step.x = step.x - self.rate * self.gradients[-1]

    def after_predict(self, step: Step) -> None:
        if self.keeps_graph:
            self._pull(step)
            step.output = step.output + self.rate * self.gradients[-1]

    def _pull(self, step: Step) -> None:
        self.gradients.append(
            step.grad(self.loss, branches=("uncond", "cond") if self.branch == "guided" else ("cond",))
        )
        self.mark(step)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_gradient_is_the_derivative(kind: str):
    """Against central differences of the loss, in float64, and each sample's loss moves only its own latents."""
    model = tiny_model(kind, fresh=True)
    for module in model.modules.values():
        module.double().requires_grad_(True)
    checked = []

    class Check(Pull):
        def before_predict(self, step: Step) -> None:
            self._pull(step)
            gradient, losses = self.gradients[-1], self.losses[-1]
            direction = torch.randn(step.x.shape, generator=torch.Generator().manual_seed(0), dtype=step.x.dtype)
            direction[0] = 0
            with torch.no_grad():
                low, high = (self.loss(step.predict(step.x + h * direction)) for h in (-1e-5, 1e-5))
            torch.testing.assert_close((high - low)[1] / 2e-5, (gradient * direction).sum(), rtol=1e-5, atol=1e-8)
            assert low[0] == high[0] == losses[0]
            checked.append(step.i)

    before = fingerprint(model)
    generate(model, ["a red cube", "a dog"], interventions=[Check(0.0)], **{**SHORT, "steps": 2})
    assert checked[:2] == [0, 1]
    assert fingerprint(model) == before
    assert all(weight.grad is None for module in model.modules.values() for weight in module.parameters())


@pytest.mark.parametrize("branch", ["cond", "guided"])
def test_recorded_prediction_gives_the_same_gradient_for_less(branch: str):
    model = tiny_model("sd")
    given = {**SHORT, "steps": 1, "scheduler": "ddim"}
    rerun, recorded = Pull(0.1, branch=branch), Pull(0.1, keep=True, branch=branch)
    dear = generate(model, "a red cube", interventions=rerun, **given)
    cheap = generate(model, "a red cube", interventions=recorded, **given)
    torch.testing.assert_close(recorded.gradients[0], rerun.gradients[0])
    rows = 2 if branch == "guided" else 1
    assert dear.cost == 2 + 2 * rows and dear.coverage["Pull"]["cost"] == 2 * rows
    assert cheap.cost == 2 + 2 and cheap.coverage["Pull"]["cost"] == 2
    assert not cheap.latents.requires_grad


@pytest.mark.parametrize("keep", [False, True])
def test_strength_zero_is_the_identity(keep: bool):
    model = tiny_model("sd3")
    plain = generate(model, "a red cube", **SHORT).latents
    pulled = generate(model, "a red cube", interventions=Pull(0.0, keep), **SHORT)
    assert torch.equal(pulled.latents, plain)


def test_steering_lowers_the_loss():
    model = tiny_model("sd3")
    part, none = Pull(5.0), Pull(0.0)
    for each in (part, none):
        generate(model, "a red cube", interventions=each, **SHORT)
    assert part.losses[-1] < none.losses[-1]


def test_a_loss_without_latents_is_refused():
    class Odd(Pull):
        def loss(self, prediction: Any) -> Tensor:
            return torch.zeros(1)

    with pytest.raises(BadInput, match="does not depend on the latents"):
        generate(tiny_model("sd"), "a red cube", interventions=Odd(1.0), **SHORT)


class Restart(Intervention):
    """Goes back once, from index 2 to index 0, with given noise (Xu et al. 2023 in miniature)."""

    def __init__(self, role: str = "path"):
        self.role = role
        self.done = False

    def after_step(self, step: Step) -> None:
        if step.i == 1 and not self.done:
            self.done = True
            self.mark(step)
            step.x = self.noise = torch.full_like(step.x, 0.25)
            step.goto(0)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "heun"])
def test_a_path_may_restart(scheduler: str):
    """After the restart everything is as in a fresh run from that noise, the history of multistep schedulers too."""
    model = tiny_model("sd")
    given = {**SHORT, "scheduler": scheduler}
    walked: list[int] = []
    path = Restart()
    again = generate(model, "a dog", interventions=path, on_step=lambda step: walked.append(step.i), **given)
    made = model.make_scheduler(scheduler)
    model.timesteps(made, 3)
    fresh = generate(model, "a dog", latents=path.noise / float(made.init_noise_sigma), **given)
    assert walked[:4] == [0, 1, 0, 1]
    torch.testing.assert_close(again.latents, fresh.latents, rtol=1e-5, atol=1e-5)
    with pytest.raises(Conflict, match="role 'path'"):
        generate(model, "a dog", interventions=Restart("steerer"), **given)


# --- attention -------------------------------------------------------------------------------------------------------


class Maps(Intervention):
    """Sums the probabilities that image positions give to text positions."""

    def __init__(self) -> None:
        self.total = 0.0
        self.seen: list[tuple[int, str]] = []

    def taps(self) -> list[Tap]:
        return [Tap(lambda site: site.text is not None, observe=self._look, stop_after=True)]

    def _look(self, call: Any) -> None:
        if "cond" in call.rows:
            self.mark(call.step, sites=[call.site.block])
            self.seen.append((call.step.i, call.site.path))
            self.total += call.branch("cond").word_probs(slice(0, 4)).sum().item()


class Sharpen(Intervention):
    role = "editor"

    def __init__(self, factor: float):
        self.factor = factor

    def taps(self) -> list[Tap]:
        return [Tap(lambda site: site.text is not None, edit_scores=self._edit)]

    def _edit(self, call: Any) -> Tensor | None:
        self.mark(call.step, sites=[call.site.block])
        return None if self.factor == 1 else call.scores() * self.factor


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "pixart"])
def test_observing_attention_changes_no_bit_and_sees_every_step(kind: str):
    model = tiny_model(kind)
    given = {**SHORT, "scheduler": "ddim"} if kind == "pixart" else SHORT
    plain = generate(model, "a red cube", **given)
    before = fingerprint(model)
    maps = Maps()
    watched = generate(model, "a red cube", interventions=[maps, Sharpen(1.0)], **given)
    assert torch.equal(watched.latents, plain.latents)
    assert watched.cost == plain.cost
    assert fingerprint(model) == before
    sites = [site.path for site in model.sites(32, 32) if site.text is not None]
    assert maps.seen == [(i, path) for i in range(3) for path in sites]
    assert maps.total > 0


def test_editors_act_and_observers_see_the_edited_map():
    model = tiny_model("sd")
    plain, sharp = Maps(), Maps()
    generate(model, "a red cube", interventions=[plain], **SHORT)
    edited = generate(model, "a red cube", interventions=[sharp, Sharpen(30.0)], **SHORT)
    assert sharp.total != pytest.approx(plain.total, rel=1e-3)
    assert edited.coverage["Sharpen"]["steps"] == [0, 1, 2]


class Nurse(Intervention):
    """Attend-and-Excite in miniature: an extra conditional pass that ends after the last watched site."""

    role = "steerer"

    def __init__(self) -> None:
        self.maps: list[Tensor] = []
        self.tap = Tap(lambda site: site.block == "mid" and site.kind == "cross", observe=self._look, stop_after=True)

    def _look(self, call: Any) -> None:
        self.maps.append(call.branch("cond").word_probs([2]))

    def before_predict(self, step: Step) -> None:
        def loss(prediction: Any) -> Tensor:
            assert prediction.outputs == {}
            return 1 - self.maps.pop().amax((1, 2, 3))

        step.x = step.x - 0.1 * step.grad(loss, taps=[self.tap])
        self.mark(step)


def test_extra_passes_stop_early_and_are_not_seen_by_others():
    model = tiny_model("sd")
    alone, beside = Maps(), Maps()
    generate(model, "a red cube", interventions=[alone], **SHORT)
    result = generate(model, "a red cube", interventions=[beside, Nurse()], **SHORT)
    assert len(beside.seen) == len(alone.seen)
    sites = model.sites(32, 32)
    part = (max(site.index for site in sites if site.block == "mid") + 1) / len(sites)
    extra = result.coverage["Nurse"]["cost"] / 3
    assert part < 1 and extra == pytest.approx(2 * part)  # back as far as forward
    assert result.cost == pytest.approx(3 * 2 + 3 * extra)


def test_a_tap_that_matches_no_site_says_so():
    class Lost(Intervention):
        def taps(self) -> list[Tap]:
            return [Tap(lambda site: site.kind == "temporal", observe=print, name="lost")]

    model = tiny_model("sd")
    before = fingerprint(model)
    with pytest.raises(NoMatch, match="'lost'"):
        generate(model, "a red cube", interventions=[Lost()], **SHORT)
    assert fingerprint(model) == before
