"""One call of a pipeline with attached systems: a batch, whose steps follow from calls of denoiser and scheduler."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from sfumato.attention.bypass import refuse_compiled
from sfumato.attention.tap import Tap
from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported
from sfumato.models import Condition, Model
from sfumato.sampling.attached.process import PipelineProcess, PipelineStep, require_unchanged
from sfumato.sampling.attached.systems import AttachedSystems
from sfumato.sampling.attached.texts import TextAxis, Texts, recording_encoders
from sfumato.sampling.attached.unknown_family import UnknownFamily, further_denoisers, locate_text
from sfumato.sampling.guidance import Guidance
from sfumato.sampling.intervention import Intervention, overridden
from sfumato.sampling.run import Run

__all__ = ["PipelineCall"]

Around = Callable[[Callable[..., Any], dict[str, Any], Any, Any], Any]


class PipelineCall:
    """Context of one call. Adapters are attached when it begins; everybody else starts at the first denoiser call, when
    size, levels and texts are known. On leaving everything is detached again."""

    _drawing: ClassVar[set[int]] = set()
    """The denoisers (their ids) of calls under way."""

    def __init__(
        self,
        systems: AttachedSystems,
        model: Model,
        arguments: dict[str, Any],
        axis: TextAxis | None,
        prompt: str | Sequence[str] | None,
    ):
        self.systems, self.model, self.axis, self.arguments = systems, model, axis, arguments
        self.texts = Texts.of_call(model, arguments, prompt)
        self.count = len(self.texts)
        self.step: PipelineStep | None = None
        self.steps = 0  # of the scheduler, so far
        self.started = False
        self._x: Tensor | None = None  # the state, in the pipeline's form, as far as it is known
        generators, seeds = _generators(arguments.get("generator"), self.count)
        self.process = PipelineProcess(model, generators)
        self.run = Run(
            model=model,
            parts=systems.parts,
            samples=range(systems.samples, systems.samples + self.count),
            prompts=self.texts.prompts,
            negatives=self.texts.negatives,
            seeds=cast(Any, seeds),
            generators=generators,
            size=(0, 0),
            grid=(0, 0),
            guidance=Guidance(0.0),
            process=self.process,
        )
        for part in systems.parts:
            if part.couples_samples and systems.calls:
                raise NotSupported(f"{part.name} holds one batch; attach it anew for another call of the pipeline.")

    def __enter__(self) -> PipelineCall:
        self.run.__enter__()
        try:
            refuse_compiled(self.model.denoiser)
            self._claim_denoiser()
            for part in self._starting(adapters=True):
                part.start(self.run)
            self.run.enter(recording_encoders(self.model.pipe, self.texts.passes))
            self._wrap(self.model.denoiser, "forward", self._predicting)
            self._wrap(self.model.pipe.scheduler, "step", self._stepping)
            for name, other in further_denoisers(self.model.pipe, self.model.denoiser).items():
                self._wrap(other, "forward", functools.partial(self._refuse, name))
        except BaseException:
            self.run.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                if not self.started:
                    raise NoMatch(f"{type(self.model.pipe).__name__} did not run its denoiser in this call.")
                for part in overridden(self.systems.parts, "finish"):
                    part.finish(self.run)
        finally:
            self.run.__exit__(kind, error, trace)

    def on_method(self, name: str, arguments: dict[str, Any], result: Any) -> None:
        """A method of the pipeline was called so and gave this. What systems call later, once the walk has begun, is
        not the pipeline's own."""
        if self.started:
            return
        if name == "encode_prompt":
            self.texts.encoded(self.model, arguments, self.model.family.texts_of_encoding(result))
        elif name == "prepare_latents":
            first = result[0] if isinstance(result, tuple) else result
            self._x = first if isinstance(first, Tensor) else None

    # --- the two places ----------------------------------------------------------------------------------------------

    def _predicting(self, real: Callable[..., Any], arguments: dict[str, Any], args: Any, kwargs: Any) -> Any:
        x, embeds = self._inputs(arguments)
        if not self.started:
            self._start(real, arguments, x, embeds)
        rows = self.texts.rows(embeds, len(x))
        step = self._step()
        self.model.announce(step.t)
        # what a branch says once more in a step, as when layers are skipped for guidance, is not what was asked about
        again = bool(set(rows) & set(step.outputs))
        taps = step.active_taps(editors=again)
        again_with = _copied(arguments)
        with self._seen_by(taps, step, rows, arguments):
            out = real(*args, **kwargs)
        if not again:
            step.outputs.update(self._by_branch(out, rows))
            if "cond" in rows:
                step.repeat = functools.partial(self._repeat, real, again_with, embeds, rows)
        self.run.add_cost(len(x) / self.count, None)
        return out

    def _repeat(
        self,
        real: Callable[..., Any],
        arguments: dict[str, Any],
        embeds: Tensor,
        rows: dict[str, slice],
        texts: Tensor,
        taps: Sequence[Tap],
    ) -> dict[str, Tensor]:
        """A denoiser call of this step once more, with ``texts`` (b t d) in place of the prompt's embeddings."""
        step = self.step
        assert step is not None
        per, b = len(embeds) // max(part.stop for part in rows.values()), len(texts)
        cond = slice(rows["cond"].start * per, rows["cond"].stop * per)
        embeds = embeds.clone()
        embeds[cond] = texts.to(embeds).repeat_interleave((cond.stop - cond.start) // b, 0)
        named = self.model.family.call_with(_copied(arguments), embeds)
        with torch.no_grad(), self._seen_by(taps, step, rows, arguments):
            out = real(**named)
        self.run.add_cost(b * len(rows) / self.count, step)
        return self._by_branch(out, rows)

    def _seen_by(
        self, taps: Sequence[Tap], step: PipelineStep, rows: dict[str, slice], arguments: dict[str, Any]
    ) -> AbstractContextManager[Any]:
        """The seam around one denoiser call, if there are taps; texts of its rows may be of other lengths than those of
        others."""
        if not taps:
            return contextlib.nullcontext()
        texts, family = self.model.family.rows_of_call(arguments), self.model.family
        order = functools.partial(family.places, texts)
        return self.run.seam(tuple(taps)).forward(step, rows, self.run.sites_with(texts), order)

    def _by_branch(self, out: Any, rows: dict[str, slice]) -> dict[str, Tensor]:
        prediction = self._unpacked(out if isinstance(out, Tensor) else out[0])
        prediction = -prediction if self.model.family.negates else prediction
        return {name: prediction[part] for name, part in rows.items()}

    def _stepping(self, real: Callable[..., Any], arguments: dict[str, Any], args: Any, kwargs: Any) -> Any:
        step = self.step
        if step is None:
            raise NotSupported(
                f"{type(self.model.pipe).__name__} steps without a call of its {self.model.family.denoiser_name}, so "
                f"what belongs to a step cannot be determined."
            )
        t = torch.as_tensor(arguments["timestep"])
        if t.dim() == 0 and float(t) != float(step.t):
            raise NotSupported(
                f"{type(self.model.pipe).__name__} steps at t = {float(t):g}, step {step.i + 1} of its scheduler is at "
                f"{float(step.t):g}, so windows and steps have no meaning in it{self._or_mixed}"
            )
        before, output = self._unpacked(arguments["sample"]), self._unpacked(arguments["model_output"])
        step.predicted(before, output)
        for part in step.active(overridden(self.systems.parts, "after_predict")):
            step.actor = part
            part.after_predict(step)
            require_unchanged(part, "the prediction", output, step.output)
        out = real(*args, **kwargs)
        self._x = out[0] if isinstance(out, tuple) else out.prev_sample
        step.x = after = self._unpacked(self._x)
        for part in step.active(overridden(self.systems.parts, "after_step")):
            step.actor = part
            part.after_step(step)
            require_unchanged(part, "the latents", after, step.x)
        self.steps += 1
        self.step = None
        return out

    def _refuse(self, name: str, *_: Any) -> None:
        raise NotSupported(
            f"{type(self.model.pipe).__name__} draws with {name} beside its {self.model.family.denoiser_name}; systems "
            f"see one denoiser, so they would tell and change half of what is drawn."
        )

    def _step(self) -> PipelineStep:
        """The step under way: all denoiser calls between two steps of the scheduler belong to one."""
        if self.step is None:
            i = self.run.begin + self.steps
            if i >= self.run.total:
                raise NotSupported(
                    f"{type(self.model.pipe).__name__} walks beyond the {self.run.total} levels of its scheduler"
                    f"{self._or_mixed}"
                )
            assert self._x is not None
            self.step = step = PipelineStep(self.run, i, self._unpacked(self._x))
            for part in step.active(overridden(self.systems.parts, "before_predict")):
                step.actor, before = part, step.x
                part.before_predict(step)
                require_unchanged(part, "the latents", before, step.x)
                require_unchanged(part, "the texts", self.run.condition, step.condition)
            step.actor = None
        return self.step

    # --- the beginning -----------------------------------------------------------------------------------------------

    def _start(self, real: Callable[..., Any], arguments: dict[str, Any], x: Tensor, embeds: Tensor) -> None:
        """Everything is known: those who are no adapters begin."""
        run, model, texts = self.run, self.model, self.texts
        texts.require(model, embeds)
        if self.axis is not None and not isinstance(model.family, UnknownFamily):
            raise BadInput(f"text says where the text lies in attention; of {model.name} that is known, leave it out.")
        if isinstance(model.family, UnknownFamily):
            locate_text(model.family, real, arguments, self.arguments, embeds, texts, self.axis)
        elif embeds.shape[1] != model.text_length and all(stream.padded for stream in model.tokenizers):
            raise NotSupported(
                f"{type(model.denoiser).__name__} sees {embeds.shape[1]} text positions, but the text encoders of "
                f"{model.name} read {model.text_length}, so which word lies where cannot be determined."
            )
        run.prompts = texts.prompts
        frames, h, w = model.family.grid_of_call(arguments)
        run.grid, run.size = (h, w), (w * model.family.scale, h * model.family.scale)
        self.process.options.frames = frames if frames > 1 or model.clips else None
        assert texts.cond is not None
        cond = {"embeds": texts.cond}
        if (mask := model.family.rows_of_call(arguments).get("mask")) is not None:
            own = texts.rows(embeds, len(x)).get("cond", slice(0))
            known = len(mask[own]) == len(texts.cond)
            cond["mask"] = mask[own] if known else mask.new_ones(texts.cond.shape[:2])
        uncond = None if texts.uncond is None else {"embeds": texts.uncond}
        run.condition = Condition(cond, uncond, tuple(texts.prompts))
        asked = self.arguments.get("true_cfg_scale") or self.arguments.get("guidance_scale")
        run.guidance = Guidance(max(float(asked or 0), 1.001) if uncond is not None else 0.0)
        self.process.begin = _begin(model.pipe, arguments.get("timestep"))
        self.systems.sites = run.sites
        for part in self._starting(adapters=False):
            part.start(run)
        for part in overridden(run.parts, "on_text"):
            require_unchanged(part, "the texts", run.condition, part.on_text(run, run.condition))
        run.connect_taps()
        self._x = x[: self.count] if self._x is None else self._x
        first = self._unpacked(self._x)
        for part in overridden(run.parts, "on_noise"):
            require_unchanged(part, "the latents", first, part.on_noise(run, first))
        for part in overridden(run.parts, "on_condition"):
            require_unchanged(part, "the condition", run.condition, part.on_condition(run, run.condition))
        self.started = True

    # --- parts -------------------------------------------------------------------------------------------------------

    def _starting(self, adapters: bool) -> list[Intervention]:
        return [part for part in overridden(self.systems.parts, "start") if (part.role == "adapter") == adapters]

    @property
    def _or_mixed(self) -> str:
        return (
            f"; if another pipeline draws with its {self.model.family.denoiser_name} meanwhile, make one call after "
            f"the other."
        )

    def _claim_denoiser(self) -> None:
        """Nobody else's systems see this denoiser until the call ends."""
        key = id(self.model.denoiser)
        if key in self._drawing:
            raise Conflict(
                f"{type(self.model.pipe).__name__} is called while another pipeline draws with the same "
                f"{self.model.family.denoiser_name} and has systems attached; make one call after the other."
            )
        self._drawing.add(key)
        self.run.defer(lambda: self._drawing.discard(key))

    def _inputs(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """State and text (b t d) of a denoiser call."""
        family = self.model.family
        try:
            x, embeds = family.state_of_call(arguments), family.rows_of_call(arguments)["embeds"]
        except (KeyError, StopIteration, TypeError, AttributeError):
            x = embeds = None
        if not isinstance(x, Tensor) or not isinstance(embeds, Tensor) or embeds.dim() != 3:
            raise NotSupported(
                f"{type(self.model.denoiser).__name__} is not called with encoder_hidden_states (b t d) as others of "
                f"diffusers are, so where the prompt is read cannot be determined."
            )
        return x, embeds

    def _unpacked(self, x: Any) -> Tensor:
        return self.model.family.unpacked(x, *self.run.grid)

    def _wrap(self, owner: Any, name: str, around: Around) -> None:
        """Until the call ends, ``owner.name`` is ``around(real, arguments by name, args, kwargs)``."""
        real = getattr(owner, name)
        signature = inspect.signature(real)
        further = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

        @functools.wraps(real)
        def instead(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            more = given.pop(further, {})
            return around(real, {**given, **more}, args, kwargs)

        held = vars(owner)
        before = {name: held[name]} if name in held else {}
        held[name] = instead

        def undo() -> None:
            if held.get(name) is instead:  # offloading may have put back the forward it knows when the call ended
                del held[name]
                held.update(before)

        self.run.defer(undo)


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments whose lists are their own: U-Nets take what adapters give them out of a list, one by one."""
    return {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}


def _begin(pipe: Any, time: Any) -> int:
    """The step of the schedule that the walk begins with: what the pipeline has set, or else the one whose timestep the
    denoiser is given. Of several at one timestep the one with as many to come as the pipeline says it takes."""
    begin = getattr(pipe.scheduler, "begin_index", None)
    if begin is not None or time is None:
        return int(begin or 0)
    t = float(torch.as_tensor(time).flatten()[0])
    levels = pipe.scheduler.timesteps.tolist()
    fit = [i for i, level in enumerate(levels) if level == t] or [0]
    begun = len(levels) - int(getattr(pipe, "_num_timesteps", 0) or 0)
    return begun if begun in fit else fit[0]


def _generators(given: Any, count: int) -> tuple[list[torch.Generator], list[int | None]]:
    """The generators of a call, one for each sample, and their seeds; none of either where the call has none."""
    if given is None:
        return [], [None] * count
    each = list(given) if isinstance(given, list | tuple) else [given] * count
    return each, [generator.initial_seed() for generator in each]
