"""Autoregressive tokens (taming transformers, Esser et al. 2021; Parti, Yu et al. 2022): one token after the other,
each drawn from what the network says about the next one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.models import Model
from sfumato.sampling.options import Options
from sfumato.sampling.process.base import Process, taken
from sfumato.sampling.process.masked import refuse_other_than_tokens

UNDRAWN = -1


class Autoregressive(Process):
    """States are token ids (b n), -1 where none is drawn yet; step i draws position i. Predictions are logits (b v)
    of that position: the family's ``predict`` reads positions before ``t`` only."""

    name = "autoregressive"
    title = "autoregressive tokens"
    takes = frozenset({"steps", "temperature", "top_k", "top_p", "start"})

    def prepare(self, backward: bool) -> None:
        (self.length,) = self.model.latent_shape(self.size[1], self.size[0])
        self.timesteps = torch.arange(self.length, device=self.model.device)
        self.begin = self.source.start

    @classmethod
    def steps(cls, model: Model, options: Options) -> int:
        (n,) = model.latent_shape(*(model.default_size if options.size is None else options.size[::-1]))
        if options.steps not in (None, n):
            raise BadInput(f"steps is {options.steps}; {model.name} draws its {n} tokens one by one: leave it out.")
        return n

    def initial(self, rows: slice) -> Tensor:
        """Nothing drawn; or the first ``start`` tokens of given ones."""
        x = torch.full((len(self.generators), self.length), UNDRAWN, dtype=torch.long, device=self.model.device)
        if self.source.latents is not None:
            given = taken(self.source.latents, rows, len(self.generators)).to(self.model.device)
            self.refuse(given, "latents")
            if (given[:, : self.begin] == UNDRAWN).any():
                raise BadInput(f"latents has positions that are not drawn among the first {self.begin} (start).")
            x[:, : self.begin] = given[:, : self.begin]
        return x

    def advance(self, output: Tensor, i: int, x: Tensor, options: dict[str, Any]) -> Tensor:
        given = {"temperature": self.options.temperature, "top_k": self.options.top_k, "top_p": self.options.top_p}
        settings = {**given, **options}
        heat = settings.pop("temperature")
        if isinstance(heat, tuple):
            heat = heat[0] + (heat[1] - heat[0]) * i / max(self.length - 1, 1)
        x = x.clone()
        x[:, i] = drawn(output, self.generators, 1.0 if heat is None else heat, **settings)
        return x

    def refuse(self, x: Tensor, who: str) -> None:
        refuse_other_than_tokens(x, who, self.model, UNDRAWN)


def drawn(
    logits: Tensor,
    generators: Sequence[torch.Generator],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Tokens (b) drawn from logits (b v), each with its own generator; the likeliest at temperature 0.

    ``top_k``: from the k likeliest only (Fan et al. 2018). ``top_p``: from the fewest likeliest that together have at
    least this probability (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # what comes before it has enough already
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)
    pairs = zip(logits.softmax(-1), generators, strict=True)
    picked = [torch.multinomial(probs.to(generator.device), 1, generator=generator) for probs, generator in pairs]
    return torch.cat(picked).to(logits.device)
