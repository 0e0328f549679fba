"""What a generation returns: states, pixels, pictures, coverage and recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor

from sfumato import markup
from sfumato.models import Model
from sfumato.sampling.intervention import Intervention
from sfumato.sampling.pixels import as_clips, as_pictures
from sfumato.sampling.recipe import recipe_of
from sfumato.sampling.request import Request


@dataclass(eq=False)
class Result:
    """Finished samples, in the order of the request.

    ``latents``: the final states, clean latents (b c h w) or token ids (b n), (b h w); ``pixels`` (b 3 H W), of
    clips (b 3 f H W), about [-1, 1] and not clamped, None with ``decode=False``.
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

    def __repr__(self) -> str:
        width, height = self.request.size
        texts = [repr(text if len(text) <= 60 else text[:57] + "...") for text in dict.fromkeys(self.prompts)]
        more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
        return f"Result({len(self)} of {width}x{height} by {self.model.name}: {', '.join(texts[:3])}{more})"

    def _repr_html_(self) -> str:
        shown = zip(self.prompts, self.seeds, self.images, strict=False)
        return markup.gallery(repr(self), [(f"{prompt} (seed {seed})", image) for prompt, seed, image in shown])

    @property
    def prompts(self) -> list[str]:
        return self.request.prompts[: len(self)]

    @property
    def seeds(self) -> list[int]:
        return self.request.seeds[: len(self)]

    @cached_property
    def images(self) -> list[Image]:
        """The pictures as PIL images, of clips their first frames; empty with ``decode=False``."""
        if self.pixels is None:
            return []
        return as_pictures(self.pixels if self.pixels.dim() == 4 else self.pixels[:, :, 0])

    @cached_property
    def clips(self) -> list[np.ndarray]:
        """The clips as bytes (f h w 3), ready for :func:`sfumato.clips.save_clip`; empty where pictures were made, and
        with ``decode=False``."""
        return [] if self.pixels is None or self.pixels.dim() != 5 else as_clips(self.pixels)

    @cached_property
    def recipes(self) -> list[dict[str, Any]]:
        """Per sample, everything needed to make it again, as plain JSON values; see
        :func:`sfumato.sampling.recipe_args`."""
        return [recipe_of(self.model, self.request, self.parts, i) for i in range(len(self))]

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the first sample."""
        return self.recipes[0]
