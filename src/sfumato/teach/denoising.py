"""The denoising loss of a whole model on given pictures, whose randomness belongs to samples and not to processes.

Noise and noise level of a sample are pure functions of the seed, the step and the sample's place in the step's batch:
however a batch is parted over processes or accumulated, the gradient is the same up to the order of additions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import NotSupported
from sfumato.models import Model
from sfumato.models.condition import Condition
from sfumato.rng import stream
from sfumato.sampling import Path as NoisePath
from sfumato.teach.subject import by_shape
from sfumato.training import Draw, denoising_loss
from sfumato.training.losses import density, min_snr

__all__ = ["Denoising", "places"]

BUDGET = 256 << 20  # bytes of encoded texts that are kept in memory

Timesteps = Literal["auto", "uniform", "logit_normal", "mode", "cubic"]


def places(draw: Draw, batch: int) -> list[int]:
    """The places 0 .. ``batch`` - 1 of a step's batch that are this draw's share."""
    return list(range(draw.rank, batch, draw.world))


class Denoising:
    """How well a model predicts the noise in pictures.

    Args:
        batch: samples of a step, over all processes; their noise levels are stratified.
        timesteps: density of the noise levels; "auto": uniform for diffusion, logit-normal for flow models, as
            diffusers' training scripts have it. Flow models with a constant shift see shifted levels.
        offset: share of noise that is constant over each channel (offset noise).
        snr_gamma: caps the weight of samples by their signal-to-noise ratio (min-SNR); 0 weighs all alike.
    """

    def __init__(
        self, model: Model, batch: int, seed: int, timesteps: Timesteps = "auto", offset: float = 0.0,
        snr_gamma: float = 0.0,
    ):  # fmt: skip
        if model.family.takes_mask:
            raise NotSupported(f"{model.name} redraws regions; teach the checkpoint for whole pictures that it is of.")
        if snr_gamma and model.flow:
            raise NotSupported(f"snr_gamma weighs diffusion models; {model.name} is a flow model: leave it 0.")
        self.model, self.batch, self.seed, self.offset, self.gamma = model, batch, seed, offset, snr_gamma
        self.timesteps = ("logit_normal" if model.flow else "uniform") if timesteps == "auto" else timesteps
        self.scheduler = model.make_scheduler(None if model.flow else "ddim")
        model.timesteps(self.scheduler, 10)
        self.path = NoisePath(self.scheduler)
        self.levels = int(self.scheduler.config.num_train_timesteps)
        shift = self.scheduler.config.get("shift", 1.0)
        self.shift = float(shift) if model.flow and not self.scheduler.config.get("use_dynamic_shifting") else 1.0

    def level(self, u: Tensor) -> Tensor:
        """Timesteps (n) as the denoiser takes them, for shares of the path ``u`` (n) in [0, 1)."""
        u = density(u, self.timesteps)
        if self.model.flow:
            return self.levels * self.shift * u / (1 + (self.shift - 1) * u)
        return (u * self.levels).long().clamp(0, self.levels - 1)

    def drawn(self, shape: tuple[int, ...], step: int, place: int, part: str = "noise") -> tuple[Tensor, Tensor]:
        """Noise of this ``shape`` and timestep () of the sample at a place of a step's batch; ``part`` names another
        stream of both, such as that of a prior."""
        generator = stream(f"teach.{part}", self.seed, step, place)
        u = (place + torch.rand((), generator=generator)) / self.batch
        noise = torch.randn(shape, generator=generator)
        if self.offset:
            noise = noise + self.offset * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
        return noise, self.level(u[None])[0]

    def errors(
        self,
        latents: Sequence[Tensor],
        condition: Condition,
        step: int,
        where: Sequence[int],
        *,
        masks: Sequence[Tensor | None] | None = None,
        parts: Sequence[str] | None = None,
    ) -> Tensor:
        """Mean squared errors (b), weighted by min-SNR, of samples (c h w) at places ``where`` of a step's batch.

        Samples of different sizes go through the denoiser one size after another. ``masks``: (h w), 1 where it counts;
        an error is then the mean over what counts. ``parts``: names of the streams of noise, of each sample, where
        several share a place.
        """
        named = parts or ["noise"] * len(latents)
        drawn = [
            self.drawn(tuple(x.shape), step, place, part) for x, place, part in zip(latents, where, named, strict=True)
        ]
        found: list[Tensor | None] = [None] * len(latents)
        for rows in by_shape(latents).values():
            x0 = torch.stack([latents[row] for row in rows])
            eps = torch.stack([drawn[row][0] for row in rows]).to(x0)
            t = torch.stack([drawn[row][1] for row in rows]).to(x0.device)
            chosen = [None if masks is None else masks[row] for row in rows]
            for row, error in zip(rows, self.at(x0, eps, t, condition.rows(rows), chosen), strict=True):
                found[row] = error
        return torch.stack([each for each in found if each is not None])

    def at(
        self, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition, masks: Sequence[Tensor | None] = ()
    ) -> Tensor:
        """The same for given noise (b c h w) and timesteps (b)."""

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.model.predict(x.to(self.model.dtype), t, condition, "cond")

        mask = None
        if any(each is not None for each in masks):
            ones = torch.ones(x0.shape[-2:])
            drawn = torch.stack([ones if each is None else each for each in masks]).to(x0)[:, None]
            mask = drawn / drawn.mean((1, 2, 3), keepdim=True).clamp_min(1e-6)
        errors = denoising_loss(predict, self.path, x0, eps, t, mask=mask).errors
        return errors if not self.gamma else errors * self._weight(t)

    def _weight(self, t: Tensor) -> Tensor:
        alphas = self.scheduler.alphas_cumprod.to(t.device)[t]
        return min_snr(alphas / (1 - alphas), self.gamma, self.path.kind)


class Probe:
    """The loss at noise and levels that never change, over which progress can be seen: single steps' losses depend on
    their noise level far more than on what was learnt.

    Args:
        latents: of pictures, (c h w) each; at most ``most`` are looked at.
        levels: how many noise levels, spread evenly.
    """

    def __init__(self, denoising: Denoising, latents: Sequence[Tensor], levels: int = 4, most: int = 8):
        self.denoising, self.levels = denoising, levels
        self.latents = list(latents)[:most]

    @torch.no_grad()
    def __call__(self, encode: Callable[[int], Condition]) -> float:
        """``encode(i)``: the condition of picture ``i``, one row."""
        d, total = self.denoising, 0.0
        for i, latents in enumerate(self.latents):
            generator = stream("teach.probe", d.seed, i)
            eps = torch.randn((self.levels, *latents.shape), generator=generator).to(latents)
            t = d.level((torch.arange(self.levels) + 0.5) / self.levels).to(latents.device)
            condition = encode(i).repeat(self.levels)
            total += float(d.at(latents.expand(self.levels, *latents.shape), eps, t, condition).mean())
        return total / len(self.latents)


def frozen_conditions(model: Model) -> Callable[[Sequence[str]], Condition]:
    """An encoder of prompts that keeps what it has encoded, for texts whose encoders do not learn; of very many texts
    the latest."""
    known: OrderedDict[str, Condition] = OrderedDict()
    sizes: dict[str, int] = {}

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Condition:
        found = {}
        for prompt in prompts:
            if prompt not in known:
                known[prompt] = model.encode_text(prompt, guidance=False)
                sizes[prompt] = sum(rows.nbytes for rows in known[prompt].cond.values())
            found[prompt] = known[prompt]
        while sum(sizes.values()) > BUDGET and len(known) > 1:
            del sizes[known.popitem(last=False)[0]]
        return Condition.cat([found[prompt] for prompt in prompts])

    return encode
