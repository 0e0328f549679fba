"""Robust ViT: a few pictures with masks teach a vision transformer to look at the thing instead of its surroundings.

Chefer, Schwartz, Wolf 2022 (arXiv 2206.01161). The relevance of each picture's own class (section 3.1: attention maps
times their gradients, carried through all layers) becomes a loss (section 3.2): it should be 1 on the thing and 0 off
it, while the classifier keeps the confidence it had. The network stays as it is built; what is taught is an ordinary
checkpoint.

    >>> taught = teach(vit, pixels, masks, labels, lr=1e-4)
    >>> taught.model.save_pretrained("robust")

As in the authors' code, gradients of the score with respect to attention maps are constants of the loss: it reaches the
weights through the maps themselves, without second derivatives.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato import cards, files
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput
from sfumato.explain.lrp import on_grid, target_scores
from sfumato.metrics.segmentation import inside_share, normalise
from sfumato.relevance.capture import captured, refuse_no_attention
from sfumato.relevance.rules import fuse_heads

__all__ = ["RobustVit", "Taught", "masks_from", "relevance_maps", "teach"]


@register
class RobustVit:
    """The card and the parameters; :func:`teach` does the work."""

    CARD = Card(
        key="robust_vit",
        title="Optimizing Relevance Maps of Vision Transformers Improves Robustness",
        authors="Chefer, Schwartz, Wolf",
        year=2022,
        arxiv="2206.01161",
        verb="teach",
        needs=("classifier",),
        defaults_from="section 4 of the paper and the authors' code; the learning rate is that for small networks",
        cost="two forward and two backward passes per picture and epoch",
        not_reproduced="masks by TokenCut; the baselines GradMask and RRR",
        summary="fine-tunes a vision transformer on few masked pictures so that it looks at the thing, not around it",
    )

    class Params(cards.Params):
        relevance: float = Field(default=0.8, ge=0, description="weight of the relevance loss")
        confidence: float = Field(default=0.2, ge=0, description="weight of the classification loss")
        background: float = Field(default=2.0, ge=0, description="weight of relevance off the thing")
        foreground: float = Field(default=0.3, ge=0, description="weight of relevance missing on the thing")
        keep: Literal["own", "label"] = Field(
            default="own", description="the classification loss holds on to the model's own answer, or to the label"
        )
        temperature: float = Field(default=1.0, gt=0, description="of the classification loss")
        lr: float = Field(default=1e-4, gt=0, description="learning rate (AdamW); the paper: 6e-7 to 3e-6 for ViT-B")
        weight_decay: float = Field(default=1e-4, ge=0, description="weight decay")
        epochs: int = Field(default=50, ge=1, description="passes over the pictures")
        batch: int = Field(default=8, ge=1, description="pictures per step")
        decay: float = Field(default=0.85, gt=0, le=1, description="factor of the learning rate every second epoch")
        seed: int = Field(default=0, ge=0, description="order of the pictures")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)


@dataclass(eq=False)
class Taught:
    """A taught copy of a model. ``log`` has one entry per epoch (losses, share of relevance inside the masks, and
    ``validation``, the loss on other pictures where there are any); ``kept`` is the epoch whose weights these are."""

    model: nn.Module
    log: list[dict[str, float]]
    kept: int
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path | str) -> Path:
        """Writes the model in its library's folder format, with ``robust_vit.json``: parameters and log.

        Raises BadInput if the folder is not empty.
        """
        target = Path(folder)
        if target.exists() and any(target.iterdir()):
            raise BadInput(f"output folder {str(target)!r} is not empty; name a new one.")
        self.model.save_pretrained(target)  # type: ignore[operator]
        with files.replacing(target / "robust_vit.json") as file:
            file.write(json.dumps({**self.facts, "kept": self.kept, "log": self.log}, indent=1).encode())
        return target


def teach(
    model: nn.Module,
    images: Tensor,
    masks: Tensor,
    labels: Tensor | Sequence[int | str],
    *,
    validation: tuple[Tensor, Tensor, Tensor | Sequence[int | str]] | None = None,
    on_progress: Callable[[int, int, dict[str, float]], None] | None = None,
    **params: Any,
) -> Taught:
    """A copy of ``model`` taught on pictures (n, c, h, w), as the model wants them, with masks (n, h, w) and labels.

    Args:
        masks: 1 (or True) on the thing: the truth, or :func:`masks_from` DAAM or relevance maps. In [0, 1].
        labels: numbers or names of the model's labels.
        validation: other pictures, masks and labels; the weights with the lowest loss on them are kept (the last ones
            without).
        on_progress: called with epoch, epochs and the epoch's log entry.
        params: :class:`RobustVit.Params`. ``relevance=0, keep="label"`` is plain fine-tuning.

    The model itself is not touched. Raises BadInput (half precision, shapes, labels out of range, empty masks),
    UnknownName (a label's name), NotSupported (no softmax attention, linear attention by name).
    """
    options = RobustVit(**params).params
    pupil = copy.deepcopy(model).eval()
    pupil.requires_grad_(True)
    _check(pupil, images, masks, "pictures")
    wanted = _numbers(pupil, images, labels)
    held = None
    if validation is not None:
        _check(pupil, *validation[:2], "validation pictures")
        held = (*validation[:2], _numbers(pupil, validation[0], validation[2]))
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: options.decay ** (epoch // 2))
    order = torch.Generator().manual_seed(options.seed)
    log: list[dict[str, float]] = []
    best, kept, weights = float("inf"), options.epochs, None
    for epoch in range(1, options.epochs + 1):
        sums: dict[str, float] = {}
        for rows in torch.randperm(len(images), generator=order).split(options.batch):
            loss, told = _loss(pupil, images[rows], masks[rows], wanted[rows], options)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for name, value in told.items():
                sums[name] = sums.get(name, 0.0) + value * len(rows) / len(images)
        schedule.step()
        if held is not None:
            sums["validation"] = _whole_loss(pupil, held, options)
            if sums["validation"] < best:
                best, kept = sums["validation"], epoch
                weights = {name: value.detach().clone() for name, value in pupil.state_dict().items()}
        if sums["loss"] != sums["loss"]:
            raise BadInput(f"robust_vit diverged in epoch {epoch}: lower lr, which is {options.lr}.")
        log.append(sums)
        if on_progress:
            on_progress(epoch, options.epochs, sums)
    if weights is not None:
        pupil.load_state_dict(weights)
    pupil.zero_grad(set_to_none=True)
    for taught, was in zip(pupil.parameters(), model.parameters(), strict=True):
        taught.requires_grad_(was.requires_grad)
    facts = {"method": "robust_vit", "params": options.model_dump(), "pictures": len(images)}
    return Taught(pupil, log, kept, facts)


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
        slopes = torch.autograd.grad(scores.sum(), maps, retain_graph=True, create_graph=second_order)
    rows = None  # the class token's row of the product, from the last layer down: n times less work than the matrix
    for probs, slope in zip(reversed(maps), reversed(slopes), strict=True):
        fused = fuse_heads(probs, slope)
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


def _loss(
    model: nn.Module, images: Tensor, masks: Tensor, labels: Tensor, options: Any
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch and its parts (equations 4 to 7)."""
    inside = masks.to(images.dtype)
    if options.relevance:
        maps, output = relevance_maps(model, images, labels)
        heat = _unit(F.interpolate(maps[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0])
        background = (heat * (1 - inside)).square().mean()
        foreground = (heat * inside - inside).square().mean()
        look = options.background * background + options.foreground * foreground
        told = {"background": float(background.detach()), "foreground": float(foreground.detach())}
        told["inside"] = float(inside_share(heat.detach(), inside).mean())
    else:
        output, look, told = model(images), torch.zeros(()), {}
    logits = output.logits / options.temperature
    answer = logits.detach().argmax(1) if options.keep == "own" else labels
    confidence = F.cross_entropy(logits, answer)
    loss = options.relevance * look + options.confidence * confidence
    return loss, {"loss": float(loss.detach()), "confidence": float(confidence.detach()), **told}


def _whole_loss(model: nn.Module, held: tuple[Tensor, Tensor, Tensor], options: Any) -> float:
    """The loss over all of ``held``."""
    total = 0.0
    for rows in torch.arange(len(held[0])).split(32):
        _, told = _loss(model, *(part[rows] for part in held), options)
        total += told["loss"] * len(rows) / len(held[0])
    return total


def _unit(maps: Tensor) -> Tensor:
    """Each map (h, w) to [0, 1]; a flat one to 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)


def _check(model: nn.Module, images: Tensor, masks: Tensor, what: str) -> None:
    for name, value in (*model.named_parameters(), (what, images)):
        if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            kind = str(value.dtype).removeprefix("torch.")
            raise BadInput(
                f"robust_vit needs full precision, its relevance underflows; {name} is {kind}: use .float()."
            )
    if images.ndim != 4 or masks.shape != (len(images), *images.shape[-2:]) or not len(images):
        raise BadInput(
            f"{what} {tuple(images.shape)} and masks {tuple(masks.shape)} must be (n, c, h, w) and (n, h, w)."
        )
    if masks.min() < 0 or masks.max() > 1:
        raise BadInput(f"masks must lie in 0 to 1, got {float(masks.min()):g} to {float(masks.max()):g}.")
    empty = (masks.flatten(1) == 0).all(1).nonzero().flatten().tolist()
    if empty:
        raise BadInput(f"the mask of picture {empty[0]} is empty; leave out pictures that do not show the thing.")


def _numbers(model: nn.Module, images: Tensor, labels: Tensor | Sequence[int | str]) -> Tensor:
    """Labels as numbers (n,), checked against what the model gives."""
    with torch.no_grad():
        first = model(images[:1]).logits
    _, numbers = target_scores(model, first.expand(len(images), -1), labels)
    assert numbers is not None
    return numbers
