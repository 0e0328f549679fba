"""Latents optimised directly, from noise or from a picture (sections 4.2 and 4.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from sfumato import rng
from sfumato.errors import BadInput
from sfumato.markup import described
from sfumato.models import Model
from sfumato.models.modes import frozen
from sfumato.models.readers import PLAIN, load_clip
from sfumato.relevance.clip import ClipExplainer
from sfumato.sampling.pixels import as_pictures
from sfumato.steer.no_token_left_behind.diagnosis import subjects
from sfumato.steer.no_token_left_behind.explained_loss import ExplainedLoss, Region, Target
from sfumato.training import Draw, Player, Progress, fit


@dataclass(frozen=True, eq=False)
class Optimised:
    """Optimised ``latents`` (b c h w), their ``pixels`` (b 3 H W), and the loss of each picture by iteration (n b)."""

    latents: Tensor
    pixels: Tensor
    losses: Tensor

    __repr__ = described

    @property
    def images(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        return as_pictures(self.pixels)


def optimise(
    model: Model,
    prompts: str | Sequence[str],
    *,
    words: Sequence[str] = (),
    regions: Sequence[Sequence[Region]] = (),
    image: Tensor | None = None,
    steps: int = 300,
    learning_rate: float = 0.1,
    anchor: float = 0.008,
    limit: float = 3.0,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    clip: str = PLAIN,
    on_step: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Optimised:
    """Optimise the latents of a model's codec by the explained loss; the denoiser takes no part.

    Args:
        prompts: one per picture. ``words``: those that must count (none: the nouns).
        regions: per picture what shall be where.
        image: pictures (b 3 H W) in [-1, 1] to begin from; without them noise, one seed per picture from ``seed`` on.
        steps, learning_rate: of Adam, with a ramp at both ends.
        anchor: weight of the squared distance to the latents of ``image``, summed over them (0 without one).
        limit: latents stay within +- this many of their own spread (VQGAN+CLIP: within the codebook's range).
        size: (width, height) where there is no picture.
        options: of :class:`ExplainedLoss`.

    Raises NoMatch for words, BadInput for unequal numbers.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    explainer = ClipExplainer(load_clip(clip, device=str(model.device)))
    found = subjects([explainer.read(text) for text in texts], words)
    placed = list(regions) or [()] * len(texts)
    if len(placed) != len(texts) or (image is not None and len(image) != len(texts)):
        raise BadInput(f"optimise: {len(texts)} prompts need as many pictures and lists of regions.")
    targets = [
        Target(text, tuple(span.tokens["clip"] for span in spans), tuple(each))
        for text, spans, each in zip(texts, found, placed, strict=True)
    ]
    explained = ExplainedLoss(explainer, **options)
    losses: list[Tensor] = []
    with frozen(model):
        with torch.no_grad():
            first = _first_latents(model, len(texts), image, seed, size)
        z = first.clone().requires_grad_(True)

        def loss(draw: Draw) -> Tensor:
            generators = [rng.stream("no_token_left_behind.views", seed + i, draw.step) for i in range(len(texts))]
            each = explained(model.decode(z), targets, generators).total
            losses.append(each.detach())
            total = each.sum()
            return total + anchor * (z - first).square().sum() if image is not None and anchor else total

        @torch.no_grad()
        def after(progress: Progress) -> None:
            z.clamp_(-limit, limit)
            if on_step is not None:
                on_step(progress.step, steps)

        player = Player(loss, torch.optim.Adam([z], lr=1.0), schedule=lambda k: learning_rate * _ramp((k + 1) / steps))
        fit(player, steps, on_progress=after, name="optimise")
        with torch.no_grad():
            pixels = model.decode(z.detach())
    return Optimised(z.detach(), pixels, torch.stack(losses) if losses else torch.zeros(0, len(texts)))


def _ramp(done: float) -> float:
    """StyleCLIP's schedule: up over the first 5 %, down over the last quarter."""
    return min(1.0, done / 0.05) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - done) / 0.25)))


def _first_latents(model: Model, n: int, image: Tensor | None, seed: int, size: tuple[int, int] | None) -> Tensor:
    if image is not None:
        return model.encode_image(image.to(model.device, model.dtype)).float()
    height, width = model.default_size if size is None else (size[1], size[0])
    shape = (n, *model.latent_shape(height, width))
    generators = rng.generators("sample", range(seed, seed + n))
    return randn_tensor(shape, generator=generators, device=model.device, dtype=torch.float32)
