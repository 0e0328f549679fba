"""What is wanted from attention: a :class:`Tap` per party."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfumato.errors import BadInput
from sfumato.models.site import Site

if TYPE_CHECKING:
    from sfumato.attention.call import Call

__all__ = ["STAGES", "Tap"]

Callback = Callable[["Call"], Any]

#: Editors of a tap, in the order in which they act.
STAGES = ("edit_values", "edit_scores", "edit_probs", "edit_map")


@dataclass(eq=False)
class Tap:
    """What one party wants from attention.

    ``where`` selects sites (a predicate on :class:`~sfumato.models.site.Site`; None for all). Every callback takes a
    :class:`Call`. ``observe`` returns nothing and sees the map after all edits (``raw=True``: before). Editors return
    the new tensor, in the shape of ``call.v`` / ``call.scores()`` / ``call.probs()``, or for ``edit_map`` an
    :class:`~sfumato.attention.map_replacement.MapReplacement`; or None to leave the call alone. Several taps on one
    site compose: first all ``edit_values`` in the order of the taps, then all ``edit_scores``, then all ``edit_probs``,
    last ``edit_map``; each sees what those before it made. ``stop_after=True`` says that this tap needs nothing of the
    forward pass beyond its sites; the pass ends early once that is true of all taps.
    """

    where: Callable[[Site], bool] | None = None
    observe: Callback | None = None
    edit_values: Callback | None = None
    edit_scores: Callback | None = None
    edit_probs: Callback | None = None
    edit_map: Callback | None = None
    raw: bool = False
    stop_after: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if not (self.observe or self.edits):
            raise BadInput(f"Tap {self.name!r} does nothing: give observe, {', '.join(STAGES[:-1])} or {STAGES[-1]}.")
        if self.stop_after and self.edits:
            raise BadInput(
                f"Tap {self.name!r} edits attention, so the rest of the forward pass is needed: drop stop_after."
            )

    @property
    def edits(self) -> bool:
        """Whether this tap may change attention."""
        return any(getattr(self, stage) is not None for stage in STAGES)
