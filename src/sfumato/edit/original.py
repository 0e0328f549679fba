"""Originals: a picture opened for editing, with all that its edits share, so that each further edit costs its own rows.

A picture that sfumato made is drawn again from its own noise, which its recipe knows; any other picture is inverted
(DDIM inversion, or the Euler path of a flow model, and null-text optimisation where there is guidance).

    >>> original = PromptToPrompt(source="a cat on a sofa").open(model, Picture(photo, "a cat on a sofa"))
    >>> original.edit("a dog on a sofa").images[0]
    >>> original.edit("a cat on a sofa", reweight={"sofa": 2.0}).images[0]

What edits is a system that follows the recorded source, such as :mod:`sfumato.edit.prompt_to_prompt`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato import files
from sfumato.arrays import to_tensor
from sfumato.attention.sites import Site
from sfumato.edit.null_text import null_text
from sfumato.errors import BadInput, NoMatch
from sfumato.markup import described
from sfumato.models import Model
from sfumato.protocol import Picture
from sfumato.sampling import Intervention, Result, Run, Step, generate, invert
from sfumato.sampling.pixels import as_pixels
from sfumato.sampling.recording import Recorder, Recording
from sfumato.sampling.request import checked_size

__all__ = ["FollowsSource", "PreserveOutside", "Original", "read_mask"]

#: sites and grid (h, w) of the latents -> what to keep of the attention at a site and progress
Wants = Callable[[Sequence[Site], tuple[int, int]], Callable[[Site, float], bool]]


class PreserveOutside(Intervention):
    """Holds everything outside a mask to the source: its latents after every step, its pixels at the end.

    ``mask`` (1 1 H W) bool, True where the picture may change; ``pixels`` (1 3 H W) in [-1, 1], what is kept.
    """

    role = "steerer"

    def __init__(self, mask: Tensor, recording: Recording, pixels: Tensor):
        self.mask, self.recording, self.pixels = mask, recording, pixels

    @property
    def name(self) -> str:
        return "keep"

    def start(self, run: Run) -> None:
        # a latent cell may change if any of its pixels may
        self._cells = F.adaptive_max_pool2d(self.mask.float(), run.grid).bool().to(run.model.device)

    def after_step(self, step: Step) -> None:
        step.x = torch.where(self._cells, step.x, self.recording.at(step.i + 1).to(step.x))
        self.mark(step)

    def on_decode(self, run: Run, pixels: Tensor) -> Tensor:
        return torch.where(self.mask.to(pixels.device), pixels, self.pixels.to(pixels))


@dataclass(eq=False)
class Original:
    """A picture opened for editing.

    ``recording`` is its walk from noise; ``settings`` the arguments of ``generate`` that walk it; ``parts`` what takes
    part in the walk, of the source and of every edit; ``pixels`` (1 3 H W) the picture, which masks keep; ``facts``
    plain values about how it was opened, ``fidelity`` the PSNR in dB between the picture and what the walk ends in.
    ``editor`` makes what edits from the recording and its parameters.
    """

    model: Model
    prompt: str
    recording: Recording
    settings: dict[str, Any]
    parts: list[Intervention]
    pixels: Tensor
    fidelity: float
    editor: Callable[..., Intervention]
    facts: dict[str, Any] = field(default_factory=dict)

    __repr__ = described

    def edit(
        self,
        prompt: str,
        *,
        mask: Image.Image | None = None,
        with_: Sequence[Intervention] = (),
        on_step: Callable[[Step], None] | None = None,
        **params: Any,
    ) -> Result:
        """The picture with ``prompt`` for its own. ``mask``: white where it may change. ``params``: those of what
        edits. Raises NoMatch, BadInput."""
        return self.redraw(prompt, mask=mask, with_=[self.editor(self.recording, **params), *with_], on_step=on_step)

    def redraw(
        self,
        prompt: str,
        *,
        mask: Image.Image | None = None,
        with_: Sequence[Intervention] = (),
        on_step: Callable[[Step], None] | None = None,
    ) -> Result:
        """The picture drawn again from its own noise with ``prompt``, followed by nothing but ``with_``."""
        parts = [*self.parts, *with_]
        if mask is not None:
            parts.append(PreserveOutside(read_mask(mask, self.recording.size), self.recording, self.pixels))
        return generate(self.model, prompt, **self.settings, interventions=parts, on_step=on_step)


class FollowsSource:
    """Makes a system that follows the recording of a source one that edits."""

    OPENING = ("from_", "steps", "guidance", "size", "inner", "refine", "invert")
    wants: Wants

    def open(
        self, model: Model, picture: Picture, on_step: Callable[[Step], None] | None = None, **opening: Any
    ) -> Original:
        """The picture with all that this system wants of its walk: drawn again from its settings, if it has some, else
        inverted; ``opening`` are then the options of :func:`inverted`. Raises BadInput."""
        if picture.settings is not None:
            return replayed(model, picture, type(self), self.wants, on_step)  # type: ignore[arg-type]
        return inverted(model, picture, type(self), self.wants, on_step, **opening)  # type: ignore[arg-type]


def replayed(
    model: Model,
    picture: Picture,
    editor: Callable[..., Intervention],
    wants: Wants,
    on_step: Callable[[Step], None] | None = None,
) -> Original:
    """The picture that ``generate(model, **picture.settings)`` made with ``picture.parts``, drawn again from its
    noise."""
    settings = dict(picture.settings or {})
    prompt = settings.pop("prompt")
    parts = [part for part in picture.parts if part.role != "observer"]
    size = checked_size(model, settings.get("size") or model.default_size[::-1])
    recorder = _recorder(model, wants, size)
    result = generate(model, prompt, **settings, interventions=[*parts, recorder], on_step=on_step)
    assert recorder.recording is not None and result.pixels is not None
    drawn, image = result.pixels.clamp(-1, 1), picture.image
    fidelity = _psnr(as_pixels(result.images, None), as_pixels(image, None)) if image.size == size else 0.0
    return Original(
        model, prompt, recorder.recording, settings, parts, drawn, fidelity, editor, {"inverted": False}
    )  # fmt: skip


def inverted(
    model: Model,
    picture: Picture,
    editor: Callable[..., Intervention],
    wants: Wants,
    on_step: Callable[[Step], None] | None = None,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    inner: int = 10,
    refine: int = 0,
) -> Original:
    """A picture that exists, shown as ``picture.prompt``: inverted with ``steps`` (the model's own, or 50), then led
    back under ``guidance`` by null-text optimisation of ``inner`` iterations per step (0: plain inversion).

    ``size`` (width, height) cuts the picture as :func:`sfumato.files.fitted` says. ``refine``: fixed-point iterations
    per step of inversion. A guidance-distilled model is inverted at its own embedded guidance, which leads back without
    null-text.
    """
    if model.embeds_guidance and guidance is not None:
        raise BadInput(f"guidance cannot be given here: {model.name} is inverted at its own embedded guidance.")
    if picture.prompt is None:
        raise BadInput("a picture that is inverted needs a prompt: what does it show?")
    image, prompt = picture.image, picture.prompt
    width, height = checked_size(model, size or image.size)
    pixels = as_pixels(files.fitted(image, (width, height)), None)
    trajectory = invert(model, pixels, prompt, steps=steps, refine=refine, on_step=on_step)
    settings = {**trajectory.settings, "size": (width, height)}
    scale = model.defaults["guidance"] if guidance is None else guidance
    settings["guidance"] = scale
    parts: list[Intervention] = []
    facts = {"inverted": True, "inner": inner, "refine": refine}
    if scale > 1 and inner and not model.embeds_guidance:
        parts.append(null_text(model, trajectory, guidance=scale, inner=inner, on_step=on_step))
    recorder = _recorder(model, wants, (width, height))
    result = generate(model, prompt, **settings, interventions=[*parts, recorder], on_step=on_step)
    assert recorder.recording is not None and result.pixels is not None
    fidelity = _psnr(result.pixels.clamp(-1, 1), pixels)
    return Original(model, prompt, recorder.recording, settings, parts, pixels, fidelity, editor, facts)


def read_mask(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """A mask picture, cut to ``size`` (width, height) as its picture is, as bool (1 1 H W): True where it is light.

    Raises NoMatch for one that is dark everywhere.
    """
    grey = np.asarray(files.fitted(mask.convert("L"), size, smooth=False))
    inside = to_tensor(grey >= 128)[None, None]
    if not inside.any():
        raise NoMatch("the mask is dark everywhere, so nothing may change; make it white where the picture may.")
    return inside


def _recorder(model: Model, wants: Wants, size: tuple[int, int]) -> Recorder:
    """A recorder of what is wanted of a walk at ``size`` (width, height)."""
    width, height = size
    return Recorder(wants(model.sites(height, width), model.grid(height, width)))


def _psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures (1 3 H W) in [-1, 1]; infinite where they are equal."""
    if a.shape != b.shape:
        raise BadInput(f"pictures of {tuple(a.shape)} and {tuple(b.shape)} cannot be compared.")
    error = float((a.detach().cpu().float() - b.cpu().float()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(4 / error)
