"""Systems attached to a user's own pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from sfumato.app.jobs import build_all

if TYPE_CHECKING:
    from sfumato.sampling.attached import AttachedSystems

__all__ = ["attached"]


def attached(
    pipe: Any, *with_: Any, text: str | None = None, prompt: str | Sequence[str] | None = None
) -> AbstractContextManager[AttachedSystems]:
    """Systems take part in every call of a diffusers pipeline of your own, which keeps its own loop.

        >>> with sfumato.attached(pipe, "KEY:words=[cat|hat]") as run:
        ...     image = pipe("a cat in a hat", control_image=edges).images[0]
        >>> run.maps[0].overlay(image, "hat"), run.coverage

    ``with_``: systems, or what ``--with`` takes. ``text``, ``prompt``, errors: see
    :func:`sfumato.sampling.attached.attached`.
    """
    from sfumato.sampling.attached import attached as attached_to

    return attached_to(pipe, build_all(list(with_)), text=text, prompt=prompt)
