"""No Token Left Behind: CLIP's own explanation as a loss, so that it ignores no word and looks in the right place.

CLIP scores a picture high although half of the text is missing, because its score rests on the other half. Paiss,
Chefer and Wolf 2022 (arXiv 2204.04908) therefore explain the score - how much does it rest on each word, on each
patch - and put the explanation into whatever loss CLIP guides:

- :class:`ExplainedLoss`: the loss itself, for pictures of any origin;
- :class:`NoTokenLeftBehind`: a diffusion model guided by it while it draws (diffusion is ours);
- :func:`optimise`: latents optimised directly, from noise or from a picture (sections 4.2 and 4.4);
- :func:`learn_prompt`: prompts for classification learnt from one picture per class (section 4.1, on CoOp);
- :func:`diagnose`: which words of a text a picture's score rests on (section 4.3).

    >>> guide = NoTokenLeftBehind(words=["cat", "frog"])
    >>> result = generate(model, "a cat and a frog", interventions=guide)
    >>> there = NoTokenLeftBehind(phrases=["cat"], box=[[0, 0.4, 0.5, 1]])
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from sfumato import cards, files, masks, rng
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, NoMatch
from sfumato.metrics.geometry import spherical_distance
from sfumato.models import Model
from sfumato.models.readers import PLAIN, load_clip
from sfumato.models.slot import frozen, in_place
from sfumato.relevance.clip import ClipLens
from sfumato.sampling import Intervention, Run, Step
from sfumato.sampling.intervention import Coverage
from sfumato.sampling.request import as_pictures
from sfumato.sampling.state import sample_axes
from sfumato.text.phrases import noun_phrases
from sfumato.text.words import Reading, WordSpan, asked_for
from sfumato.windows import Window

__all__ = [
    "ExplainedLoss",
    "LearnedPrompt",
    "NoTokenLeftBehind",
    "Optimised",
    "Region",
    "Wish",
    "cut_outs",
    "diagnose",
    "learn_prompt",
    "optimise",
]

SHARPNESS, LEVEL = 20.0, 0.1  # relevance, its maximum 1, becomes a mask by sigmoid(20 (r - 0.1)) (the authors' code)


# --- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Region:
    """What shall be where: a text, and its mask (H W) in [0, 1] on the picture."""

    text: str
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Wish:
    """What one picture shall show: its text, the token positions of the words that must count, and regions."""

    text: str
    words: tuple[tuple[int, ...], ...] = ()
    regions: tuple[Region, ...] = ()


@dataclass(eq=False)
class Parts:
    """The parts of a loss, each (b), and ``relevance``: per picture that of each wished word, from 0 to 1."""

    total: Tensor
    similarity: Tensor
    words: Tensor
    regions: Tensor
    relevance: list[list[float]] = field(default_factory=list)


class ExplainedLoss:
    """How far pictures are from wishes, for CLIP and for what CLIP's score rests on; one number per picture.

    - similarity: squared spherical distance 2 arcsin(|a - b| / 2)^2 of picture and text;
    - ``explain`` times 1 - the mean over the wished words of their relevance, the most relevant word of the text having
      1 and a word's being that of its best token (section 4.3; the text tower, all layers);
    - per region the distance of its text to the whole picture and to the picture inside the mask, their mean, less
      ``spatial`` / sqrt(share of the area) times the overlap (Dice) of the mask with where the score of its text looks
      (section 4.4; the image tower, last layer).

    All are means over ``cutouts`` views of the picture, each distorted on its own, which makes it harder to raise the
    figures without drawing anything. ``augment`` 1 distorts as the authors do, 0 not at all.
    """

    def __init__(
        self,
        lens: ClipLens,
        *,
        similarity: float = 1.0,
        explain: float = 1.0,
        spatial: float = 0.15,
        cutouts: int = 8,
        augment: float = 1.0,
        image_start: int = -1,
        second_order: bool = True,
    ):
        self.lens, self.cutouts, self.augment = lens, cutouts, augment
        self.similarity, self.explain, self.spatial = similarity, explain, spatial
        self.image_start, self.second_order = image_start, second_order

    def __call__(self, images: Tensor, wishes: Sequence[Wish], generators: Sequence[torch.Generator]) -> Parts:
        """The loss of pictures (b 3 H W) in [-1, 1], each with its wish and the generator of its views."""
        views, spots = [], []
        for image, wish, generator in zip(images, wishes, generators, strict=True):
            covers = torch.stack([region.mask for region in wish.regions]).to(image) if wish.regions else None
            seen, cover = cut_outs(image, covers, self.cutouts, self.lens.clip.side, self.augment, generator)
            views.append(seen)
            spots.append(cover)
        seen = torch.stack(views)  # (b c 3 s s)
        similarity, words, relevance = self._text(seen, wishes)
        regions = self._regions(seen, wishes, spots)
        total = self.similarity * similarity + self.explain * words + regions
        return Parts(total, similarity, words, regions, relevance)

    def _text(self, seen: Tensor, wishes: Sequence[Wish]) -> tuple[Tensor, Tensor, list[list[float]]]:
        """Distance to the whole text (b), neglect of its wished words (b), their relevance."""
        b, c = seen.shape[:2]
        texts = [wish.text for wish in wishes for _ in range(c)]
        wanted = self.explain > 0 and any(wish.words for wish in wishes)
        looked = self.lens.look(seen.flatten(0, 1), texts, text=wanted, second_order=self.second_order)
        near = spherical_distance(looked.image_embeds, looked.text_embeds).unflatten(0, (b, c)).mean(1)
        if not wanted:
            return near, torch.zeros_like(near), [[] for _ in wishes]
        row = looked.tokens()
        row = (row / row.amax(-1, keepdim=True).clamp_min(1e-12)).unflatten(0, (b, c))
        neglect: list[Tensor] = []
        told: list[Any] = []
        for one, wish in zip(row, wishes, strict=True):
            if not wish.words:
                neglect.append(near.new_zeros(()))
                told.append([])
                continue
            best = torch.stack([one[:, list(positions)].amax(-1) for positions in wish.words], 1)  # (c words)
            neglect.append(1 - best.mean())
            told.append(best.detach().mean(0).tolist())
        return near, torch.stack(neglect), told

    def _regions(self, seen: Tensor, wishes: Sequence[Wish], spots: Sequence[Tensor | None]) -> Tensor:
        """The regions' part (b), the mean over the regions of a picture."""
        rows = [(i, k) for i, wish in enumerate(wishes) for k in range(len(wish.regions))]
        if not rows:
            return seen.new_zeros(len(seen))
        c = seen.shape[1]
        texts = [wishes[i].regions[k].text for i, k in rows for _ in range(c)]
        whole = torch.cat([seen[i] for i, _ in rows])
        mask = torch.cat([spots[i][:, k] for i, k in rows])  # type: ignore[index]
        looked = self.lens.look(
            whole, texts, image=self.spatial > 0, image_start=self.image_start, second_order=self.second_order
        )
        inside = self.lens.look(whole * mask[:, None], texts)
        near = (
            spherical_distance(looked.image_embeds, looked.text_embeds)
            + spherical_distance(inside.image_embeds, inside.text_embeds)
        ) / 2
        if self.spatial > 0:
            share = torch.cat([wishes[i].regions[k].mask.mean().clamp_min(1e-3).expand(c) for i, k in rows]).to(near)
            near = near - self.spatial * share.rsqrt() * overlap(looked.patches(), mask)
        out = seen.new_zeros(len(seen))
        for (i, _), each in zip(rows, near.unflatten(0, (len(rows), c)).mean(1), strict=True):
            out = out + F.one_hot(torch.tensor(i), len(seen)).to(out) * each / len(wishes[i].regions)
        return out


def overlap(patches: Tensor, mask: Tensor) -> Tensor:
    """Dice (b) of masks (b s s) with relevance (b h w) made a soft mask: enlarged, its maximum 1, sharpened."""
    large = F.interpolate(patches[:, None].float(), size=tuple(mask.shape[-2:]), mode="bicubic")[:, 0].clamp_min(0)
    large = large / large.amax((1, 2), keepdim=True).clamp_min(1e-12)
    looks = torch.sigmoid(SHARPNESS * (large - LEVEL))
    inside, outside = (looks * mask).sum((1, 2)), (looks * (1 - mask)).sum((1, 2))
    return 2 * inside / (2 * inside + outside).clamp_min(1e-12)


def cut_outs(
    image: Tensor, covers: Tensor | None, count: int, side: int, augment: float, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """``count`` square views (c 3 s s) of a picture (3 H W), and with each the masks (r H W), moved alike (c r s s).

    Every view is turned (15 degrees), shifted (a tenth) and seen at an angle, each with a chance of 0.7, then its
    colours are weakened or strengthened, a rectangle is erased and noise added (to the picture alone); ``augment``
    scales it all. A picture that is not square is seen whole, its borders continued.
    """
    height, width = image.shape[-2:]
    longest = max(height, width)
    if longest > side:
        small = (max(1, round(height * side / longest)), max(1, round(width * side / longest)))
        image = F.interpolate(image[None], size=small, mode="bicubic", antialias=True)[0]
    draw = torch.rand(count, 14, generator=generator)
    noise = torch.randn(count, 3, side, side, generator=generator)
    spread = 2 * draw[:, :5] - 1
    on = (draw[:, 5:9] < 0.7).float() * augment
    angle = spread[:, 0] * on[:, 0] * math.pi / 12
    shift = spread[:, 1:3] * on[:, :1] * 0.2  # a tenth of the picture, which is 2 wide here
    tilt = spread[:, 3:5] * on[:, 1:2] * 0.25
    ticks = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    depth = 1 + tilt[:, 0, None, None] * x + tilt[:, 1, None, None] * y
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    u = (cos * x - sin * y) / depth + shift[:, 0, None, None]
    v = (sin * x + cos * y) / depth + shift[:, 1, None, None]
    grid = torch.stack([u * longest / width, v * longest / height], -1).to(image)

    def moved(what: Tensor) -> Tensor:
        spread_out = what[None].expand(count, -1, -1, -1)
        return F.grid_sample(spread_out, grid, mode="bilinear", padding_mode="border", align_corners=False)

    seen = moved(image)
    gray = seen.mean(1, keepdim=True)
    color = (1 + 0.1 * (2 * draw[:, 9] - 1) * on[:, 2]).view(-1, 1, 1, 1).to(seen)
    seen = gray + (seen - gray) * color
    place, reach = draw[:, 10:12] * 2 - 1, 0.1 + 0.25 * draw[:, 12:13]
    erased = ((x - place[:, 0, None, None]).abs() < reach[:, :, None]) & (
        (y - place[:, 1, None, None]).abs() < reach[:, :, None]
    )
    keep = 1 - erased[:, None].to(seen) * (on[:, 3] > 0).view(-1, 1, 1, 1).to(seen)
    seen = seen * keep + 0.1 * augment * draw[:, 13].view(-1, 1, 1, 1).to(seen) * noise.to(seen)
    return seen, None if covers is None else moved(covers).round()


def diagnose(images: Tensor, texts: Sequence[str], words: Sequence[str] = (), clip: str = PLAIN) -> list[dict]:
    """Per picture (b 3 H W) with its text, how much CLIP's score rests on each of ``words`` (none: the nouns): the most
    relevant word of the text has 1. Low ones are neglected; compare with pictures that do show everything."""
    lens = ClipLens(load_clip(clip))
    readings = [lens.read(text) for text in texts]
    spans = subjects(readings, words)
    with torch.no_grad():
        views = [cut_outs(image, None, 1, lens.clip.side, 0.0, torch.Generator())[0] for image in images]
        row = lens.look(torch.cat(views), list(texts), text=True).tokens()
    row = row / row.amax(-1, keepdim=True).clamp_min(1e-12)
    return [
        {span.label: float(each[list(span.tokens["clip"])].max()) for span in found}
        for each, found in zip(row, spans, strict=True)
    ]


def subjects(readings: Sequence[Reading], words: Sequence[str]) -> list[list[WordSpan]]:
    """Per text its wished words: those of ``words`` that it has, or the heads of its noun phrases. Raises NoMatch."""
    if words:
        return asked_for(readings, words)
    found = []
    for reading in readings:
        heads = [phrase.head.start for phrase in noun_phrases(reading.prompt)]
        found.append([span for span in reading.all() if any(span.start <= at < span.end for at in heads)])
        if not found[-1]:
            raise NoMatch(
                f"no_token_left_behind: {reading.prompt!r} has no noun that is recognised; name words of it. "
                f"Its words: {', '.join(span.label for span in reading.all())}."
            )
    return found


# --- guiding a diffusion model ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Guided:
    """One guided picture: its ``words``, and by step the loss and the relevance of each word."""

    words: tuple[str, ...]
    losses: dict[int, float] = field(default_factory=dict)
    relevance: dict[int, list[float]] = field(default_factory=dict)


@register
class NoTokenLeftBehind(Intervention):
    """CLIP guidance that no word escapes. Afterwards ``guided`` holds one :class:`Guided` per sample."""

    CARD = Card(
        key="no_token_left_behind",
        title="No Token Left Behind: Explainability-Aided Image Classification and Generation",
        authors="Paiss, Chefer, Wolf",
        year=2022,
        arxiv="2204.04908",
        verb="steer",
        needs=("pictures", "noise_path", "differentiable_state"),
        defaults_from="the authors' code: weights of the terms, sharpness, distortions; guiding diffusion is ours",
        cost="per guided step: 1 backward of the step's own prediction, a decoding and 3 passes of a CLIP per view",
        not_reproduced="StyleGAN2, BigGAN and VQGAN as generators; hue jitter, for here colours are words",
        summary="CLIP guidance in which every word counts and phrases stay in their boxes",
        example="no_token_left_behind:words=[cube|ball],cutouts=2",
    )

    class Params(cards.Params):
        words: list[str] = Field(
            default=[], description="words or phrases that must count; none: the nouns of the prompt"
        )
        phrases: list[str] = Field(default=[], description="what shall be where: a phrase per region")
        box: masks.Boxes = Field(
            default=[], description="a box x0|y0|x1|y1 per phrase, as fractions of the picture or in pixels"
        )
        mask: masks.MaskTexts = Field(default=[], description="a picture per phrase, white where it shall be")
        template: str = Field(default="{}", description="sentence around a phrase of a region; {} stands for it")
        strength: float = Field(
            default=0.2,
            ge=0,
            description="how far each step moves the clean picture that it foresees",
            json_schema_extra={"unit": "spread of the latents"},
        )
        similarity: float = Field(default=1.0, ge=0, description="weight of CLIP's score itself")
        explain: float = Field(default=1.0, ge=0, description="weight of the words' relevance; 0: plain CLIP guidance")
        spatial: float = Field(
            default=0.15, ge=0, description="weight of the overlap of region and relevance; 0: masked similarity alone"
        )
        image_start: int = Field(
            default=-1, description="first layer of the image tower to explain, 0 all, -1 the last alone"
        )
        cutouts: int = Field(default=8, ge=1, le=256, description="distorted views of the picture per step")
        augment: float = Field(default=0.5, ge=0, le=1, description="how much views are distorted, 1 as the authors do")
        through: Literal["denoiser", "picture"] = Field(
            default="denoiser",
            description="take gradients through the denoiser, or cheaper of the foreseen picture alone",
        )
        clip: str = Field(default=PLAIN, description="a built-in CLIP or the folder of a CLIPModel")
        window: Window = Field(
            default=(0.0, 1.0), description="share of the denoising to act in", json_schema_extra={"unit": "progress"}
        )

    role = "guider"

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        p = self.params
        self.window = p.window
        self._read = [masks.read_mask(mask) for mask in p.mask]
        owned = len(self._read) + len(p.box)
        if len(p.phrases) != owned:
            raise BadInput(
                f"no_token_left_behind has {len(p.phrases)} phrases for {owned} regions; give each mask, then each "
                f"box, its phrase."
            )
        if p.template.count("{}") != 1:
            raise BadInput(f"template of no_token_left_behind is {p.template!r}; it must hold {{}} once.")
        self.keeps_graph = p.through == "denoiser" and p.strength > 0
        self.guided: list[Guided] = []
        self.activity = Coverage()

    def start(self, run: Run) -> None:
        """Finds the words. Raises NoMatch for words that no prompt has, UnknownName for a CLIP that is not there."""
        p = self.params
        if run.samples.start == 0:
            self.guided = []
        lens = ClipLens(load_clip(p.clip, device=str(run.model.device)))
        readings = [lens.read(prompt) for prompt in run.prompts]
        spans = subjects(readings, p.words) if p.words or not p.phrases else [[] for _ in readings]
        layers = masks.regions(self._read, p.box, run.size)
        regions = tuple(
            Region(p.template.format(phrase), layer) for phrase, layer in zip(p.phrases, layers, strict=True)
        )
        self._wishes = [
            Wish(prompt, tuple(span.tokens["clip"] for span in found), regions)
            for prompt, found in zip(run.prompts, spans, strict=True)
        ]
        self._guided = [Guided(tuple(span.label for span in found)) for found in spans]
        self.guided += self._guided
        self.activity.tokens.update({label: 1 for one in self._guided for label in (*one.words, *p.phrases)})
        self._loss = ExplainedLoss(
            lens,
            similarity=p.similarity,
            explain=p.explain,
            spatial=p.spatial,
            cutouts=p.cutouts,
            augment=p.augment,
            image_start=p.image_start,
        )

    def after_predict(self, step: Step) -> None:
        """Moves the foreseen clean picture down the gradient of the loss, by ``strength`` times sigma / alpha but at
        most ``strength``; the direction of classifier guidance (Dhariwal and Nichol 2021), its length set."""
        if self.strength == 0:
            return
        told: list[Parts] = []

        def loss(clean: Tensor) -> Tensor:
            # views depend on the sample's seed and the step alone
            generators = rng.generators("no_token_left_behind.views", step.run.seeds, step.i)
            told.append(self._loss(step.run.model.decode(clean), self._wishes, generators))
            return told[0].total

        x0 = step.x0.detach()
        if self.params.through == "denoiser":
            guided = "guided" if "uncond" in step.branches else "cond"
            gradient = step.grad(lambda prediction: loss(prediction.x0(guided)), branches=step.branches)
        else:
            step.run.freeze()
            with torch.enable_grad():
                clean = x0.clone().requires_grad_(True)
                (gradient,) = torch.autograd.grad(loss(clean).sum(), clean)
        alpha, sigma = step.path.alpha_sigma(step.t)
        size = self.strength * (1.0 if sigma >= alpha else sigma / alpha)
        gradient = gradient.float()
        length = gradient.square().mean(sample_axes(gradient), keepdim=True).sqrt()
        moved = x0.float() - size * gradient / length.clamp_min(torch.finfo(torch.float32).tiny)
        step.output = step.path.from_x0(step.x.detach().float(), moved, step.t).to(x0.dtype)
        for one, total, relevance in zip(self._guided, told[0].total.tolist(), told[0].relevance, strict=True):
            one.losses[step.i] = total
            one.relevance[step.i] = relevance
        self.mark(step)

    def finish(self, run: Run) -> None:
        del self._wishes, self._guided, self._loss

    def pictures(self, result: Any, index: int) -> dict[str, Image.Image]:
        """The picture, and how much the score rested on each word while it was drawn."""
        one = self.guided[index]
        return {"guided": _chart(result.images[index], one)} if one.words and one.relevance else {}


def _chart(image: Image.Image, one: Guided) -> Image.Image:
    import io

    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure((6, 2.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(np.asarray(image.convert("RGB")))
    left.axis("off")
    steps = sorted(one.relevance)
    for k, word in enumerate(one.words):
        right.plot(steps, [one.relevance[i][k] for i in steps], label=word)
    right.set_xlabel("step")
    right.set_ylabel("relevance to CLIP's score")
    right.set_ylim(0, 1.05)
    right.legend(fontsize=8)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    return Image.open(encoded).convert("RGB")


# --- optimising latents ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Optimised:
    """Optimised ``latents`` (b c h w), their ``pixels`` (b 3 H W), and the loss of each picture by iteration (n b)."""

    latents: Tensor
    pixels: Tensor
    losses: Tensor

    @property
    def images(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        return as_pictures(self.pixels)


def optimise(
    model: Model,
    prompts: str | Sequence[str],
    *,
    words: Sequence[str] = (),
    regions: Sequence[Sequence[Region]] = (),
    image: Tensor | None = None,
    steps: int = 300,
    rate: float = 0.1,
    anchor: float = 0.008,
    limit: float = 3.0,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    clip: str = PLAIN,
    on_step: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Optimised:
    """Optimise the latents of a model's codec by the explained loss; the denoiser takes no part.

    Args:
        prompts: one per picture. ``words``: those that must count (none: the nouns).
        regions: per picture what shall be where.
        image: pictures (b 3 H W) in [-1, 1] to begin from; without them noise, one seed per picture from ``seed`` on.
        steps, rate: of Adam; the rate rises over the first 5 % and falls over the last quarter (StyleCLIP's schedule).
        anchor: weight of the squared distance to the latents of ``image``, summed over them (0 without one).
        limit: latents stay within +- this many of their own spread (VQGAN+CLIP: within the codebook's range).
        size: (width, height) where there is no picture.
        options: of :class:`ExplainedLoss`.

    Raises NoMatch for words, BadInput for unequal numbers.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    lens = ClipLens(load_clip(clip, device=str(model.device)))
    found = subjects([lens.read(text) for text in texts], words)
    placed = list(regions) or [()] * len(texts)
    if len(placed) != len(texts) or (image is not None and len(image) != len(texts)):
        raise BadInput(f"optimise: {len(texts)} prompts need as many pictures and lists of regions.")
    wishes = [
        Wish(text, tuple(span.tokens["clip"] for span in spans), tuple(each))
        for text, spans, each in zip(texts, found, placed, strict=True)
    ]
    loss = ExplainedLoss(lens, **options)
    with frozen(model):
        with torch.no_grad():
            first = _first_latents(model, len(texts), image, seed, size)
        z = first.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([z], lr=rate)
        history = []
        for k in range(steps):
            part = (k + 1) / steps
            fade = min(1.0, (1 - part) / 0.25)
            optimizer.param_groups[0]["lr"] = rate * min(1.0, part / 0.05) * (0.5 - 0.5 * math.cos(math.pi * fade))
            generators = [rng.stream("no_token_left_behind.views", seed + i, k) for i in range(len(texts))]
            with torch.enable_grad():
                each = loss(model.decode(z), wishes, generators).total
                total = each.sum()
                if image is not None and anchor:
                    total = total + anchor * (z - first).square().sum()
                (z.grad,) = torch.autograd.grad(total, z)
            optimizer.step()
            with torch.no_grad():
                z.clamp_(-limit, limit)
            history.append(each.detach())
            if on_step is not None:
                on_step(k + 1, steps)
        with torch.no_grad():
            pixels = model.decode(z.detach())
    return Optimised(z.detach(), pixels, torch.stack(history) if history else torch.zeros(0, len(texts)))


def _first_latents(model: Model, n: int, image: Tensor | None, seed: int, size: tuple[int, int] | None) -> Tensor:
    if image is not None:
        return model.encode_image(image.to(model.device, model.dtype)).float()
    height, width = model.default_size if size is None else (size[1], size[0])
    shape = (n, *model.latent_shape(height, width))
    generators = rng.generators("sample", range(seed, seed + n))
    return randn_tensor(shape, generator=generators, device=model.device, dtype=torch.float32)


# --- learning prompts ------------------------------------------------------------------------------------------------

FORMAT = "sfumato-learned-prompt-1"


@dataclass(eq=False)
class LearnedPrompt:
    """A prompt of learnt vectors for CLIP classification: half of ``context`` (n d), the class name, the other half.

    ``losses``: (epochs); ``shares``: the mean relevance of the right class's name over the epochs.
    """

    clip: str
    classes: tuple[str, ...]
    context: Tensor
    losses: Tensor
    shares: Tensor

    def logits(self, images: Tensor) -> Tensor:
        """(b classes) of pictures (b 3 H W) in [-1, 1]."""
        lens = ClipLens(load_clip(self.clip))
        with torch.no_grad():
            return (
                _scale(lens)
                * _embed(lens, images)
                @ _Slots(lens, self.classes, len(self.context)).embeds(self.context).T
            )

    def classify(self, images: Tensor) -> list[str]:
        """The best class of each picture (b 3 H W) in [-1, 1]."""
        return [self.classes[i] for i in self.logits(images).argmax(1).tolist()]

    def save(self, path: Path | str) -> Path:
        """Write it as safetensors, whole or not at all."""
        facts = {"clip": self.clip, "classes": list(self.classes)}
        tensors = {name: getattr(self, name) for name in ("context", "losses", "shares")}
        return files.save_tensors(path, tensors, {"format": FORMAT, "facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path | str) -> LearnedPrompt:
        """What :meth:`save` wrote. Raises BadInput for any other file, OSError when it cannot be read."""
        with files.reading_tensors(path, FORMAT, "learnt prompt") as (file, metadata):
            facts = json.loads(metadata["facts"])
            tensors = [file.get_tensor(name) for name in ("context", "losses", "shares")]
            return cls(facts["clip"], tuple(facts["classes"]), *tensors)


def learn_prompt(
    images: Tensor,
    labels: Sequence[int],
    classes: Sequence[str],
    *,
    explain: float = 1.0,
    others: bool = True,
    context: int = 16,
    epochs: int = 50,
    rate: float = 0.002,
    batch: int = 32,
    flip: bool = True,
    seed: int = 0,
    clip: str = PLAIN,
    on_epoch: Callable[[int, int], None] | None = None,
) -> LearnedPrompt:
    """Learn the prompt around class names from a few labelled pictures (CoOp, Zhou et al. 2022), so that CLIP decides
    by the names and not by the words learnt around them.

    With s_c the relevance of the most relevant token of class c's name, as a share of all tokens but the end token, the
    loss of a picture of class y is cross entropy + ``explain`` (mean over the others of s_c - s_y); ``explain`` 0 is
    CoOp. Gradients inside s are held fixed, as in the authors' code.

    Args:
        images: (b 3 H W) in [-1, 1]. ``labels``: index of each one's class. ``classes``: their names.
        others: whether the names of wrong classes are to lose relevance.
        context: how many vectors are learnt, half of them before the name. ``rate``: of SGD with momentum, falling as a
            cosine after one epoch at 1e-5.
        flip: mirror pictures at random.

    Raises BadInput for labels out of range, fewer than two classes, or names too long for the text tower.
    """
    if len(classes) < 2 or len(images) != len(labels) or not len(labels):
        raise BadInput(f"learn_prompt: {len(images)} pictures, {len(labels)} labels and {len(classes)} classes given.")
    if min(labels) < 0 or max(labels) >= len(classes):
        raise BadInput(
            f"learn_prompt: labels run from {min(labels)} to {max(labels)}; the {len(classes)} classes from 0."
        )
    lens = ClipLens(load_clip(clip))
    slots = _Slots(lens, classes, context)
    generator = torch.Generator().manual_seed(seed)
    width = int(lens.model.config.text_config.hidden_size)
    vectors = (0.02 * torch.randn(context, width, generator=generator)).requires_grad_(True)
    optimizer = torch.optim.SGD([vectors], lr=rate, momentum=0.9, weight_decay=5e-4)
    target = torch.tensor(list(labels))
    losses, shares = [], []
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 1e-5 if epoch == 0 else rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        seen, share = 0.0, 0.0
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            views = images[rows]
            if flip:
                mirrored = torch.rand(len(rows), generator=generator) < 0.5
                views = torch.where(mirrored.view(-1, 1, 1, 1), views.flip(-1), views)
            with torch.no_grad():
                pictures = _embed(lens, views)
            with torch.enable_grad():
                if explain:
                    cosines, relevance = slots.relevance(vectors, pictures)
                    right = F.one_hot(target[rows], len(classes)).to(relevance)
                    own, rest = (relevance * right).sum(1).mean(), (relevance * (1 - right)).mean()
                    share += float(own.detach()) * len(rows)
                    extra = explain * (rest * others - own)
                else:
                    cosines, extra = pictures @ slots.embeds(vectors).T, 0.0
                loss = F.cross_entropy(_scale(lens) * cosines, target[rows]) + extra
                (vectors.grad,) = torch.autograd.grad(loss, vectors)
            optimizer.step()
            seen += float(loss.detach()) * len(rows)
        losses.append(seen / len(images))
        shares.append(share / len(images))
        if on_epoch is not None:
            on_epoch(epoch + 1, epochs)
    return LearnedPrompt(clip, tuple(classes), vectors.detach(), torch.tensor(losses), torch.tensor(shares))


def _scale(lens: ClipLens) -> float:
    return float(lens.model.logit_scale.detach().exp())


def _embed(lens: ClipLens, images: Tensor) -> Tensor:
    """Unit embeddings (b d) of pictures (b 3 H W)."""
    seen = lens.model.vision_model(pixel_values=lens.prepare(images)).pooler_output
    return F.normalize(lens.model.visual_projection(seen).float(), dim=-1)


class _Slots:
    """Prompts of ``count`` slots with a class name in the middle, for all classes."""

    def __init__(self, lens: ClipLens, classes: Sequence[str], count: int):
        tokenizer, self.lens = lens.tokenizer, lens
        half = count // 2
        names = [tokenizer(name, add_special_tokens=False).input_ids for name in classes]
        longest = max(map(len, names)) + count + 2
        if longest > lens.length:
            raise BadInput(
                f"learn_prompt: {count} vectors and a class name take {longest} tokens; the CLIP reads {lens.length}."
            )
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        rows = [
            [tokenizer.bos_token_id, *[0] * half, *name, *[0] * (count - half), end]
            + [end if pad is None else pad] * (longest - len(name) - count - 2)
            for name in names
        ]
        self.ids = torch.tensor(rows)
        self.end = torch.tensor([len(name) + count + 1 for name in names])
        place = torch.arange(longest)
        size = torch.tensor([len(name) for name in names])[:, None]
        self.name = (place > half) & (place <= half + size)
        self.slot = (place > 0) & (place < self.end[:, None]) & ~self.name

    def tokens(self, rows: Tensor) -> dict[str, Tensor]:
        """Ids and mask of these classes' prompts."""
        mask = (torch.arange(self.ids.shape[1]) <= self.end[rows][:, None]).long()
        return {"input_ids": self.ids[rows], "attention_mask": mask}

    def embeds(self, context: Tensor) -> Tensor:
        """Unit embeddings (classes d) of all prompts."""
        rows = torch.arange(len(self.ids))
        with self._filled(context, rows):
            written = self.lens.model.text_model(**self.tokens(rows)).pooler_output
        return F.normalize(self.lens.model.text_projection(written).float(), dim=-1)

    def relevance(self, context: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines (b classes) with picture embeddings (b d), and the share of relevance of the most relevant token of
        each class's name (b classes); the end token's own entry does not count, the start token's does."""
        rows = torch.arange(len(self.ids)).repeat(len(pictures))
        with self._filled(context, rows):
            cosines, relevance = self.lens.explain_text(self.tokens(rows), pictures.repeat_interleave(len(self.ids), 0))
        end = self.end[rows]
        row = relevance[torch.arange(len(rows)), end]
        row = row * (torch.arange(row.shape[1]) != end[:, None])
        share = (row * self.name[rows]).amax(1) / row.sum(1).clamp_min(1e-12)
        shape = (len(pictures), len(self.ids))
        return cosines.unflatten(0, shape), share.unflatten(0, shape)

    def _filled(self, context: Tensor, rows: Tensor) -> Any:
        slot = self.slot[rows]

        def fill(ids: Tensor, embeds: Tensor) -> Tensor:
            filled = embeds.clone()
            filled[slot] = context.to(embeds).repeat(len(slot), 1)  # every prompt has all slots, in their order
            return filled

        return in_place(self.lens.model.text_model, fill)
