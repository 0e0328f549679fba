"""Interventions: whatever watches or changes generation, in a few optional methods that the loop calls in a fixed
order.

For each batch the loop calls, on every intervention in the order of :data:`ROLES`::

    start -> on_text -> on_noise -> on_condition ->
    ( before_predict -> [denoiser with taps] -> after_predict -> after_step )* -> on_decode -> finish

A system overrides what it needs. Whatever it attaches to the model it attaches through ``run.enter(context_manager)``
or ``run.defer(callback)``: the loop undoes these in reverse order when the batch ends, however it ends, so that the
model afterwards is bit-identical to what it was. A list of interventions is an intervention (:class:`Stack`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sfumato.cards import CAPABILITIES, MOST_SYSTEMS
from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported, UnknownName
from sfumato.models.families import families_with

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.models import Model
    from sfumato.sampling.run import Run, Step

ROLES = ("adapter", "path", "conditioner", "editor", "steerer", "guider", "observer")
"""The order in which interventions act: adapters add weights (attached first, detached last), at most one path replaces
the trajectory, conditioners change text, editors change attention, steerers move latents, guiders change the combined
output, observers see everything as edited and change nothing."""


@dataclass
class Coverage:
    """What an intervention really did: filled by :meth:`Intervention.mark`, read by ``coverage()``."""

    calls: int = 0
    sites: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    cost: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "sites": list(self.sites),
            "tokens": list(self.tokens),
            "steps": sorted(self.steps),
            "cost": self.cost,
        }


class Intervention:
    """Base of every system that takes part in generation. All methods are optional.

    ``role``: one of :data:`ROLES`. ``window``: fractions of progress [start, end) in which the methods of steps and the
    taps are active. ``keeps_graph``: record the main prediction with gradients with respect to the latents, so that
    ``step.grad`` in ``after_predict`` costs a backward pass only. ``couples_samples``: samples of one batch influence
    each other, so a run must not be cut into several batches. ``needs_own_loop``: why it cannot take part in the call
    of somebody's own pipeline (:mod:`sfumato.sampling.attached`), where its role does not say so already.
    """

    role: str = "observer"
    window: tuple[float, float] = (0.0, 1.0)
    keeps_graph: bool = False
    couples_samples: bool = False
    needs_own_loop: str = ""
    activity: Coverage  # set by the loop before the first batch starts

    @property
    def name(self) -> str:
        card = getattr(self, "CARD", None)
        return card.key if card is not None else type(self).__name__

    @property
    def strength(self) -> float:
        """0 promises that nothing changes, bit for bit; such an intervention may end without having acted."""
        return getattr(getattr(self, "params", None), "strength", 1.0)

    @classmethod
    def usual_bytes(cls, model: Model) -> int | None:
        """What it holds beside ``model`` (of any weights, or none) that comes from a file, at the size that files of
        its kind usually have; None: nothing does."""
        return None

    def start(self, run: Run) -> None:
        """A batch begins; prompts, size, steps and sites are known. Validate words and sites here (raise NoMatch).

        A generation in several batches starts and finishes once per batch; ``run.samples`` says which samples it holds.
        """

    def on_text(self, run: Run, condition: Any) -> Any:
        """Return the condition to use, with text embedded."""
        return condition

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        """Return the latents (b c h w) to begin with, in the scheduler's scaling."""
        return x

    def on_condition(self, run: Run, condition: Any) -> Any:
        """Return a condition, the prompt's or one of ``run.compose``, with what a denoiser gets beside the text; the
        latents are known by now. Called once for each."""
        return condition

    def further_prompts(self) -> Sequence[str]:
        """Further prompts that are read on the run's text axis, and must fit on it."""
        return ()

    def before_predict(self, step: Step) -> None:
        """May replace ``step.x`` (use ``step.grad``) or ``step.condition``."""

    def taps(self) -> Sequence[Any]:
        """What this intervention wants from attention in every step's own prediction, called once per batch after the
        texts are encoded. An observer must look which branches a call holds: Flux runs them in calls of their own."""
        return ()

    def after_predict(self, step: Step) -> None:
        """May replace ``step.output``, the guided output; ``step.outputs`` holds each branch before guidance."""

    def after_step(self, step: Step) -> None:
        """May replace ``step.x``, now at the next noise level (``step.t_next``)."""

    def on_decode(self, run: Run, pixels: Tensor) -> Tensor:
        """Return the pixels (b 3 H W), of clips (b 3 f H W), in [-1, 1]."""
        return pixels

    def finish(self, run: Run) -> None:
        """The batch is complete; not called when it failed. Move what is to be kept out of per-batch state."""

    def coverage(self) -> dict[str, Any]:
        """What was really touched: at least ``calls``; zero at the end is an error unless ``strength`` is 0."""
        return self.activity.as_dict()

    def mark(self, step: Step | None = None, *, sites: Iterable[str] = (), tokens: Iterable[str] = ()) -> None:
        """Record that this intervention acted, once, here. Call it where the work is done."""
        self.activity.calls += 1
        if step is not None:
            self.activity.steps.add(step.i)
        for counts, names in ((self.activity.sites, sites), (self.activity.tokens, tokens)):
            for name in names:
                counts[name] = counts.get(name, 0) + 1

    def __add__(self, other: Intervention | Sequence[Intervention]) -> Stack:
        return Stack(self, other)


class Stack(Intervention):
    """Several interventions as one; stacks nest, and the loop sees their parts in the order of the roles."""

    def __init__(self, *parts: Intervention | Sequence[Intervention]):
        self.parts = parts


def arrange(interventions: Intervention | Iterable[Any]) -> tuple[Intervention, ...]:
    """The parts of a nested list of interventions in the order in which they act; equal roles keep their given order.

    Raises BadInput for anything that is not an intervention, Conflict when two replace the trajectory or one is given
    twice.
    """
    parts = _flatten(interventions)
    if len(parts) > MOST_SYSTEMS:
        raise BadInput(f"{len(parts)} systems are given; the most is {MOST_SYSTEMS}.")
    if len({id(part) for part in parts}) < len(parts):
        twice = next(part for part in parts if sum(other is part for other in parts) > 1)
        raise Conflict(f"the same {twice.name} object is given twice; make a second one if both are meant.")
    paths = [part.name for part in parts if part.role == "path"]
    if len(paths) > 1:
        raise Conflict(f"{' and '.join(paths)} each replace the trajectory; a run can follow only one of them.")
    return tuple(sorted(parts, key=lambda part: ROLES.index(part.role)))


def _flatten(given: Any) -> list[Intervention]:
    if isinstance(given, Stack):
        return _flatten(given.parts)
    if isinstance(given, Intervention):
        if given.role not in ROLES:
            raise UnknownName(f"role of {given.name}", given.role, ROLES)
        return [given]
    if isinstance(given, list | tuple):
        return [part for each in given for part in _flatten(each)]
    card = getattr(given, "CARD", None)
    if card is not None:
        raise NotSupported(f"{card.key} takes no part in drawing a picture; see: sfumato methods {card.key}.")
    raise BadInput(f"interventions holds {given!r}; each must be an Intervention or a list of them.")


def refuse_unfit(parts: Sequence[Any], model: Any) -> None:
    """Raise NotSupported for a part, or a system of another kind, whose card needs what ``model`` does not offer."""
    for part in parts:
        card: Any = getattr(part, "CARD", None)
        for need in getattr(card, "needs", ()):
            if not model.family.has(need):
                raise NotSupported(
                    f"{card.key} needs {CAPABILITIES[need]}; {model.name} ({model.family.name}) has none; "
                    f"{families_with(*card.needs)}."
                )


def distinct_names(parts: Sequence[Intervention]) -> list[str]:
    """A name for each part, numbered from the second of a kind on: ``daam``, ``daam 2``."""
    names: list[str] = []
    for i, part in enumerate(parts):
        earlier = sum(other.name == part.name for other in parts[:i])
        names.append(f"{part.name} {earlier + 1}" if earlier else part.name)
    return names


def overridden(parts: Sequence[Intervention], method: str) -> list[Intervention]:
    """The parts that define ``method`` themselves: the loop calls no empty methods."""
    return [part for part in parts if getattr(type(part), method) is not getattr(Intervention, method)]


def refuse_idle(parts: Sequence[Intervention], sites: Iterable[Any]) -> None:
    """Raise NoMatch for a part that did nothing in the whole run although its strength is not 0."""
    for name, part in zip(distinct_names(parts), parts, strict=True):
        if part.strength != 0 and not part.coverage().get("calls"):
            places = list(dict.fromkeys(f"{site.kind} {site.block}" for site in sites))
            raise NoMatch(
                f"{name} did nothing: no site, word or step of this run matched it. It acts on progress "
                f"{part.window[0]:g} to {part.window[1]:g}; attention sites: {', '.join(places[:24]) or 'none'}."
            )
