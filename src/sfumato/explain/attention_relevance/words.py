"""Words of a drawing: relevance of the tokens of a prompt to the places of a picture, in a model that draws.

Ours: the paper explains no diffusion models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import NotSupported
from sfumato.explain.relevance_maps import Answer, RelevanceMaps
from sfumato.models import Model
from sfumato.relevance.attention import attention_relevance
from sfumato.sampling.real_images import noised_levels, open_image_run
from sfumato.sampling.request import checked_size
from sfumato.text.words import find_phrases

__all__ = ["NOISE_LEVELS", "word_maps"]

NOISE_LEVELS = 5


def word_maps(
    model: Model,
    images: Tensor,
    prompts: Sequence[str],
    words: Sequence[str] = (),
    *,
    steps: int = NOISE_LEVELS,
    seed: int = 0,
    scheduler: Any = None,
    start_layer: int | None = None,
    target: Callable[[Tensor, Tensor], Tensor] | None = None,
    **rules: Any,
) -> list[RelevanceMaps]:
    """For each word, which places of the picture it helped to draw: relevance of text tokens to picture tokens.

    A picture (b 3 h w in [-1, 1]) is noised to ``steps`` levels of the schedule. The scalar explained at each is the
    negative squared error of the predicted noise (``target`` of predicted and true noise, both (b c h w), gives
    another), so a word is relevant where it helped the model to recognise what is there. Ours: the paper explains no
    diffusion models. Maps are means over the levels. Costs one forward and one backward pass per level.
    """
    checked_size(model, (images.shape[-1], images.shape[-2]))
    score = target or (lambda eps, true: -(eps - true).square().sum((1, 2, 3)))
    total: Tensor | None = None
    scores = torch.zeros(len(prompts))
    given = {"steps": steps, "seed": seed, "scheduler": scheduler}
    with open_image_run(model, images, prompts, **given) as (run, clean):
        _refuse_several_calls(model)
        readings = [run.words.read(prompt) for prompt in run.prompts]
        spans = find_phrases(readings, list(words)) if words else [reading.all() for reading in readings]
        for i, x, noise in noised_levels(run, clean):
            t = run.timesteps[i]

            def predict(x: Tensor = x, t: Tensor = t) -> Tensor:
                assert run.condition is not None
                out = run.denoise(x, t, run.condition, ("cond",), (), None)["cond"]
                return run.path.to_eps(x.float(), out.float(), t)

            found = attention_relevance(
                model.denoiser, predict, lambda eps, noise=noise: score(eps, noise.float()), sites=run.sites,
                start_layer=start_layer or 0, **rules,
            )  # fmt: skip
            across = found.block("image", "text").float()
            total = across if total is None else total + across
            scores += found.scores.cpu() / run.total
    assert total is not None
    h, w = found.layout.grids["image"]
    out = []
    for i, prompt in enumerate(prompts):
        answers = []
        for span in spans[i]:
            if span.positions:
                cells = total[i][:, list(span.positions)].mean(-1).view(h, w) / run.total
                answers.append(Answer(span.label, float(scores[i]), cells.cpu()))
        facts = {"model": model.name, "query": prompt, "seed": seed + i, "steps": steps}
        out.append(RelevanceMaps(tuple(answers), tuple(images.shape[-2:]), found.method, facts))
    return out


def _refuse_several_calls(model: Model) -> None:
    if len(model.calls(("cond",))) != 1:
        raise NotSupported(f"{model.name} predicts in several passes, whose attention does not form one relevance.")
