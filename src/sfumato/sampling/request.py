"""Arguments of :func:`sfumato.sampling.generate`, checked once and spelt out per sample before any work begins."""

from __future__ import annotations

import itertools
import math
import operator
import secrets
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.models import Encoding
from sfumato.models.families import families_with
from sfumato.sampling.encoding import encoding_of
from sfumato.sampling.guidance import Guidance
from sfumato.sampling.options import MAX_AREA, MAX_SIDE, Options
from sfumato.sampling.pixels import as_pictures, as_pixels, as_pixels_of, upright_picture
from sfumato.sampling.process import Source, process_of
from sfumato.text.dialects import Composition, adapter_tags, read_composition, refuse_dialect, warn_of_plain_words
from sfumato.text.weights import read_weights

DEFAULT_STRENGTH = 0.8  # of image-to-image, as in diffusers


class GuidanceCosts(UserWarning):
    """Guidance asked of a model that is distilled to do without; the message says what it costs."""


@dataclass(frozen=True)
class Request:
    """What to generate. ``options``: as given, with what was left open filled in by the model's own choice; one entry
    of ``prompts``, ``negatives`` and ``seeds`` per sample. ``encoding``: how the texts are encoded. ``embedded``: the
    guidance scale that is an input of a guidance-distilled denoiser."""

    options: Options
    prompts: list[str]
    negatives: list[str] | None
    seeds: list[int]
    guidance: Guidance
    embedded: float | None
    source: Source
    encoding: Encoding

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        assert self.options.size is not None
        return self.options.size

    @property
    def steps(self) -> int:
        assert self.options.steps is not None
        return self.options.steps

    def batches(self, model: Any) -> list[range]:
        """The samples, cut into batches of at most ``batch_size``, whose prompts take equally many chunks and compose
        alike, so that no sample depends on another."""
        step, known = self.options.batch_size or len(self), {}
        starts: list[int] = [0]
        layout = None
        for i in range(len(self)):
            key = self.prompts[i], self.negatives[i] if self.negatives else None
            if key not in known:
                composed = self.composition(i)
                known[key] = (
                    self.chunks(model, [i]),
                    composed.weight,
                    tuple(weight for _, weight in composed.others),
                )
            if i and (i - starts[-1] == step or known[key] != layout):
                starts.append(i)
            layout = known[key]
        return [range(i, j) for i, j in itertools.pairwise([*starts, len(self)])]

    def composition(self, i: int) -> Composition:
        """What the prompt of sample ``i`` composes by ``AND``."""
        return read_composition(self.prompts[i])

    def chunks(self, model: Any, samples: Iterable[int], further: Iterable[str] = ()) -> int:
        """In how many chunks every text of these samples is read, and ``further`` ones; 0: none is, all are cut."""
        if self.options.long_prompts == "cut":
            return 0
        texts = {*further, *(text for text, _ in self.options.compose)}
        for i in samples:
            composed = self.composition(i)
            texts |= {
                composed.text,
                *(text for text, _ in composed.others),
                *(self.negatives[i : i + 1] if self.negatives else ()),
            }
        with model.in_chunks(None):
            return model.chunks_for([read_weights(text).text for text in texts])


def checked_request(
    model: Any,
    prompt: str | Sequence[str],
    *,
    latents: Tensor | None = None,
    image: Any = None,
    reference: Any = None,
    **given: Any,
) -> Request:
    """A :class:`Request`, or an error naming the argument. ``given``: :class:`Options`. Samples: all n of the first
    prompt, then of the next."""
    if model.embeds_guidance and isinstance(given.get("guidance"), Guidance):
        raise BadInput("guidance is an input of this model and must be a number; a Guidance goes into true_guidance.")
    options = Options(prompt=prompt if isinstance(prompt, str | list) else _listed(prompt), **given)
    process = process_of(model)
    own = Options.model_fields
    changed = {name for name in options.model_fields_set if getattr(options, name) != own[name].default}
    process.check(model, options, changed | ({"image"} if image is not None else set()))
    prompts = _texts(options.prompt)
    total = len(prompts) * options.n
    for text in prompts:
        if adapter_tags(text)[1]:
            raise BadInput(
                f"<lora:...> stands in {text[:80]!r}, but no adapter is read here; give --with lora:file=NAME."
            )
        read_composition(text)
    negatives = None if options.negative is None else _texts(options.negative)
    if negatives is not None and len(negatives) not in (1, len(prompts)):
        raise BadInput(f"negative has {len(negatives)} texts for {len(prompts)} prompts; give one for all or one each.")
    if negatives is not None and len(negatives) < len(prompts):
        negatives = negatives * len(prompts)
    for text in negatives or ():
        refuse_dialect(text, "the negative prompt")
    warn_of_plain_words([*prompts, *(negatives or ())])
    scale = model.defaults["guidance"] if options.guidance is None else options.guidance
    mixed, embedded = _guidance(model, scale, options)
    composes = bool(options.compose) or any(read_composition(text).others for text in prompts)
    if any(negatives or ()) and not mixed.on and not composes:
        name = "true_guidance" if model.embeds_guidance else "guidance"
        raise BadInput(f"negative has no effect without classifier-free guidance; give {name} above {mixed.off:g}.")
    if mixed.on and not model.embeds_guidance and model.defaults["guidance"] <= 1:
        warnings.warn(
            f"{model.name} is distilled to draw without guidance; guidance {mixed.scale:g} takes a second pass through "
            "it in every step, twice the time, and it was not made for that: 1 is its own.",
            GuidanceCosts,
            stacklevel=3,
        )
    if options.fps is not None and not model.clips:
        raise BadInput(f"fps={options.fps:g}, but {model.name} makes pictures, not clips.")
    references = _references(model, reference)
    steps = process.steps(model, options)
    size, source = _source(model, options, latents, image, total, steps)
    filled = {
        "steps": steps,
        "guidance": float(scale),
        "size": size,
        "frames": model.frames(_frames(model, options, source.latents, source.pixels)),
        "fps": options.fps if options.fps is not None or not model.clips else float(model.defaults["fps"]),
        "scheduler": model.defaults["scheduler"] if options.scheduler is None else options.scheduler,
        "strength": source.strength,
    }
    return Request(
        options=options.model_copy(update=filled),
        prompts=[text for text in prompts for _ in range(options.n)],
        negatives=None if negatives is None else [text for text in negatives for _ in range(options.n)],
        seeds=_seeds(options.seed, total),
        guidance=mixed,
        embedded=embedded,
        source=source,
        encoding=encoding_of(model, options, size, references),
    )


def _guidance(model: Any, scale: float, options: Options) -> tuple[Guidance, float | None]:
    """Classifier-free guidance, and the scale given to a guidance-distilled denoiser."""
    mixed, embedded = scale, None
    if model.embeds_guidance:
        mixed, embedded = 1.0 if options.true_guidance is None else options.true_guidance, float(scale)
    elif options.true_guidance is not None:
        raise BadInput("true_guidance is for guidance-distilled models; this one takes guidance alone.")
    return Guidance(mixed, options.rescale, options.guidance_interval, model.family.guidance_off), embedded


def _source(
    model: Any, options: Options, latents: Any, image: Any, total: int, steps: int
) -> tuple[tuple[int, int], Source]:
    """((width, height), source); the size is that asked for, else that of the picture or latents, else the model's."""
    size, strength = options.size, options.strength
    if image is not None and latents is not None:
        raise BadInput("image and latents are both given; the walk can begin with one of them only.")
    if strength is not None and image is None:
        raise BadInput("strength says how much to change an image, but no image is given.")
    start = checked_int(options.start, "start", 0, steps - 1)
    if start and latents is None:
        raise BadInput(f"start is {start}, but no latents are given to start from.")
    after = options.denoising_start
    if after is not None and (latents is None or start):
        why = "start is given too" if start else "no latents are given to go on from"
        raise BadInput(f"denoising_start is {after:g}, but {why}.")
    if model.family.finishes and image is None and not (start or after):
        raise BadInput(
            f"{model.name} ({model.family.name}) finishes pictures and draws none: give it an image, or latents of its "
            f"base model (made with denoising_end) and denoising_start."
        )
    if image is not None:
        pixels = as_pixels_of(model, image, None if size is None else checked_size(model, size))
        size = checked_size(model, (pixels.shape[-1], pixels.shape[-2]), "the picture, without size,")
        _check_rows("image", len(pixels), total)
        return size, Source(pixels=pixels, strength=DEFAULT_STRENGTH if strength is None else strength)
    if latents is None:
        return checked_size(model, model.default_size[::-1] if size is None else size), Source()
    family = model.family
    if not isinstance(latents, Tensor) or latents.dim() != family.state_dims:
        shape = tuple(getattr(latents, "shape", ()))
        letters = ", ".join(("b", *family.state.split()))
        raise BadInput(f"latents has shape {shape}; it must be a tensor ({letters}).")
    if size is None:
        grid = family.state.split()[-2:] == ["h", "w"]
        size = tuple(side * family.scale for side in latents.shape[:-3:-1]) if grid else model.default_size[::-1]
    width, height = checked_size(model, size)
    frames = _frames(model, options, latents)
    expected = tuple(model.latent_shape(height, width, frames))
    if tuple(latents.shape[1:]) != expected:
        numbers = ", ".join(("b", *map(str, expected)))
        clip = f"{frames} frames of " if model.clips else ""
        raise BadInput(f"latents has shape {tuple(latents.shape)}; {clip}{width}x{height} pixels need ({numbers}).")
    if not torch.isfinite(latents).all():
        raise BadInput("latents holds values that are not finite.")
    _check_rows("latents", len(latents), total)
    return (width, height), Source(latents=latents, start=start, after=after)


def _references(model: Any, given: Any) -> tuple[Image.Image, ...]:
    """The reference pictures, each in its own size. Raises BadInput for more or fewer than the model looks at."""
    if isinstance(given, Tensor):
        given = as_pictures(as_pixels(given, None))
    pictures = tuple(given) if isinstance(given, list | tuple) else () if given is None else (given,)
    allowed = model.family.references
    if len(pictures) in allowed:
        return tuple(upright_picture(picture, "reference") for picture in pictures)
    if len(allowed) == 1 and 0 in allowed:
        raise BadInput(
            f"reference is given, but {model.name} ({model.family.name}) looks at no pictures beside its prompt; "
            f"{families_with('reference')}. Give image to begin from a picture."
        )
    if not pictures:
        raise BadInput(f"{model.name} ({model.family.name}) edits pictures: give it one as reference.")
    raise BadInput(f"reference has {len(pictures)} pictures; {model.name} looks at {allowed[-1]} at most.")


def _frames(model: Any, options: Options, latents: Any, pixels: Tensor | None = None) -> int | None:
    """How many frames are asked for, or those of given latents or clips; None is the model's own choice."""
    letters = model.family.state.split()
    if pixels is not None and model.clips:
        if options.frames not in (None, pixels.shape[2]):
            raise BadInput(f"frames is {options.frames}, but the clip to begin with has {pixels.shape[2]}.")
        return pixels.shape[2]
    if options.frames is not None or latents is None or "f" not in letters:
        return options.frames
    return model.family.frames_of(latents.shape[1 + letters.index("f")])


def _check_rows(name: str, given: int, total: int) -> None:
    if given not in (1, total):
        raise BadInput(f"{name} has {given} rows for {total} samples; give one for all, or one per sample.")


def checked_int(value: Any, name: str, low: int, high: int | None = None) -> int:
    """``value`` as an integer in [low, high], or BadInput."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise BadInput(f"{name} is {value!r}; it must be a whole number, {limits}.")
    return number


def _listed(prompts: Any) -> Any:
    """Several prompts as a list; anything else is left to the schema to refuse."""
    return list(prompts) if isinstance(prompts, Sequence) else prompts


def _texts(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


def _seeds(seed: int | list[int] | None, total: int) -> list[int]:
    if seed is None:
        seed = secrets.randbelow(2**31)
    if isinstance(seed, list):
        if len(seed) != total:
            raise BadInput(f"seed has {len(seed)} entries for {total} samples; give one number, or one per sample.")
        return seed
    checked_int(seed, "seed", 0, 2**63 - total)
    return list(range(seed, seed + total))


def checked_size(model: Any, size: Any, what: str = "size") -> tuple[int, int]:
    """(width, height) in pixels that the model can make, or BadInput naming the nearest ones that it can."""
    if not (isinstance(size, list | tuple) and len(size) == 2):
        raise BadInput(f"size is {size!r}; it must be (width, height) in pixels, such as (512, 768).")
    width, height = (checked_int(side, "size", 1, MAX_SIDE) for side in size)
    if width * height > MAX_AREA:
        raise BadInput(f"{what} is {width}x{height}; the most is {MAX_AREA} pixels, such as 4096x4096.")
    step = model.size_multiple
    if width % step or height % step:
        nearest = dict.fromkeys((_round(width, step, up), _round(height, step, up)) for up in (False, True))
        options = " or ".join(f"{w}x{h}" for w, h in nearest)
        raise BadInput(f"{what} is {width}x{height}; sides must be multiples of {step}. Nearest: {options}.")
    model.latent_shape(height, width)  # refuses what the family cannot make
    return width, height


def _round(side: int, step: int, up: bool) -> int:
    return max(math.ceil(side / step) if up else side // step, 1) * step
