"""What a figure must show for a claim to hold, and whether it could have shown anything else."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from sfumato.errors import BadInput
from sfumato.metrics.stats import Interval

POWER = 0.8


@dataclass(frozen=True)
class Bar:
    """One condition of a verdict, by the one rule of this repository: a size is asked of the estimate (``at_least``,
    ``at_most``), a direction of the whole 95 % interval (``above``, ``below``). All that are given must be met.

    ``null`` and ``ideal`` are what the estimate would be for a method without the effect and for a perfect one: with an
    interval as wide as the one measured, the first must fail the bar and the second must pass it, else the bar decides
    nothing (:attr:`fault`); but a figure whose whole interval lies on the wrong side is refuted however wide it is.
    Raises BadInput where nothing is asked.
    """

    figure: Interval
    null: float
    ideal: float
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    what: str = ""

    def __post_init__(self) -> None:
        if all(each is None for each in (self.at_least, self.at_most, self.above, self.below)):
            raise BadInput("a bar asks for nothing; give at_least, at_most, above or below.")

    def met(self, figure: Interval | None = None) -> bool:
        """Whether a figure (the measured one) meets the bar."""
        it = figure or self.figure
        return (
            (self.at_least is None or it.value >= self.at_least)
            and (self.at_most is None or it.value <= self.at_most)
            and (self.above is None or it.low > self.above)
            and (self.below is None or it.high < self.below)
        )

    def _moved(self, value: float) -> Interval:
        """The measured interval, around another estimate."""
        shift = value - self.figure.value
        return Interval(value, self.figure.low + shift, self.figure.high + shift, self.figure.n, self.figure.level)

    @property
    def refuted(self) -> bool:
        """Whether the whole interval lies on the wrong side of what is asked."""
        floors = [each for each in (self.at_least, self.above) if each is not None]
        ceilings = [each for each in (self.at_most, self.below) if each is not None]
        return any(self.figure.high < each for each in floors) or any(self.figure.low > each for each in ceilings)

    @property
    def fault(self) -> str:
        """Why the bar decides nothing at this n; empty where it does."""
        if self.met(self._moved(self.null)):
            return f"a method without the effect would pass ({self.null:g})"
        alone = Interval(self.ideal, self.ideal, self.ideal, self.figure.n, self.figure.level)
        if not self.met(alone) or not (self.refuted or self.met(self._moved(self.ideal))):
            return f"a perfect method would fail ({self.ideal:g} at n {self.figure.n})"
        return ""

    @property
    def smallest(self) -> float:
        """The smallest true effect (from ``null``'s side) that this bar would find at its n in 80 % of repetitions, by
        the normal approximation of the measured interval."""
        it, z = self.figure, NormalDist().inv_cdf
        error = (it.high - it.low) / 2 / z(0.5 + it.level / 2)
        one_sided, full = z(POWER) * error, (z(0.5 + it.level / 2) + z(POWER)) * error
        up = [each + by for each, by in ((self.at_least, one_sided), (self.above, full)) if each is not None]
        down = [each - by for each, by in ((self.at_most, one_sided), (self.below, full)) if each is not None]
        return max(up) if up else min(down)

    def text(self) -> str:
        """The bar in words, with its power."""
        asked = [
            f"{word} {value:g}"
            for word, value in (
                ("at least", self.at_least),
                ("at most", self.at_most),
                ("95 % bound above", self.above),
                ("95 % bound below", self.below),
            )
            if value is not None
        ]
        name = f"{self.what}: " if self.what else ""
        return f"{name}{' and '.join(asked)} (would find {self.smallest:.3g} at n {self.figure.n})"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the record."""
        asked = {name: getattr(self, name) for name in ("at_least", "at_most", "above", "below")}
        return {
            "what": self.what,
            "figure": self.figure.to_json(),
            **{name: value for name, value in asked.items() if value is not None},
            "null": self.null,
            "ideal": self.ideal,
            "met": self.met(),
            "smallest": self.smallest,
            "fault": self.fault,
            "text": self.text(),
        }
