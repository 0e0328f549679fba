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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sfumato import cards, writing
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, NotSupported
from sfumato.markup import described
from sfumato.models.readers import load_reader
from sfumato.relevance.lrp import target_scores
from sfumato.teach.examples import read_examples, toybox_examples
from sfumato.teach.robust_vit.loss import batch_loss, masks_from, relevance_maps, whole_loss
from sfumato.training import BestTensors, Draw, Player, Progress, fit, shuffled

__all__ = ["RobustVit", "TaughtClassifier", "masks_from", "relevance_maps", "teach"]


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

    RESUMES: ClassVar[bool] = False

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
        batch: int = Field(default=8, ge=1, le=10000, description="pictures per step")
        decay: float = Field(default=0.85, gt=0, le=1, description="factor of the learning rate every second epoch")
        seed: int = Field(default=0, ge=0, description="order of the pictures")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def teach(
        self,
        model: Any,
        data: str | Path = "toybox",
        *,
        per_class: int = 3,
        seed: int = 0,
        on_progress: Callable[..., None] | None = None,
    ) -> TaughtClassifier:
        """:func:`teach` with these parameters.

        Args:
            model: a built-in name, a transformers folder, or a :class:`~sfumato.models.readers.Reader`.
            data: an imagefolder whose ``metadata.jsonl`` names ``file_name``, ``mask`` and ``label``, or "toybox":
                pictures whose backdrop gives the shape away, ``per_class`` of each drawn by ``seed``.

        Raises NotSupported for a model that is no classifier of pictures.
        """
        reader = load_reader(model) if isinstance(model, str | Path) else model
        if reader.kind != "classifier" or reader.preprocessing.size is None:
            raise NotSupported(f"{self.CARD.key} teaches classifiers of pictures; {reader.name} is none.")
        if str(data) == "toybox":
            examples, held_out = toybox_examples(per_class, seed), toybox_examples(per_class, seed, "val")
            validation = (reader.pixels(held_out.pictures), held_out.masks, held_out.labels)
        else:
            examples, validation = read_examples(data, reader.preprocessing.size), None
        found = teach(
            reader.module, reader.pixels(examples.pictures), examples.masks, examples.labels, validation=validation,
            on_progress=on_progress, **self.params.model_dump(),
        )  # fmt: skip
        found.facts |= {"model": reader.name, "data": str(data), "labels": list(examples.labels)}
        return found


@dataclass(eq=False)
class TaughtClassifier:
    """A taught copy of a model. ``log`` has one entry per epoch (losses, share of relevance inside the masks, and
    ``validation``, the loss on other pictures where there are any); ``epoch`` is the one whose weights these are."""

    model: nn.Module
    log: list[dict[str, float]]
    epoch: int
    facts: dict[str, Any] = field(default_factory=dict)

    __repr__ = described

    def save(self, folder: Path | str) -> Path:
        """Writes the model in its library's folder format, with ``robust_vit.json``: parameters and log.

        Raises BadInput if the folder is not empty.
        """
        target = writing.only_folder(folder, "the files of a model")
        with writing.atomic_folder(target) as beside:
            self.model.save_pretrained(beside)  # type: ignore[operator]
            text = json.dumps({**self.facts, "epoch": self.epoch, "log": self.log}, indent=1)
            (beside / "robust_vit.json").write_text(text, encoding="utf-8")
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
) -> TaughtClassifier:
    """A copy of ``model`` taught on pictures (n, c, h, w), as the model wants them, with masks (n, h, w) and labels.

    Args:
        masks: 1 (or True) on the thing: the truth, or :func:`masks_from` DAAM or relevance maps. In [0, 1].
        labels: numbers or names of the model's labels.
        validation: other pictures, masks and labels; the weights with the lowest loss on them are kept (the last ones
            without).
        on_progress: called with epoch, epochs and the epoch's log entry.
        params: :class:`RobustVit.Params`. ``relevance=0, keep="label"`` is plain fine-tuning.

    Ctrl-C ends it with what was learnt until then. The model itself is not touched. Raises BadInput (half precision,
    shapes, labels out of range, empty masks), UnknownName (a label's name), NotSupported (no softmax attention, linear
    attention by name).
    """
    options = RobustVit(**params).params
    taught = copy.deepcopy(model).eval()
    taught.requires_grad_(True)
    _check(taught, images, masks, "pictures")
    targets = _numbers(taught, images, labels)
    held_out = None
    if validation is not None:
        _check(taught, *validation[:2], "validation pictures")
        held_out = (*validation[:2], _numbers(taught, validation[0], validation[2]))
    rows = shuffled(len(images), options.batch, options.epochs, options.seed)
    per_epoch = len(rows) // options.epochs
    log: list[dict[str, float]] = []
    sums: dict[str, float] = {}
    best = None if held_out is None else BestTensors(dict(taught.named_parameters()))

    def loss(draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        now = rows[draw.step]
        return batch_loss(taught, images[now], masks[now], targets[now], options)

    def decay(step: int) -> float:
        return options.decay ** (step // per_epoch // 2)

    def after(progress: Progress) -> None:
        nonlocal sums
        n = len(rows[progress.step - 1])
        losses = {name: value * n / len(images) for name, value in progress.logs.items() if name != "rate"}
        sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
        if progress.step % per_epoch:
            return
        if held_out is not None and best is not None:
            sums["validation"] = whole_loss(taught, held_out, options)
            best.measured(len(log) + 1, sums["validation"])
        log.append(sums)
        if on_progress:
            on_progress(len(log), options.epochs, sums)
        sums = {}

    optimizer = torch.optim.AdamW(taught.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    done = fit(Player(loss, optimizer, taught, schedule=decay), len(rows), on_progress=after, name="robust_vit")
    kept = 0 if best is None else best.step
    if best is not None and kept:
        best.take()
    for parameter, was in zip(taught.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(was.requires_grad)
    facts = {"method": "robust_vit", "params": options.model_dump(), "pictures": len(images)}
    if done.interrupted:
        facts["interrupted"] = f"after {done.step} of {len(rows)} steps"
    return TaughtClassifier(taught, log, kept or len(log), facts)


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
