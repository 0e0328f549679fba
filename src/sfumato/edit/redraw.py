"""Pictures opened for edits that draw a region anew and keep the rest: what :mod:`sfumato.edit.inpaint` and
:mod:`sfumato.edit.blend` share as systems that edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from sfumato import files
from sfumato.markup import described
from sfumato.models import Model
from sfumato.protocol import Picture
from sfumato.sampling import Intervention, Result, Step, generate

__all__ = ["Redrawn", "Redraws"]


@dataclass(eq=False)
class Redrawn:
    """A picture opened for redrawing regions: ``original``, cut to the size that the model draws."""

    model: Model
    original: Image.Image
    system: Callable[..., Intervention]
    settings: dict[str, Any] = field(default_factory=dict)

    __repr__ = described

    def edit(
        self,
        prompt: str,
        *,
        mask: Any = None,
        with_: Sequence[Intervention] = (),
        on_step: Callable[[Step], None] | None = None,
        **params: Any,
    ) -> Result:
        """The picture with its region drawn anew from ``prompt``. ``mask``: white there; a picture is cut as the
        original was, anything else is read as the system's own parameter."""
        if isinstance(mask, Image.Image):
            mask = files.fitted(mask, self.original.size, smooth=False)
        region = {} if mask is None else {"mask": mask}
        parts = [self.system(**params, **region), *with_]
        return generate(self.model, prompt, image=self.original, interventions=parts, on_step=on_step, **self.settings)


class Redraws:
    """Makes a system that keeps a picture around a region one that edits."""

    OPENING = ("steps", "guidance", "size", "seed", "scheduler", "strength")

    def open(
        self,
        model: Model,
        picture: Picture,
        on_step: Callable[[Step], None] | None = None,
        *,
        size: tuple[int, int],
        seed: int = 0,
        strength: float = 1.0,
        **settings: Any,
    ) -> Redrawn:
        """The picture, cut to ``size`` (width, height). ``strength``: how much of the schedule draws the region, 1 from
        pure noise; ``settings`` are ``steps``, ``guidance`` and ``scheduler``."""
        fitted = files.fitted(picture.image.convert("RGB"), size)
        return Redrawn(model, fitted, type(self), {"seed": seed, "strength": strength, **settings})  # type: ignore[arg-type]
