"""Attend-and-Excite: nudges the latents while they are denoised until every named thing gets attention.

Generators forget things: "a cat and a frog" gives a cat. A thing that appears has, early on, some place whose attention
goes to its word; so in the first half of the denoising the latents are moved, before each step, down the gradient of
how far the most neglected word is from having such a place (Chefer et al. 2023, section 3, algorithm 1).

    >>> steer = AttendExcite(words=["cat", "frog"])
    >>> result = generate(model, "a cat and a frog", interventions=steer)

Beyond the original: words and phrases instead of token numbers (the nouns of the prompt when none are given), batches
with different subjects, words of several tokens, any picture size and schedule, joint attention (SD3, Flux), clips (a
word's loss is the mean over the frames, so that it is drawn in all of them), and a gradient that costs less: the pass
ends after the last layer that is read and weights take no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from sfumato import cards
from sfumato.attention.tap import Tap
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, Conflict
from sfumato.sampling import Intervention, Run, Step
from sfumato.sampling.intervention import Coverage
from sfumato.sampling.state import per_sample, sample_axes
from sfumato.steer.attend_excite.choices import sites_of, subjects_of
from sfumato.steer.attend_excite.record import WordAttention, sheet
from sfumato.steer.attend_excite.word_maps import WordMaps, smoothing_kernel
from sfumato.windows import Window

__all__ = ["AttendExcite", "WordAttention", "smoothing_kernel"]


@register
class AttendExcite(Intervention):
    """Moves latents until every word is attended to. Afterwards ``attended`` holds one :class:`WordAttention` per
    sample."""

    CARD = Card(
        key="attend_excite",
        title="Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models",
        authors="Chefer, Alaluf, Vinker, Wolf, Cohen-Or",
        year=2023,
        arxiv="2301.13826",
        verb="steer",
        needs=("text_attention", "differentiable_state"),
        defaults_from="the authors' code (step 20, thresholds, first half, 3x3 smoothing); algorithm 1 for refinement",
        cost="at most 1 forward and backward per altered step and per refinement, up to the last layer that is read",
        not_reproduced="the user study; joint attention and T5 are ours: the paper has Stable Diffusion 1 and 2 only",
        summary="nudges the picture while it is made until every named thing gets attention",
        example="attend_excite:words=[cube|ball],tries=3",
    )

    class Params(cards.Params):
        words: list[str] = Field(
            default=[], description="words or phrases that must appear; none: the nouns of the prompt"
        )
        strength: float = Field(
            default=20.0,
            ge=0,
            description="step size, tuned for latents of Stable Diffusion; see step",
            json_schema_extra={"unit": "latent per unit of loss gradient, or share of the latents"},
        )
        step: Literal["gradient", "relative"] = Field(
            default="gradient",
            description="relative: each step moves the latents by strength times their own spread, however long the "
            "gradient is; then strength is about 0.02 to 0.2",
        )
        scale_range: tuple[float, float] = Field(
            default=(1.0, 0.5), description="the step size is multiplied by the root of this, from first to last step"
        )
        window: Window = Field(
            default=(0.0, 0.5),
            description="share of the denoising in which latents are moved",
            json_schema_extra={"unit": "progress"},
        )
        thresholds: list[tuple[float, float]] = Field(
            default=[(0.0, 0.05), (0.2, 0.5), (0.4, 0.8)],
            description="(progress, attention): there, if inside the window, go on until every word has that much "
            "attention; an empty list: never",
        )
        tries: int = Field(default=20, ge=0, le=1000, description="how often to go on at most at one threshold")
        enough: float = Field(
            default=1.0, gt=0, le=1, description="no step where every word has this much attention already"
        )
        resolution: int | None = Field(
            default=None,
            ge=2,
            description="shorter side of the attention maps to read (16 in the paper); none: a quarter of the latents, "
            "if that is at least 8",
            json_schema_extra={"unit": "cell"},
        )
        layers: list[str] = Field(
            default=[], description="blocks to read, such as up or joint.3; none: all of that size"
        )
        against: Literal["auto", "all", "words"] = Field(
            default="auto",
            description="which tokens share a place's attention, the start token never: all, end and padding included "
            "(the original with Stable Diffusion 1), or words alone (with 2); auto: all for CLIP cross-attention",
        )
        sharpness: float | None = Field(
            default=None,
            gt=0,
            description="inverse temperature with which these tokens share it (100 in the original's code); none: "
            "that, and less in models whose start token does not keep most of the attention, where it would be all or "
            "nothing",
        )
        smooth: bool = Field(default=True, description="smooth the maps by a 3x3 Gaussian")
        sigma: float = Field(default=0.5, gt=0, description="its width", json_schema_extra={"unit": "cell"})
        true_gaussian: bool = Field(
            default=False, description="take sigma at its word; the original's kernel is wider by the root of 2"
        )
        reference: bool = Field(
            default=False, description="refine as the original's code does: once more after a threshold is met"
        )

    role = "steerer"

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        self.window = self.params.window
        for at, level in self.params.thresholds:
            if not (0 <= at < 1 and 0 <= level <= 1):
                raise BadInput(
                    f"thresholds of attend_excite have ({at:g}, {level:g}); progress is from 0 to below 1, "
                    f"attention from 0 to 1."
                )
        if min(self.params.scale_range) < 0:
            raise BadInput(f"scale_range of attend_excite is {self.params.scale_range}; both must be 0 or above.")
        self.attended: list[WordAttention] = []
        self.activity = Coverage()

    # -- what the loop calls -------------------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Chooses words and sites. Raises NoMatch for words that no prompt has, and prompts that name nothing."""
        p = self.params
        if run.samples.start == 0:
            self.attended = []
        words = run.words
        readings = [words.read(prompt) for prompt in run.prompts]
        subjects = subjects_of(readings, p.words)
        self.activity.tokens.update({span.label: 1 for spans in subjects for span in spans})
        self._records = [WordAttention(tuple(span.label for span in spans)) for spans in subjects]
        self.attended += self._records
        sites = sites_of(run.sites, p.layers, p.resolution, run.model.name)
        kernel = smoothing_kernel(p.sigma, p.true_gaussian) if p.smooth else None
        self._maps = WordMaps(readings, subjects, sites, p.against, kernel, run.model.device, p.sharpness)
        self._levels: dict[int, float] = {}
        for at, level in p.thresholds:
            i = round(at * run.total)
            self._levels[i] = max(level, self._levels.get(i, 0.0))
        paths = {site.path for site in sites}
        observe = self._maps.observe
        self._tap = Tap(lambda site: site.path in paths, observe=observe, stop_after=True, name="attend_excite")

    def before_predict(self, step: Step) -> None:
        """Algorithm 1 up to the prediction: look, move down the gradient, again while a threshold is not met."""
        p = self.params
        if p.strength == 0:
            return
        level = self._levels.get(step.i)
        together = bool(step.active_taps(editors=True))  # their edits are made for whole batches
        rows, met = list(range(len(step.run))), set[int]()
        for attempt in range(p.tries + 1):
            losses = self._move(step, rows, together)
            if level is None:
                return
            short = {row for row, loss in zip(rows, losses, strict=True) if loss > 1 - level}
            if p.reference and attempt:  # one look more for whoever has only now met the threshold
                once_more = [row for row in rows if row not in met]
                met |= {row for row in rows if row not in short}
                rows = once_more
            else:
                rows = [row for row in rows if row in short]
            if not rows:
                return

    def finish(self, run: Run) -> None:
        del self._tap, self._maps, self._records

    def pictures(self, result: Any, index: int) -> dict[str, Image.Image]:
        """One picture, and the attention its words got when first and when last looked at, by file suffix."""
        one = self.attended[index]
        if one.before is None or one.after is None:
            return {}
        return {"attended": sheet(list(result.clips[index]) if result.clips else [result.images[index]], one)}

    # -- the loss ------------------------------------------------------------------------------------------------------

    def _move(self, step: Step, rows: Sequence[int], together: bool) -> list[float]:
        """One gradient step of the latents of some samples; returns their losses before it."""
        taken = list(range(len(step.run))) if together else list(rows)
        self._maps.sites.clear()
        found: list[Tensor] = []

        def loss(_: Any) -> Tensor:
            maps = self._maps.take(taken)
            if not maps.requires_grad:
                held = ", ".join(dict.fromkeys(tap.name for tap in step.active_taps(editors=True) if tap.name))
                raise Conflict(
                    f"attend_excite moves latents by their attention, but {held or 'another system'} replaces that "
                    f"attention at progress {step.progress:g}; leave one of them out or give them different windows."
                )
            peaks = maps.flatten(-2).amax(-1)  # (b s [f])
            named = self._maps.weights[taken].any(-1)
            short = (1 - peaks).clamp_min(0)
            each = torch.where(named, short if short.dim() == 2 else short.mean(2), 0).amax(1)
            found.extend((maps.detach(), each.detach()))
            return each

        gradient = step.grad(loss, taps=[self._tap], samples=None if together or len(rows) == len(step.run) else rows)
        maps, each = found
        self._record(step, taken, rows, maps, each)
        meant = torch.tensor([row in rows for row in taken], device=each.device)
        moving = meant & (each > 1 - self.params.enough)
        x = step.x.clone()
        x[taken] = x[taken] + (per_sample(moving, x) * self._shift(step, x[taken], gradient)).to(x.dtype)
        step.x = x
        self.mark(step, sites=self._maps.sites)
        self._maps.sites.clear()
        losses = dict(zip(taken, each.tolist(), strict=True))
        return [losses[row] for row in rows]

    def _shift(self, step: Step, x: Tensor, gradient: Tensor) -> Tensor:
        """What to add to latents (b c [f] h w), in the scheduler's scaling."""
        p = self.params
        high, low = p.scale_range
        size = p.strength * (high + (low - high) * step.i / max(step.total - 1, 1)) ** 0.5
        x, gradient = x.float(), gradient.float()
        if p.step == "relative":
            axes = sample_axes(x)
            spread = x.square().mean(axes, keepdim=True).sqrt()
            length = gradient.square().mean(axes, keepdim=True).sqrt()
            return -size * spread * gradient / length.clamp_min(torch.finfo(torch.float32).tiny)
        # in the scaling of Karras et al. latents are s times as long and gradients s times as short
        return -size * step.path.scale(step.t) ** 2 * gradient

    def _record(self, step: Step, taken: Sequence[int], rows: Sequence[int], maps: Tensor, losses: Tensor) -> None:
        maps, numbers = maps.float().cpu(), losses.tolist()
        for i, row in enumerate(taken):
            if row in rows:
                one = self._records[row]
                one.after = maps[i, : len(one.words)]
                one.before = one.after if one.before is None else one.before
                one.losses.setdefault(step.i, []).append(numbers[i])
