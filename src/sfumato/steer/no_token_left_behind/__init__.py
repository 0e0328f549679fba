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

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from sfumato import cards, masks, rng
from sfumato.cards import Card, Field, ModelPath, Template, register
from sfumato.errors import BadInput
from sfumato.models.readers import PLAIN, load_clip
from sfumato.relevance.clip import ClipExplainer
from sfumato.sampling import Intervention, Run, Step
from sfumato.sampling.intervention import Coverage
from sfumato.sampling.state import sample_axes
from sfumato.steer.no_token_left_behind.diagnosis import diagnose, subjects
from sfumato.steer.no_token_left_behind.explained_loss import ExplainedLoss, LossParts, Region, Target
from sfumato.steer.no_token_left_behind.learned_prompt import LearnedPrompt, learn_prompt
from sfumato.steer.no_token_left_behind.optimising import Optimised, optimise
from sfumato.steer.no_token_left_behind.views import cut_outs
from sfumato.windows import Window

__all__ = [
    "ExplainedLoss",
    "LearnedPrompt",
    "NoTokenLeftBehind",
    "Optimised",
    "Region",
    "Target",
    "cut_outs",
    "diagnose",
    "learn_prompt",
    "optimise",
]


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
        template: Template = Field(default="{}", description="sentence around a phrase of a region; {} stands for it")
        strength: float = Field(
            default=0.2,
            ge=0,
            description="how far each step moves the clean picture that it predicts",
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
            description="take gradients through the denoiser, or cheaper of the predicted picture alone",
        )
        clip: ModelPath = Field(default=PLAIN, description="a built-in CLIP or the folder of a CLIPModel")
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
        self.keeps_graph = p.through == "denoiser" and p.strength > 0
        self.guided: list[Guided] = []
        self.activity = Coverage()

    def start(self, run: Run) -> None:
        """Finds the words. Raises NoMatch for words that no prompt has, UnknownName for a CLIP that is not there."""
        p = self.params
        if run.samples.start == 0:
            self.guided = []
        explainer = ClipExplainer(load_clip(p.clip, device=str(run.model.device)))
        readings = [explainer.read(prompt) for prompt in run.prompts]
        spans = subjects(readings, p.words) if p.words or not p.phrases else [[] for _ in readings]
        layers = masks.regions(self._read, p.box, run.size)
        regions = tuple(
            Region(p.template.format(phrase), layer) for phrase, layer in zip(p.phrases, layers, strict=True)
        )
        self._targets = [
            Target(prompt, tuple(span.tokens["clip"] for span in found), regions)
            for prompt, found in zip(run.prompts, spans, strict=True)
        ]
        self._guided = [Guided(tuple(span.label for span in found)) for found in spans]
        self.guided += self._guided
        self.activity.tokens.update({label: 1 for one in self._guided for label in (*one.words, *p.phrases)})
        self._loss = ExplainedLoss(
            explainer,
            similarity=p.similarity,
            explain=p.explain,
            spatial=p.spatial,
            cutouts=p.cutouts,
            augment=p.augment,
            image_start=p.image_start,
        )

    def after_predict(self, step: Step) -> None:
        """Moves the predicted clean picture down the gradient of the loss, by ``strength`` times sigma / alpha but at
        most ``strength``; the direction of classifier guidance (Dhariwal and Nichol 2021), its length set."""
        if self.strength == 0:
            return
        parts: list[LossParts] = []

        def loss(clean: Tensor) -> Tensor:
            # views depend on the sample's seed and the step alone
            generators = rng.generators("no_token_left_behind.views", step.run.seeds, step.i)
            parts.append(self._loss(step.run.model.decode(clean), self._targets, generators))
            return parts[0].total

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
        for one, total, relevance in zip(self._guided, parts[0].total.tolist(), parts[0].relevance, strict=True):
            one.losses[step.i] = total
            one.relevance[step.i] = relevance
        self.mark(step)

    def finish(self, run: Run) -> None:
        del self._targets, self._guided, self._loss

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
