"""Pictures that exist, shown to a model that draws, noised level by level of a schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfumato.models import Model
from sfumato.sampling.intervention import Intervention
from sfumato.sampling.loop import open_run
from sfumato.sampling.request import checked_request
from sfumato.sampling.run import Run

__all__ = ["noised_levels", "open_image_run"]


@contextlib.contextmanager
def open_image_run(
    model: Model,
    images: Tensor,
    prompts: Sequence[str],
    *,
    steps: int,
    seed: int | Sequence[int] = 0,
    scheduler: Any = None,
    interventions: Sequence[Intervention] = (),
) -> Iterator[tuple[Run, Tensor]]:
    """An open run of ``steps`` steps for pictures (b 3 h w) in [-1, 1] with a prompt each, without guidance, and the
    pictures' latents (b c h w). ``scheduler``: by default DDIM or flow Euler. Raises BadInput as ``generate``."""
    with torch.no_grad():  # one by one, so that what is found in a picture does not depend on its neighbours
        clean = torch.cat([model.encode_image(picture) for picture in images.split(1)])
    schedule = scheduler or model.deterministic_scheduler
    guidance: dict[str, Any] = {} if model.embeds_guidance else {"guidance": 1.0}
    request = checked_request(
        model, list(prompts), steps=steps, seed=seed, latents=clean, scheduler=schedule, **guidance
    )
    with open_run(model, request, range(len(request)), tuple(interventions)) as run:
        yield run, clean


def noised_levels(run: Run, clean: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(i, x, noise) for every step i: the latents ``clean`` (b c h w) with fresh ``noise`` of each sample's own
    generator, at that step's level; the run stands at the step meanwhile."""
    for i in range(run.total):
        noise = randn_tensor(tuple(clean.shape), generator=run.generators, device=clean.device, dtype=clean.dtype)
        x = run.path.add_noise(clean, noise, run.timesteps[i]).to(run.model.state_dtype)
        run.seek(i)
        yield i, x, noise
