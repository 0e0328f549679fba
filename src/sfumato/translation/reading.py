"""Reading concepts off codes: a small network trained on what pictures show, and how far it is to be trusted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.training import Draw, Player, fit

__all__ = ["CodeReader"]


class CodeReader:
    """Reads concepts off vectors (b n). ``accuracy``: on held-out vectors, by concept."""

    def __init__(self, net: nn.Module, heads: Mapping[str, int], mean: Tensor, std: Tensor, accuracy: dict[str, float]):
        self.net, self.heads, self.mean, self.std, self.accuracy = net, dict(heads), mean, std, accuracy

    @torch.no_grad()
    def read(self, z: Tensor) -> dict[str, Tensor]:
        """The value (b) of every concept."""
        parts = self.net((z - self.mean) / self.std).split(list(self.heads.values()), 1)
        return {name: part.argmax(1) for name, part in zip(self.heads, parts, strict=True)}

    @classmethod
    def fitted(
        cls, z: Tensor, labels: Mapping[str, Tensor], steps: int = 500, seed: int = 0, hidden: int = 128
    ) -> CodeReader:
        """Learns to read from vectors z (m n) and labels (m); -1 where a picture's label is not known. A fifth of the
        rows is held out for ``accuracy``. Raises BadInput where nothing is labelled."""
        if not labels or all(int((each >= 0).sum()) < 10 for each in labels.values()):
            raise BadInput("a reader of concepts needs pictures with labels: 10 or more.")
        heads = {name: int(each.max()) + 1 for name, each in labels.items()}
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(z), generator=rng)
        held, rows = order[: len(z) // 5], order[len(z) // 5 :]
        mean, std = z.mean(0), z.std(0).clamp_min(1e-6)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = nn.Sequential(
                nn.Linear(z.shape[1], hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, hidden), nn.LeakyReLU(0.1),
                nn.Linear(hidden, sum(heads.values())),
            )  # fmt: skip

        def loss(draw: Draw) -> Tensor:
            at = rows[draw.indices(len(rows), 128)]
            x = (z[at] - mean) / std
            x = x + 0.1 * torch.randn(x.shape, generator=draw.generator("noise"))
            parts = net(x).split(list(heads.values()), 1)
            losses = [
                F.cross_entropy(part, labels[name][at], ignore_index=-1, reduction="sum") / len(at)
                for name, part in zip(heads, parts, strict=True)
            ]
            return torch.stack(losses).sum()

        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
        fit(Player(loss, optimizer, net, schedule=lambda s: 1 - s / steps), steps, seed=seed, name="reader")
        found = cls(net.eval().requires_grad_(False), heads, mean, std, {})
        predictions = found.read(z[held])
        for name, each in labels.items():
            known = each[held] >= 0
            found.accuracy[name] = float((predictions[name] == each[held])[known].float().mean())
        return found
