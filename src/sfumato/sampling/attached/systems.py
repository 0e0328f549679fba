"""The systems attached to a pipeline: what they found and what they touched."""

from __future__ import annotations

from typing import Any

from sfumato.errors import BadInput, UnknownName
from sfumato.sampling.intervention import Intervention, distinct_names

__all__ = ["AttachedSystems"]


class AttachedSystems:
    """What :func:`attached` hands out. ``parts``: the systems, in the order in which they act. ``calls``: how often the
    pipeline was called and finished; samples of later calls follow those of earlier ones."""

    def __init__(self, parts: tuple[Intervention, ...]):
        self.parts = parts
        self.calls = 0
        self.samples = 0
        self.sites: list[Any] = []

    def __getitem__(self, name: str) -> Intervention:
        """A system by its key, ``"daam"``; the second of a kind as ``"daam 2"``. Raises UnknownName."""
        known = dict(zip(distinct_names(self.parts), self.parts, strict=True))
        if name not in known:
            raise UnknownName("attached system", name, known)
        return known[name]

    @property
    def maps(self) -> list[Any]:
        """The maps of the one system that makes some, one for each sample drawn so far. BadInput for none or several:
        ``run["daam"].maps``."""
        makers = [name for name, part in zip(distinct_names(self.parts), self.parts, strict=True) if _has_maps(part)]
        if len(makers) != 1:
            names = ", ".join(makers) or "none of the systems"
            raise BadInput(
                f"run.maps: {names} made maps; ask one system for its own, as run[{(makers or ['daam'])[0]!r}].maps."
            )
        return self[makers[0]].maps  # type: ignore[attr-defined]

    @property
    def coverage(self) -> dict[str, dict[str, Any]]:
        """What each system really touched, by name."""
        return dict(zip(distinct_names(self.parts), [part.coverage() for part in self.parts], strict=True))


def _has_maps(part: Intervention) -> bool:
    return isinstance(getattr(part, "maps", None), list)
