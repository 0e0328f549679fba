"""Systems attached to a user's own diffusers pipeline, whose loop runs in place of ours.

    >>> with attached(pipe, DAAM(words=["cat"])) as run:
    ...     image = pipe("a cat on a mat", control_image=edges).images[0]
    >>> run.maps[0].overlay(image, "cat")

The pipeline does what it does; systems see two places of it, the denoiser's forward and the scheduler's step, and
at attention through the same seam as in our own loop. Prompts are read from the call, the rows of a denoiser call that
belong to them from the embeddings that the pipeline made: nothing is guessed, and what cannot be determined is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sfumato.errors import NoMatch
from sfumato.sampling.attached.call import PipelineCall
from sfumato.sampling.attached.interception import intercepted, model_of
from sfumato.sampling.attached.process import refuse_own_loop_only
from sfumato.sampling.attached.systems import AttachedSystems
from sfumato.sampling.attached.texts import TextAxis
from sfumato.sampling.intervention import Coverage, Intervention, arrange, refuse_idle, refuse_unfit

__all__ = ["AttachedSystems", "attached"]


@contextmanager
def attached(
    pipe: Any,
    interventions: Intervention | Sequence[Any],
    *,
    text: str | None = None,
    prompt: str | Sequence[str] | None = None,
) -> Iterator[AttachedSystems]:
    """While it lasts, ``interventions`` take part in every call of ``pipe``. Afterwards pipeline and networks are what
    they were, bit for bit, however it ends.

    Args:
        pipe: a diffusers pipeline, of a known class or not.
        interventions: observers, editors of attention and adapters; lists nest.
        text: for pipelines of an unknown class with joint attention whose text axis cannot be determined: where the
            text lies among the keys, as ``"first 512"``, ``"last 77"`` or ``"64:141"``.
        prompt: what the pictures show, for calls that are given embeddings in place of a prompt.

    Raises:
        NotSupported: systems that need our own loop; networks whose attention cannot be seen, such as compiled ones;
            texts or pictures whose place cannot be determined. Conflict: systems are attached already. NoMatch, on
            leaving: the pipeline was not called, or a system did nothing.
    """
    host = getattr(pipe, "pipe", pipe)
    model_of(host)
    parts = arrange(interventions)
    refuse_own_loop_only(parts)
    axis = TextAxis.read(text)
    for part in parts:
        part.activity = Coverage()
    systems = AttachedSystems(parts)

    def call(proceed: Any, arguments: dict[str, Any]) -> Any:
        model = model_of(host, arguments.get("max_sequence_length"))
        refuse_unfit(parts, model)
        with PipelineCall(systems, model, arguments, axis, prompt) as now:
            out = proceed(now)
        systems.calls += 1
        systems.samples += now.count
        return out

    with intercepted(host, call):
        yield systems
    if not systems.calls:
        raise NoMatch(f"{type(host).__name__} was not called while systems were attached to it, so they saw nothing.")
    refuse_idle(parts, systems.sites)
