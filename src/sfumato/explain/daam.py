"""DAAM: for each word of a prompt, where in the picture, or in each frame of a clip, it acted while that was drawn.

The queries of the picture attend to the text; column k of the softmax, laid out on the grid, is where token k acted.
Maps are averaged over heads and denoising steps, interpolated to one grid, averaged over layers, and a word's map is
the mean over its sub-tokens.

    >>> daam = DAAM(words=["red cube"])
    >>> result = generate(model, "a red cube and a ball", interventions=daam)
    >>> daam.maps[0].overlay(result.images[0], "red cube")

or, for a picture that exists already, ``explain_image(model, picture, "a red cube and a ball").map("red cube")``.

Beyond the original: joint attention (SD3, Flux), where text columns share the softmax with image columns; batches of
different prompts; any picture size; clips; repeated words kept apart; a scale that does not depend on the number of
steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image

from sfumato import cards
from sfumato.attention.accumulate import MapStore
from sfumato.attention.call import Call
from sfumato.attention.sites import Site, matches_place
from sfumato.attention.tap import Tap
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, NoMatch, NotSupported
from sfumato.explain.heatmaps import HeatMaps
from sfumato.explain.real_images import observe_images
from sfumato.models import Model
from sfumato.models.families import families_with
from sfumato.sampling import Intervention, Run
from sfumato.sampling.intervention import Coverage
from sfumato.text.words import Reading, find_phrases
from sfumato.windows import Window

__all__ = ["DAAM", "explain_image", "explain_images"]

#: The original skips maps whose side is an eighth of the latents': 8x8 in Stable Diffusion at 512 pixels.
COARSEST = 4


@register
class DAAM(Intervention):
    """Records word maps during generation. Afterwards ``maps`` holds one :class:`HeatMaps` per sample."""

    CARD = Card(
        key="daam",
        title="What the DAAM: Interpreting Stable Diffusion Using Cross Attention",
        authors="Tang, Liu, Pandey, Jiang, Yang, Kumar, Stenetorp, Lin, Ture",
        year=2022,
        arxiv="2210.04885",
        verb="explain",
        needs=("text_attention",),
        defaults_from="the paper (tau 0.4); the middle block is read too, and the scale is per step instead of summed",
        cost="none: read beside the prediction; an existing picture costs one forward per step",
        not_reproduced="the human opinion scores, and replaying the attention of one run in another",
        default_for=("explain",),
        summary="heat maps of where each word of the prompt acted",
    )

    class Params(cards.Params):
        words: list[str] = Field(default=[], description="words or phrases to map; none: every word of the prompt")
        layers: list[str] = Field(
            default=[], description="blocks or module paths to read, such as up or joint.3; none: all but the coarsest"
        )
        heads: list[int] = Field(default=[], description="numbers of the heads to read; none: all")
        window: Window = Field(
            default=(0.0, 1.0),
            description="share of the denoising to read, from start to end",
            json_schema_extra={"unit": "progress"},
        )
        coarsest: int = Field(
            default=COARSEST,
            ge=1,
            description="leave out maps whose sides are more than so many times smaller than the finest; "
            "no limit where layers are named",
        )
        over: Literal["all", "text"] = Field(
            default="all",
            description="joint attention only: each pixel's attention as a share of all it attends to, or of the text",
        )
        negative: bool = Field(default=False, description="map the negative prompt instead of the prompt")
        padding: bool = Field(default=False, description="record the padding tokens too")
        per_head: bool = Field(default=False, description="keep heads apart, to choose among them afterwards")
        per_step: bool = Field(default=False, description="keep steps apart; memory then grows with them")
        reference: bool = Field(
            default=False,
            description="the original's conventions: sums over steps, no middle block, heads clamped alone",
        )

    role = "observer"

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        self.window = self.params.window
        if any(head < 0 for head in self.params.heads):
            raise BadInput(f"heads of daam are {self.params.heads}: they count from 0.")
        self.maps: list[HeatMaps] = []
        self.activity = Coverage()

    # -- what the loop calls -------------------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Chooses sites and columns. Raises NoMatch for words that no prompt has and layers that the model has not."""
        if run.samples.start == 0:
            self.maps = []
        self._branch, prompts = self._read_branch(run)
        words = run.words
        self._readings = [words.read(prompt) for prompt in prompts]
        wanted = find_phrases(self._readings, self.params.words)
        shown = wanted if self.params.words else [reading.all() for reading in self._readings]
        self._labels = [list(dict.fromkeys(span.label for span in spans)) for spans in shown]
        self.activity.tokens.update({label: 1 for labels in self._labels for label in labels})
        self._positions = sorted({p for reading in self._readings for p in self._recorded(reading)})
        self._sites = {site.path for site in self._chosen(run.sites, run.model.name)}
        self._store = MapStore(heads=self.params.per_head or self.params.reference, steps=self.params.per_step)

    def taps(self) -> Sequence[Tap]:
        return [Tap(lambda site: site.path in self._sites, observe=self._look, stop_after=True, name="daam")]

    def finish(self, run: Run) -> None:
        if not len(self._store):
            return
        for i, reading in enumerate(self._readings):
            facts = {
                "model": run.model.name,
                "seed": run.seeds[i],
                "steps": run.total,
                "timesteps": [float(t) for t in run.timesteps],
                "window": list(self.window),
                "over": self.params.over,
                "negative": self.params.negative,
            }
            self.maps.append(
                HeatMaps(
                    reading=reading,
                    layers=tuple(self._store.take(i)),
                    positions=tuple(self._positions),
                    size=(run.size[1], run.size[0]),
                    words=tuple(self._labels[i]),
                    reference=self.params.reference,
                    facts=facts,
                )
            )
        del self._store

    def explain_image(self, model: Model, image: Any, prompt: str, **options: Any) -> Any:
        """:func:`explain_image` with these parameters."""
        return explain_image(model, image, prompt, **{**self.params.model_dump(), **options})

    def pictures(self, result: Any, index: int) -> dict[str, Image.Image]:
        """A sheet of overlays for one picture of a result, by file suffix."""
        if not self.maps[index].words:
            return {}
        return {"heat": self.maps[index].grid(result.clips[index] if result.clips else result.images[index])}

    # -- inside attention ----------------------------------------------------------------------------------------------

    def _look(self, call: Call) -> None:
        if self._branch not in call.rows:
            return
        assert call.site.text is not None
        first = call.site.text[0]
        joint = call.site.kind == "joint"  # elsewhere the text is all there is
        within = call.site.text if joint and self.params.over == "text" else None
        with torch.no_grad():
            part = call.branch(self._branch)
            maps = call.site.unfold(part.word_probs([first + p for p in self._positions], within=within))
            if self.params.heads:
                maps = maps[:, self.params.heads]
            self._store.add(call.site, maps, call.step.i)
        self.mark(call.step, sites=[call.site.path])

    # -- choices -------------------------------------------------------------------------------------------------------

    def _read_branch(self, run: Run) -> tuple[str, list[str]]:
        if not self.params.negative:
            return "cond", run.prompts
        if not run.negatives or not run.guidance.on:
            raise BadInput("negative of daam is set, but there is no negative prompt; give one, and guidance above 1.")
        return "uncond", run.negatives

    def _recorded(self, reading: Reading) -> set[int]:
        """All real tokens, so that any word can be looked up later, with start and end; padding only if named."""
        special = reading.special()
        if not self.params.padding and "<pad>" not in self.params.words:
            special.pop("<pad>", None)
        tokens = {p for positions in reading.tokens().values() for p in positions}
        return tokens | {p for span in special.values() for p in span.positions}

    def _chosen(self, sites: Sequence[Site], model: str) -> list[Site]:
        candidates = [s for s in sites if s.kind in ("cross", "joint") and s.text is not None and s.grid is not None]
        if not candidates:
            raise NotSupported(
                f"daam reads attention from picture to text, and {model} has none; {families_with('text_attention')}."
            )
        p = self.params
        if p.reference:
            if any(site.kind == "joint" for site in candidates):
                raise NotSupported(f"reference=True is the original's U-Net convention; {model} has joint attention.")
            candidates = [site for site in candidates if site.block != "mid"]
        chosen = [site for site in candidates if not p.layers or matches_place(site, p.layers)]
        if not chosen:
            places = ", ".join(dict.fromkeys(site.block for site in candidates))
            raise NoMatch(f"layers={p.layers} of daam match none of {model}'s: {places}.")
        if not p.layers:
            finest = max(site.cells for site in chosen)
            chosen = [site for site in chosen if site.cells * p.coarsest**2 >= finest]
        few = min(chosen, key=lambda site: site.heads)
        if p.heads and max(p.heads) >= few.heads:
            raise BadInput(f"heads={p.heads} of daam: {few.path} has {few.heads} heads, numbered from 0.")
        return chosen


def explain_images(
    model: Model,
    images: Any,
    prompts: str | Sequence[str],
    words: Sequence[str] = (),
    *,
    steps: int = 20,
    seed: int | Sequence[int] = 0,
    scheduler: Any = None,
    size: tuple[int, int] | None = None,
    **params: Any,
) -> list[HeatMaps]:
    """Word maps of pictures that exist already: each is encoded, noised to the level of every step of a schedule, with
    fresh noise each time, and shown once per step to the denoiser together with its prompt.

    Args:
        images: a PIL picture, several, or a tensor (b 3 H W) in [-1, 1]; for models of clips frames (f h w 3) uint8,
            several clips, or a tensor (b 3 f H W).
        prompts: what the pictures show: one text for all, or one each.
        words: words or phrases to map; none: every word.
        steps: how many noise levels, spread as ``scheduler`` spreads them (by default DDIM or flow Euler).
        seed: picture i draws its noise from ``seed`` + i, or from the i-th of several seeds.
        size: (width, height) to resize pictures to; by default their own.
        params: further parameters of :class:`DAAM`.

    Costs one forward per step and picture, which ends after the last layer that is read. Raises BadInput, NoMatch.
    """
    daam = DAAM(words=[words] if isinstance(words, str) else list(words), **params)
    observe_images(daam, model, images, prompts, steps=steps, seed=seed, scheduler=scheduler, size=size)
    return daam.maps


def explain_image(
    model: Model, image: Any, prompt: str, words: Sequence[str] = (), *, seed: int = 0, **options: Any
) -> HeatMaps:
    """Word maps of one picture that exists already; arguments and errors as for :func:`explain_images`."""
    found = explain_images(model, image, prompt, words, seed=seed, **options)
    if len(found) != 1:
        raise BadInput(f"explain_image takes one picture, not {len(found)}; explain_images takes several.")
    return found[0]
