"""Originals: a picture opened for editing, with all that its edits share, so that each further edit costs its own rows.

A picture that sfumato made is drawn again from its own noise, which its recipe knows; any other picture is inverted
(DDIM inversion, or the Euler path of a flow model, and null-text optimisation where there is guidance).

    >>> original = Original.inverted(model, picture, "a cat on a sofa")
    >>> original.edit("a dog on a sofa").images[0]
    >>> original.edit("a cat on a sofa", reweight={"sofa": 2.0}).images[0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato import files
from sfumato.edit.null_text import null_text
from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.errors import BadInput, NoMatch
from sfumato.models import Model
from sfumato.sampling import Intervention, Result, Run, Step, generate, invert
from sfumato.sampling.recording import Recorder, Recording
from sfumato.sampling.request import as_pixels, checked_size

__all__ = ["Keep", "Original", "read_mask"]


class Keep(Intervention):
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
    """

    model: Model
    prompt: str
    recording: Recording
    settings: dict[str, Any]
    parts: list[Intervention]
    pixels: Tensor
    fidelity: float
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def replayed(
        cls,
        model: Model,
        image: Image.Image,
        settings: Mapping[str, Any],
        *,
        parts: Sequence[Intervention] = (),
        edit: Mapping[str, Any] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Original:
        """The picture that ``generate(model, **settings)`` with ``parts`` made, drawn again from its noise.

        ``edit``: parameters of :class:`PromptToPrompt` whose needs are recorded; the defaults if left out.
        """
        given = dict(settings)
        prompt = given.pop("prompt")
        parts = [part for part in parts if part.role != "observer"]
        size = checked_size(model, given.get("size") or model.default_size[::-1])
        recorder = _recorder(model, prompt, edit, size)
        result = generate(model, prompt, **given, interventions=[*parts, recorder], on_step=on_step)
        assert recorder.recording is not None and result.pixels is not None
        drawn = result.pixels.clamp(-1, 1)
        same = image.size == size
        fidelity = _psnr(as_pixels(result.images, None), as_pixels(image, None)) if same else 0.0
        return cls(model, prompt, recorder.recording, given, parts, drawn, fidelity, {"inverted": False})

    @classmethod
    def inverted(
        cls,
        model: Model,
        image: Image.Image,
        prompt: str,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        inner: int = 10,
        refine: int = 0,
        edit: Mapping[str, Any] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Original:
        """A picture that exists, shown as ``prompt``: inverted with ``steps`` (the model's own, or 50), then led back
        under ``guidance`` by null-text optimisation of ``inner`` iterations per step (0: plain inversion).

        ``size`` (width, height) cuts the picture as :func:`sfumato.files.fitted` says. ``refine``: fixed-point
        iterations per step of inversion. A guidance-distilled model is inverted at its own embedded guidance, which
        leads back without null-text.
        """
        if model.embeds_guidance and guidance is not None:
            raise BadInput(f"guidance cannot be given here: {model.name} is inverted at its own embedded guidance.")
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
        recorder = _recorder(model, prompt, edit, (width, height))
        result = generate(model, prompt, **settings, interventions=[*parts, recorder], on_step=on_step)
        assert recorder.recording is not None and result.pixels is not None
        fidelity = _psnr(result.pixels.clamp(-1, 1), pixels)
        return cls(model, prompt, recorder.recording, settings, parts, pixels, fidelity, facts)

    def edit(
        self,
        prompt: str,
        *,
        mask: Image.Image | None = None,
        with_: Sequence[Intervention] = (),
        on_step: Callable[[Step], None] | None = None,
        **edit: Any,
    ) -> Result:
        """The picture with ``prompt`` for its own. ``mask``: white where it may change. ``edit``: parameters of
        :class:`PromptToPrompt`. Raises NoMatch, BadInput."""
        parts = [*self.parts, PromptToPrompt(self.recording, **edit), *with_]
        if mask is not None:
            parts.append(Keep(read_mask(mask, self.recording.size), self.recording, self.pixels))
        return generate(self.model, prompt, **self.settings, interventions=parts, on_step=on_step)


def read_mask(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """A mask picture, cut to ``size`` (width, height) as its picture is, as bool (1 1 H W): True where it is light.

    Raises NoMatch for one that is dark everywhere.
    """
    grey = np.asarray(files.fitted(mask.convert("L"), size, smooth=False))
    inside = torch.from_numpy(grey >= 128)[None, None]
    if not inside.any():
        raise NoMatch("the mask is dark everywhere, so nothing may change; make it white where the picture may.")
    return inside


def _recorder(model: Model, prompt: str, edit: Mapping[str, Any] | None, size: tuple[int, int]) -> Recorder:
    """A recorder of all that an edit with these parameters needs."""
    given = {name: value for name, value in (edit or {}).items() if name != "source"}
    plan = PromptToPrompt(source=prompt, **given)
    width, height = size
    return Recorder(plan.wants(model.sites(height, width), model.grid(height, width)))


def _psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures (1 3 H W) in [-1, 1]; infinite where they are equal."""
    if a.shape != b.shape:
        raise BadInput(f"pictures of {tuple(a.shape)} and {tuple(b.shape)} cannot be compared.")
    error = float((a.detach().cpu().float() - b.cpu().float()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(4 / error)
