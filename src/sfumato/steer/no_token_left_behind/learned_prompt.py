"""Prompts for classification learnt from a few pictures per class (section 4.1, on CoOp)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import files
from sfumato.errors import BadInput
from sfumato.markup import described
from sfumato.models.readers import PLAIN, load_clip
from sfumato.relevance.clip import ClipExplainer
from sfumato.steer.no_token_left_behind.class_prompts import ClassPrompts, image_embeds, logit_scale
from sfumato.training import Draw, Player, Progress, fit

FORMAT = "sfumato-learned-prompt-1"


@dataclass(eq=False)
class LearnedPrompt:
    """A prompt of learnt vectors for CLIP classification: half of ``context`` (n d), the class name, the other half.

    ``losses``: (epochs); ``shares``: the mean relevance of the right class's name over the epochs.
    """

    clip: str
    classes: tuple[str, ...]
    context: Tensor
    losses: Tensor
    shares: Tensor

    __repr__ = described

    def logits(self, images: Tensor) -> Tensor:
        """(b classes) of pictures (b 3 H W) in [-1, 1]."""
        explainer = ClipExplainer(load_clip(self.clip))
        with torch.no_grad():
            return (
                logit_scale(explainer)
                * image_embeds(explainer, images)
                @ ClassPrompts(explainer, self.classes, len(self.context)).embeds(self.context).T
            )

    def classify(self, images: Tensor) -> list[str]:
        """The best class of each picture (b 3 H W) in [-1, 1]."""
        return [self.classes[i] for i in self.logits(images).argmax(1).tolist()]

    def save(self, path: Path | str) -> Path:
        """Write it as safetensors, whole or not at all."""
        facts = {"clip": self.clip, "classes": list(self.classes)}
        tensors = {name: getattr(self, name) for name in ("context", "losses", "shares")}
        return files.save_tensors(path, tensors, {"format": FORMAT, "facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path | str) -> LearnedPrompt:
        """What :meth:`save` wrote. Raises BadInput for any other file, OSError when it cannot be read."""
        with files.reading_tensors(path, FORMAT, "learnt prompt") as (file, metadata):
            facts = json.loads(metadata["facts"])
            tensors = [file.get_tensor(name) for name in ("context", "losses", "shares")]
            return cls(facts["clip"], tuple(facts["classes"]), *tensors)


def learn_prompt(
    images: Tensor,
    labels: Sequence[int],
    classes: Sequence[str],
    *,
    explain: float = 1.0,
    others: bool = True,
    context: int = 16,
    epochs: int = 50,
    learning_rate: float = 0.002,
    batch: int = 32,
    flip: bool = True,
    seed: int = 0,
    clip: str = PLAIN,
    on_epoch: Callable[[int, int], None] | None = None,
) -> LearnedPrompt:
    """Learn the prompt around class names from a few labelled pictures (CoOp, Zhou et al. 2022), so that CLIP decides
    by the names and not by the words learnt around them.

    With s_c the relevance of the most relevant token of class c's name, as a share of all tokens but the end token, the
    loss of a picture of class y is cross entropy + ``explain`` (mean over the others of s_c - s_y); ``explain`` 0 is
    CoOp. Gradients inside s are held fixed, as in the authors' code.

    Args:
        images: (b 3 H W) in [-1, 1]. ``labels``: index of each one's class. ``classes``: their names.
        others: whether the names of wrong classes are to lose relevance.
        context: how many vectors are learnt, half of them before the name.
        learning_rate: of SGD with momentum, falling as a cosine after one epoch at 1e-5.
        flip: mirror pictures at random.

    Raises BadInput for labels out of range, fewer than two classes, or names too long for the text tower.
    """
    if len(classes) < 2 or len(images) != len(labels) or not len(labels):
        raise BadInput(f"learn_prompt: {len(images)} pictures, {len(labels)} labels and {len(classes)} classes given.")
    if min(labels) < 0 or max(labels) >= len(classes):
        raise BadInput(
            f"learn_prompt: labels run from {min(labels)} to {max(labels)}; the {len(classes)} classes from 0."
        )
    explainer = ClipExplainer(load_clip(clip))
    prompts = ClassPrompts(explainer, classes, context)
    generator = torch.Generator().manual_seed(seed)
    width = int(explainer.model.config.text_config.hidden_size)
    vectors = (0.02 * torch.randn(context, width, generator=generator)).requires_grad_(True)
    batches: list[tuple[int, Tensor, Tensor]] = []  # epoch, rows, which are mirrored
    for epoch in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            chance = torch.rand(len(rows), generator=generator) if flip else torch.ones(len(rows))
            batches.append((epoch, rows, chance < 0.5))
    truth = torch.tensor(list(labels))

    def loss(draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        _, rows, mirrored = batches[draw.step]
        views = torch.where(mirrored.view(-1, 1, 1, 1), images[rows].flip(-1), images[rows])
        with torch.no_grad():
            pictures = image_embeds(explainer, views)
        if not explain:
            cosines = pictures @ prompts.embeds(vectors).T
            return F.cross_entropy(logit_scale(explainer) * cosines, truth[rows]), {}
        cosines, relevance = prompts.relevance(vectors, pictures)
        right = F.one_hot(truth[rows], len(classes)).to(relevance)
        own, rest = (relevance * right).sum(1).mean(), (relevance * (1 - right)).mean()
        extra = explain * (rest * others - own)
        return F.cross_entropy(logit_scale(explainer) * cosines, truth[rows]) + extra, {"share": own.detach()}

    def schedule(step: int) -> float:
        epoch = batches[step][0]
        return 1e-5 if epoch == 0 else learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))

    losses, shares = ([0.0] * epochs for _ in range(2))

    def after(progress: Progress) -> None:
        epoch, rows, _ = batches[progress.step - 1]
        losses[epoch] += progress.logs["loss"] * len(rows)
        shares[epoch] += progress.logs.get("share", 0.0) * len(rows)
        if on_epoch is not None and (progress.step == len(batches) or batches[progress.step][0] > epoch):
            on_epoch(epoch + 1, epochs)

    optimizer = torch.optim.SGD([vectors], lr=1.0, momentum=0.9, weight_decay=5e-4)
    fit(Player(loss, optimizer, schedule=schedule), len(batches), on_progress=after, name="learn_prompt")
    means = [torch.tensor([total / len(images) for total in totals]) for totals in (losses, shares)]
    return LearnedPrompt(clip, tuple(classes), vectors.detach(), *means)
