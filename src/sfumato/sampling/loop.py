"""The sampling loop: the only place that walks between noise and latents.

With no intervention :func:`generate` makes the latents of the diffusers pipeline, bit for bit on a CPU. The model
answers what a family is like, diffusers' schedulers make the step, interventions do everything else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL.Image import Image
from torch import Tensor, nn

from sfumato import rng
from sfumato.errors import BadInput, Conflict, NotFinite, SfumatoError, WorkInterrupted
from sfumato.models import Model
from sfumato.sampling.guidance import Guidance
from sfumato.sampling.intervention import (
    Coverage,
    Intervention,
    arrange,
    distinct_names,
    overridden,
    refuse_idle,
    refuse_unfit,
)
from sfumato.sampling.noise import Path
from sfumato.sampling.recipe import recipe_of
from sfumato.sampling.request import Request, Source, as_pictures, checked
from sfumato.sampling.run import Run, Step
from sfumato.text.weights import encode_weighted, read_weights


@dataclass(eq=False)
class Result:
    """Finished samples, in the order of the request.

    ``latents`` (b c h w) clean; ``pixels`` (b 3 H W), about [-1, 1] and not clamped, None with ``decode=False``.
    ``coverage``: what each intervention did, by name. ``cost``: forward-equivalents per sample.
    """

    model: Model
    request: Request
    latents: Tensor
    pixels: Tensor | None
    coverage: dict[str, dict[str, Any]] = field(default_factory=dict)
    cost: float = 0.0
    parts: tuple[Intervention, ...] = ()

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def prompts(self) -> list[str]:
        return self.request.prompts[: len(self)]

    @property
    def seeds(self) -> list[int]:
        return self.request.seeds[: len(self)]

    @cached_property
    def images(self) -> list[Image]:
        """The pictures as PIL images; empty with ``decode=False``."""
        return [] if self.pixels is None else as_pictures(self.pixels)

    @cached_property
    def recipes(self) -> list[dict[str, Any]]:
        """Per sample, everything needed to make it again, as plain JSON values; see
        :func:`sfumato.sampling.recipe_args`."""
        return [recipe_of(self.model, self.request, self.parts, i) for i in range(len(self))]

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the first sample."""
        return self.recipes[0]


def generate(
    model: Model,
    prompt: str | Sequence[str],
    *,
    negative: str | Sequence[str] | None = None,
    steps: int | None = None,
    guidance: float | Guidance | None = None,
    true_guidance: float | Guidance | None = None,
    rescale: float = 0.0,
    compose: Sequence[tuple[str, float]] | None = None,
    seed: int | Sequence[int] | None = 0,
    n: int = 1,
    size: tuple[int, int] | None = None,
    scheduler: Any = None,
    eta: float = 0.0,
    latents: Tensor | None = None,
    start: int = 0,
    image: Any = None,
    strength: float | None = None,
    interventions: Intervention | Sequence[Any] = (),
    batch_size: int | None = None,
    grad: bool = False,
    decode: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> Result:
    """Make pictures of prompts: ``n`` of each, all n of the first prompt first.

    Args:
        prompt: may hold weights, as may all other texts: see :mod:`sfumato.text.weights`.
        negative: what to steer away from; one text for all prompts or one each.
        steps, guidance, size, scheduler: None is the model's own choice.
        size: (width, height) in pixels.
        scheduler: a short name such as "ddim", or a diffusers scheduler. ``eta``: share of fresh noise in DDIM steps.
        guidance: scale of classifier-free guidance (1 or below: none), or a :class:`Guidance` with an interval. A
            guidance-distilled denoiser (Flux-dev) is told it; ``true_guidance`` then is the classifier-free scale.
        rescale: share by which the guided output's spread is pulled back (Lin et al. 2023).
        compose: further (text, weight) conditions added to every sample (Liu et al. 2022).
        seed: sample i uses ``seed + i``; or one per sample; None draws one, told in the result. A sample's noise, also
            that of stochastic schedulers, depends on its own seed only.
        latents: unit noise (b c h w) to begin with; or, with ``start`` > 0, the latents with which step ``start`` of
            the schedule begins, as found in ``step.x``.
        image: a picture, several, or a tensor (b 3 H W) in [-1, 1], noised to ``strength`` (0.8) of the schedule.
        interventions: systems that watch or change generation; lists nest.
        batch_size: how many samples to run at once (None: all). An interruption keeps the finished batches.
        grad: record gradients through the whole loop, for latents or texts that require them.
        on_step: called with the :class:`Step` after every step.

    Raises:
        BadInput, UnknownName, NotSupported: an argument. Conflict: interventions that cannot run together. NoMatch:
        one of them did nothing. WorkInterrupted: Ctrl-C. NotFinite: numbers overflowed; the message says at which step.
        The ``result`` of whatever stops a later batch holds the samples finished before.
    """
    parts = arrange(interventions)
    request = checked(
        model, prompt, negative=negative, steps=steps, guidance=guidance, true_guidance=true_guidance, rescale=rescale,
        compose=compose, seed=seed, n=n, size=size, scheduler=scheduler, eta=eta, latents=latents, start=start,
        image=image, strength=strength, batch_size=batch_size,
    )  # fmt: skip
    batches = request.batches()
    coupled = [part.name for part in parts if part.couples_samples]
    if coupled and len(batches) > 1:
        raise Conflict(f"{coupled[0]} couples the samples of a batch, so batch_size must be at least {len(request)}.")
    for part in parts:
        part.activity = Coverage()
    latents_done: list[Tensor] = []
    pixels_done: list[Tensor] = []
    cost = 0.0

    def result() -> Result:
        coverage = dict(zip(distinct_names(parts), [part.coverage() for part in parts], strict=True))
        pixels = torch.cat(pixels_done) if pixels_done else None
        done = latents_done[: len(pixels_done)] if decode else latents_done
        return Result(model, request, torch.cat(done), pixels, coverage, cost, parts)

    run: Run | None = None
    try:
        for samples in batches:
            with opened(model, request, samples, parts, grad=grad) as run:
                x = walk(run, _initial(run, request.source), on_step)
                pixels = None
                if decode:
                    pixels = model.decode(x)
                    for part in overridden(parts, "on_decode"):
                        pixels = part.on_decode(run, pixels)
            latents_done.append(x)
            pixels_done += [] if pixels is None else [pixels]
            cost += run.cost * len(run) / len(request)
    except SfumatoError as error:
        done = sum(len(each) for each in latents_done)
        if done:
            error.result = result()
            error.args = (f"{error} The first {done} of {len(request)} samples are finished and kept.",)
        raise
    except KeyboardInterrupt as stop:
        done = sum(len(each) for each in latents_done)
        kept = f"the first {done} of {len(request)} samples are finished and kept" if done else "nothing was finished"
        interrupted = WorkInterrupted(f"generation was interrupted: {kept}.")
        interrupted.result = result() if done else None
        raise interrupted from stop
    assert run is not None
    refuse_idle(parts, run.sites if parts else ())
    return result()


@contextmanager
def opened(
    model: Model,
    request: Request,
    samples: range,
    parts: tuple[Intervention, ...],
    grad: bool = False,
    backward: bool = False,
) -> Iterator[Run]:
    """A run ready to walk: interventions started, texts encoded, weights in evaluation mode. On leaving, however that
    comes about, everything attached is detached, and torch's global random state is what it was."""
    refuse_unfit(parts, model)
    rows = slice(samples.start, samples.stop)

    def make_scheduler() -> Any:
        scheduler = model.make_scheduler(request.scheduler)
        trained = scheduler.config.get("num_train_timesteps", 1000)
        if request.steps > trained:
            raise BadInput(f"steps is {request.steps}; this scheduler has {trained} timesteps at most.")
        try:
            model.timesteps(scheduler, request.steps, request.height, request.width)
        except SfumatoError:
            raise
        except ValueError as error:  # a limit of this scheduler's own
            name = type(scheduler).__name__
            raise BadInput(f"steps is {request.steps}, which {name} refuses: {' '.join(str(error).split())}") from error
        return scheduler

    scheduler = make_scheduler()
    total = len(scheduler.timesteps)
    run = Run(
        model=model,
        parts=parts,
        samples=samples,
        prompts=[read_weights(text).text for text in request.prompts[rows]],
        negatives=request.negatives and [read_weights(text).text for text in request.negatives[rows]],
        seeds=request.seeds[rows],
        generators=rng.generators("sample", request.seeds[rows]),
        size=(request.width, request.height),
        grid=model.latent_shape(request.height, request.width)[1:],
        guidance=request.guidance,
        make_scheduler=make_scheduler,
        scheduler=scheduler,
        timesteps=scheduler.timesteps,
        path=Path(scheduler),
        begin=total - 1 if backward else request.begin(scheduler, model.flow),
        grad=grad,
        direction=-1 if backward else 1,
        request=request,
    )
    run.step_options = _step_options(run, request.eta)
    if run.begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(run.begin)
    with run:
        run.enter(torch.set_grad_enabled(grad))
        run.enter(torch.random.fork_rng([model.device] if model.device.type == "cuda" else []))
        run.enter(_evaluation_mode(model.modules.values()))
        for part in overridden(parts, "start"):
            part.start(run)
        _encode(run, request)
        for part in overridden(parts, "on_text"):
            run.condition = part.on_text(run, run.condition)
        run.connect_taps()
        yield run
        for part in overridden(parts, "finish"):
            part.finish(run)


def walk(run: Run, x: Tensor, on_step: Callable[[Step], None] | None = None) -> Tensor:
    """Carry latents (b c h w), in the scheduler's scaling, along the schedule from ``run.begin`` to its end."""
    for part in overridden(run.parts, "on_noise"):
        x = part.on_noise(run, x)
    before, after, last = (overridden(run.parts, name) for name in ("before_predict", "after_predict", "after_step"))
    finite: list[tuple[int, Tensor]] = []
    i = run.begin
    while 0 <= i < run.total:
        step = Step(run, i, x)
        for part in step.active(before):
            step.actor = part
            part.before_predict(step)
        step.actor = None
        step.evaluate()
        for part in step.active(after):
            step.actor = part
            part.after_predict(step)
        step.actor = None
        step.release()
        step.x = run.advance(step)
        for part in step.active(last):
            step.actor = part
            part.after_step(step)
        step.actor = None
        x = step.x
        finite.append((i, torch.isfinite(x).all()))
        if x.device.type == "cpu":  # elsewhere asking would stall the queue at every step
            _refuse_non_finite(finite, run)
            finite.clear()
        if on_step is not None:
            on_step(step)
        if step.next != i + run.direction:
            run.scheduler = run.scheduler_at(step.next)
        i = step.next
    _refuse_non_finite(finite, run)
    return x


def _initial(run: Run, source: Source) -> Tensor:
    """The latents to begin with (b c h w), in the scheduler's scaling: given ones, a noised picture, or noise."""
    model, like = run.model, dict(device=run.model.device, dtype=run.model.dtype)
    rows = slice(run.samples.start, run.samples.stop)
    if source.latents is not None:
        latents = source.latents[rows].to(**like)
        return latents if run.begin else model.prepare(latents, run.scheduler)
    shape = (len(run), *model.latent_shape(run.size[1], run.size[0]))
    if source.pixels is None:
        return model.prepare(randn_tensor(shape, generator=run.generators, **like), run.scheduler)
    pixels = source.pixels[rows] if len(source.pixels) > 1 else source.pixels.expand(len(run), -1, -1, -1)
    clean = model.encode_image(pixels, run.generators)
    noise = randn_tensor(shape, generator=run.generators, **like)
    if run.begin >= run.total:  # strength 0
        return clean
    t = run.timesteps[run.begin : run.begin + 1].repeat(len(run))
    if hasattr(run.scheduler, "scale_noise"):
        return run.scheduler.scale_noise(clean, t, noise)
    return run.scheduler.add_noise(clean, noise, t)


def _encode(run: Run, request: Request) -> None:
    """Encode the batch's texts, each once however many samples share it, and spread them over the samples."""
    rows = slice(run.samples.start, run.samples.stop)  # with the weights that run.prompts lack
    negatives = request.negatives[rows] if request.negatives else [""] * len(run)
    pairs = list(zip(request.prompts[rows], negatives, strict=True))
    known = list(dict.fromkeys(pairs))
    guided = request.guidance.on or bool(request.compose)
    encoded = encode_weighted(
        run.model,
        [prompt for prompt, _ in known],
        None if run.negatives is None else [negative for _, negative in known],
        guidance=guided,
        embedded_guidance=request.embedded,
    )
    run.condition = encoded.rows([known.index(pair) for pair in pairs])
    for k, (text, weight) in enumerate(request.compose, 1):
        extra = encode_weighted(run.model, [text], None, guidance=False, embedded_guidance=request.embedded)
        run.compose[f"compose {k}"] = extra.rows([0] * len(run)), weight


def _step_options(run: Run, eta: float) -> dict[str, Any]:
    accepted = inspect.signature(run.scheduler.step).parameters
    if eta and "eta" not in accepted:
        raise BadInput(
            f"eta is {eta:g}, but {type(run.scheduler).__name__} adds no noise by eta; use scheduler 'ddim'."
        )
    options = {"eta": eta, "generator": run.generators}
    return {name: value for name, value in options.items() if name in accepted}


@contextmanager
def _evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _refuse_non_finite(finite: list[tuple[int, Tensor]], run: Run) -> None:
    for i, fine in finite:
        if not fine:
            raise NotFinite(
                f"latents stopped being finite at step {i + 1} of {run.total} (t = {float(run.timesteps[i]):g}); "
                f"lower the guidance or the strength of interventions, or use dtype float32."
            )
