"""Arguments of :func:`sfumato.sampling.generate`, checked once and spelt out per sample before any work begins."""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.sampling.guidance import Guidance, checked_compose

DEFAULT_STRENGTH = 0.8  # of image-to-image, as in diffusers
MAX_SIDE = 8192  # pixels; beyond it the latents alone outgrow any denoiser


@dataclass(frozen=True)
class Source:
    """What the walk begins with: unit noise drawn from the seeds (nothing given), given ``latents`` (1 or b, c h w), at
    step ``start`` of the schedule, or ``pixels`` (1 or b, 3 H W) noised to ``strength`` of it."""

    latents: Tensor | None = None
    start: int = 0
    pixels: Tensor | None = None
    strength: float | None = None


@dataclass(frozen=True)
class Request:
    """What to generate: one entry of ``prompts``, ``negatives`` and ``seeds`` per sample."""

    prompts: list[str]
    negatives: list[str] | None
    seeds: list[int]
    width: int
    height: int
    steps: int
    guidance: Guidance
    embedded: float | None
    compose: list[tuple[str, float]]
    scheduler: Any
    eta: float
    source: Source
    batch_size: int

    def __len__(self) -> int:
        return len(self.prompts)

    def batches(self) -> list[range]:
        """The samples, cut into batches of at most ``batch_size``."""
        return [range(i, min(i + self.batch_size, len(self))) for i in range(0, len(self), self.batch_size)]

    def begin(self, scheduler: Any, flow: bool) -> int:
        """Index of the schedule at which the walk begins."""
        start = self.source.start
        if self.source.strength is not None:
            kept = self.steps * self.source.strength
            # diffusers rounds the kept steps down for diffusion models and the skipped ones down for flow models
            start = int(self.steps - kept) if flow else self.steps - int(kept)
            if start == self.steps and kept:
                raise BadInput(
                    f"strength {self.source.strength:g} leaves no step out of {self.steps}; "
                    f"give at least {1 / self.steps:g}."
                )
        return min(start * scheduler.order, len(scheduler.timesteps))


def checked(
    model: Any,
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
    batch_size: int | None = None,
) -> Request:
    """A :class:`Request`, or an error naming the argument. Samples: all n of the first prompt, then of the next."""
    own = model.defaults
    steps = whole(own["steps"] if steps is None else steps, "steps", 1, 1000)
    scheduler = own["scheduler"] if scheduler is None else scheduler
    n = whole(n, "n", 1)
    prompts = _texts(prompt, "prompt")
    total = len(prompts) * n
    negatives = None if negative is None else _texts(negative, "negative")
    if negatives is not None and len(negatives) not in (1, len(prompts)):
        raise BadInput(f"negative has {len(negatives)} texts for {len(prompts)} prompts; give one for all or one each.")
    if negatives is not None and len(negatives) < len(prompts):
        negatives = negatives * len(prompts)
    composed = checked_compose(compose)
    mixed, embedded = _guidance(model, own["guidance"] if guidance is None else guidance, true_guidance, rescale)
    if any(negatives or ()) and not mixed.on and not composed:
        name = "true_guidance" if model.embeds_guidance else "guidance"
        raise BadInput(f"negative has no effect without classifier-free guidance; give {name} above 1.")
    width, height, source = _source(model, size, latents, start, image, strength, total, steps)
    return Request(
        prompts=[text for text in prompts for _ in range(n)],
        negatives=None if negatives is None else [text for text in negatives for _ in range(n)],
        seeds=_seeds(seed, total),
        width=width,
        height=height,
        steps=steps,
        guidance=mixed,
        embedded=embedded,
        compose=composed,
        scheduler=scheduler,
        eta=fraction(eta, "eta"),
        source=source,
        batch_size=total if batch_size is None else whole(batch_size, "batch_size", 1),
    )


def _guidance(
    model: Any, guidance: float | Guidance, true_guidance: float | Guidance | None, rescale: float
) -> tuple[Guidance, float | None]:
    """Classifier-free guidance, and the scale told to a guidance-distilled denoiser."""
    embedded = None
    if model.embeds_guidance:
        if isinstance(guidance, Guidance):
            raise BadInput(
                "guidance is an input of this model and must be a number; a Guidance goes into true_guidance."
            )
        embedded, guidance = float(Guidance(guidance).scale), 1.0 if true_guidance is None else true_guidance
    elif true_guidance is not None:
        raise BadInput("true_guidance is for guidance-distilled models; this one takes guidance alone.")
    if not isinstance(guidance, Guidance):
        return Guidance(guidance, rescale), embedded
    if rescale:
        raise BadInput("rescale is given twice: set it inside the Guidance object only.")
    return guidance, embedded


def _source(
    model: Any, size: Any, latents: Any, start: int, image: Any, strength: Any, total: int, steps: int
) -> tuple[int, int, Source]:
    """(width, height, source); the size is that asked for, else that of the picture or latents, else the model's."""
    if image is not None and latents is not None:
        raise BadInput("image and latents are both given; the walk can begin with one of them only.")
    if strength is not None and image is None:
        raise BadInput("strength says how much to change an image, but no image is given.")
    start = whole(start, "start", 0, steps - 1)
    if start and latents is None:
        raise BadInput(f"start is {start}, but no latents are given to start from.")
    if image is not None:
        pixels = as_pixels(image, None if size is None else checked_size(model, size))
        width, height = checked_size(model, (pixels.shape[-1], pixels.shape[-2]), "the picture, without size,")
        _check_rows("image", len(pixels), total)
        strength = fraction(DEFAULT_STRENGTH if strength is None else strength, "strength")
        return width, height, Source(pixels=pixels, strength=strength)
    if latents is None:
        width, height = checked_size(model, model.default_size[::-1] if size is None else size)
        return width, height, Source()
    if not isinstance(latents, Tensor) or latents.dim() != 4:
        raise BadInput(f"latents has shape {tuple(getattr(latents, 'shape', ()))}; it must be a tensor (b, c, h, w).")
    if size is None:
        size = (latents.shape[-1] * model.family.scale, latents.shape[-2] * model.family.scale)
    width, height = checked_size(model, size)
    expected = tuple(model.latent_shape(height, width))
    if tuple(latents.shape[1:]) != expected:
        raise BadInput(
            f"latents has shape {tuple(latents.shape)}; {width}x{height} pixels need (b, {str(expected)[1:]}."
        )
    if not torch.isfinite(latents).all():
        raise BadInput("latents holds values that are not finite.")
    _check_rows("latents", len(latents), total)
    return width, height, Source(latents=latents.expand(total, -1, -1, -1), start=start)


def _check_rows(name: str, given: int, total: int) -> None:
    if given not in (1, total):
        raise BadInput(f"{name} has {given} rows for {total} samples; give one for all, or one per sample.")


def whole(value: Any, name: str, low: int, high: int | None = None) -> int:
    """``value`` as an integer in [low, high], or BadInput."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise BadInput(f"{name} is {value!r}; it must be a whole number, {limits}.")
    return number


def fraction(value: Any, name: str) -> float:
    """``value`` as a number in [0, 1], or BadInput."""
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise BadInput(f"{name} is {value!r}; it must lie between 0 and 1.")
    return float(value)


def _texts(given: Any, name: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise BadInput(f"{name} is {given!r}; it must be a text or a non-empty list of texts.")
    return list(texts)


def _seeds(seed: Any, total: int) -> list[int]:
    if seed is None:
        seed = secrets.randbelow(2**31)
    if isinstance(seed, list | tuple):
        if len(seed) != total:
            raise BadInput(f"seed has {len(seed)} entries for {total} samples; give one number, or one per sample.")
        return [whole(each, "seed", 0, 2**63 - 1) for each in seed]
    first = whole(seed, "seed", 0, 2**63 - total)
    return list(range(first, first + total))


def checked_size(model: Any, size: Any, what: str = "size") -> tuple[int, int]:
    """(width, height) in pixels that the model can make, or BadInput naming the nearest ones that it can."""
    if not (isinstance(size, list | tuple) and len(size) == 2):
        raise BadInput(f"size is {size!r}; it must be (width, height) in pixels, such as (512, 768).")
    width, height = (whole(side, "size", 1, MAX_SIDE) for side in size)
    step = model.size_multiple
    if width % step or height % step:
        nearest = dict.fromkeys((_round(width, step, up), _round(height, step, up)) for up in (False, True))
        options = " or ".join(f"{w}x{h}" for w, h in nearest)
        raise BadInput(f"{what} is {width}x{height}; sides must be multiples of {step}. Nearest: {options}.")
    model.latent_shape(height, width)  # refuses what the family cannot make
    return width, height


def _round(side: int, step: int, up: bool) -> int:
    return max(math.ceil(side / step) if up else side // step, 1) * step


def as_pixels(image: Any, size: tuple[int, int] | None) -> Tensor:
    """Pictures as a tensor (b 3 H W) in [-1, 1], resized to ``size`` = (width, height) when given.

    ``image``: a PIL picture, a list of them, or such a tensor already.
    """
    if isinstance(image, Tensor):
        if image.dim() != 4 or image.shape[1] != 3:
            raise BadInput(f"image has shape {tuple(image.shape)}; a tensor must be (b, 3, height, width) in [-1, 1].")
        if size is not None and tuple(image.shape[-2:]) != (size[1], size[0]):
            raise BadInput(
                f"image is {image.shape[-1]}x{image.shape[-2]} but size is {size[0]}x{size[1]}; resize it first."
            )
        if not torch.isfinite(image).all():
            raise BadInput("image holds values that are not finite.")
        return image
    pictures = image if isinstance(image, list | tuple) else [image]
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise BadInput(f"image is {image!r}; it must be a PIL picture, a list of them, or a tensor (b, 3, H, W).")
    size = size or pictures[0].size
    resized = [p.convert("RGB") if p.size == size else p.convert("RGB").resize(size, Image.LANCZOS) for p in pictures]
    array = np.stack([np.asarray(picture) for picture in resized]).astype(np.float32) / 255.0
    return torch.from_numpy(array.transpose(0, 3, 1, 2)) * 2.0 - 1.0


def as_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels (b 3 H W) in [-1, 1] as PIL pictures, rounded as diffusers rounds them."""
    array = (pixels.detach() / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
    return [Image.fromarray(picture) for picture in (array * 255).round().astype("uint8")]
