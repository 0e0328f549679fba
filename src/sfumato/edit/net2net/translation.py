"""A representation of one expert translated into that of another, with what the first does not say drawn or kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.edit.net2net.experts import NetExpert, expert
from sfumato.errors import BadInput, BadWeights, NotSupported
from sfumato.translation.examples import LabelledVectors
from sfumato.translation.translator import FitRecord, FlowParams, Translator, fit_translator, load_translator

__all__ = ["Translation", "fit_translation", "load_translation"]


@dataclass(eq=False)
class Translation:
    """``tau``: from what ``first`` says (the condition) and a residual v to the representation of ``second``."""

    first: NetExpert
    second: NetExpert
    translator: Translator
    facts: dict[str, Any] = field(default_factory=dict)
    record: FitRecord | None = None

    @property
    def model(self) -> Translator:
        return self.translator

    def translate(self, given: Any, n: int = 1, seed: int = 0, temperature: float = 1.0) -> Tensor:
        """Pictures (b n 3 h w) drawn for each text, label or picture; ``temperature`` below 1 gives up spread."""
        z = self.translator.sample(self.first.encode(given), n, seed, temperature)
        return self.decoded(z.flatten(0, 1)).unflatten(0, z.shape[:2])

    def exchange(self, pictures: Tensor, shown: Any, other: Any) -> Tensor:
        """Pictures (b 3 h w) that show ``other`` instead of ``shown`` and keep the rest: the residual of each picture
        given what it shows, under what it shall show."""
        z = self.second.encode(pictures)
        v = self.translator.residual(z, self.first.encode(shown))
        return self.decoded(self.translator.vectors(v, self.first.encode(other)))

    def score(self, pictures: Tensor, given: Any) -> Tensor:
        """Negative log-likelihood (b) of each picture's representation given its text: low where they fit."""
        return self.translator.nll(self.second.encode(pictures), self.first.encode(given))

    def bits_shared(self, examples: LabelledVectors, params: FlowParams, held: float = 0.25) -> float:
        """Bits that the two representations share: the NLL of a flow without the condition less that with it, on the
        last part of ``examples``, which this translation should not have been fitted on."""
        z, c = self.second.encode(examples.pixels), self.first.encode(self.first.of(examples))
        cut = round(len(z) * (1 - held))
        alone = fit_translator(z[:cut], params=params, name="net2net without condition").translator
        here = self.translator
        # both in nats of z itself: the two flows scale it differently
        nats = alone.nll(z[cut:]) + alone.std.log().sum() - here.nll(z[cut:], c[cut:]) - here.std.log().sum()
        return float(nats.mean() / torch.log(torch.tensor(2.0)))

    def decoded(self, z: Tensor) -> Tensor:
        """Pictures (b 3 h w) of vectors (b n). Raises NotSupported where the second expert makes none."""
        if self.second.decode is None:
            raise NotSupported(f"{self.second.name} makes no pictures; the second expert must decode (toy-ae).")
        return self.second.decode(z)

    def save(self, folder: Path | str) -> Path:
        """Writes the flow with the names of its experts. Raises BadInput if the folder is not empty."""
        experts = {"first": self.first.name, "second": self.second.name, "labels": self.facts.get("labels", [])}
        self.translator.register_to_config(about={**self.facts, **experts})
        return self.translator.save(folder)


def load_translation(folder: Path | str) -> Translation:
    """One that :meth:`Translation.save` wrote, with its experts. Raises BadInput, BadWeights, UnknownName."""
    translator = load_translator(folder)
    about = translator.about
    try:
        first, second = expert(about["first"], about.get("labels", [])), expert(about["second"])
    except KeyError:
        raise BadWeights(f"{folder} holds a flow that names no experts; net2net wrote none of it.") from None
    return Translation(first, second, translator, about)


def fit_translation(
    first: NetExpert,
    second: NetExpert,
    examples: LabelledVectors,
    params: FlowParams,
    on_progress: Callable[..., None] | None = None,
) -> Translation:
    """Fits tau on pairs of what the two experts say of the same examples: condition ``first``, target ``second``,
    whose posterior noise is drawn anew at every step where it has any. Raises BadInput."""
    given = second.of(examples)
    z = second.encode(given)
    if z.ndim != 2:
        raise BadInput(f"{second.name} gives maps; the second expert of net2net must give vectors (toy-ae).")
    c = first.encode(first.of(examples))
    if not (c != c[:1]).any():
        raise BadInput(f"{first.name} says the same of all {len(c)} pictures; give captions or labels that differ.")
    record = fit_translator(
        z, c, params=params, spread=second.spread(given), embedding=32, on_progress=on_progress, name="net2net"
    )
    labels: Sequence[str] = examples.names.get(first.concept, [])
    return Translation(first, second, record.translator, {"labels": list(labels), "pictures": len(z)}, record)
