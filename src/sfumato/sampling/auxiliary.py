"""Auxiliary samples: drawn with a run's settings but without its interventions, while the run waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sfumato.markup import described
from sfumato.models import Condition
from sfumato.sampling.intervention import Intervention
from sfumato.sampling.loop import open_run, walk
from sfumato.sampling.process.base import Source
from sfumato.sampling.run import Run


@dataclass(frozen=True, eq=False)
class AuxiliarySamples:
    """What was drawn: the final states ``x`` (b ...), or those that step ``until`` begins with, under ``condition``.
    ``cost``: forward-equivalents per sample of the waiting run."""

    x: Tensor
    condition: Condition
    cost: float

    __repr__ = described


def draw_auxiliary(
    run: Run,
    prompt: str,
    *,
    seed: int | None = None,
    x: Tensor | None = None,
    source: Source | None = None,
    parts: Sequence[Intervention] = (),
    until: int | None = None,
) -> AuxiliarySamples:
    """Draws ``prompt``: one sample from the noise of ``seed``, or as many as the run has, from the states ``x`` that
    the walk begins with (or else from noise of the run's own seeds). ``source``: what the run's request begins with
    instead of noise, where it begins later in the schedule. ``until``: ends where this step begins. The run pays."""
    assert run.request is not None
    request = replace(run.request, prompts=[prompt] * len(run.request), source=source or Source())
    samples = run.samples
    if seed is not None:
        negatives = request.negatives and request.negatives[:1]
        request, samples = replace(request, prompts=[prompt], negatives=negatives, seeds=[seed]), range(1)
    with open_run(run.model, request, samples, tuple(parts)) as other:
        if x is None:
            x = other.process.initial(slice(samples.start, samples.stop))
        x = walk(other, x, until=until)
        condition = other.condition
    assert condition is not None
    cost = other.cost * len(other) / len(run)
    run.add_cost(cost, None)
    return AuxiliarySamples(x, condition, cost)
