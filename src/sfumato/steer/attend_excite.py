"""Attend-and-Excite: nudges the latents while they are denoised until every named thing gets attention.

Generators forget things: "a cat and a frog" gives a cat. A thing that appears has, early on, some place whose attention
goes to its word; so in the first half of the denoising the latents are moved, before each step, down the gradient of
how far the most neglected word is from having such a place (Chefer et al. 2023, section 3, algorithm 1).

    >>> nurse = AttendExcite(words=["cat", "frog"])
    >>> result = generate(model, "a cat and a frog", interventions=nurse)

Beyond the original: words and phrases instead of token numbers (the nouns of the prompt when none are given), batches
with different subjects, words of several tokens, any picture size and schedule, joint attention (SD3, Flux), clips (a
word's loss is the mean over the frames, so that it is drawn in all of them), and a gradient that costs less: the pass
ends after the last layer that is read and weights take no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato import cards, sheets
from sfumato.attention.accumulate import upscale
from sfumato.attention.call import Call
from sfumato.attention.sites import Site, matches_place
from sfumato.attention.tap import Tap
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported
from sfumato.sampling import Intervention, Run, Step
from sfumato.sampling.intervention import Coverage
from sfumato.sampling.state import per_sample, sample_axes
from sfumato.text.phrases import noun_phrases
from sfumato.text.words import Reading, WordSpan, asked_for
from sfumato.windows import Window

__all__ = ["AttendExcite", "Attended", "smoothing_kernel"]

#: Inverse temperature of the second softmax over tokens (the original's code; not in the paper).
SHARPNESS = 100.0
#: The original reads 16x16 maps of 64x64 latents; below 8x8 a map can no longer tell two things apart.
COARSER, FEWEST = 4, 8


@dataclass(eq=False)
class Attended:
    """What was asked for in one sample, and the attention it got.

    ``words`` (s) by label; ``before`` and ``after`` (s [f] h w): the share of each place's attention to the text that
    went to each word, when first and when last looked at; ``losses``: by step, one entry per look.
    """

    words: tuple[str, ...]
    before: Tensor | None = None
    after: Tensor | None = None
    losses: dict[int, list[float]] = field(default_factory=dict)


@register
class AttendExcite(Intervention):
    """Moves latents until every word is attended to. Afterwards ``attended`` holds one :class:`Attended` per sample."""

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
        self.attended: list[Attended] = []
        self.activity = Coverage()

    # -- what the loop calls -------------------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Chooses words and sites. Raises NoMatch for words that no prompt has, and prompts that name nothing."""
        if run.samples.start == 0:
            self.attended = []
        words = run.words
        readings = [words.read(prompt) for prompt in run.prompts]
        subjects = self._subjects(readings)
        self.activity.tokens.update({span.label: 1 for spans in subjects for span in spans})
        self._attended = [Attended(tuple(span.label for span in spans)) for spans in subjects]
        self.attended += self._attended
        sites = self._chosen(run.sites, run.model.name)
        whole = self._whole_axis(sites, readings[0])
        rivals = [_rivals(reading, whole) for reading in readings]
        self._columns = sorted(set().union(*rivals))
        index = {position: i for i, position in enumerate(self._columns)}
        self._rivals = torch.zeros(len(readings), len(index), dtype=torch.bool)  # (b c): who shares attention
        self._weights = torch.zeros(len(readings), max(map(len, subjects)), len(index))  # (b s c): words from tokens
        for row, (spans, others) in enumerate(zip(subjects, rivals, strict=True)):
            self._rivals[row, [index[position] for position in others]] = True
            for s, span in enumerate(spans):
                for tokens in set(span.tokens.values()) - {()}:  # encoders add up, the tokens of one average
                    self._weights[row, s, [index[position] for position in tokens]] += 1 / len(tokens)
        self._rivals, self._weights = self._rivals.to(run.model.device), self._weights.to(run.model.device)
        self._kernel = smoothing_kernel(self.params.sigma, self.params.true_gaussian).to(run.model.device)
        self._levels: dict[int, float] = {}
        for at, level in self.params.thresholds:
            i = round(at * run.total)
            self._levels[i] = max(level, self._levels.get(i, 0.0))
        self._shape = sites[0].shape  # ([f] h w)
        paths = {site.path for site in sites}
        self._tap = Tap(lambda site: site.path in paths, observe=self._look, stop_after=True, name="attend_excite")

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
        del self._tap, self._rivals, self._weights, self._kernel, self._attended

    def pictures(self, result: Any, index: int) -> dict[str, Image.Image]:
        """One picture, and the attention its words got when first and when last looked at, by file suffix."""
        one = self.attended[index]
        if one.before is None or one.after is None:
            return {}
        return {"attended": _sheet(list(result.clips[index]) if result.clips else [result.images[index]], one)}

    # -- the loss ------------------------------------------------------------------------------------------------------

    def _move(self, step: Step, rows: Sequence[int], together: bool) -> list[float]:
        """One gradient step of the latents of some samples; returns their losses before it."""
        looked = list(range(len(step.run))) if together else list(rows)
        self._seen: dict[str, Tensor] = {}
        found: list[Tensor] = []

        def loss(_: Any) -> Tensor:
            maps = self._word_maps(torch.cat(list(self._seen.values()), 1).mean(1), looked)
            if not maps.requires_grad:
                held = ", ".join(dict.fromkeys(tap.name for tap in step.active_taps(editors=True) if tap.name))
                raise Conflict(
                    f"attend_excite moves latents by their attention, but {held or 'another system'} replaces that "
                    f"attention at progress {step.progress:g}; leave one of them out or give them different windows."
                )
            peaks = maps.flatten(-2).amax(-1)  # (b s [f])
            named = self._weights[looked].any(-1)
            short = (1 - peaks).clamp_min(0)
            each = torch.where(named, short if short.dim() == 2 else short.mean(2), 0).amax(1)
            found.extend((maps.detach(), each.detach()))
            return each

        gradient = step.grad(loss, taps=[self._tap], samples=None if together or len(rows) == len(step.run) else rows)
        maps, each = found
        self._remember(step, looked, rows, maps, each)
        meant = torch.tensor([row in rows for row in looked], device=each.device)
        moving = meant & (each > 1 - self.params.enough)
        x = step.x.clone()
        x[looked] = x[looked] + (per_sample(moving, x) * self._shift(step, x[looked], gradient)).to(x.dtype)
        step.x = x
        self.mark(step, sites=self._seen)
        del self._seen
        losses = dict(zip(looked, each.tolist(), strict=True))
        return [losses[row] for row in rows]

    def _look(self, call: Call) -> None:
        """Keeps the attention of one site from pixels to text (b k n c)."""
        assert call.site.text is not None
        first = call.site.text[0]
        within = call.site.text if call.site.kind == "joint" else None  # there pixels share it with pixels
        columns = [first + position for position in self._columns]
        probs = call.branch("cond").word_probs(columns, within=within)
        self._seen[call.site.path] = call.site.unfold(probs)

    def _word_maps(self, attention: Tensor, rows: Sequence[int]) -> Tensor:
        """From attention to tokens (b n c) to maps of words (b s [f] h w): without the start token, shared out among
        the others by a sharp softmax, the tokens of a word averaged, smoothed (section 3; the softmax is the
        code's)."""
        rivals = self._rivals[rows][:, None]
        shares = (SHARPNESS * attention).masked_fill(~rivals, float("-inf")).softmax(-1)
        maps = torch.einsum("bnc,bsc->bsn", shares, self._weights[rows].to(shares.dtype)).unflatten(-1, self._shape)
        if self.params.smooth:  # every frame by itself
            padded = F.pad(maps.flatten(0, -3)[:, None], (1, 1, 1, 1), mode="reflect")
            maps = F.conv2d(padded, self._kernel.to(maps.dtype))[:, 0].unflatten(0, maps.shape[:-2])
        return maps

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

    def _remember(self, step: Step, looked: Sequence[int], rows: Sequence[int], maps: Tensor, losses: Tensor) -> None:
        maps, numbers = maps.float().cpu(), losses.tolist()
        for i, row in enumerate(looked):
            if row in rows:
                one = self._attended[row]
                one.after = maps[i, : len(one.words)]
                one.before = one.after if one.before is None else one.before
                one.losses.setdefault(step.i, []).append(numbers[i])

    # -- choices -------------------------------------------------------------------------------------------------------

    def _subjects(self, readings: Sequence[Reading]) -> list[list[WordSpan]]:
        if self.params.words:
            subjects = asked_for(readings, self.params.words)
        else:
            subjects = [_nouns(reading) for reading in readings]
        for reading, spans in zip(readings, subjects, strict=True):
            if any(span.start < 0 for span in spans):
                raise BadInput(f"words={self.params.words} of attend_excite: special tokens are no things to be drawn.")
            if not spans:
                there = ", ".join(span.label for span in reading.all())
                asked = f"none of {self.params.words}" if self.params.words else "no noun that is recognised"
                raise NoMatch(
                    f"attend_excite: the prompt {reading.prompt!r} has {asked}; name words of it. Its words: {there}."
                )
        return subjects

    def _chosen(self, sites: Sequence[Site], model: str) -> list[Site]:
        """Sites that see text, of one grid (h w)."""
        p = self.params
        candidates = [s for s in sites if s.kind in ("cross", "joint") and s.text is not None and s.grid is not None]
        if not candidates:
            raise NotSupported(f"attend_excite needs attention from picture to text, and {model} has none.")
        chosen = [site for site in candidates if not p.layers or matches_place(site, p.layers)]
        if not chosen:
            places = ", ".join(dict.fromkeys(site.block for site in candidates))
            raise NoMatch(f"layers={p.layers} of attend_excite match none of {model}'s: {places}.")
        grids = sorted({site.grid for site in chosen if site.grid is not None}, reverse=True)
        if p.resolution is None:
            finest = max(site.grid[0] for site in sites if site.grid is not None)
            fine = [grid for grid in grids if min(grid) >= FEWEST and grid[0] * COARSER >= finest]
            wanted = fine[-1] if fine else grids[0]
        else:
            fits = [grid for grid in grids if min(grid) == p.resolution]
            if not fits:
                sides = ", ".join(str(min(grid)) for grid in grids)
                raise NoMatch(
                    f"resolution={p.resolution} of attend_excite: at this size {model} attends to text at {sides}."
                )
            wanted = fits[0]
        return [site for site in chosen if site.grid == wanted]

    def _whole_axis(self, sites: Sequence[Site], reading: Reading) -> bool:
        """Whether end and padding share attention with the words. T5 pads with hundreds of tokens, and in joint
        attention they are no rivals that the temperature was made for."""
        if self.params.against != "auto":
            return self.params.against == "all"
        return all(site.kind == "cross" for site in sites) and "t5" not in reading.streams


def smoothing_kernel(sigma: float, true_gaussian: bool = False) -> Tensor:
    """A 3x3 Gaussian (1 1 3 3). The original's is exp(-(x / 2 sigma)^2), whose standard deviation is sqrt(2) sigma."""
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    taps = torch.exp(-(x**2) / ((2 if true_gaussian else 4) * sigma**2))
    taps = taps / taps.sum()
    return torch.outer(taps, taps).float()[None, None]


def _nouns(reading: Reading) -> list[WordSpan]:
    """The heads of the prompt's noun phrases that an encoder sees."""
    spans = []
    for phrase in noun_phrases(reading.prompt):
        matches = [span for span in reading.all() if span.start <= phrase.head.start < span.end]
        spans += [span for span in matches if span not in spans]
    return spans


def _rivals(reading: Reading, whole: bool) -> set[int]:
    """Positions on the text axis among which a place's attention is shared out."""
    words = {position for positions in reading.tokens().values() for position in positions}
    if not whole:
        return words
    rest = {position for name in ("<end>", "<pad>") for s in reading.streams.values() for position in s.special[name]}
    # the original leaves out the first and the last position; the last is never a word's
    return words | rest - {max(words | rest)}


def _sheet(frames: Sequence[Any], one: Attended) -> Image.Image:
    """A picture, or some frames of a clip, then per word two overlays on it: before and after, in brightness from none
    to all attention."""
    assert one.before is not None and one.after is not None
    chosen = sheets.strip(range(len(frames)))
    pictures = [sheets.as_picture(frames[i]) for i in chosen]
    factor = max(1, round(192 / max(pictures[0].size)))
    w, h = pictures[0].width * factor, pictures[0].height * factor
    pictures = [picture.resize((w, h), Image.Resampling.BICUBIC) for picture in pictures]
    rows: list[list[tuple[str, Image.Image]]] = [[("", picture)] for picture in pictures]
    for s, word in enumerate(one.words):
        for label, maps in (("first", one.before[s]), ("last", one.after[s])):
            by_frame = maps.reshape(-1, *maps.shape[-2:])  # a picture is one frame
            for row, picture, i in zip(rows, pictures, chosen, strict=True):
                lit = upscale(by_frame[i], (h, w)).clamp(0, 1).sqrt().numpy()[..., None]
                shown = np.asarray(picture, dtype=np.float32) * (0.15 + 0.85 * lit)
                told = f"{word}, {label}: {float(by_frame[i].max()):.2f}"
                row.append((told, Image.fromarray(shown.round().clip(0, 255).astype(np.uint8))))
    return sheets.sheet([cell for row in rows for cell in row], len(rows[0]))
