"""The loss of robust ViT: relevance on the thing, none beside it, and the confidence the classifier had."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.metrics.segmentation import inside_share, normalise
from sfumato.relevance.capture import captured, refuse_no_attention
from sfumato.relevance.lrp import on_grid, target_scores
from sfumato.relevance.rules import fuse_heads


def relevance_maps(model: nn.Module, images: Tensor, labels: Tensor, second_order: bool = False) -> tuple[Tensor, Any]:
    """(maps (b, h, w) >= 0 of the patches, the model's output), both differentiable with respect to the weights.

    Relevance of each picture's label to the class token: R = I, then R + E_k[(gradient A)^+] R layer by layer, the row
    of the class token. ``second_order``: gradients of the maps are differentiated too.
    """
    with captured(model) as calls:
        output = model(images)
        refuse_no_attention(model, calls)
        scores, _ = target_scores(model, output, labels)
        maps = [call.probs for call in calls]
        gradients = torch.autograd.grad(scores.sum(), maps, retain_graph=True, create_graph=second_order)
    rows = None  # the class token's row of the product, from the last layer down: n times less work than the matrix
    for probs, gradient in zip(reversed(maps), reversed(gradients), strict=True):
        fused = fuse_heads(probs, gradient)
        rows = (
            F.one_hot(torch.zeros(len(fused), 1, dtype=torch.long), fused.shape[-1]).to(fused) if rows is None else rows
        )
        rows = rows + rows @ fused
    assert rows is not None
    return on_grid(rows[:, 0]), output


def masks_from(maps: Tensor, share: float | None = None) -> Tensor:
    """Masks (n, h, w) bool from any heat maps (n, h, w), DAAM's or relevance: where a map, brought to [0, 1], exceeds
    ``share``, or its own mean without one."""
    if maps.ndim != 3:
        raise BadInput(f"maps must be (n, h, w), got {tuple(maps.shape)}.")
    levels = normalise(maps)
    bars = levels.mean((1, 2), keepdim=True) if share is None else torch.full_like(levels[:, :1, :1], share)
    return levels > bars


def batch_loss(
    model: nn.Module, images: Tensor, masks: Tensor, labels: Tensor, options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its parts (equations 4 to 7)."""
    inside = masks.to(images.dtype)
    if options.relevance:
        maps, output = relevance_maps(model, images, labels)
        heat = _unit(F.interpolate(maps[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0])
        background = (heat * (1 - inside)).square().mean()
        foreground = (heat * inside - inside).square().mean()
        look = options.background * background + options.foreground * foreground
        parts = {"background": background.detach(), "foreground": foreground.detach()}
        parts["inside"] = inside_share(heat.detach(), inside).mean()
    else:
        output, look, parts = model(images), torch.zeros((), device=images.device), {}
    logits = output.logits / options.temperature
    answer = logits.detach().argmax(1) if options.keep == "own" else labels
    confidence = F.cross_entropy(logits, answer)
    loss = options.relevance * look + options.confidence * confidence
    return loss, {"confidence": confidence.detach(), **parts}


def whole_loss(model: nn.Module, held_out: tuple[Tensor, Tensor, Tensor], options: Any) -> float:
    """The loss over all of ``held_out``."""
    total = 0.0
    for rows in torch.arange(len(held_out[0])).split(32):
        images, masks, labels = (part[rows] for part in held_out)
        loss, _ = batch_loss(model, images, masks, labels, options)
        total += float(loss.detach()) * len(rows) / len(held_out[0])
    return total


def _unit(maps: Tensor) -> Tensor:
    """Each map (h, w) to [0, 1]; a flat one to 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)
