"""Models of the zoo that went on learning for a claim: looks without steps between the names, new words for old things.

The toybox of the zoo's training has eight colours and two sizes, so a hue between two names is as strange to its models
as a texture that was never rendered. What a few vectors can say is claimed of models that have seen every hue; what is
said of words with two senses, and of what a word is made of, of models that have read such words. All weights of the
denoiser learn; captions name nothing more than before. As in the zoo's training the pixels of toys weigh more, and high
noise, where colours and shapes are decided, is drawn more often. Some 600 steps at the loss of pictures as a whole left
a denoiser that still drew "a green ball" in the one green of the toybox (hues within 10 degrees of deviation where what
it was shown has 25): whatever is taught to be found between the names was not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from claims.core import Context
from sfumato.adapters.trainable import copies, substituted_weights
from sfumato.models import load as load_model
from sfumato.models.modes import frozen
from sfumato.rng import sequence, stream
from sfumato.teach.denoising import Denoising, frozen_conditions, places
from sfumato.toybox import HOMONYMS, PLANTED, PlantedWord, Scene, caption, continuous, render
from sfumato.toybox.dataset import draw_scene
from sfumato.training import Draw, Player, fit

SEED, BATCH, RATE, EMPTY = 8300, 16, 3e-4, 0.1
TOY_WEIGHT = 4.0  # of a toy's pixels in the loss
COLORLESS = 0.2  # share of toys whose colour is not told, as when the generators were trained


def world(context: Context, name: str) -> Any:
    """A generator of the zoo that has seen every hue and height, once per run."""
    return taught(context, name, "every hue", lambda: looks(context.count(6000, 24)), 8)


def ambiguous(context: Context, name: str) -> Any:
    """A generator of the zoo that has read homonyms among other captions, once per run."""
    return taught(context, name, "homonyms", lambda: senses(context.count(1500, 24), HOMONYMS))


def planted(context: Context, name: str) -> Any:
    """A generator of the zoo that has read the planted words among other captions, once per run."""
    return taught(context, name, "planted words", lambda: senses(context.count(4000, 40), PLANTED))


def looks(n: int) -> list[tuple[Scene, str]]:
    """Training scenes with continuous looks, and their captions."""
    out = []
    for i in range(n):
        scene, draw = draw_scene("train", SEED, i), sequence("claims.looks", SEED, i)
        out.append((continuous(scene, draw), caption(scene, draw, "random", COLORLESS).text))
    return out


def senses(n: int, known: Mapping[str, PlantedWord]) -> list[tuple[Scene, str]]:
    """Scenes of every new word in turn, and every second time ordinary ones, so that other words stay what they are."""
    out, words = [], list(known.values())
    for i in range(n):
        if i % 2:
            scene = draw_scene("train", SEED + 1, i)
            out.append((scene, caption(scene, sequence("claims.senses", SEED, i), "random", COLORLESS).text))
        else:
            sample = words[i // 2 % len(words)].sample(SEED, i)
            out.append((sample.scene, sample.caption))
    return out


def taught(
    context: Context, name: str, what: str, examples: Callable[[], Sequence[tuple[Scene, str]]], each: int = 5
) -> Any:
    """The model after it has learnt ``what``, once per run: these scenes and captions, about so many looks at
    ``each``."""

    def made() -> Any:
        model = load_model(str(context.folder(name)))
        model.name = name  # what is kept of it is found again wherever its weights lie
        context.report(f"  {name} learns {what}")
        learning = partial(learnt, context, model, what, examples, each)
        weights = context.kept((f"{name} that has learnt {what}",), learning, __file__, (name,))
        with torch.no_grad():
            for path, value in weights.items():
                component, _, parameter = path.partition(".")
                model.modules[component].get_parameter(parameter).copy_(value)
        return model

    return context.once(f"{name} with {what}", made)


def learnt(
    context: Context, model: Any, what: str, made: Callable[[], Sequence[tuple[Scene, str]]], each: int
) -> dict[str, torch.Tensor]:
    """The denoiser's weights afterwards, by ``component.path``; the model stays as it is. An interrupted run goes on
    from its last checkpoint."""
    examples, latents, weighed = made(), [], []
    for start in range(0, len(examples), 32):
        frames = render([scene for scene, _ in examples[start : start + 32]], model.default_size[0])
        with torch.no_grad():
            latents += list(model.encode_image(frames.image).float())
        on_toys = F.adaptive_avg_pool2d((frames.mask >= 0).float()[:, None], latents[0].shape[-2:])[:, 0]
        weighed += list(1 + (TOY_WEIGHT - 1) * on_toys)
    denoising, encode = Denoising(model, BATCH, SEED, "cubic"), frozen_conditions(model)
    weights = copies(model, {model.family.denoiser_name: ".*"})
    steps = context.count(each * len(examples) // BATCH, 2)

    def loss(draw: Draw) -> Any:
        rows, where = draw.indices(len(examples), BATCH).tolist(), places(draw, BATCH)
        bare = torch.rand(len(rows), generator=stream("claims.empty", SEED, draw.step)) < EMPTY
        texts = ["" if empty else examples[i][1] for i, empty in zip(rows, bare.tolist(), strict=True)]
        shown, masks = [latents[i] for i in rows], [weighed[i] for i in rows]
        return denoising.errors(shown, encode(texts), draw.step, where, masks=masks).mean()

    def decayed(step: int) -> float:
        return min((step + 1) / 50, 1.0, max(0.02, (steps - step) / (0.3 * steps)))

    learning = nn.ParameterList(list(weights.values()))
    optimizer = torch.optim.AdamW(learning, lr=RATE)
    player = Player(loss, optimizer, learning, name="child", schedule=decayed, clip=1.0, ema=0.995)
    home = context.home(__file__, (model.name,))
    folder = None if home is None else home / f"learning {what}"
    with frozen(model), substituted_weights(model, weights):
        done = fit(player, steps, seed=SEED, folder=folder, checkpoint_every=100, name=f"a child of {model.name}")
    if not done.finished:
        raise KeyboardInterrupt
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)  # the caller keeps the weights
    return dict(weights)
