"""MGAD: texts and pictures guide together, each by CLIP and each with its weight.

While a picture is made, what it is going to be is looked at in random square crops; CLIP says how far these are from
each text and from crops of each reference picture, and the gradient of the weighted distances moves the sample (Huang
et al. 2022, section 3). The crops, drawn anew at every step, are the augmentation, and with the seed the source of
diversity. A noise-aware CLIP looks at the noised latents themselves instead, beside which it sees each reference
noised alike (Liu et al. 2023, arXiv 2112.05744): where a CLIP of pictures finds nothing to hold on to in the blurred
prediction of early steps, it says what is there so far.

    >>> both = MGAD(texts=["a red ball"], images=["sunset.png:0.5"], prompted=False)
    >>> generate(model, "a red ball", guidance=1, interventions=both)

Beyond the original: batches, any size and schedule, latent models, flow, and a base model that reads the prompt too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import BeforeValidator
from torch import Tensor
from torch.nn.functional import normalize

from sfumato import files, masks, rng, sheets
from sfumato.arrays import to_pixels
from sfumato.cards import Card, Field, FilePath, ModelPath, register
from sfumato.errors import NoMatch
from sfumato.metrics.geometry import spherical_distance
from sfumato.models import Condition
from sfumato.models.readers import Clip, clip_for
from sfumato.sampling import Run, Step
from sfumato.sampling.gradient import GradientGuidance, GradientParams
from sfumato.sampling.guidance_losses import Cutouts, out_of_range, shares, total_variation, weighted

__all__ = ["MGAD"]


def _as_texts(given: Any) -> Any:
    """Pictures as text: paths stay paths, with their weight; PIL pictures and arrays become embedded PNGs."""
    listed = given if isinstance(given, list | tuple) else [given]
    return [masks.as_text(each, labels=True) for each in listed]


@register
class MGAD(GradientGuidance):
    """Pulls samples towards texts and pictures in CLIP's eyes. Afterwards ``distances`` holds, per target, one list per
    step of each sample's distance (0 alike, pi^2 / 2 opposite)."""

    CARD = Card(
        key="mgad",
        title="Draw Your Art Dream: Diverse Digital Art Synthesis with Multimodal Guided Diffusion",
        authors="Huang, Tang, Dong, Xu",
        year=2022,
        arxiv="2209.13360",
        verb="steer",
        needs=("pictures", "noise_path", "differentiable_state"),
        defaults_from="the authors' code (crops, distance, weights, smoothness 400 beside 5000); strength was tuned on "
        "toy-sd and its noise-aware CLIP, for the original's 5000 belongs to 512 pixels and 2000 DDPM steps",
        cost="per step a backward pass through the denoiser, a forward and a backward pass through the decoder and one "
        "of CLIP per crop; with a noise-aware CLIP two forwards and a backward pass of it",
        not_reproduced="the secondary model that predicts the clean picture cheaply (through=decoder spares the pass "
        "through the denoiser instead), LPIPS to an initial picture, the user study",
        summary="texts and reference pictures guide together, each with a weight",
        example="mgad:texts=[a red cube|a blue ball:0.5],cutouts=2,clip=toy-clip",
    )

    class Params(GradientParams):
        strength: float = Field(default=1000.0, ge=0, description="weight of the distances; 0 off; see step")
        texts: list[str] = Field(
            default=[],
            description="what to pull towards, each with a weight after a colon if it is not 1; negative ones push "
            "away; neither texts nor images: the prompt",
        )
        images: Annotated[list[FilePath], BeforeValidator(_as_texts)] = Field(
            default=[], description="reference pictures, each with a weight after a colon if it is not 1"
        )
        prompted: bool = Field(
            default=True,
            description="the model reads the prompt itself; false: it gets no text, as in the paper, and CLIP alone "
            "says what is drawn",
        )
        cutouts: int = Field(
            default=16, ge=1, le=256, description="crops per step and per reference picture, for a CLIP of pictures"
        )
        cut_power: float = Field(
            default=0.5, gt=0, description="below 1 large crops are more likely, above 1 small ones"
        )
        smallest: float = Field(
            default=0.5, gt=0, le=1, description="side of the smallest crop", json_schema_extra={"unit": "shorter side"}
        )
        smooth: float = Field(default=0.08, ge=0, description="weight of the total variation beside the distances")
        in_range: float = Field(default=0.0, ge=0, description="weight of brightness out of range beside the distances")
        clip: ModelPath | None = Field(
            default=None,
            description="a built-in CLIP or the folder of one; none: for models of toys the noise-aware toy-clip, or "
            "toy-clip where that does not fit",
        )
        through: Literal["denoiser", "decoder"] = Field(
            default="denoiser",
            description="for a CLIP of pictures: how far back the gradient goes; decoder: an estimate in place of the "
            "pass through the denoiser, cheaper and in less memory",
        )

    def __init__(self, **given: Any):
        super().__init__(**given)
        p = self.params
        self._texts = [weighted(text, "texts of mgad:") for text in p.texts]
        self._images = [weighted(path, "images of mgad:") for path in p.images]
        self._pictures = [masks.read_labels(path, "images of mgad:") for path, _ in self._images]
        if self._texts or self._images:
            shares([weight for _, weight in self._texts + self._images], "mgad")
        self.distances: dict[str, list[list[float]]] = {}

    # -- what the loop calls -------------------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Loads the CLIP and looks at the targets. Raises NotSupported where no CLIP fits the model."""
        p = self.params
        if run.samples.start == 0:
            self.distances = {}
        if p.strength == 0:
            return
        self._clip: Clip = clip_for(run.model, p.clip, self.name)
        self.keeps_graph = not self._clip.reads_noise and p.through == "denoiser"
        self._cutouts = Cutouts(p.cutouts, p.cut_power, p.smallest)
        rows: list[tuple[str, float, Tensor]] = []  # label, weight, vectors (b or 1, m, d) or clean latents (1 c h w)
        texts = self._texts
        if not texts and not self._images:
            if not all(prompt.strip() for prompt in run.prompts):
                raise NoMatch("mgad has neither texts nor images, and a prompt that says nothing; name one of them.")
            rows.append(("the prompt", 1.0, self._clip.text(run.prompts)[:, None]))
        for text, weight in texts:
            rows.append((text, weight, self._clip.text([text])[None]))
        for number, (picture, (_, weight)) in enumerate(zip(self._pictures, self._images, strict=True), 1):
            seen = self._latents_of(picture, run) if self._clip.reads_noise else self._crops_of(picture)[None]
            rows.append((f"image {number}", weight, seen))
        weights = shares([weight for _, weight, _ in rows], "mgad")
        self._targets = [(label, weight, embeds) for (label, _, embeds), weight in zip(rows, weights, strict=True)]
        if run.samples.start == 0:
            self.distances = {label: [] for label, _, _ in self._targets}

    def on_text(self, run: Run, condition: Condition) -> Condition:
        """The empty text in the prompt's place, where the model is to get no text."""
        if self.params.prompted or self.params.strength == 0:
            return condition
        empty = run.model.encode_text([""] * len(run), None, guidance=False, embedded_guidance=condition.guidance)
        return Condition(empty.cond, condition.uncond, condition.prompts, condition.negatives, condition.guidance)

    def finish(self, run: Run) -> None:
        for name in ("_clip", "_targets", "_cutouts"):
            self.__dict__.pop(name, None)

    def gradient(self, step: Step) -> Tensor:
        if self._clip.reads_noise:
            return self.of_noised(step, lambda *noised: -self._loss_of_noised(step, *noised))
        model = step.run.model
        return self.of_prediction(step, lambda x0: -self._loss(step, model.decode(x0).float()), self.keeps_graph)

    # -- the loss ------------------------------------------------------------------------------------------------------

    def _loss_of_noised(self, step: Step, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The weighted distances of noised latents (b), to pictures noised as much, anew at every step and sample."""
        targets = []
        for number, (label, weight, wanted) in enumerate(self._targets):
            if wanted.dim() == 4:
                draws = [rng.stream("mgad.noise", seed, number, step.i) for seed in step.run.seeds]
                noise = torch.cat([torch.randn(wanted.shape, generator=draw) for draw in draws])
                with torch.no_grad():
                    wanted = self._clip.latents(alpha * wanted + sigma * noise.to(wanted), alpha, sigma)[:, None]
            targets.append((label, weight, wanted))
        return self._distances(step, self._clip.latents(x, alpha, sigma)[:, None], targets)

    def _loss(self, step: Step, pixels: Tensor) -> Tensor:
        """The weighted distances of a picture's crops (b), and what keeps it a picture. Samples do not share crops."""
        p, size = self.params, (pixels.shape[-2], pixels.shape[-1])
        crops = torch.cat(
            [
                self._cutouts.cut(
                    picture, self._cutouts.draw(size, rng.stream("mgad.crops", seed, step.i)), self._clip.side
                )
                for picture, seed in zip(pixels, step.run.seeds, strict=True)
            ]
        )
        embeds = self._clip.pictures(crops).unflatten(0, (len(pixels), p.cutouts))  # (b n d)
        total = p.smooth * total_variation(pixels) + p.in_range * out_of_range(pixels)
        return total.to(embeds.device) + self._distances(step, embeds, self._targets)

    def _distances(self, step: Step, embeds: Tensor, among: Sequence[tuple[str, float, Tensor]]) -> Tensor:
        """The weighted distances of vectors (b n d) to all targets (b)."""
        total = embeds.new_zeros(len(embeds))
        for label, weight, targets in among:
            views, wanted = (normalize(each, dim=-1) for each in (embeds[:, :, None], targets[:, None]))
            distance = spherical_distance(views, wanted).mean((1, 2))
            total = total + weight * distance
            self._remember(label, step, distance)
        return total

    def _remember(self, label: str, step: Step, distance: Tensor) -> None:
        record = self.distances[label]
        at = step.i - step.run.begin
        record.extend([] for _ in range(at + 1 - len(record)))
        record[at].extend(distance.detach().tolist())

    def _crops_of(self, picture: Tensor) -> Tensor:
        """Vectors (m d) of crops of a reference picture (H W 3) of 8 bits, always the same ones."""
        pixels = picture.permute(2, 0, 1).float() / 127.5 - 1
        boxes = self._cutouts.draw((pixels.shape[-2], pixels.shape[-1]), rng.stream("mgad.crops", 0, -1))
        with torch.no_grad():
            return self._clip.pictures(self._cutouts.cut(pixels, boxes, self._clip.side))

    @staticmethod
    def _latents_of(picture: Tensor, run: Run) -> Tensor:
        """The latents (1 c h w) of a reference picture (H W 3) of 8 bits, cut to the shape of what is drawn."""
        cut = files.fitted(Image.fromarray(picture.numpy()), (run.size[1], run.size[0]))
        with torch.no_grad():
            return run.model.encode_image(to_pixels([cut])).float()

    def pictures(self, result: Any, index: int) -> dict[str, Image.Image]:
        """A picture beside the references, by file suffix."""
        if not self._pictures:
            return {}
        made = result.images[index].convert("RGB")
        shown = [Image.fromarray(picture.numpy()) for picture in self._pictures]
        return {"references": _row([made, *shown], made.height)}


def _row(pictures: Sequence[Image.Image], height: int, gap: int = 4) -> Image.Image:
    scaled = [
        p.resize((max(1, round(p.width * height / p.height)), height), Image.Resampling.LANCZOS) for p in pictures
    ]
    return sheets.sheet(scaled, len(scaled), gap=gap)
