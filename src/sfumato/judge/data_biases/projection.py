"""One flow for several data sets: what they share is its residual, what is each set's own comes from its condition."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadInput, BadWeights, UnknownName
from sfumato.translation.networks import Network
from sfumato.translation.translator import FitRecord, FlowParams, Translator, fit_translator, load_translator

__all__ = ["Projection", "fit_projection", "load_projection"]

LEAST = 32
RARE = 100  # times as likely in its own set: a picture without counterpart


@dataclass(eq=False)
class Projection:
    """``sets``: their names, in the order of the condition. ``unseen``: of each set the rows that fitting left out;
    empty where it was read from files."""

    network: Network
    translator: Translator
    sets: list[str]
    unseen: dict[str, Tensor] = field(default_factory=dict, repr=False)
    record: FitRecord | None = None

    def condition(self, name: str, n: int) -> Tensor:
        """One-hot (n k). Raises UnknownName."""
        if name not in self.sets:
            raise UnknownName("data set", name, self.sets)
        return F.one_hot(torch.full((n,), self.sets.index(name)), len(self.sets)).float()

    def codes(self, z: Tensor, source: str, target: str) -> Tensor:
        """Codes (b n) of ``source`` as ``target`` has them: tau(tau^-1(z | source) | target)."""
        v = self.translator.residual(z, self.condition(source, len(z)))
        return self.translator.vectors(v, self.condition(target, len(z)))

    def project(self, pixels: Tensor, source: str, target: str) -> Tensor:
        """Pictures (b 3 h w) of one set as another would have them, by the means of their codes."""
        return self.network.pictures(self.codes(self.network.vectors(pixels)[0], source, target))

    def animate(self, pixels: Tensor, source: str, target: str, steps: int = 125) -> Tensor:
        """From each picture to its projection (b steps 3 h w), along a line between their codes; 125 as the authors."""
        if steps < 2:
            raise BadInput(f"an animation has 2 steps or more, got {steps}.")
        z = self.network.vectors(pixels)[0]
        line = torch.lerp(z[:, None], self.codes(z, source, target)[:, None], torch.linspace(0, 1, steps)[:, None])
        return self.network.pictures(line.flatten(0, 1)).unflatten(0, (len(z), steps))

    def aligned(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Pictures (n 3 h w) of every set from the same ``n`` residuals."""
        v = self.translator.noise(n, seed)
        return {s: self.network.pictures(self.translator.vectors(v, self.condition(s, n))) for s in self.sets}

    def log_ratio(self, z: Tensor, source: str, target: str) -> Tensor:
        """log p(z | source) - log p(z | target) (b) of codes, in nats: high where the target has nothing of the kind.
        The likelihood under one set alone says more of how rich a picture is than of how usual (Ren et al. 2019,
        likelihood ratios for out-of-distribution detection, arXiv 1906.02845)."""
        own = self.translator.nll(z, self.condition(source, len(z)))
        return self.translator.nll(z, self.condition(target, len(z))) - own

    def without_counterpart(self, z: Tensor, source: str, target: str) -> Tensor:
        """Which codes (b) of ``source`` the target has no counterpart for: they are a hundred times as likely in their
        own set. To be asked of pictures that the flow was not fitted to: it may know those by heart."""
        return self.log_ratio(z, source, target) > math.log(RARE)

    def save(self, folder: Path | str) -> Path:
        """Writes the flow. Raises BadInput if the folder is not empty."""
        about = {"sets": self.sets, "autoencoder": self.network.name}
        self.translator.register_to_config(about=about)
        return self.translator.save(folder)


def load_projection(folder: Path | str, network: Network) -> Projection:
    """One that :meth:`Projection.save` wrote, on its autoencoder. Raises BadInput, BadWeights."""
    translator = load_translator(folder)
    about = translator.about
    if not isinstance(about.get("sets"), list):
        raise BadWeights(f"{folder} holds a flow that names no data sets; data_biases wrote none of it.")
    return Projection(network, translator, about["sets"])


def fit_projection(
    network: Network,
    sets: Mapping[str, Tensor],
    params: FlowParams,
    *,
    balance: bool = True,
    codes: Mapping[str, tuple[Tensor, Tensor | None]] | None = None,
    on_progress: Callable[..., None] | None = None,
) -> Projection:
    """Fits the flow on the pictures (m 3 h w) of two or more sets.

    Args:
        balance: sets are drawn equally often, whatever their sizes; the authors' code concatenates them, so that the
            larger one dominates.
        codes: codes and spreads that are known already, in place of the pictures'.

    Raises BadInput: fewer than two sets, fewer than 32 pictures in one.
    """
    if len(sets) < 2:
        raise BadInput(f"data_biases compares two data sets or more, got {len(sets)}.")
    for name, pixels in sets.items():
        if len(pixels) < LEAST:
            raise BadInput(f"the set {name!r} holds {len(pixels)} pictures; give {LEAST} or more, better 1000.")
    read = {name: (codes or {}).get(name) or network.vectors(pixels) for name, pixels in sets.items()}
    z = torch.cat([each[0] for each in read.values()])
    spreads = [each[1] for each in read.values() if each[1] is not None]
    spread = torch.cat(spreads) if len(spreads) == len(read) else None
    of = torch.cat([torch.full((len(each[0]),), i) for i, each in enumerate(read.values())])
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(params.seed))
    z, of, spread = z[order], of[order], None if spread is None else spread[order]
    c = F.one_hot(of, len(sets)).float()
    weights = (1 / torch.bincount(of).float())[of] if balance else None
    record = fit_translator(
        z, c, params=params, spread=spread, weights=weights, embedding=10, on_progress=on_progress, name="data_biases"
    )
    firsts = torch.tensor([0, *torch.bincount(of).cumsum(0).tolist()])
    left_out, whose = order[record.held_out], of[record.held_out]
    unseen = {name: left_out[whose == i] - firsts[i] for i, name in enumerate(sets)}
    return Projection(network, record.translator, list(sets), unseen, record)
