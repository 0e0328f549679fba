"""Vital signs of a text-to-image model: does every level of the denoiser matter, does every word act where it is?

A denoiser can draw well and still be dead inside: a middle block that changes nothing, attention that looks at the
start token alone, nouns that carry what their adjectives say. Whatever is then measured on its features, its attention
or its words says nothing about models that are not so. Three signs, with a bar each (:func:`failed_checks`):

- ``zeroed``: by how much the predicted clean latents change when the output of a block is set to zero,
- ``words``: how much attention the best-seen word gets at each site that reads the text,
- ``swapped``: how often a toy takes the colour of another prompt when the embedding of one of its tokens is exchanged.

All of it is a pure function of the model (and of the toy-judge that reads colours): toybox scenes, captions and noise
have fixed seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.attention.seam import AttentionSeam, Call, Tap
from sfumato.hspace import tapped
from sfumato.models import Condition, Model
from sfumato.sampling import Intervention, Path, generate
from sfumato.sampling.run import Run
from sfumato.text.words import Words
from sfumato.toybox import COLORS, GROUNDS, SHAPES, Toy, caption, is_held_out, render, sample_scene
from sfumato.toybox.oracle.presence import RequestedToy, find
from sfumato.toybox.oracle.toy_judge import ToyJudge

LEVELS = (900, 500)  # timesteps, out of 1000, at which blocks are silenced and attention is looked at
LEAST_CHANGE = {900: 0.05, 500: 0.005}
LEAST_ATTENTION = 1e-3
LEAST_SWAPPED = 0.6
PLACES = ("color", "noun", "end")  # the colour's token, the shape's token, the end and all padding

Signs = dict[str, Any]


def vital_signs(
    model: Model, judge: ToyJudge | None = None, scenes: int = 32, pictures: int = 24, steps: int | None = None
) -> Signs:
    """All signs of ``model`` as plain JSON values.

    Args:
        model: a text-to-image model of the toybox, U-Net or transformer.
        judge: reads the colours; without one ``swapped`` is left out.
        scenes: how many captioned pictures blocks and attention are looked at with.
        pictures: how many pictures are drawn for each kind of exchange.
        steps: denoising steps of these pictures; None is the model's own choice.

    Returns:
        ``zeroed``: block name -> timestep -> relative change (:func:`zeroed_blocks`); ``words``: site -> share
        (:func:`word_attention`); ``swapped``: place -> share of pictures (:func:`swapped_colors`).
    """
    x0, prompts = toy_latents(model, scenes)
    signs: Signs = {"zeroed": zeroed_blocks(model, x0, prompts), "words": word_attention(model, x0, prompts)}
    if judge is not None:
        signs["swapped"] = swapped_colors(model, judge, pictures, steps)
    return signs


def failed_checks(signs: Mapping[str, Any]) -> list[str]:
    """What is wrong with a model, by its signs; empty when all hold.

    Bars: every block changes the clean latents by ``LEAST_CHANGE`` of their energy; at every site some word gets
    ``LEAST_ATTENTION``; a colour exchanged at its own token shows in ``LEAST_SWAPPED`` of the pictures and in more than
    when the noun's token is exchanged.
    """
    found = []
    for block, levels in signs["zeroed"].items():
        for t, change in levels.items():
            least = LEAST_CHANGE[int(t)]
            if not change >= least:
                found.append(f"{block} zeroed at t = {t} changes x0 by {change:.2g}, less than {least:g}")
    for site, share in signs["words"].items():
        if not share >= LEAST_ATTENTION:
            found.append(f"no word gets more than {share:.2g} of the attention at {site}")
    if (swapped := signs.get("swapped")) is not None:
        if not swapped["color"] >= LEAST_SWAPPED:
            found.append(f"a colour exchanged at its own token shows in {swapped['color']:.0%} of the pictures")
        if not swapped["color"] > swapped["noun"]:
            found.append(f"the noun's token carries the colour: {swapped['noun']:.0%} against {swapped['color']:.0%}")
    return found


# pictures to look at --------------------------------------------------------------------------------------------------
def toy_latents(model: Model, n: int) -> tuple[Tensor, list[str]]:
    """Latents (n c h w) and captions of ``n`` scenes that no training set holds."""
    scenes = [sample_scene(np.random.default_rng((5, i))) for i in range(n)]
    prompts = [caption(scene, np.random.default_rng((6, i)), "random").text for i, scene in enumerate(scenes)]
    pictures = render(scenes, model.default_size).image
    with torch.no_grad():
        return torch.cat([model.encode_image(part) for part in pictures.split(16)]), prompts


def noises(x0: Tensor, t: int) -> Tensor:
    """Unit noise like ``x0`` (b c h w), one fixed seed per sample and timestep, the same on every device."""
    drawn = [torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(1000 * i + t)) for i in range(len(x0))]
    return torch.stack(drawn).to(x0)


def _path(model: Model) -> Path:
    scheduler = model.make_scheduler("flow_euler" if model.flow else "ddim")  # neither scales the latents
    model.timesteps(scheduler, 10)
    return Path(scheduler)


# blocks ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def zeroed_blocks(model: Model, x0: Tensor, prompts: Sequence[str]) -> dict[str, dict[str, float]]:
    """By how much the predicted clean latents change when a block's output is zero.

    Args:
        x0: latents (b c h w) of pictures; prompts: their b captions.

    Returns:
        For every block, in the order of execution, and every timestep of ``LEVELS`` the energy of the change as a share
        of the energy of the prediction, both summed over all samples. The skip connections of a U-Net stay as they are.
    """
    path, condition = _path(model), model.encode_text(list(prompts), guidance=False)
    found: dict[str, dict[str, float]] = {layer.name: {} for layer in model.layers}
    for t in LEVELS:
        x = path.add_noise(x0, noises(x0, t), t)
        whole = path.to_x0(x, model.predict(x, t, condition), t).double()
        for layer in model.layers:
            with tapped(model, layer, torch.zeros_like):
                silent = path.to_x0(x, model.predict(x, t, condition), t).double()
            found[layer.name][str(t)] = float((silent - whole).square().sum() / whole.square().sum())
    return found


# attention ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def word_attention(model: Model, x0: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """How much attention words get at each site that reads the text.

    Returns:
        For every site with text among its keys the share of the attention, mean over the heads and the places of the
        picture, that goes to the word which gets most of it; mean over the prompts, the least over ``LEVELS``.
    """
    words, path = Words(model), _path(model)
    places = [sorted({p for word in words.all(prompt) for p in word.positions}) for prompt in prompts]
    sites = [site for site in model.sites() if site.text is not None]
    least: dict[str, float] = {}

    def look(call: Call) -> None:
        probs_of_words = call.probs(call.image)[..., call.text].mean((1, 2))  # (b t)
        best = torch.stack([row[list(at)].max() for row, at in zip(probs_of_words, places, strict=True)]).mean()
        least[call.site.path] = min(least.get(call.site.path, 1.0), float(best))

    condition = model.encode_text(list(prompts), guidance=False)
    with AttentionSeam(model.denoiser, sites, [Tap(observe=look, name="vital signs")]) as seam:
        for t in LEVELS:
            x = path.add_noise(x0, noises(x0, t), t)
            with seam.forward(step=t):
                model.predict(x, t, condition)
    return {site.path: least[site.path] for site in sites}


# words ----------------------------------------------------------------------------------------------------------------
class Exchange(Intervention):
    """Puts the embeddings of other prompts in at some positions of the text axis; pooled text stays as it is."""

    role = "conditioner"

    def __init__(self, others: Sequence[str], positions: Sequence[Sequence[int]]):
        self.others, self.positions = others, positions

    def on_text(self, run: Run, condition: Condition) -> Condition:
        """The condition with the tokens exchanged, one list of positions per sample."""
        out = condition.clone()
        others = run.model.encode_text([self.others[i] for i in run.samples], guidance=False).cond["embeds"]
        for row, i in enumerate(run.samples):
            at = list(self.positions[i])
            out.cond["embeds"][row, at] = others[row, at]
            self.mark(tokens=map(str, at))
        return out


def color_prompts(n: int) -> list[tuple[str, str, str, str]]:
    """``n`` times a prompt of one toy, the same with another colour, and the two colours, all combinations known to the
    training sets; shapes, colours and grounds take turns."""
    found: list[tuple[str, str, str, str]] = []
    i = 0
    while len(found) < n:
        shape, ground = SHAPES[i % len(SHAPES)], GROUNDS[i % len(GROUNDS)]
        pair = COLORS[i % len(COLORS)], COLORS[(i + 1 + i // len(COLORS) % (len(COLORS) - 1)) % len(COLORS)]
        i += 1
        if any(is_held_out(Toy(shape, color)) for color in pair):
            continue
        texts = [f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape} on the {ground}" for color in pair]
        found.append((texts[0], texts[1], *pair))
    return found


@torch.no_grad()
def swapped_colors(model: Model, judge: ToyJudge, n: int = 24, steps: int | None = None) -> dict[str, float]:
    """How often a toy takes another prompt's colour when that prompt's embedding is put in at one place alone.

    Returns:
        ``plain``: share of the ``n`` pictures in which the toy has the shape and colour asked for; then, for every
        place of ``PLACES``, the share in which a toy of that shape has the *other* colour. Guidance, sampler and noise
        are the same for all.
    """
    cases, words = color_prompts(n), Words(model)
    positions: dict[str, list[tuple[int, ...]]] = {place: [] for place in PLACES}
    for prompt, _, color, _ in cases:
        special = words.special(prompt)
        positions["color"].append(words.one(prompt, color).positions)
        positions["noun"].append(words.one(prompt, prompt.split()[2]).positions)
        ends = [special[name].positions for name in ("<end>", "<pad>") if name in special]
        positions["end"].append(tuple(p for each in ends for p in each))

    def share(place: str | None) -> float:
        acting = [] if place is None else [Exchange([other for _, other, _, _ in cases], positions[place])]
        drawn = generate(model, [case[0] for case in cases], steps=steps, seed=0, batch_size=12, interventions=acting)
        assert drawn.pixels is not None  # they are decoded
        readings = judge.read(drawn.pixels.float().clamp(-1, 1).cpu())
        wanted = [RequestedToy(prompt.split()[2], old if place is None else new) for prompt, _, old, new in cases]
        return float(np.mean([find(r, w) is not None for r, w in zip(readings, wanted, strict=True)]))

    return {"plain": share(None), **{place: share(place) for place in PLACES}}
