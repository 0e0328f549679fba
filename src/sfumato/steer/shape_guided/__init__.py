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

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfumato import cards, mask_ops, masks, rng
from sfumato.attention.tap import Tap
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, Conflict, NotSupported
from sfumato.metrics.geometry import slerp
from sfumato.models import Condition
from sfumato.models.chunks import MARK
from sfumato.models.families import families_with
from sfumato.sampling import Run, Step
from sfumato.sampling.inversion import invert
from sfumato.steer.shape_guided.attention import DECAYS, InsideOutside, takes_part
from sfumato.steer.shape_guided.pieces import Piece, joined, plain, refuse_overlaps, split
from sfumato.steer.shape_guided.sides import Sides
from sfumato.steer.shape_guided.word_region import infer_region
from sfumato.text.words import Words

__all__ = ["DECAYS", "InsideOutside", "ShapeGuided", "Sides", "infer_region"]

NOTHING_ELSE = "background"  # the original's outside prompt


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

    @property
    def role(self) -> str:  # type: ignore[override]
        """On a picture it sets the start and the outside of the whole trajectory."""
        return "path" if self.params.source else "editor"

    def __init__(self, **given: Any):
        self.params = self.options = self.Params(**given)
        self._read = [masks.read_mask(mask) for mask in self.params.mask]

    def start(self, run: Run) -> None:
        """Finds the words, the regions and the texts of either side. Raises NoMatch, BadInput, NotSupported."""
        p = self.params
        if sum(isinstance(part, ShapeGuided) for part in run.parts) > 1:
            raise Conflict("shape_guided is given twice; give one all regions, with a word for each.")
        if not any(site.kind in ("cross", "joint") and takes_part(site) for site in run.sites):
            raise NotSupported(
                f"shape_guided needs attention from picture to text, and {run.model.name} has none; "
                f"{families_with('text_attention')}."
            )
        words = Words(run.model)
        # each side is encoded by itself, in one window: a new chunk begins nowhere
        parts = [split(words, prompt.replace(MARK, " "), p.words) for prompt in run.prompts]
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
            for prompt, (phrases, _) in zip(run.prompts, parts, strict=True):
                refuse_overlaps(prompt, p.words, phrases)
        inside = [phrases if r > 1 else [joined(phrases)] for phrases, _ in parts]
        around = [Piece(p.outside) if p.outside else rest if rest.text else Piece(NOTHING_ELSE) for _, rest in parts]
        pieces = [[*each, outside] for each, outside in zip(inside, around, strict=True)]
        self.texts = [[piece.text for piece in each] for each in pieces]
        self.before = None
        if p.source:
            self.before = [[*p.source, p.source_outside or outside.text] for outside in around]
        self.activity.tokens.update({text: 1 for texts in self.texts for text in texts})
        self.weighted = [
            [whole.part(piece.text, piece.origins) if piece.origins else plain(piece.text) for piece in each]
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
        pixels = self._pixels[run.samples.start : run.samples.stop] if len(self._pixels) > 1 else self._pixels
        texts = self.before if len(pixels) > 1 else self.before[:1]
        constraint = InsideOutside(self.params, self.regions, texts, hard=True)
        back = invert(
            run.model, pixels, [each[0] for each in texts], steps=run.request.steps, interventions=[constraint]
        )
        self._add_cost(run, back.cost * len(pixels) / len(run))
        if not torch.equal(back.timesteps, run.timesteps):
            raise BadInput("shape_guided inverts along the family's own schedule, which this run's scheduler leaves.")
        self._trajectory = back.latents.expand(-1, len(run), -1, -1, -1)
        self._inside = mask_ops.on_grid(self.regions, run.grid, self.params.level, bool(self.params.soft)).amax(0).to(x)
        x = self._trajectory[run.begin]
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
        known = self._trajectory[step.i if self.params.reference and not last else step.i + 1]
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
            found.append(mask_ops.area(region, run.size[::-1]))
            cost += spent
        self._add_cost(run, cost / len(run))
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

    def _add_cost(self, run: Run, cost: float) -> None:
        run.add_cost(cost, None)
        self.activity.cost += cost
