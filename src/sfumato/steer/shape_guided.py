"""Shape-guided diffusion: an object that fills a given silhouette, by inside-outside attention.

The picture and the text are both split in an inside and an outside: pixels by the region, tokens by encoding what the
region shows and what is around it apart and putting the two encodings side by side on one text axis. In every attention
of every step pixels then see only words, and only pixels, of their own side (Park et al. 2022, section 3).

    >>> generate(model, "a red cube on the grass", interventions=ShapeGuided(words=["cube"], mask="silhouette.png"))

Given a picture and ``source``, what the region shows in it now, the picture is first inverted under the same
constraint, generation starts from there, and everything outside the region is kept:

    >>> guided = ShapeGuided(words=["lego truck"], source=["truck"], mask="truck.png", outside="a street")
    >>> generate(model, "a lego truck", image=photo, strength=1.0, scheduler="ddim", interventions=guided)

Beyond the original: several regions with a text each, soft masks, any size, and joint attention (SD3, Flux). There one
softmax runs over picture and text, so keeping what is on the same side means conditioning it: the image-image block
takes the rule of self-attention, the image-text block that of cross-attention, text queries keep to their side too, and
each row is divided by what is left of it. There, cells are on either side by their share, and the mask among pixels
fades: hard to the end, as in the U-Nets of the paper, it breaks the shapes of what it puts in place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfumato import cards, masks, rng
from sfumato.attention.accumulate import MapStore, upscale
from sfumato.attention.call import Call
from sfumato.attention.tap import Tap
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, Conflict, NotSupported
from sfumato.metrics.geometry import slerp
from sfumato.models import Condition, Model, Site
from sfumato.sampling import Intervention, Run, Step
from sfumato.sampling.inversion import invert
from sfumato.text.weights import Weighted, encode_weighted
from sfumato.text.words import Reading, StreamReading, Words, homes, noun_phrases

__all__ = ["InsideOutside", "ShapeGuided", "infer_region"]

NOTHING_ELSE = "background"  # the original's outside prompt
DECAYS = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "exponential": lambda progress: 0.95 ** (50 * progress),
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


@dataclass(frozen=True)
class Piece:
    """A text in the place of a part of the prompt. ``home``: where in the prompt each of its characters comes from, -1
    for those that do not; empty: none does."""

    text: str
    home: tuple[int, ...] = ()


class Sides:
    """Which positions of the text axis belong to which side: ``groups`` texts, the last of them the outside.

    Every stretch of the axis (one per text encoder; two that share positions are one stretch) is cut into ``groups``
    equal parts behind its start token; what is left over belongs to none.
    """

    def __init__(self, model: Model, groups: int):
        self.words, self.groups = Words(model), groups
        self.stretches: dict[str, tuple[int, int]] = {}  # stream -> (first position, length of a part)
        for stream in model.tokenizers:
            lead = len(self.words.read("").streams[stream.name].special["<start>"])
            self.stretches[stream.name] = stream.offset + lead, (stream.length - lead) // groups

    def part(self, stream: str, group: int) -> slice:
        first, length = self.stretches[stream]
        return slice(first + group * length, first + (group + 1) * length)

    def own(self, length: int) -> Tensor:
        """(groups t): 1 where a position belongs to a group."""
        own = torch.zeros(self.groups, length)
        for stream in self.stretches:
            for group in range(self.groups):
                own[group, self.part(stream, group)] = 1
        return own

    def reading(self, prompt: str, pieces: Sequence[Piece]) -> Reading:
        """Where the words of a prompt lie when ``pieces``, one per group, stand side by side in its place."""
        streams = {}
        for name, plain in self.words.read(prompt).streams.items():
            tokens: list[tuple[tuple[int, int], int]] = []
            special: dict[str, list[int]] = {"<end>": [], "<pad>": []}
            for group, piece in enumerate(pieces):
                part, spans = self.part(name, group), self.words.read(piece.text).streams[name].spans
                for position, (a, b) in zip(range(part.start, part.stop), spans, strict=False):
                    told = [place for place in piece.home[a:b] if place >= 0]
                    if told:
                        tokens.append(((min(told), max(told) + 1), position))
                end, *padding = [*range(part.start + len(spans), part.stop)] or [part.stop - 1]
                special["<end>"].append(end)
                special["<pad>"] += padding
            tokens.sort()
            streams[name] = StreamReading(
                first=plain.first,
                spans=tuple(span for span, _ in tokens),
                special={"<start>": plain.special["<start>"], **{key: tuple(each) for key, each in special.items()}},
                seen=len(prompt),
                length=plain.length,
                at=tuple(position for _, position in tokens),
            )
        return Reading(prompt, streams)

    def check_lengths(self, texts: Sequence[str]) -> None:
        """Raise BadInput for a text that does not fit into its part of the axis."""
        for text in texts:
            for name, stream in self.words.read(text).streams.items():
                if len(stream.spans) > self.stretches[name][1]:
                    raise BadInput(
                        f"{text[:60]!r} has {len(stream.spans)} {name} tokens; beside the other texts of shape_guided "
                        f"there is room for {self.stretches[name][1]}."
                    )

    def fixed(self, before: str, after: str, group: int, length: int) -> Tensor:
        """(t): True for tokens of ``after`` that ``before`` has too, in matching order, in every encoder that reads
        that position."""
        told = torch.zeros(length)
        readers = torch.zeros(length)
        for stream in self.words.streams:
            part = self.part(stream.name, group)
            old, new = (self._ids(stream, text) for text in (before, after))
            readers[part.start : part.start + len(new)] += 1
            for _, at, size in SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks():
                told[part.start + at : part.start + at + size] += 1
        return (told == readers) & (readers > 0)

    def _ids(self, stream: Any, text: str) -> list[int]:
        reading = self.words.read(text).streams[stream.name]
        lead = reading.first - stream.offset
        return stream.tokenizer(stream.prepare(text), verbose=False).input_ids[lead : lead + len(reading.spans)]


class InsideOutside(Intervention):
    """The constraint itself: a composite text and inside-outside attention, for given regions and texts.

    ``regions`` (r H W); ``texts`` and, where something is edited, ``before``: one list of r + 1 texts per sample, the
    outside last. ``hard``: a decay that was asked for is left out, as on the original's way back.
    """

    role = "editor"
    hard: bool = False
    weighted: Sequence[Sequence[Weighted]] = ()  # the texts with the prompt's weights, where these are known

    def __init__(
        self,
        params: ShapeGuided.Params,
        regions: Tensor,
        texts: Sequence[Sequence[str]],
        before: Sequence[Sequence[str]] | None = None,
        hard: bool = False,
    ):
        self.options, self.regions, self.texts, self.before, self.hard = params, regions, texts, before, hard

    @property
    def strength(self) -> float:
        return self.options.strength

    def on_text(self, run: Run, condition: Condition) -> Condition:
        """The composite text: each side's own encoding, side by side."""
        sides = Sides(run.model, len(self.regions) + 1)
        embeds = condition.cond["embeds"].clone()
        rows = {**condition.cond, "embeds": embeds}
        if "mask" in rows:
            rows["mask"] = rows["mask"].clone()
        length = embeds.shape[1]
        self.own = sides.own(length).to(embeds.device)
        boosted = self.own.sum(0) * self.options.boost
        self.columns = boosted.repeat(len(run), 1)  # (b t)
        for group in range(sides.groups):
            told = [texts[group] for texts in self.texts]
            sides.check_lengths(told)
            said = [each[group] for each in self.weighted] if self.weighted else list(map(_plain, told))
            alone = encode_weighted(run.model, said, None, guidance=False, embedded_guidance=condition.guidance).cond
            for stream, (first, part) in sides.stretches.items():
                embeds[:, sides.part(stream, group)] = alone["embeds"][:, first : first + part]
                if "mask" in rows:
                    rows["mask"][:, sides.part(stream, group)] = alone["mask"][:, first : first + part]
            for i, old in enumerate(self.before or ()):
                kept = sides.fixed(old[group], told[i], group, length).to(embeds.device)
                self.columns[i] = torch.where(kept, self.own.sum(0), self.columns[i])
        self._at: dict[tuple[tuple[int, int], bool], Tensor] = {}
        self.mark()
        uncond = condition.uncond
        if uncond is not None and (condition.negatives or "mask" in uncond):
            # a negative prompt, or the few tokens that a mask leaves, must be there for every side
            uncond = {**uncond, **{name: uncond[name].clone() for name in ("embeds", "mask") if name in uncond}}
            for stream, (first, part) in sides.stretches.items():
                for group in range(1, sides.groups):
                    for name in {"embeds", "mask"} & set(uncond):
                        uncond[name][:, sides.part(stream, group)] = uncond[name][:, first : first + part]
        return Condition(rows, uncond, condition.prompts, condition.negatives, condition.guidance)

    def taps(self) -> Sequence[Tap]:
        wanted = {"cross", "joint"} if self.options.cross else set()
        wanted |= {"self", "joint"} if self.options.self_attention else set()
        if not wanted:
            return []
        return [
            Tap(lambda site: _takes_part(site) and site.kind in wanted, edit_probs=self._edit, name="inside-outside")
        ]

    # -- inside attention ----------------------------------------------------------------------------------------------

    def _edit(self, call: Call) -> Tensor:
        weights = self._weights(call.site, call.step.progress)
        weights = 1 + self.strength * (weights - 1)
        probs = call.probs()
        repeats = len(probs) // len(weights)
        probs = probs * weights.repeat(repeats, 1, 1)[:, None].to(probs)
        if self.options.renormalise == "all" or (self.options.renormalise == "joint" and call.site.kind == "joint"):
            probs = probs / probs.sum(-1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)
        self.mark(call.step, sites=[call.site.path])
        return probs

    def _weights(self, site: Site, progress: float) -> Tensor:
        """(b n t), or (1 n t) where all samples agree: what each probability is multiplied by."""
        sides = self._sides(site)
        if site.kind == "self":
            return self._among_pixels(sides, progress, "constant")[None]
        words = self._to_words(sides)
        if site.kind == "cross":
            return words
        # joint: rows and columns are those of one sequence
        assert site.text is not None
        image, text = slice(*site.image), slice(*site.text)
        total = max(image.stop, text.stop)
        weights = torch.ones(len(words), total, total, device=words.device)
        if self.options.self_attention:
            weights[:, image, image] = self._among_pixels(sides, progress, "linear")
        if self.options.cross:
            weights[:, image, text] = words
            grouped = self.own.sum(0) > 0
            rows = torch.arange(total, device=words.device)[text][grouped]
            weights[:, rows, image] = (self.own.T @ sides)[grouped]
            weights[:, rows, text] = (self.own.T @ self.own)[grouped]
        return weights

    def _to_words(self, sides: Tensor) -> Tensor:
        """(b n t): inside pixels see inside tokens, outside pixels outside tokens, nobody the start token; section 3.2
        with the original's boost of (new) words."""
        return (sides.T @ self.own)[None] * self.columns[:, None]

    def _among_pixels(self, sides: Tensor, progress: float, otherwise: str) -> Tensor:
        """(n n): pixels see their own side, section 3.1; ``self_attention`` 1 is a hard mask."""
        same = (sides.T @ sides).clamp(max=1)
        asked = "constant" if self.hard and self.options.decay else self.options.decay
        decay = DECAYS[asked or otherwise](progress)
        return 1 + self.options.self_attention * decay * (same - 1)

    def _sides(self, site: Site) -> Tensor:
        """(r+1 n): how much of each pixel of a site's grid belongs to each region, and to the outside."""
        assert site.grid is not None
        soft = site.kind == "joint" if self.options.soft is None else self.options.soft
        if (site.grid, soft) not in self._at:
            inside = masks.on_grid(self.regions, site.grid, self.options.level, soft)
            sides = torch.cat([inside, 1 - inside.amax(0, keepdim=True)])
            self._at[site.grid, soft] = sides.flatten(1).to(self.own.device)
        return self._at[site.grid, soft]


@register
class ShapeGuided(InsideOutside):
    """Draws what the words say inside a silhouette; on a picture, redraws what is there and keeps the rest."""

    CARD = Card(
        key="shape_guided",
        title="Shape-Guided Diffusion with Inside-Outside Attention",
        authors="Park, Luo, Toste, Azadi, Liu, Karalashvili, Rohrbach, Darrell",
        year=2022,
        arxiv="2212.00210",
        verb="steer",
        needs=("pictures", "noise_path", "text_attention"),
        defaults_from="the paper's code (boost 2.5, hard self-attention mask, no noise mixed in); it guides by 4.5",
        cost="explicit attention everywhere; on a picture one inversion more, without a region ten forwards more",
        not_reproduced="the segmenter for pictures without a mask (the source word's attention map stands in)",
        summary="an object that fills a given silhouette, from noise or in place of another",
        example="shape_guided:words=[cube],box=[0.2|0.3|0.8|0.9]",
    )

    class Params(cards.Params):
        words: list[str] = Field(
            default=[], description="words of the prompt for the regions: all in one, or one each; none: all"
        )
        mask: masks.MaskTexts = Field(default=[], description="silhouette: a picture that is white there; or several")
        box: masks.Boxes = Field(default=[], description="region as a box x0|y0|x1|y1, fractions or pixels; or several")
        outside: str | None = Field(
            default=None, description="what is outside the regions; none: the rest of the prompt, else background"
        )
        source: list[str] = Field(
            default=[], description="with a picture: what its regions show now, one text per region"
        )
        source_outside: str | None = Field(
            default=None, description="with a picture: what is outside now; none: as it shall be"
        )
        boost: float = Field(default=2.5, gt=0, description="factor on attention to words that are new to the picture")
        cross: bool = Field(default=True, description="constrain attention to words")
        self_attention: float = Field(
            default=1.0, ge=0, le=1, description="constrain attention among pixels; 1: a hard mask, 0: not at all"
        )
        decay: Literal["constant", "linear", "exponential", "cosine"] | None = Field(
            default=None,
            description="how the mask among pixels weakens over the steps; none: linear in joint attention, not at all "
            "elsewhere",
        )
        renormalise: Literal["joint", "all", "none"] = Field(
            default="joint", description="where attention is brought back to a sum of 1 (the original: nowhere)"
        )
        copy_outside: bool = Field(default=True, description="with a picture: keep everything outside the regions")
        invert: bool = Field(default=False, description="with a picture: keep the regions, redraw the outside")
        fresh: float = Field(
            default=0.0, ge=0, le=1, description="with a picture: share of fresh noise mixed into the regions' start"
        )
        level: float = Field(
            default=0.5, gt=0, le=1, description="share of a cell in a region from which on it is inside"
        )
        soft: bool | None = Field(
            default=None,
            description="use the share itself instead of deciding cell by cell; none: in joint attention only",
        )
        reference: bool = Field(
            default=False, description="copy the outside one noise level late, as the original does"
        )
        strength: float = Field(default=1.0, ge=0, le=1, description="how strongly both constraints act; 0: not at all")

    def __init__(self, **given: Any):
        self.params = self.options = self.Params(**given)
        if self.params.source:
            self.role = "path"  # it then sets the start and the outside of the whole trajectory
        self._read = [masks.read_mask(mask) for mask in self.params.mask]

    def start(self, run: Run) -> None:
        """Finds the words, the regions and the texts of either side. Raises NoMatch, BadInput, NotSupported."""
        p = self.params
        if sum(isinstance(part, ShapeGuided) for part in run.parts) > 1:
            raise Conflict("shape_guided is given twice; give one all regions, with a word for each.")
        if not any(site.kind in ("cross", "joint") and _takes_part(site) for site in run.sites):
            raise NotSupported(f"shape_guided needs attention from picture to text, and {run.model.name} has none.")
        words = Words(run.model)
        told = [_split(words, prompt, p.words) for prompt in run.prompts]
        self._pixels = None if run.request is None else run.request.source.pixels
        if p.source and self._pixels is None:
            raise BadInput("source of shape_guided says what a picture shows, but no image is given.")
        if self._pixels is not None and not p.source:
            raise BadInput("shape_guided on a picture needs source: what do the regions show now?")
        self.regions = masks.regions(self._read, p.box, run.size)
        if not len(self.regions):
            self.regions = self._without_region(run)
        self._check(run)
        r = len(self.regions)
        if r > 1:
            for prompt, (phrases, _) in zip(run.prompts, told, strict=True):
                _refuse_overlaps(prompt, p.words, phrases)
        inside = [phrases if r > 1 else [_joined(phrases)] for phrases, _ in told]
        around = [Piece(p.outside) if p.outside else rest if rest.text else Piece(NOTHING_ELSE) for _, rest in told]
        pieces = [[*parts, outside] for parts, outside in zip(inside, around, strict=True)]
        self.texts = [[piece.text for piece in each] for each in pieces]
        self.before = None
        if p.source:
            self.before = [[*p.source, p.source_outside or outside.text] for outside in around]
        self.activity.tokens.update({text: 1 for texts in self.texts for text in texts})
        self.weighted = [
            [whole.part(piece.text, piece.home) if piece.home else _plain(piece.text) for piece in each]
            for whole, each in zip(run.weighted, pieces, strict=True)
        ]
        if self.strength:
            sides = Sides(run.model, r + 1)
            for prompt, each in zip(run.prompts, pieces, strict=True):
                sides.check_lengths([piece.text for piece in each])
                run.words.relaid[prompt] = sides.reading(prompt, each)

    def on_text(self, run: Run, condition: Condition) -> Condition:
        if run.compose:
            raise Conflict("shape_guided splits one prompt in inside and outside; it cannot serve composed ones too.")
        return condition if self.strength == 0 else super().on_text(run, condition)

    def taps(self) -> Sequence[Tap]:
        return [] if self.strength == 0 else super().taps()

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        """On a picture: the latents that lead to it under the constraint (DDIM inversion without guidance)."""
        if self._pixels is None or self.strength == 0:
            return x
        assert run.request is not None and self.before is not None
        constraint = InsideOutside(self.params, self.regions, self.before, hard=True)
        pixels = self._pixels[run.samples.start : run.samples.stop] if len(self._pixels) > 1 else self._pixels
        told = self.before if len(pixels) > 1 else self.before[:1]
        constraint.texts = told
        back = invert(
            run.model, pixels, [texts[0] for texts in told], steps=run.request.steps, interventions=[constraint]
        )
        self._spend(run, back.cost * len(pixels) / len(run))
        if not torch.equal(back.timesteps, run.timesteps):
            raise BadInput("shape_guided inverts along the family's own schedule, which this run's scheduler leaves.")
        self._way = back.latents.expand(-1, len(run), -1, -1, -1)
        self._inside = masks.on_grid(self.regions, run.grid, self.params.level, bool(self.params.soft)).amax(0).to(x)
        x = self._way[run.begin]
        if self.params.fresh:
            generators = rng.generators("shape_guided.fresh", run.seeds)
            noise = randn_tensor(tuple(x.shape), generator=generators, device=x.device, dtype=x.dtype)
            x = self._inside * slerp(x, noise, self.params.fresh, keep_norm=False) + (1 - self._inside) * x
        return x

    def after_step(self, step: Step) -> None:
        """Background copy: what is kept follows its own way back to the picture."""
        if self._pixels is None or self.strength == 0 or not self.params.copy_outside:
            return
        last = step.i + 1 == step.total
        known = self._way[step.i if self.params.reference and not last else step.i + 1]
        share = 1 - self._inside if self.params.invert else self._inside
        step.x = share * step.x + (1 - share) * known
        self.mark(step)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _without_region(self, run: Run) -> Tensor:
        if self._pixels is None:
            raise BadInput("shape_guided needs a silhouette: give mask (a picture, white there) or box=x0|y0|x1|y1.")
        if len(self._pixels) > 1:
            raise BadInput("shape_guided finds the region of one picture only; give mask or box for several.")
        found, cost = [], 0.0
        for source in self.params.source:
            region, spent = infer_region(run.model, self._pixels, source)
            found.append(masks.area(region, run.size[::-1]))
            cost += spent
        self._spend(run, cost / len(run))
        return torch.stack(found)

    def _check(self, run: Run) -> None:
        p, r = self.params, len(self.regions)
        if r > 1 and len(p.words) != r:
            raise BadInput(f"shape_guided has {r} regions and {len(p.words)} words; give one phrase per region.")
        if p.source and len(p.source) != r:
            raise BadInput(f"source of shape_guided has {len(p.source)} texts for {r} regions; give one per region.")
        for number, region in enumerate(self.regions, 1):
            if not (region >= p.level).any() and not (p.soft and region.any()):
                raise BadInput(f"region {number} of shape_guided is empty: nothing reaches the level {p.level:g}.")
        if bool((self.regions.amax(0) >= p.level).all()):
            raise BadInput("the regions of shape_guided cover the whole picture; there must be an outside, too.")
        if p.source and run.request is not None:
            wanted = "flow_euler" if run.model.flow else "ddim"
            if type(run.model.make_scheduler(wanted)) is not type(run.scheduler) or run.request.options.eta:
                raise BadInput(
                    f"shape_guided follows an inversion, so the run needs scheduler {wanted!r} without eta; it has "
                    f"{type(run.scheduler).__name__}."
                )
            if p.fresh and run.begin:
                raise BadInput("fresh of shape_guided mixes noise into the very start; give strength 1 to the run.")

    def _spend(self, run: Run, cost: float) -> None:
        run.spend(cost, None)
        self.activity.cost += cost


def infer_region(model: Model, pixels: Tensor, source: str, steps: int = 10) -> tuple[Tensor, float]:
    """Where ``source`` is in a picture (1 3 H W): the mean attention map of its words while the picture is inverted
    without constraint, parted in two, closed and filled. Returns the region (h w) and the forwards spent."""
    looker = _WordMap(source)
    back = invert(model, pixels, source, steps=steps, interventions=[looker])
    found = masks.close((looker.map > masks.mixture_threshold(looker.map)).float())
    return masks.fill_holes(found), back.cost


class _WordMap(Intervention):
    """The mean attention map of all words of a text over sites, heads and steps, at the finest site's grid."""

    def __init__(self, text: str):
        self.text = text

    def start(self, run: Run) -> None:
        # the noun stands for the object; articles and the rest of the phrase do not
        phrases, reading = noun_phrases(self.text), Words(run.model).read(self.text)
        spans = [reading.span(phrase.head.start, phrase.head.end) for phrase in phrases] or reading.all()
        self.positions = sorted({position for span in spans for position in span.positions})
        self.store = MapStore()

    def taps(self) -> Sequence[Tap]:
        chosen = lambda site: site.kind in ("cross", "joint") and _takes_part(site)  # noqa: E731
        return [Tap(chosen, observe=self.look, name="word map")]

    def look(self, call: Call) -> None:
        if "cond" in call.rows:
            first = call.text.start
            self.store.add(call.site, call.branch("cond").word_probs([first + p for p in self.positions]))
            self.mark(call.step, sites=[call.site.path])

    def finish(self, run: Run) -> None:
        layers = [layer.mean()[0].mean(0) for layer in self.store.take(0)]
        finest = max((tuple(layer.shape) for layer in layers), key=math.prod)
        self.map = torch.stack([upscale(layer / layer.mean(), finest) for layer in layers]).mean(0)


def _takes_part(site: Site) -> bool:
    return site.grid is not None and site.kind != "temporal"


def _split(words: Words, prompt: str, asked: Sequence[str]) -> tuple[list[Piece], Piece]:
    """The texts of the regions, a phrase per word asked for, and what the prompt says besides; the whole prompt and
    nothing when no word is asked for. Raises NoMatch."""
    if not asked:
        return [Piece(prompt, tuple(range(len(prompt))))], Piece("")
    chunks = noun_phrases(prompt)
    inside: list[Piece] = []
    cut: list[tuple[int, int]] = []
    for word in asked:
        spans: list[tuple[int, int]] = []
        for found in words.find(prompt, word):
            if found.start < 0:
                raise BadInput(f"words of shape_guided has {word}: special tokens are nothing to draw.")
            chunk = next((c for c in chunks if c.start <= found.start and found.end <= c.end), found)
            spans.append((chunk.start, chunk.end))
        inside.append(_joined([Piece(prompt[a:b], tuple(range(a, b))) for a, b in dict.fromkeys(spans)]))
        cut += spans
    rest = list(prompt)
    for a, b in cut:
        rest[a:b] = ["\0"] * (b - a)
    left = "".join(rest)
    text = re.sub(r"\s*,\s*(?=and\b|or\b)", " ", re.sub(r"\s+", " ", left.replace("\0", ""))).replace(" ,", ",")
    text = re.sub(
        r"^(?:(?:and|or|with|of)\b[\s,]*)+|[\s,]*\b(?:and|or|with|of|to|on|in|at|by|next)$", "", text.strip(" ,.;")
    ).strip(" ,.;")
    return inside, Piece(text, tuple(homes(left, text)))


def _refuse_overlaps(prompt: str, asked: Sequence[str], phrases: Sequence[Piece]) -> None:
    """Raise BadInput where two regions would show the same words."""
    for i, one in enumerate(phrases):
        for j in range(i):
            if {place for place in one.home if place >= 0} & set(phrases[j].home):
                raise BadInput(
                    f"words of shape_guided overlap: {asked[j]!r} and {asked[i]!r} both stand in {one.text!r} of "
                    f"{prompt!r}; give each region words of its own."
                )


def _plain(text: str) -> Weighted:
    return Weighted(text, (1.0,) * len(text))


def _joined(pieces: Sequence[Piece]) -> Piece:
    """Several texts as one."""
    between = (" and ", (-1,) * 5)
    text, home = pieces[0].text, pieces[0].home
    for piece in pieces[1:]:
        text, home = text + between[0] + piece.text, home + between[1] + piece.home
    return Piece(text, home)
