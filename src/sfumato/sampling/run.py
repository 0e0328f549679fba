"""The records that interventions work with: one :class:`Run` per batch, one :class:`Step` per step of its walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.errors import BadInput, Conflict
from sfumato.markup import described
from sfumato.models import Condition, Model, Site
from sfumato.models.condition import Rows
from sfumato.sampling.guidance import Guidance, rescaled
from sfumato.sampling.noise import Path
from sfumato.sampling.process import Process
from sfumato.text.weights import WeightedPrompt, read_weights
from sfumato.text.words import Words

if TYPE_CHECKING:
    from sfumato.attention.seam import AttentionSeam
    from sfumato.attention.tap import Tap
    from sfumato.sampling.request import Request

Branches = tuple[str, ...]


@dataclass(eq=False)
class Prediction:
    """What one denoiser call said about the state ``x`` (b ...; latents in the scheduler's scaling) at ``t``:
    ``outputs`` per branch (b ... each), empty when the call's taps ended it early."""

    run: Run
    x: Tensor
    t: Tensor
    outputs: dict[str, Tensor]

    __repr__ = described

    def output(self, branch: str = "cond") -> Tensor:
        """The output of one branch, or with ``"guided"`` what guidance makes of them."""
        if branch == "guided":
            return self.run.combined(self.outputs)
        if branch not in self.outputs:
            held = ", ".join(self.outputs) or "none, for its taps ended the forward pass early"
            raise BadInput(f"branch={branch!r} was not predicted; this prediction holds: {held}.")
        return self.outputs[branch]

    def x0(self, branch: str = "cond") -> Tensor:
        """The clean latents implied (b ...). NotSupported without a noise path."""
        return self.run.path.to_x0(self.x, self.output(branch), self.t)

    def eps(self, branch: str = "cond") -> Tensor:
        """The noise implied (b ...). NotSupported without a noise path."""
        return self.run.path.to_eps(self.x, self.output(branch), self.t)


@dataclass(eq=False)
class Run:
    """One batch on its way to pictures; interventions read it.

    ``parts``: the interventions, in the order in which they act. ``samples``: indices of the batch's rows in the whole
    request. ``prompts``, ``negatives`` (plain, without weights),
    ``seeds``, ``generators``: one per row. ``size``: (width, height) in pixels; ``grid``: (h, w) of the latents or
    tokens. ``process``: how the model draws. The walk begins at index ``begin`` of ``timesteps`` and goes forward, or
    backward in time with ``direction`` -1. ``request``: all that was asked for, of which this is a batch. ``condition``
    is set after ``on_text``. ``weight``: of the prompt beside the texts of ``compose``. ``cost``: forward-equivalents
    per sample so far (1 = one row through the denoiser, a backward pass counts as one more).
    """

    model: Model
    parts: tuple[Any, ...]
    samples: range
    prompts: list[str]
    negatives: list[str] | None
    seeds: list[int]
    generators: list[torch.Generator]
    size: tuple[int, int]
    grid: tuple[int, int]
    guidance: Guidance
    process: Process
    grad: bool = False
    compose: dict[str, tuple[Condition, float]] = field(default_factory=dict)
    weight: float = 1.0
    condition: Condition | None = None
    cost: float = 0.0
    direction: int = 1
    request: Request | None = None
    stepper: Callable[[Step], Tensor] | None = None
    _stack: ExitStack = field(default_factory=ExitStack)
    _taps: list[tuple[Any, list[Tap]]] = field(default_factory=list)
    _seams: dict[tuple[Tap, ...], AttentionSeam] = field(default_factory=dict)
    _sites: dict[int | None, list[Site]] = field(default_factory=dict)
    _frozen: bool = False
    _words: Words | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def timesteps(self) -> Tensor:
        """What the network receives at each prediction of the whole schedule (total)."""
        return self.process.timesteps

    @property
    def total(self) -> int:
        """Number of predictions in the whole schedule; second-order schedulers take two per step."""
        return len(self.timesteps)

    @property
    def begin(self) -> int:
        """Index of the schedule at which the walk begins."""
        return self.process.begin

    @property
    def frames(self) -> int | None:
        """Number of frames of a clip; None where pictures are made."""
        return self.process.options.frames

    @property
    def path(self) -> Path:
        """The noise path of diffusion and flow. Raises NotSupported where the model draws in another way."""
        return self.process.path

    @property
    def scheduler(self) -> Any:
        """The diffusers scheduler. Raises NotSupported where the model draws without one."""
        return self.process.scheduler

    @property
    def sites(self) -> list[Site]:
        """Attention sites of a denoiser call at this size, in the order of execution."""
        return self.sites_with(None if self.condition is None else self.condition.cond)

    def sites_with(self, rows: Rows | None) -> list[Site]:
        """The sites of a denoiser call with these rows: texts of other branches may be of other lengths."""
        text = None if rows is None else self.model.family.text_in(rows)
        if text not in self._sites:
            length = self.model.text_length if text is None else text
            self._sites[text] = list(self.model.family.sites(*self.grid, length, self.frames or 1))
        return self._sites[text]

    @property
    def weighted(self) -> list[WeightedPrompt]:
        """The prompts with the weights that the request gave their words."""
        if self.request is None:
            return [WeightedPrompt(text, (1.0,) * len(text)) for text in self.prompts]
        return [read_weights(self.request.composition(i).text) for i in self.samples]

    @property
    def weighting(self) -> str:
        """What weights below 1 mean: see :func:`~sfumato.text.weights.encode_weighted`."""
        return "comfyui" if self.request is None else self.request.options.weighting

    @property
    def words(self) -> Words:
        """Finds words of the prompts on the text axis as it is in this run, other systems' changes included; ask late
        enough (``on_text``, or ``start`` of a role behind the editors) to see these."""
        if self._words is None:
            self._words = Words(self.model)
        return self._words

    def enter(self, context: AbstractContextManager[Any]) -> Any:
        """Enter a context that is left when the batch ends, in reverse order, whatever happens."""
        return self._stack.enter_context(context)

    def defer(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call ``callback(*args)`` when the batch ends, whatever happens."""
        self._stack.callback(callback, *args)

    def freeze(self) -> None:
        """Turn off gradients of all weights for the rest of the batch, so that only latents (and texts) receive any.
        Not in a run with ``grad``, whose caller decides what receives gradients."""
        if not self._frozen and not self.grad:
            self._frozen = True
            weights = [p for module in self.model.modules.values() for p in module.parameters() if p.requires_grad]
            self.defer(lambda: [weight.requires_grad_(True) for weight in weights])
            for weight in weights:
                weight.requires_grad_(False)

    def branches(self, progress: float) -> Branches:
        """Which branches the step at this progress evaluates, in diffusers' order."""
        guided = self.guidance.on and self.guidance.covers(progress)
        return ("uncond", "cond") if guided or self.compose else ("cond",)

    def seek(self, i: int) -> None:
        """Be ready to take the step at index ``i`` next, whatever came before."""
        self.process.seek(i)

    def advance(self, step: Step) -> Tensor:
        """The state (b ...) after ``step``."""
        if self.stepper is not None:
            return self.stepper(step)
        return self.process.advance(step.output, step.i, step.x, step.options)

    def connect_taps(self) -> None:
        """Ask every intervention what it wants from attention. The step's own prediction never stops early."""
        for part in self.parts:
            if taps := part.taps():
                self._taps.append((part, [replace(tap, stop_after=False) for tap in taps]))

    def __enter__(self) -> Run:
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def denoise(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        branches: Sequence[str],
        taps: Sequence[Tap],
        step: Step | None,
    ) -> dict[str, Tensor]:
        """Outputs (b ...) of the branches at states ``x``, under ``taps``; empty if these ended the pass early."""
        scaled = self.process.shown(x, t)
        outputs: dict[str, Tensor] = {}
        for names in self.model.calls(branches):
            if not taps:
                share, out = 1.0, self.model.predict(scaled, t, condition, names)
            else:
                seam, rows, out = self.seam(tuple(taps)), self.rows(names, len(condition)), None
                batch = condition.batch(names)
                order = partial(self.model.family.places, batch)
                with seam.forward(step, rows, self.sites_with(batch), order) as forward:
                    out = self.model.predict(scaled, t, condition, names)
                share = self._share(forward.calls) if forward.stopped else 1.0
            if out is not None:
                outputs.update(zip(names, out.chunk(len(names)), strict=True))
            self.add_cost(share * len(names) * len(condition) / len(self), step)
        return outputs

    def combined(self, outputs: dict[str, Tensor]) -> Tensor:
        """The one output that guidance makes of the branches."""
        if "uncond" not in outputs:
            return outputs["cond"]
        weights = {
            "cond": self.guidance.scale * self.weight,
            **{name: weight for name, (_, weight) in self.compose.items()},
        }
        held = [name for name in weights if name in outputs]
        conds = [outputs[name] for name in held]
        guided = self.model.family.combine(outputs["uncond"], conds, [weights[name] for name in held])
        return rescaled(guided, conds[0], self.guidance.rescale) if self.guidance.rescale > 0 else guided

    def rows(self, names: Sequence[str], samples: int | None = None) -> dict[str, slice]:
        """Where the rows of each branch lie in a denoiser call that holds these branches of so many samples (all)."""
        b = len(self) if samples is None else samples
        return {name: slice(k * b, (k + 1) * b) for k, name in enumerate(names)}

    def add_cost(self, cost: float, step: Step | None) -> None:
        """Count forward-equivalents, for the run and for the intervention that asked for them."""
        self.cost += cost
        if step is not None and step.actor is not None:
            step.actor.activity.cost += cost

    def seam(self, taps: tuple[Tap, ...]) -> AttentionSeam:
        """The seam with these taps, attached for the rest of the batch."""
        if taps not in self._seams:
            from sfumato.attention.seam import AttentionSeam

            self._seams[taps] = self.enter(AttentionSeam(self.model.denoiser, self.sites, taps))
        return self._seams[taps]

    def _share(self, calls: dict[str, int]) -> float:
        """How much of a forward pass ran until it stopped after its last wanted site, measured in sites."""
        sites = self.sites
        return (max(site.index for site in sites if site.path in calls) + 1) / len(sites)


class Step:
    """One step, handed to every intervention; (w) marks what they may replace.

    Valid from ``before_predict``: ``i`` (index in the whole schedule), ``t``, ``x`` (w), ``condition`` (w), ``options``
    (w: settings for the scheduler in this step, such as eta). From ``after_predict``: ``outputs`` per branch (w) and
    ``output`` (w), what the process will step with. In ``after_step`` ``x`` is already at the next level.

    ``x`` is the state, (b ...): latents (b c h w) in the scheduler's scaling, token ids (b n) or (b h w); outputs are
    noise, velocity or the like in the layout of the latents, or logits of tokens.
    """

    def __init__(self, run: Run, i: int, x: Tensor):
        self.run, self.i, self.x = run, i, x
        self.t: Tensor = run.timesteps[i]
        assert run.condition is not None
        self.condition: Condition = run.condition
        self.branches: Branches = run.branches(self.progress)
        self.outputs: dict[str, Tensor] = {}
        self.options: dict[str, Any] = {}
        self._output: Tensor | None = None
        self.next = i + run.direction
        self.actor: Any = None  # whose method is running
        self._predicted_at: Tensor = x

    @property
    def total(self) -> int:
        return self.run.total

    @property
    def progress(self) -> float:
        """Fraction of the schedule behind this step: 0 at the first step, below 1 at the last."""
        return self.i / self.run.total

    @property
    def path(self) -> Path:
        """The noise path. Raises NotSupported, naming who asked, where the model draws without one."""
        if not self.run.process.noise_path:
            raise self.run.process.lacks("noise path", self.actor.name if self.actor is not None else "step.path")
        return self.run.path

    @property
    def t_next(self) -> Tensor | None:
        """The timestep of the level that ``x`` has after this step; None where x is clean then."""
        following = self.i + 1 if self.run.direction > 0 else self.i
        return self.run.timesteps[following] if following < self.run.total else None

    @property
    def output(self) -> Tensor:
        """What the process steps with (b ...): the value set last, else what guidance makes of ``outputs``."""
        return self.run.combined(self.outputs) if self._output is None else self._output

    @output.setter
    def output(self, value: Tensor) -> None:
        self._output = value

    @property
    def x0(self) -> Tensor:
        """The clean latents implied by ``output`` at the latents it was predicted from. Computed when asked for."""
        return self.path.to_x0(self._predicted_at, self.output, self.t)

    @property
    def eps(self) -> Tensor:
        """The noise implied by ``output``."""
        return self.path.to_eps(self._predicted_at, self.output, self.t)

    def rows(self, branch: str) -> slice:
        """Rows of a branch in the denoiser call of this step that holds it."""
        for names in self.run.model.calls(self.branches):
            if branch in names:
                return self.run.rows(names)[branch]
        raise BadInput(f"branch={branch!r} is not part of this step; it has {', '.join(self.branches)}.")

    def predict(
        self,
        x: Tensor | None = None,
        *,
        t: Tensor | None = None,
        branches: Sequence[str] = ("cond",),
        condition: Condition | None = None,
        taps: Sequence[Tap] = (),
        edited: bool = True,
    ) -> Prediction:
        """An extra denoiser call, counted as cost. Attention edits that are active in this step apply here too, unless
        ``edited`` is False; the observers of other interventions do not see it. ``taps`` are the caller's own."""
        x, t = self.x if x is None else x, self.t if t is None else t
        taps = [*self.active_taps(editors=True), *taps] if edited else list(taps)
        outputs = self.run.denoise(x, t, condition or self.condition, branches, taps, self)
        return Prediction(self.run, x, t, outputs)

    def grad(
        self,
        loss: Callable[[Prediction], Tensor],
        *,
        branches: Sequence[str] = ("cond",),
        condition: Condition | None = None,
        taps: Sequence[Tap] = (),
        samples: Sequence[int] | None = None,
    ) -> Tensor:
        """Gradient (b ...) with respect to ``x`` of ``loss(prediction)``, a number or one per sample (b), by an extra
        pass with frozen weights. In ``after_predict`` of an intervention with ``keeps_graph`` and without own
        ``taps`` it reuses the step's prediction instead. A loss per sample must use no other sample, or samples will
        mix. ``samples``: only these rows of the batch, as b; not while others edit attention, which is made for whole
        batches (Conflict). NotSupported where states have no gradients, such as token ids."""
        if not self.run.process.differentiable:
            who = self.actor.name if self.actor is not None else "step.grad"
            raise self.run.process.lacks("gradient with respect to the state", who)
        recorded, spent = self._predicted_at, self.run.cost
        if samples is not None and self.active_taps(editors=True):
            raise Conflict("step.grad of some samples is not possible while others edit attention; take all of them.")
        reuse = bool(self.outputs) and recorded.requires_grad and not taps and not self.run.grad and samples is None
        self.run.freeze()
        with torch.enable_grad():
            if reuse:
                x, prediction = recorded, Prediction(self.run, recorded, self.t, self.outputs)
            else:
                condition = condition or self.condition
                x, condition = (self.x, condition) if samples is None else (self.x[samples], condition.rows(samples))
                x = x.detach().requires_grad_(True)
                prediction = self.predict(x, branches=branches, condition=condition, taps=taps)
            value = loss(prediction).sum()
        if not value.requires_grad:
            raise BadInput("the loss given to step.grad does not depend on the latents.")
        (gradient,) = torch.autograd.grad(value, x, retain_graph=reuse)
        self.run.add_cost(len(self.branches) if reuse else self.run.cost - spent, self)  # back as far as forward
        return gradient

    def goto(self, i: int) -> None:
        """Go on at index ``i`` of the schedule instead of the next one; ``x`` must be at that level by then. For
        interventions of role "path" (restarts, re-noising) in ``after_step``."""
        if self.actor is None or self.actor.role != "path":
            raise Conflict("step.goto changes the trajectory; only an intervention of role 'path' may call it.")
        if not 0 <= i < self.total:
            raise BadInput(f"step.goto({i}) is outside the schedule of {self.total} steps.")
        self.next = i

    def active(self, parts: Sequence[Any]) -> list[Any]:
        """Those of ``parts`` whose window covers this step."""
        return [part for part in parts if self.covered_by(part)]

    def covered_by(self, part: Any) -> bool:
        """Whether this step lies in the part's window of progress."""
        return part.window[0] <= self.progress < part.window[1]

    def active_taps(self, editors: bool = False) -> list[Tap]:
        """Taps of the interventions active in this step; ``editors``: only those that change attention."""
        taps = [tap for part, taps in self.run._taps if self.covered_by(part) for tap in taps]
        return [tap for tap in taps if tap.edits] if editors else taps

    def evaluate(self) -> None:
        """The step's own prediction: fills ``outputs``."""
        run = self.run
        keep = not run.grad and any(part.keeps_graph for part in self.active(run.parts))
        if keep:
            run.freeze()
            self.x = self.x.detach().requires_grad_(True)
        self._predicted_at = self.x
        with torch.set_grad_enabled(keep or run.grad):
            self.outputs = run.denoise(self.x, self.t, self.condition, self.branches, self.active_taps(), self)
            for name, (condition, _) in run.compose.items():
                extra = run.denoise(self.x, self.t, condition, ("cond",), self.active_taps(editors=True), self)
                self.outputs[name] = extra["cond"]

    def release(self) -> None:
        """Let go of the gradient graph that ``keeps_graph`` asked for, once it can no longer be used."""
        if self._predicted_at.requires_grad and not self.run.grad:
            self._output = None if self._output is None else self._output.detach()
            self.outputs = {name: out.detach() for name, out in self.outputs.items()}
            self.x, self._predicted_at = self.x.detach(), self._predicted_at.detach()
