"""Masked tokens (MaskGIT, Chang et al. 2022, section 3.2; Muse; aMUSEd): all tokens are predicted at once, the surest
ones stay, the others are masked again - fewer at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.models import Model
from sfumato.sampling.process.base import Process, fewest, taken

TEMPERATURE = (2.0, 0.0)  # of the noise on the tokens' confidence, first and last step: the pipelines' default


class Masked(Process):
    """States are token ids, (b h w) or (b n), with the mask's id where nothing is drawn yet; predictions are logits in
    the layout that ``AmusedScheduler`` takes, (b v h w) or (b n v). The scheduler makes each sample's step by itself,
    with that sample's generator."""

    name = "masked"
    title = "masked tokens"
    takes = frozenset({"steps", "temperature", "start", "strength"})
    takes_image = True

    def prepare(self, backward: bool) -> None:
        self._scheduler = self.model.make_scheduler()
        steps, strength = self.steps(self.model, self.options), self.source.strength
        heat = TEMPERATURE if self.options.temperature is None else self.options.temperature
        self._scheduler.set_timesteps(steps, heat, self.model.device)
        self.timesteps = self._scheduler.timesteps
        self.mask = int(self._scheduler.config.mask_token_id)
        self.begin = self.source.start
        if strength is not None:
            self.begin = steps - int(steps * strength)
            if self.begin == steps and strength:
                raise BadInput(f"strength {strength:g} leaves no step out of {steps}; give at least {fewest(steps)}.")

    @property
    def scheduler(self) -> Any:
        return self._scheduler

    def initial(self, rows: slice) -> Tensor:
        """All masked; or given token ids; or those of a picture, masked as at the level before the first step. At
        strength 1 nothing of the picture is left."""
        source, b = self.source, len(self.generators)
        if source.latents is not None:
            x = taken(source.latents, rows, b).to(self.model.device)
            self.refuse(x, "latents")
            return x
        if source.pixels is not None and self.begin:
            tokens = self.model.encode_image(taken(source.pixels, rows, b), self.generators)
            if self.begin == len(self.timesteps):  # strength 0
                return tokens
            t = self.timesteps[self.begin - 1]
            pairs = zip(tokens.split(1), self.generators, strict=True)
            return torch.cat([self._scheduler.add_noise(each, t, generator) for each, generator in pairs])
        shape = (b, *self.model.latent_shape(self.size[1], self.size[0]))
        return torch.full(shape, self.mask, dtype=torch.long, device=self.model.device)

    def advance(self, output: Tensor, i: int, x: Tensor, options: dict[str, Any]) -> Tensor:
        rows = zip(output.split(1), x.split(1), self.generators, strict=True)
        steps = [
            self._scheduler.step(logits, self.timesteps[i], tokens, generator=generator, **options)
            for logits, tokens, generator in rows
        ]
        return torch.cat([step.prev_sample for step in steps])

    def refuse(self, x: Tensor, who: str) -> None:
        refuse_other_than_tokens(x, who, self.model, self.mask)


def refuse_other_than_tokens(x: Tensor, who: str, model: Model, unknown: int) -> None:
    """Raise BadInput unless ``x`` holds token ids of the model, or ``unknown`` where a token is still to be drawn."""
    if x.is_floating_point() or x.dtype == torch.bool:
        raise BadInput(f"{who} made the state {x.dtype}, but {model.name} draws token ids, which are whole numbers.")
    bad = x[(x != unknown) & ((x < 0) | (x >= model.family.vocabulary))]
    if len(bad):
        raise BadInput(
            f"{who} put the token {int(bad[0])} into the state; {model.name} has tokens 0 to "
            f"{model.family.vocabulary - 1}, and {unknown} where none is drawn yet."
        )
