"""Blended latent diffusion: redraw a region of a picture by the prompt and keep everything else.

At every noise level the latents outside the region are set to the picture's own, noised to that level, so the model
draws the region in sight of its true surroundings (Avrahami, Fried, Lischinski 2022, algorithm 1; the same replacement
in pixels is section 4.1 of Lugmayr et al. 2022, RePaint). After the last step the latents outside are the picture's,
exactly.

    >>> result = generate(model, "a blue ball on the grass", image=photo, strength=1.0, interventions=Blend(mask=mask))

The picture is the one that the run begins from (``image``); without one, ``source`` names a prompt, and the picture is
what the same seed draws for it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfumato import mask_ops, masks, rng
from sfumato.cards import Card, Field, register
from sfumato.edit.redraw import Redraws
from sfumato.edit.region import RegionParams, kept_picture, region_of
from sfumato.errors import NotSupported
from sfumato.sampling import Intervention, Path, Run, Step

__all__ = ["Blend", "renoised"]


@register
class Blend(Redraws, Intervention):
    """Keeps a picture outside a region while the region is drawn anew."""

    CARD = Card(
        key="blend",
        title="Blended Latent Diffusion",
        authors="Avrahami, Fried, Lischinski",
        year=2022,
        arxiv="2206.02779",
        verb="edit",
        needs=("pictures", "noise_path"),
        defaults_from="the paper (fresh noise at every level, hard mask); resampling from RePaint, off",
        cost="none; with source, one more generation; resample multiplies the steps",
        not_reproduced="the decoder fine-tuned to each picture (paste keeps the original pixels instead)",
        summary="redraws a region of a picture and keeps the rest",
        example="blend:source=a green ball,box=[0.2|0.3|0.8|0.9]",
    )

    class Params(RegionParams):
        level: float = Field(
            default=0.5, gt=0, le=1, description="share of a latent cell in the region from which on it is drawn anew"
        )
        soft: bool = Field(default=False, description="mix by grey level instead of deciding cell by cell")
        shrink: int = Field(
            default=0,
            ge=0,
            le=64,
            description="begin with the region grown by so much and shrink it to its own size (for thin regions)",
            json_schema_extra={"unit": "latent cell"},
        )
        noise: Literal["fresh", "same"] = Field(
            default="fresh", description="noise of the surroundings: drawn at each level, or once for all"
        )
        resample: int = Field(default=1, ge=1, le=100, description="how often each stretch of steps is run (RePaint)")
        jump: int = Field(default=10, ge=1, le=1000, description="length of such a stretch, in steps")
        paste: float | None = Field(
            default=None,
            ge=0,
            description="put the original pixels back outside the region; the edge fades over so much; none: off",
            json_schema_extra={"unit": "pixel"},
        )
        strength: float = Field(default=1.0, ge=0, le=1, description="how firmly the surroundings are held; 1: exactly")

        def soft_edges(self) -> bool:
            return self.soft

    role = "path"

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        self._read = [masks.read_mask(mask) for mask in self.params.mask]

    def start(self, run: Run) -> None:
        """Lays the region over the picture. Raises BadInput without a region or a picture, NotSupported for resampling
        with a scheduler that cannot go back."""
        p = self.params
        [self._region] = region_of(run, self.name, p, self._read, p.level)
        if p.resample > 1 and (run.scheduler.order > 1 or len(set(run.timesteps.tolist())) < run.total):
            raise NotSupported(
                f"resample of blend goes back by whole steps, which {type(run.scheduler).__name__} cannot; use "
                f"{'flow_euler' if run.model.flow else 'ddim or euler'}."
            )
        self._generators = rng.generators("blend.surroundings", run.seeds)
        self._repeats: dict[int, int] = {}

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        """Fetches the clean latents of the picture and noises them to the level of ``x``."""
        if self.strength == 0:
            return x
        self._pixels, self._clean = kept_picture(run, x, self.params, self)
        self._noise = self._draw(run, x)
        t = run.timesteps[run.begin] if run.begin < run.total else None
        return self._blended(run, x, t, 0.0)

    def after_step(self, step: Step) -> None:
        """Algorithm 1, line 8: the region from the model, the rest from the picture at the same level of noise."""
        if self.strength == 0:
            return
        step.x = self._blended(step.run, step.x, step.t_next, (step.i + 1) / step.total)
        self._resample(step)
        self.mark(step)

    def on_decode(self, run: Run, pixels: Tensor) -> Tensor:
        if self.params.paste is None or self.strength == 0:
            return pixels
        original = run.model.decode(self._clean) if self._pixels is None else self._pixels.to(pixels)
        share = mask_ops.feather(mask_ops.binarised(self._region, self.params.level), self.params.paste).to(pixels)
        return share * pixels + (1 - share) * original

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _draw(self, run: Run, x: Tensor) -> Tensor:
        return randn_tensor(tuple(x.shape), generator=self._generators, device=x.device, dtype=x.dtype)

    def _blended(self, run: Run, x: Tensor, t: Any, progress: float) -> Tensor:
        """``x`` (b c h w) inside the region, the picture at noise level ``t`` (None: clean) outside."""
        known = self._clean
        if t is not None:
            noise = self._draw(run, x) if self.params.noise == "fresh" else self._noise
            known = run.path.add_noise(self._clean, noise, t).to(x.dtype)
        share = 1 - self.strength * (1 - self._share(run, progress).to(x))
        return share * x + (1 - share) * known

    def _share(self, run: Run, progress: float) -> Tensor:
        """How much of each latent cell (h w) is drawn anew, at this progress."""
        share = mask_ops.on_grid(self._region, run.grid, self.params.level, self.params.soft)
        return mask_ops.dilate(share, math.ceil(self.params.shrink * (1 - progress)))

    def _resample(self, step: Step) -> None:
        """RePaint's schedule (Lugmayr et al. 2022, appendix B): after every ``jump`` steps go back as many and run them
        again, so that the region and its surroundings come to agree."""
        done = step.i + 1 - step.run.begin
        if self.params.resample == 1 or step.t_next is None or done % self.params.jump:
            return
        self._repeats[step.i] = self._repeats.get(step.i, 0) + 1
        if self._repeats[step.i] == self.params.resample:
            return
        back = step.i + 1 - self.params.jump
        step.x = renoised(step.path, step.x, self._draw(step.run, step.x), step.t_next, step.run.timesteps[back])
        step.goto(back)


def renoised(path: Path, x: Tensor, noise: Tensor, low: Any, high: Any) -> Tensor:
    """Latents (b c h w) at noise level ``low`` carried to the higher level ``high`` by fresh noise, as the forward
    process does: q(x_high | x_low)."""
    (alpha_low, sigma_low), (alpha_high, sigma_high) = path.alpha_sigma(low), path.alpha_sigma(high)
    ratio = alpha_high / alpha_low
    added = math.sqrt(max(sigma_high**2 - (ratio * sigma_low) ** 2, 0.0))
    return path.scale(high) * (ratio * x / path.scale(low) + added * noise)
