"""The sampling loop: the only place that walks from nothing to a picture.

With no intervention :func:`generate` makes the latents of the diffusers pipeline, bit for bit on a CPU, the weights of
both frozen; ``n`` samples are those of ``num_images_per_prompt``. A prompt given twice in a list is encoded once here
and twice there, which rounds otherwise. The model answers what a family is like, the process (diffusion, masked tokens,
...) makes the step, interventions do everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato import cards, rng
from sfumato.cards import parameters_of
from sfumato.cards.signatures import with_signature
from sfumato.errors import BadInput, Conflict, NotFinite, SfumatoError, WorkInterrupted, within_memory
from sfumato.models import Model
from sfumato.models.memory import refuse_unaffordable
from sfumato.sampling.arguments import GenerateArguments
from sfumato.sampling.attached.interception import has_attached
from sfumato.sampling.intervention import (
    Coverage,
    Intervention,
    arrange,
    distinct_names,
    overridden,
    refuse_idle,
    refuse_unfit,
)
from sfumato.sampling.options import Options
from sfumato.sampling.process import process_of
from sfumato.sampling.request import Request, checked_request
from sfumato.sampling.result import Result
from sfumato.sampling.run import Run, Step
from sfumato.text.dialects import adapter_tags
from sfumato.text.weights import encode_weighted, read_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_signature(GenerateArguments, parameters_of(Options))
def generate(
    model: Model,
    prompt: str | Sequence[str],
    *,
    latents: Tensor | None = None,
    image: Any = None,
    reference: Any = None,
    interventions: Intervention | Sequence[Any] = (),
    grad: bool = False,
    decode: bool = True,
    on_step: Callable[[Step], None] | None = None,
    **options: Unpack[GenerateArguments],
) -> Result:
    """Make pictures of prompts: ``n`` of each, all n of the first prompt first.

    Args:
        prompt: may hold weights, as may all other texts: see :mod:`sfumato.text.weights`.
        latents: unit noise (b c h w) to begin with; or, with ``start`` > 0, the latents with which step ``start`` of
            the schedule begins, as found in ``step.x``; with ``denoising_start``, those that another model left at the
            same ``denoising_end`` (SDXL and its refiner). Of models that draw tokens: token ids in the state's shape.
        image: a picture, several, or a tensor (b 3 H W) in [-1, 1], noised to ``strength`` (0.8) of the schedule. For
            models of clips: frames (f h w 3) uint8, a list of pictures, or a tensor (b 3 f H W).
        reference: a picture, or several, that all samples are drawn by, where the model looks at pictures beside its
            prompt (Kontext, Flux.2, Qwen-Image-Edit); each is resized as the model's pipeline does.
        interventions: systems that watch or change generation; lists nest.
        grad: record gradients through the whole loop, for latents or texts that require them.
        decode: also make ``pixels``.
        on_step: called with the :class:`Step` after every step.
        options: :class:`sfumato.sampling.Options` - ``negative``, ``n``, ``steps``, ``guidance`` (a number or a
            :class:`Guidance`), ``seed``, ``size`` (width, height) in pixels, ``scheduler`` and more. None is the
            model's own choice. Sample i uses ``seed + i``; what it draws, noise of stochastic schedulers and tokens
            included, depends on its own seed only. An interruption keeps the finished batches of ``batch_size``.

    Raises:
        BadInput, UnknownName, NotSupported: an argument. Conflict: interventions that cannot run together. NoMatch:
        one of them did nothing. WorkInterrupted: Ctrl-C. NotFinite: numbers overflowed; the message says at which step.
        The ``result`` of whatever stops a later batch holds the samples finished before.
    """
    prompt, adapters = _adapters(prompt)
    parts = arrange([adapters, interventions])
    request = checked_request(model, prompt, latents=latents, image=image, reference=reference, **options)
    batches = request.batches(model)
    if decode and hasattr(model.pipe, "vae") and not getattr(model.pipe.vae, "use_tiling", False):
        rows, itemsize = max(map(len, batches)), model.dtype.itemsize
        refuse_unaffordable(model.pipe.vae.config, request.size, rows, itemsize, model.device, model.name)
    coupled = [part.name for part in parts if part.couples_samples]
    if coupled and len(batches) > 1:
        if (request.options.batch_size or len(request)) < len(request):
            raise Conflict(
                f"{coupled[0]} couples the samples of a batch, so batch_size must be at least {len(request)}."
            )
        raise Conflict(
            f"{coupled[0]} couples the samples of a batch, but these prompts take different numbers of chunks or AND "
            f"parts; give them to separate calls."
        )
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
            with _remedy(request, samples), open_run(model, request, samples, parts, grad=grad) as run:
                x = walk(run, run.process.initial(slice(samples.start, samples.stop)), on_step, run.process.until)
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
        finished = (
            f"the first {done} of {len(request)} samples are finished and kept" if done else "nothing was finished"
        )
        interrupted = WorkInterrupted(f"generation was interrupted: {finished}.")
        interrupted.result = result() if done else None
        raise interrupted from stop
    assert run is not None
    refuse_idle(parts, run.sites if parts else ())
    return result()


@contextmanager
def open_run(
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
    if has_attached(model.pipe):
        raise Conflict(
            f"systems are attached to the pipeline of {model.name}, which see its own calls only; give them to this "
            f"run as interventions, or call the pipeline."
        )
    rows = slice(samples.start, samples.stop)

    process = process_of(model)(
        model,
        request.options,
        request.source,
        request.size,
        rng.generators("sample", request.seeds[rows]),
        backward=backward,
    )
    for part in parts:
        if part.keeps_graph and not process.differentiable:
            raise process.lacks("gradient with respect to the state", part.name)
    if grad and not (process.differentiable and model.family.has("differentiable_state")):
        raise process.lacks("gradient with respect to the state", "grad")
    run = Run(
        model=model,
        parts=parts,
        samples=samples,
        prompts=[read_weights(request.composition(i).text).text for i in samples],
        negatives=request.negatives and [read_weights(text).text for text in request.negatives[rows]],
        seeds=request.seeds[rows],
        generators=process.generators,
        size=request.size,
        grid=model.grid(request.size[1], request.size[0]),
        guidance=request.guidance,
        process=process,
        grad=grad,
        direction=-1 if backward else 1,
        request=request,
        weight=request.composition(samples.start).weight,
    )
    with run:
        run.enter(torch.set_grad_enabled(grad))
        run.enter(torch.random.fork_rng([model.device] if model.device.type == "cuda" else []))
        run.enter(_evaluation_mode(model.modules.values()))
        run.enter(model.encoding(request.encoding))
        started = overridden(parts, "start")
        for part in started:
            if part.role == "adapter":
                part.start(run)
        # only now every tokenizer knows its words; the systems find theirs on an axis of its final length
        further = [text for part in parts for text in part.further_prompts()]
        run.enter(model.in_chunks(request.chunks(model, samples, further)))
        for part in started:
            if part.role != "adapter":
                part.start(run)
        _encode(run, request)
        for part in overridden(parts, "on_text"):
            run.condition = part.on_text(run, run.condition)
        run.connect_taps()
        yield run
        for part in overridden(parts, "finish"):
            part.finish(run)


def walk(run: Run, x: Tensor, on_step: Callable[[Step], None] | None = None, until: int | None = None) -> Tensor:
    """Carry states (b ...), latents in the scheduler's scaling, along the schedule from ``run.begin`` to its end, or to
    where step ``until`` would begin."""
    for part in overridden(run.parts, "on_noise"):
        x = part.on_noise(run, x)
        run.process.refuse(x, part.name)
    for part in overridden(run.parts, "on_condition"):
        run.condition = part.on_condition(run, run.condition)
        run.compose = {name: (part.on_condition(run, each), weight) for name, (each, weight) in run.compose.items()}
    before, after, last = (overridden(run.parts, name) for name in ("before_predict", "after_predict", "after_step"))
    finite: list[tuple[int, Tensor, Tensor | bool]] = []
    i = run.begin
    while 0 <= i < run.total and i != until:
        step = Step(run, i, x)
        for part in step.active(before):
            step.actor = part
            part.before_predict(step)
            run.process.refuse(step.x, part.name)
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
            run.process.refuse(step.x, part.name)
        step.actor = None
        x = step.x
        own: Tensor | bool = True  # the denoiser's own output is checked in the first step only: see _way_out
        if i == run.begin:
            own = torch.stack([torch.isfinite(out).all() for out in step.outputs.values()]).all()
        finite.append((i, torch.isfinite(x).all(), own))
        if x.device.type == "cpu":  # elsewhere asking would stall the queue at every step
            _refuse_non_finite(finite, run)
            finite.clear()
        if on_step is not None:
            on_step(step)
        if step.next != i + run.direction:
            run.seek(step.next)
        i = step.next
    _refuse_non_finite(finite, run)
    return x


def _encode(run: Run, request: Request) -> None:
    """Encode the batch's texts, each once however many samples share it, and spread them over the samples."""
    rows = slice(run.samples.start, run.samples.stop)  # with the weights that run.prompts lack
    compositions = [request.composition(i) for i in run.samples]
    if len({(each.weight, tuple(weight for _, weight in each.others)) for each in compositions}) > 1:
        raise BadInput("these prompts compose differently many texts, or with other weights; give them one by one.")
    negatives = request.negatives[rows] if request.negatives else [""] * len(run)
    pairs = list(zip([each.text for each in compositions], negatives, strict=True))
    known = list(dict.fromkeys(pairs))
    composed = [([text] * len(run), weight) for text, weight in request.options.compose]
    for k, (_, weight) in enumerate(compositions[0].others):
        composed.append(([each.others[k][0] for each in compositions], weight * request.guidance.scale))
    encoded = encode_weighted(
        run.model,
        [prompt for prompt, _ in known],
        None if run.negatives is None else [negative for _, negative in known],
        guidance=request.guidance.on or bool(composed),
        embedded_guidance=request.embedded,
        weighting=run.weighting,
    )
    run.condition = encoded.rows([known.index(pair) for pair in pairs])
    for k, (texts, weight) in enumerate(composed, 1):
        each = list(dict.fromkeys(texts))
        extra = encode_weighted(
            run.model, each, None, guidance=False, embedded_guidance=request.embedded, weighting=run.weighting
        )
        run.compose[f"compose {k}"] = extra.rows([each.index(text) for text in texts]), weight


def _adapters(prompt: Any) -> tuple[Any, list[Any]]:
    """The prompts without their ``<lora:name:scale>``, and the adapters these name. Raises BadInput where prompts name
    different ones, for an adapter acts on the whole batch."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return prompt, []  # refused with the other options
    read = [adapter_tags(text) for text in texts]
    if len({tags for _, tags in read}) > 1:
        raise BadInput("the prompts name different adapters in <lora:...>; give them one by one.")
    lora = [cards.method("lora")(file=name, scale=scale) for name, scale in (read[0][1] if read else ())]
    plain = [text for text, _ in read]
    return plain[0] if isinstance(prompt, str) else plain, lora


def _remedy(request: Request, samples: range) -> AbstractContextManager[None]:
    """Within: running out of memory is said in our words."""
    what = f"{len(samples)} samples at once" if len(samples) > 1 else "one sample"
    fewer = f"draw fewer at once (batch_size={len(samples) // 2}), " if len(samples) > 1 else ""
    return within_memory(
        f"{what} of {request.size[0]}x{request.size[1]}", f"{fewer}make it smaller (size) or use dtype bfloat16"
    )


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


def _refuse_non_finite(finite: list[tuple[int, Tensor, Tensor | bool]], run: Run) -> None:
    """``finite``: per step its index, whether the state is finite after it, and of the first whether the denoiser's
    outputs were."""
    for i, fine, own in finite:
        if not fine:
            raise NotFinite(
                f"latents stopped being finite at step {i + 1} of {run.total} (t = {float(run.timesteps[i]):g}); "
                f"{_way_out(run, bool(own), i == run.begin)}."
            )


def _way_out(run: Run, own: bool, first: bool) -> str:
    """What may keep the state finite in this run, where the denoiser's ``own`` outputs were finite or not, in the
    ``first`` step or later."""
    innocent = own or not first
    acting = [part.name for part in run.parts if part.role != "observer" and part.strength]
    ways = ["lower the guidance"] if innocent and "uncond" in run.branches(0.5) else []
    ways += [f"lower the strength of {' or '.join(acting)}"] if acting else []
    ways += ["use dtype float32"] if run.model.dtype != torch.float32 else []
    if ways:
        return ", or ".join(ways)
    if innocent:
        return "the scheduler leads there by itself; use another one"
    return "the denoiser itself gives such numbers in float32, so its weights are damaged; get them again"
