"""Pictures that exist already, shown to a denoiser at the noise levels of a schedule, for systems that look on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfumato.errors import BadInput
from sfumato.models import Model
from sfumato.sampling import Intervention, Step
from sfumato.sampling.intervention import refuse_idle
from sfumato.sampling.pixels import as_pixels_of
from sfumato.sampling.real_images import noised_levels, open_image_run
from sfumato.sampling.request import checked_size

__all__ = ["observe_images"]


def observe_images(
    look: Intervention,
    model: Model,
    images: Any,
    prompts: str | Sequence[str],
    *,
    steps: int,
    seed: int | Sequence[int],
    scheduler: Any,
    size: tuple[int, int] | None,
) -> None:
    """Lets ``look`` see what the denoiser does with each picture and its prompt at the levels within its window: one
    forward of the conditional branch for each, which its taps may end early.

    Arguments as of :func:`sfumato.explain.daam.explain_images`. Raises BadInput; NoMatch where nothing was seen.
    """
    pixels = as_pixels_of(model, images, None if size is None else checked_size(model, size))
    checked_size(model, (pixels.shape[-1], pixels.shape[-2]))
    texts = [prompts] * len(pixels) if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(pixels):
        raise BadInput(f"there are {len(texts)} prompts for {len(pixels)} images; give one for all or one each.")
    given = {"steps": steps, "seed": seed, "scheduler": scheduler}
    with open_image_run(model, pixels, texts, interventions=(look,), **given) as (run, clean):
        taps, sites = look.taps(), run.sites
        for i, x, _ in noised_levels(run, clean):
            step = Step(run, i, x)
            if step.covered_by(look):
                run.denoise(x, step.t, step.condition, ("cond",), taps, step)
                look.after_predict(step)
    refuse_idle([look], sites)
