"""Paint-with-words: phrases of the prompt go where they were painted.

Each phrase owns regions of the canvas. In every attention from picture to text the scores of a phrase's tokens are
raised for the pixels of its regions, by an amount that is large while there is much noise, when the layout is decided,
and vanishes towards the end (Balaji et al. 2022, eDiff-I, the section on paint-with-words)::

    softmax((Q K^T + w A) / sqrt(d)) V,    w = w' log(1 + sigma) max(Q K^T)

A (pixels x tokens) holds the coverage of each pixel of a layer's grid by a token's regions. The maximum is that of each
sample alone, over heads, pixels and tokens, so that samples of a batch do not influence each other.

    >>> painted = PaintWithWords(phrases=["red cube", "blue ball"], box=[[0, 0.4, 0.4, 1], [0.6, 0.4, 1, 1]])
    >>> generate(model, "a red cube and a blue ball", interventions=painted)

Regions are boxes, mask pictures, or the colours of one painted map. On the command line::

    --with "paint_with_words:phrases=[red cube|blue ball],map=map.png,colors=[red|#0000ff]"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from pydantic import BeforeValidator
from torch import Tensor

from sfumato import cards, mask_ops, masks, rng
from sfumato.attention.call import Call
from sfumato.attention.tap import Tap
from sfumato.cards import Card, Field, FilePath, register
from sfumato.errors import BadInput, Conflict, NotSupported
from sfumato.models import Condition, Site
from sfumato.models.families import families_with
from sfumato.sampling import Intervention, Run, Step
from sfumato.windows import Window

__all__ = ["PaintWithWords", "noise_level"]

LARGEST_SIGMA = 14.6  # where Stable Diffusion's own schedule begins; flow models begin at infinity
LabelMap = Annotated[FilePath, BeforeValidator(lambda given: masks.as_text(given, labels=True))]


@register
class PaintWithWords(Intervention):
    """Raises the attention of painted pixels to the words they were painted with."""

    CARD = Card(
        key="paint_with_words",
        title="eDiff-I: paint-with-words",
        authors="Balaji, Nah, Huang, Vahdat, Song, Zhang, Kreis, Aittala, Aila, Laine, Catanzaro, Karras, Liu",
        year=2022,
        arxiv="2211.01324",
        verb="steer",
        needs=("pictures", "noise_path", "text_attention"),
        defaults_from="the paper's rule; its weight 0.1 and conditional branch only from the common re-implementation",
        cost="explicit attention at the sites that see text",
        not_reproduced="the style image of the same paper; its expert denoisers are the system experts",
        summary="phrases go where they were painted, by boxes, masks or a map of colours",
        example="paint_with_words:phrases=[red cube|blue ball],box=[[0|0.3|0.4|1]|[0.6|0.3|1|1]]",
    )

    class Params(cards.Params):
        phrases: list[str] = Field(
            default=[], description="words or phrases of the prompt, one per region; one that comes twice owns both"
        )
        box: masks.Boxes = Field(
            default=[], description="a box x0|y0|x1|y1 per phrase, as fractions of the picture or in pixels"
        )
        mask: masks.MaskTexts = Field(default=[], description="a picture per phrase, white where it was painted")
        map: LabelMap | None = Field(default=None, description="one picture painted in flat colours")
        colors: list[str] = Field(
            default=[], description="the colour of each phrase in the map: a name, or a code such as #ff8000"
        )
        weights: list[float] = Field(default=[], description="factor on the strength, per phrase; none: 1 each")
        seeds: list[int] = Field(
            default=[], description="a seed per region, from which its own initial noise comes; none: the run's"
        )
        strength: float = Field(default=0.1, ge=0, description="w' of the paper; 0: nothing is changed")
        scale: Literal["max", "std"] = Field(
            default="max",
            description="what the strength is relative to: the largest score with log(1 + sigma), or their spread with "
            "log(1 + sigma^2), which is softer (then about 0.4)",
        )
        window: Window = Field(
            default=(0.0, 1.0), description="share of the denoising to act in", json_schema_extra={"unit": "progress"}
        )

    role = "editor"

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        p = self.params
        self.window = p.window
        if (p.map is None) != (not p.colors):
            raise BadInput(
                "map and colors of paint_with_words go together: a painted picture and its phrases' colours."
            )
        self._read = [masks.read_mask(mask) for mask in p.mask]
        if p.map is not None:
            self._read += list(masks.label_regions(masks.read_labels(p.map), p.colors))
        owned = len(self._read) + len(p.box)
        if not p.phrases or len(p.phrases) != owned:
            raise BadInput(
                f"paint_with_words has {len(p.phrases)} phrases for {owned} regions; give each region (masks, then map "
                f"colours, then boxes) its phrase."
            )
        for name, given_numbers in (("weights", p.weights), ("seeds", p.seeds)):
            if given_numbers and len(given_numbers) != owned:
                raise BadInput(f"{name} of paint_with_words has {len(given_numbers)} numbers for {owned} phrases.")
        if any(seed < 0 for seed in p.seeds):
            raise BadInput(f"seeds of paint_with_words are {p.seeds}; each must be 0 or above.")

    def start(self, run: Run) -> None:
        """Finds the phrases in every prompt and lays out the regions. Raises NoMatch, BadInput, NotSupported."""
        if not any(_sees_text(site) for site in run.sites):
            raise NotSupported(
                f"paint_with_words needs attention from picture to text, and {run.model.name} has none; "
                f"{families_with('text_attention')}."
            )
        words = run.words
        found = [[words.find(prompt, phrase) for phrase in self.params.phrases] for prompt in run.prompts]
        self.activity.tokens.update({span.label: 1 for each in found for spans in each for span in spans})
        self._regions = masks.regions(self._read, self.params.box, run.size)
        for phrase, region in zip(self.params.phrases, self._regions, strict=True):
            if not region.any():
                raise BadInput(f"nothing is painted for {phrase!r}: its region is empty.")
        self._painted: dict[tuple[Any, ...], Tensor] = {}

    def on_text(self, run: Run, condition: Condition) -> Condition:
        if run.compose:
            raise Conflict("paint_with_words places the words of one prompt; it cannot serve composed ones as well.")
        self._positions = [  # only now: shape_guided may have laid the text out anew
            [[p for span in run.words.find(prompt, phrase) for p in span.positions] for phrase in self.params.phrases]
            for prompt in run.prompts
        ]
        return condition

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        """The noise of each region from its own seed, so that an object stays while the others are drawn again."""
        if not self.params.seeds or self.strength == 0:
            return x
        if run.begin or (run.request is not None and run.request.source.pixels is not None):
            raise BadInput("seeds of paint_with_words set the noise a run begins from; this one begins from a picture.")
        for seed, region in zip(self.params.seeds, self._regions, strict=True):
            noise = randn_tensor(tuple(x.shape[1:]), generator=rng.stream("sample", seed), dtype=x.dtype)
            inside = mask_ops.on_grid(region, run.grid).to(x)
            x = torch.where(inside > 0, run.model.prepare(noise.to(x), run.scheduler), x)
        return x

    def taps(self) -> Sequence[Tap]:
        if self.strength == 0:
            return []
        return [Tap(_sees_text, edit_scores=self._edit, name="paint_with_words")]

    # -- inside attention ----------------------------------------------------------------------------------------------

    def _edit(self, call: Call) -> Tensor | None:
        if "cond" not in call.rows:
            return None  # the unconditional branch of a family that runs it alone
        step: Step = call.step
        scores = call.scores()
        image, text, rows = call.image, call.text, call.rows["cond"]
        block = scores[rows][:, :, image, text]
        painted = self._paint(call.site, text.stop - text.start).to(block)
        raised = block + (self._weight(step, block) * painted)[:, None]
        scores = scores.clone()
        scores[rows, :, image, text] = raised
        self.mark(step, sites=[call.site.path])
        return scores

    def _weight(self, step: Step, scores: Tensor) -> Tensor:
        """w / sqrt(d) (b 1 1) for scores (b k n t) that are scaled already, so that Q K^T / sqrt(d) takes the place of
        Q K^T on either side of the formula."""
        sigma = noise_level(step)
        if self.params.scale == "max":
            size, level = scores.amax((1, 2, 3)).clamp_min(0), math.log1p(sigma)
        else:
            size, level = scores.flatten(1).std(1), math.log1p(sigma**2)
        return (self.strength * level * size)[:, None, None]

    def _paint(self, site: Site, length: int) -> Tensor:
        """A (b n t): how much of each pixel of a site's grid belongs to each token, times the phrase's weight. Regions
        of one phrase are joined, different phrases that share a token add up."""
        key = (site.grid, length)
        if key not in self._painted:
            assert site.grid is not None
            cover = mask_ops.area(self._regions, site.grid).flatten(1)
            painted = torch.zeros(len(self._positions), cover.shape[1], length)
            weights = self.params.weights or [1.0] * len(cover)
            phrases: dict[tuple[str, float], list[int]] = {}
            for i, (phrase, weight) in enumerate(zip(self.params.phrases, weights, strict=True)):
                phrases.setdefault((phrase.lower(), weight), []).append(i)
            for (_, weight), owned in phrases.items():
                joined = cover[owned].amax(0)
                for sample, positions in enumerate(self._positions):
                    painted[sample][:, sorted(set(positions[owned[0]]))] += weight * joined[:, None]
            self._painted[key] = painted
        return self._painted[key]


def noise_level(step: Step) -> float:
    """sigma / alpha of a step, the noise of Karras et al. 2022's scaling, for every family; at most 14.6."""
    alpha, sigma = step.path.alpha_sigma(step.t)
    return LARGEST_SIGMA if alpha * LARGEST_SIGMA <= sigma else sigma / alpha


def _sees_text(site: Site) -> bool:
    return site.kind in ("cross", "joint") and site.text is not None and site.grid is not None
