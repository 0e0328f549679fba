"""Inpainting by text: redraw a region of a picture with a model that was fine-tuned to see the hole.

GLIDE (Nichol et al. 2021, section 3.2) gives the denoiser more input channels - the picture with the region erased, and
the mask - with weights that start at zero, and fine-tunes it on pictures with random regions erased. Stable Diffusion's
inpainting checkpoints are the same idea on latents. Unlike :mod:`sfumato.edit.blend`, which pastes noised surroundings
into an ordinary model's trajectory, such a model knows from the first step what surrounds the hole and where it ends.

    >>> model = sfumato.load("toy-sd-inpaint")
    >>> generate(model, "a blue ball on the grass", image=photo, strength=1.0, interventions=Inpaint(mask=mask))

The picture is the one that the run begins from (``image``); without one, ``source`` names a prompt, and the picture is
what the same seed draws for it. At ``strength`` 1 the walk begins from pure noise.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfumato import mask_ops, masks, rng
from sfumato.cards import Card, Field, register
from sfumato.edit.redraw import Redraws
from sfumato.edit.region import RegionParams, kept_picture, region_of
from sfumato.models import Condition
from sfumato.models.hole import hole_of
from sfumato.sampling import Intervention, Run, Step
from sfumato.sampling.process.base import repeated

__all__ = ["Inpaint", "trained_coverage"]


@register
class Inpaint(Redraws, Intervention):
    """Tells an inpainting model the hole, and holds what is known."""

    CARD = Card(
        key="inpaint",
        title="GLIDE: text-guided inpainting with a masked-input denoiser",
        authors="Nichol, Dhariwal, Ramesh, Shyam, Mishkin, McGrew, Sutskever, Chen",
        year=2021,
        arxiv="2112.10741",
        verb="edit",
        needs=("pictures", "noise_path", "mask_input"),
        defaults_from="the paper and its notebook: known part of the predicted x0 replaced at every step",
        cost="none; with source, one more generation",
        not_reproduced="the pixel-space model and its upsampler: ours works on latents, as Stable Diffusion's does",
        summary="redraws a region of a picture with a model fine-tuned to see the hole",
        default_for=("edit mask",),
        example="inpaint:source=a green ball,box=[0.2|0.3|0.8|0.9]",
    )

    class Params(RegionParams):
        each: bool = Field(default=False, description="the i-th mask is for the i-th sample, instead of all for all")
        level: float = Field(
            default=0.5, gt=0, le=1, description="share of a latent cell in the region from which on it is drawn anew"
        )
        coverage: float | None = Field(
            default=None,
            gt=0,
            le=1,
            description="the same for the latents alone, while pixels go by level: small, and every cell that the "
            "region "
            "touches is drawn anew; none: as the model was trained, by its card, else as level",
        )
        hold: bool = Field(
            default=True, description="replace the known part of the predicted x0 at every step (GLIDE's sampler)"
        )
        paste: float | None = Field(
            default=0.0,
            ge=0,
            description="put the original pixels back outside the region; the edge fades over so much; none: off",
            json_schema_extra={"unit": "pixel"},
        )

    role = "path"

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        self._read = [masks.read_mask(mask) for mask in self.params.mask]

    def start(self, run: Run) -> None:
        """Lays the region over the picture. Raises BadInput without a region or a picture."""
        self._region = region_of(run, self.name, self.params, self._read, self.params.level, self.params.each)
        coverage = self.params.coverage or trained_coverage(run.model) or self.params.level
        self._share = mask_ops.on_grid(self._region, run.grid, coverage)[:, None]

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        """Fetches the picture with its hole; at strength 1 returns pure noise."""
        self._pixels, self._clean = kept_picture(run, x, self.params, self)
        pixels = run.model.decode(self._clean) if self._pixels is None else self._pixels
        self._share = self._share.to(x)
        erased = mask_ops.binarised(self._region, self.params.level).to(pixels)[:, None]
        hole = hole_of(run.model, pixels, erased, self._share)
        self._hole = hole if len(hole) == len(run) else repeated(hole, len(run))
        if run.begin or self._pixels is None:
            return x
        # as the diffusers pipeline: the picture's own noised latents would give away what the hole hides
        seeds = rng.generators("sample", run.seeds)
        noise = randn_tensor(tuple(x.shape), generator=seeds, device=x.device, dtype=x.dtype)
        return run.model.prepare(noise, run.scheduler)

    def on_condition(self, run: Run, condition: Condition) -> Condition:
        """The hole, for every branch."""
        return condition.with_rows(hole=self._hole)

    def after_predict(self, step: Step) -> None:
        """The known part of the predicted clean latents is the picture's."""
        self.mark(step)
        if self.params.hold:
            x0 = self._share * step.x0 + (1 - self._share) * self._clean
            step.output = step.path.from_x0(step.x, x0, step.t).to(step.x.dtype)

    def on_decode(self, run: Run, pixels: Tensor) -> Tensor:
        if self.params.paste is None:
            return pixels
        original = run.model.decode(self._clean) if self._pixels is None else self._pixels.to(pixels)
        erased = mask_ops.binarised(self._region, self.params.level)
        share = torch.stack([mask_ops.feather(each, self.params.paste) for each in erased])[:, None].to(pixels)
        return share * pixels + (1 - share) * original


def trained_coverage(model: Any) -> float | None:
    """The share of a latent cell in the hole from which on a model was taught to draw it anew, if its card says so."""
    loss = model.card.get("recipe", {}).get("loss", {})
    return float(loss["coverage"]) if "coverage" in loss else None
