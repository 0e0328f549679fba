"""Models of the zoo that went on learning for a claim: looks without steps between the names, new words for old things.

The toybox of the zoo's training has eight colours and two sizes, so a hue between two names is as strange to its models
as a texture that was never rendered. What a few vectors can say is claimed of models that have seen every hue; what is
said of words with two senses, and of what a word is made of, of models that have read such words. All weights of the
denoiser learn, by the loss they were trained with; captions name nothing more than before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
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

SEED, BATCH, RATE, EMPTY = 8300, 16, 2e-4, 0.1
COLORLESS = 0.2  # share of toys whose colour is not told, as when the generators were trained


def world(context: Context, name: str) -> Any:
    """A generator of the zoo that has seen every hue and height, once per run."""
    return taught(context, name, "every hue", lambda: looks(context.count(2000, 24)))


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


def taught(context: Context, name: str, what: str, examples: Callable[[], Sequence[tuple[Scene, str]]]) -> Any:
    """The model after it has learnt ``what``, once per run: these scenes and captions, about five looks at each."""

    def made() -> Any:
        model = load_model(str(context.folder(name)))
        model.name = name  # what is kept of it is found again wherever its weights lie
        context.report(f"  {name} learns {what}")
        weights = context.kept(
            (f"{name} that has learnt {what}",), lambda: learnt(context, model, examples()), __file__, (name,)
        )
        with torch.no_grad():
            for path, value in weights.items():
                component, _, parameter = path.partition(".")
                model.modules[component].get_parameter(parameter).copy_(value)
        return model

    return context.once(f"{name} with {what}", made)


def learnt(context: Context, model: Any, examples: Sequence[tuple[Scene, str]]) -> dict[str, torch.Tensor]:
    """The denoiser's weights afterwards, by ``component.path``; the model stays as it is."""
    latents = []
    for start in range(0, len(examples), 32):
        pictures = render([scene for scene, _ in examples[start : start + 32]], model.default_size[0]).image
        with torch.no_grad():
            latents += list(model.encode_image(pictures).float())
    denoising, encode = Denoising(model, BATCH, SEED), frozen_conditions(model)
    weights = copies(model, {model.family.denoiser_name: ".*"})

    def loss(draw: Draw) -> Any:
        rows, where = draw.indices(len(examples), BATCH).tolist(), places(draw, BATCH)
        bare = torch.rand(len(rows), generator=stream("claims.empty", SEED, draw.step)) < EMPTY
        texts = ["" if empty else examples[i][1] for i, empty in zip(rows, bare.tolist(), strict=True)]
        return denoising.errors([latents[i] for i in rows], encode(texts), draw.step, where).mean()

    learning = nn.ParameterList(list(weights.values()))
    player = Player(loss, torch.optim.AdamW(learning, lr=RATE), learning, name="child", clip=1.0, ema=0.99)
    with frozen(model), substituted_weights(model, weights):
        fit(player, context.count(5 * len(examples) // BATCH, 2), seed=SEED, name=f"a child of {model.name}")
    return dict(weights)
