"""CLIP guidance: a picture follows the gradient of a text-image scorer while it is made.

A CLIP that was trained on noised pictures says, at every noise level, how well what is there so far fits the text; its
gradient is added to the score that the denoiser predicts (Nichol et al. 2021, GLIDE, section 2.4). It is the other way,
beside classifier-free guidance, to make a picture obey its text, and both can act in one run.

    >>> generate(model, "a red cube", guidance=1, interventions=ClipGuidance(strength=3))

An ordinary CLIP serves as well: it looks at the decoded prediction of the clean picture, and the gradient goes back
through decoder and denoiser. With ``against``, the texts become the classes of a zero-shot classifier, and the gradient
is that of log p(class | x_t): classifier guidance (Dhariwal & Nichol 2021, section 4.2).
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from sfumato.cards import Card, Field, ModelPath, Template, register
from sfumato.errors import BadInput
from sfumato.models.readers import Clip, clip_for
from sfumato.sampling import Run, Step
from sfumato.sampling.gradient import GradientGuidance, GradientParams
from sfumato.sampling.guidance_losses import log_probability

__all__ = ["ClipGuidance"]


@register
class ClipGuidance(GradientGuidance):
    """Pulls samples towards texts in CLIP's eyes. Afterwards ``scores`` holds, per step, each sample's cosine with its
    texts; of the noised latents or of the predicted picture, whichever the CLIP reads."""

    CARD = Card(
        key="clip_guidance",
        title="GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models",
        authors="Nichol, Dhariwal, Ramesh, Shyam, Mishkin, McGrew, Sutskever, Chen",
        year=2021,
        arxiv="2112.10741",
        verb="steer",
        needs=("pictures", "noise_path", "differentiable_state"),
        defaults_from="the authors' code: strength 3 times the logit scale, on the score as for DDIM, all steps",
        cost="a forward and a backward pass of CLIP per step; with a CLIP of pictures a backward pass through "
        "decoder and denoiser besides",
        not_reproduced="the 3.5 billion parameter model, the human study and the upsampler; the noise-aware CLIP reads "
        "latents and gets the noise level by input channels, not by a token per timestep",
        summary="pulls the picture towards its text by the gradient of a CLIP",
        example="clip_guidance:clip=toy-clip",
    )

    class Params(GradientParams):
        strength: float = Field(
            default=3.0,
            ge=0,
            description="what the gradient of CLIP's logit is multiplied by; 0 off",
        )
        texts: list[str] = Field(
            default=[], description="what to pull towards, in equal parts; none: the prompt of each picture"
        )
        against: list[str] = Field(
            default=[],
            description="other texts from which CLIP must tell it: with them this is classifier guidance, the classes "
            "being these and the text itself",
        )
        clip: ModelPath | None = Field(
            default=None,
            description="a built-in CLIP or the folder of one; none: the noise-aware toy-clip, for models of toys",
        )
        through: Literal["denoiser", "decoder"] = Field(
            default="denoiser",
            description="for a CLIP of pictures: how far back the gradient goes; decoder: an estimate in place of the "
            "pass through the denoiser, cheaper and in less memory",
        )
        templates: list[Template] = Field(
            default=["{}"], min_length=1, description="sentences with {} for the text, whose vectors are averaged"
        )

    def __init__(self, **given: Any):
        super().__init__(**given)
        for name in ("texts", "against"):
            if any(not text.strip() for text in getattr(self.params, name)):
                raise BadInput(f"{name} of clip_guidance holds an empty text; each must say something.")
        self.scores: dict[int, list[float]] = {}

    # -- what the loop calls -------------------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Loads the CLIP and reads the texts. Raises NotSupported where no CLIP fits the model."""
        p = self.params
        if run.samples.start == 0:
            self.scores = {}
        if p.strength == 0:
            return
        self._clip: Clip = clip_for(run.model, p.clip, self.name)
        self.keeps_graph = not self._clip.reads_noise and p.through == "denoiser"
        if p.texts:
            self._own = self._clip.text(p.texts, p.templates).mean(0, keepdim=True).expand(len(run), -1)
        else:
            self._own = self._clip.text(run.prompts, p.templates)
        self._rivals = self._clip.text(p.against, p.templates) if p.against else None

    def finish(self, run: Run) -> None:
        for name in ("_clip", "_own", "_rivals"):
            self.__dict__.pop(name, None)

    def gradient(self, step: Step) -> Tensor:
        if self._clip.reads_noise:
            return self.of_noised(step, lambda *noised: self._gain(step, self._clip.latents(*noised)))
        model = step.run.model
        return self.of_prediction(
            step, lambda x0: self._gain(step, self._clip.pictures(model.decode(x0))), self.keeps_graph
        )

    # -- the objective -------------------------------------------------------------------------------------------------

    def _gain(self, step: Step, embeds: Tensor) -> Tensor:
        """What is to rise (b): the logit of the own text, or its log probability among the classes."""
        cosines = (embeds * self._own).sum(-1)
        self.scores.setdefault(step.i, []).extend(cosines.detach().tolist())
        if self._rivals is None:
            return self._clip.scale * cosines
        return log_probability(embeds, self._own, self._rivals, self._clip.scale)
