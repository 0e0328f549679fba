"""The stages from a name to masks: weak maps, rough masks, removal, refined masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import mask_ops
from sfumato.edit.blend import Blend
from sfumato.edit.inpaint import Inpaint
from sfumato.errors import NoMatch
from sfumato.explain.daam import explain_images
from sfumato.models import Model
from sfumato.sampling import Intervention, generate

BATCH = 32
Threshold = Literal["mixture", "half"]

#: called after each piece of work: (stage, done, of how many)
Report = Callable[[str, int, int], None]


def make_pictures(model: Model, prompt: str, n: int, seed: int, steps: int | None, report: Report) -> Tensor:
    """``n`` pictures (n 3 H W) of ``prompt``."""
    out = []
    for start in range(0, n, BATCH):
        count = min(BATCH, n - start)
        result = generate(model, prompt, n=count, seed=seed + start, steps=steps)
        assert result.pixels is not None
        out.append(result.pixels.clamp(-1, 1).float())
        report("pictures", start + count, n)
    return torch.cat(out)


def weak_maps(
    model: Model,
    pictures: Tensor,
    prompt: str,
    concept: str,
    levels: int = 20,
    window: tuple[float, float] = (0.2, 1.0),
    seed: int = 0,
    report: Report | None = None,
) -> Tensor:
    """Where the concept acts in pictures (n 3 H W), as raw attention (n H W): each is noised afresh to every level of
    the schedule within ``window`` and shown once to the denoiser with ``prompt`` (the paper's section 3.1).

    Raises NoMatch where the concept is not in the prompt.
    """
    out = []
    for start in range(0, len(pictures), BATCH):
        part = pictures[start : start + BATCH]
        seeds = list(range(seed + start, seed + start + len(part)))
        found = explain_images(model, part, prompt, [concept], steps=levels, seed=seeds, window=window)
        out += [each.map(concept, merge=True) for each in found]
        if report:
            report("maps", start + len(part), len(pictures))
    return torch.stack(out)


def rough_masks(maps: Tensor, threshold: Threshold = "mixture") -> Tensor:
    """Masks (n H W) bool from maps: above the middle between the means of two Gaussians fitted to each map's values, or
    above the middle of its range (``half``); then the majority of each 3x3 neighbourhood. A map that is the same
    everywhere gives an empty mask."""
    if threshold == "half":
        low, high = maps.amin((1, 2), True), maps.amax((1, 2), True)
        return torch.stack([_majority(each) for each in (maps > (low + high) / 2) & (high > low)])
    return torch.stack([_majority(_above(each)) for each in maps])


def remove(
    remover: Model,
    pictures: Tensor,
    holes: Tensor,
    background: Sequence[str],
    negative: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    report: Report | None = None,
) -> Tensor:
    """Pictures (n 3 H W) with the ``holes`` (n H W) redrawn as ``background``; those with an empty hole stay as they
    are.

    The released code takes the opposite caption for ``negative``. On our models that is much worse than none: two
    prompts that both are far from the picture pull it out of what the model knows.
    """
    out = pictures.clone()
    todo = holes.flatten(1).any(1).nonzero()[:, 0]
    size = BATCH if remover.family.takes_mask else 1  # blending lays one region over all samples
    for part in todo.split(size):
        given = [each.float() for each in holes[part]]
        system: Intervention = (
            Inpaint(mask=given, each=True) if remover.family.takes_mask else Blend(mask=given, paste=0.0)
        )
        result = generate(
            remover,
            [background[int(i) % len(background)] for i in part],
            negative=negative,
            image=pictures[part],
            strength=1.0,
            seed=[seed + int(i) for i in part],
            steps=steps,
            guidance=guidance,
            interventions=system,
        )
        assert result.pixels is not None
        out[part] = result.pixels.clamp(-1, 1).to(out)
        if report:
            report("removals", int((todo <= part[-1]).sum()), len(todo))
    return out


def refined_masks(pictures: Tensor, removed: Tensor, holes: Tensor, tidy: bool = True) -> Tensor:
    """Masks (n H W) bool of what changed when the object was removed: the difference, mean over channels, above the
    threshold of a mixture fitted within the hole (outside nothing changes, and those zeros would pull it down).
    ``tidy``: gaps closed and holes filled."""
    out = []
    for difference, hole in zip((pictures - removed).abs().mean(1), holes, strict=True):
        mask = _majority(_above(difference, hole)) & hole
        out.append(mask_ops.fill_holes(mask_ops.close(mask.float())).bool() & hole if tidy else mask)
    return torch.stack(out)


def grown(found: Tensor, pixels: int) -> Tensor:
    """Masks (n H W) bool, dilated."""
    return torch.stack([mask_ops.dilate(each.float(), pixels).bool() for each in found])


def _above(values: Tensor, where: Tensor | None = None) -> Tensor:
    """Where a map (H W) is above the threshold of its two-part mixture, fitted to the values of ``where`` (H W) bool;
    nowhere if they are flat, or none."""
    fitted = values if where is None else values[where]
    try:
        return values > mask_ops.mixture_threshold(fitted) if fitted.numel() else torch.zeros_like(values).bool()
    except NoMatch:
        return torch.zeros_like(values, dtype=torch.bool)


def _majority(mask: Tensor) -> Tensor:
    """A mask (H W) of what at least half of each pixel's 3x3 neighbourhood says."""
    return F.avg_pool2d(mask.float()[None], 3, 1, 1, count_include_pad=False)[0] >= 0.5
