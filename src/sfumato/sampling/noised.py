"""A way to show pictures to a denoiser, as nets that look at pictures are shown them."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.models import Model
from sfumato.models.layers import Forward
from sfumato.rng import stream
from sfumato.sampling.noise import Path as NoisePath

__all__ = ["noised_forward"]


def noised_forward(model: Model, progress: float, prompt: str = "", seed: int = 0) -> Forward:
    """A way to show pictures (b 3 h w) to a model's denoiser: encoded, noised to one level of its schedule, with a
    prompt.

    Picture i, counted over all calls, gets the noise of seed + i. ``progress`` 0 is pure noise, towards 1 the clean
    picture.
    """
    scheduler = model.make_scheduler("flow_euler" if model.flow else "ddim")
    condition, shown = None, 0

    def forward(pixels: Tensor) -> Tensor:
        nonlocal condition, shown
        h, w = pixels.shape[-2:]
        times = model.timesteps(scheduler, 50, h, w)
        t = times[min(int(progress * len(times)), len(times) - 1)]
        path = NoisePath(scheduler)
        if condition is None or len(condition) != len(pixels):
            condition = model.encode_text([prompt] * len(pixels), guidance=False, embedded_guidance=1.0)
        clean = model.encode_image(pixels.to(model.device, model.dtype))
        noise = torch.stack(
            [torch.randn(clean.shape[1:], generator=stream("sample", seed + shown + i)) for i in range(len(clean))]
        ).to(clean)
        shown += len(clean)
        return model.predict(path.add_noise(clean, noise, t).to(model.dtype), t, condition)

    return forward
