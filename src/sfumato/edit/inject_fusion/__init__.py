"""InjectFusion: the content of one picture in the look of another, without training.

The look is the picture that the run draws; the content comes from a second one. While the run goes through its noisy
half, the bottleneck of the U-Net (its *h-space*) is turned a little towards the content's at the same noise level, its
norm kept and the skip connections left alone (Jeong, Kwon, Uh 2023, section 3.2). Only the predicted clean picture
follows the turned bottleneck, the direction back to the noise stays: the asymmetric reverse process of Kwon, Jeong, Uh
2022 (Asyrp), where a symmetric edit would cancel itself.

    >>> fusion = InjectFusion(content="a red cube on the grass", content_seed=3)
    >>> generate(model, "a blue ball on the snow", seed=4, interventions=fusion)

With x0 and x0~ the clean latents predicted without and with the injection, Asyrp's step is the scheduler's own plus
alpha (x0~ - x0) at the next noise level. That is how it is done here, so it goes with every scheduler.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from pydantic import BeforeValidator
from torch import Tensor

from sfumato import cards, files, mask_ops, masks, rng
from sfumato.cards import Card, Field, FilePath, register
from sfumato.edit.inject_fusion.content import FeatureRecord, prompt_of
from sfumato.errors import BadInput, NoMatch, NotSupported
from sfumato.hspace.tap import bottleneck_of, layer_of, tapped
from sfumato.metrics.geometry import slerp
from sfumato.sampling import Intervention, Run, Step, invert
from sfumato.sampling.auxiliary import draw_auxiliary
from sfumato.sampling.intervention import Coverage
from sfumato.sampling.pixels import as_pictures
from sfumato.sampling.state import sample_axes
from sfumato.windows import Window, inside

__all__ = ["InjectFusion"]

PictureText = Annotated[
    FilePath | None, BeforeValidator(lambda given: None if given is None else masks.as_text(given, labels=True))
]
"""A picture as a path, or as a PNG in text so that a recipe can hold it; also from a PIL picture or a uint8 array."""


@register
class InjectFusion(Intervention):
    """Injects the bottleneck of a content picture. ``contents``: the clean latents (b c h w) of those pictures."""

    CARD = Card(
        key="inject_fusion",
        title="Training-free Content Injection using h-space in Diffusion Models",
        authors="Jeong, Kwon, Uh",
        year=2023,
        arxiv="2303.15403",
        verb="edit",
        needs=("pictures", "noise_path", "h_space"),
        defaults_from="the authors' code (share of the turn 0.3, t_edit 400 of 1000, 50 injections, no calibration)",
        cost="the content's own run or inversion once; 1 more forward per injected step, 2 with calibration",
        not_reproduced="the factor 0.9985 on the direction at the noisiest steps; training of Asyrp's edits. "
        "Transformers (SD3, Flux, PixArt) have no bottleneck with skip connections, and are refused",
        summary="the content of one picture in the look of another",
        example="inject_fusion:content=a blue cone",
    )

    class Params(cards.Params):
        content: str | None = Field(
            default=None, description="what the content picture shows; it is drawn from this, or the picture inverted"
        )
        content_seed: int | None = Field(
            default=None, ge=0, description="seed of the content picture; none: the same noise as the run's own"
        )
        content_image: PictureText = Field(
            default=None, description="an existing picture to take the content from; it is inverted"
        )
        strength: float = Field(
            default=0.3, ge=0, le=1, description="share of the angle by which each injection turns the bottleneck"
        )
        window: Window = Field(
            default=(0.0, 0.6),
            description="share of the denoising in which to inject, from start to end",
            json_schema_extra={"unit": "progress"},
        )
        injections: int = Field(
            default=50, ge=1, description="in a schedule of more steps inject in so many of them, evenly spread"
        )
        mix: Literal["slerp", "lerp"] = Field(
            default="slerp", description="turn the bottleneck and keep its norm, or mix the two in a straight line"
        )
        process: Literal["asymmetric", "symmetric"] = Field(
            default="asymmetric",
            description="edit the predicted picture alone (Asyrp), or the direction back to the noise as well",
        )
        calibration: float | None = Field(
            default=None,
            ge=0,
            description="move the latents instead so that an ordinary step agrees with the injection; the share of the "
            "noise's change that goes along, near 1 keeps more of the look; none: off",
        )
        mask: masks.MaskTexts = Field(
            default=[], description="picture that is white where to inject, of any size; several are joined"
        )
        box: masks.Boxes = Field(
            default=[], description="box x0|y0|x1|y1 where to inject, as fractions or in pixels; several are joined"
        )
        layer: str | None = Field(
            default=None,
            description="block whose features are turned, such as up.0; none: the bottleneck, as in the paper",
        )
        boost: float = Field(
            default=0.0,
            ge=0,
            le=1,
            description="share of the denoising at its end that draws fresh noise (eta 1), for more quality",
            json_schema_extra={"unit": "progress"},
        )

    role = "steerer"

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        p = self.params
        if p.content is None and p.content_image is None:
            raise BadInput(
                "inject_fusion needs a content picture: content, the prompt to draw it from, or content_image."
            )
        if p.content_image is not None and p.content_seed is not None:
            raise BadInput("content_seed of inject_fusion draws a content picture; content_image gives one. Choose.")
        self._read = [masks.read_mask(mask) for mask in p.mask]
        self._picture = None if p.content_image is None else masks.read_labels(p.content_image, "content_image")
        self.contents: Tensor | None = None
        self.activity = Coverage()

    # -- what the loop calls -------------------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Raises NotSupported for a denoiser without bottleneck, NoMatch for a mask that covers nothing."""
        bottleneck = bottleneck_of(run.model, "inject_fusion")
        self._layer = bottleneck if self.params.layer is None else layer_of(run.model, self.params.layer)
        layers = masks.regions(self._read, self.params.box, run.size)
        self._region = layers.amax(0) if len(layers) else None
        if self._region is not None and not self._region.any():
            raise NoMatch("the mask of inject_fusion is empty, so nothing would be injected; make it white somewhere.")
        if self.params.boost and "eta" not in run.process.step_options:
            name = type(run.scheduler).__name__
            raise NotSupported(f"boost of inject_fusion draws noise by eta, which {name} does not; use ddim.")
        self._shift: Tensor | None = None
        if run.samples.start == 0:
            self.contents = None

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        """Draws or inverts the content, and keeps its bottleneck at every noise level."""
        if self.strength == 0:
            return x
        record = FeatureRecord(self._layer)
        before = run.cost
        clean = self._drawn(run, x, record) if self._picture is None else self._inverted(run, record)
        self.activity.cost += run.cost - before
        self._content = record
        clean = clean.expand(len(run), -1, -1, -1).detach()
        self.contents = clean if self.contents is None else torch.cat([self.contents, clean])
        return x

    def before_predict(self, step: Step) -> None:
        """Latent calibration (section 3.3): the step's own prediction is made from latents that agree with it."""
        if self.params.calibration is None or not self._injects(step):
            return
        plain = step.predict(branches=step.branches)
        change = step.run.combined(self._injected(step)) - plain.output("guided")
        path, t, out = step.path, step.t, plain.output("guided")
        alpha, sigma = path.alpha_sigma(t)
        was, now = (path.to_x0(step.x.float(), each.float(), t) for each in (out, out + change))
        axes = sample_axes(step.x)
        mean, spread = now.mean(axes, keepdim=True), now.std(axes, keepdim=True)
        now = mean + (now - mean) * was.std(axes, keepdim=True) / spread.clamp_min(torch.finfo(now.dtype).tiny)
        noise = path.to_eps(step.x.float(), (out + change).float(), t) - path.to_eps(step.x.float(), out.float(), t)
        moved = alpha * (now - was) + self.params.calibration * sigma * noise
        step.x = (step.x + path.scale(t) * moved).to(step.x.dtype)
        self.mark(step)

    def after_predict(self, step: Step) -> None:
        p = self.params
        if p.boost and self.strength and step.progress >= 1 - p.boost:
            step.options["eta"] = 1.0
        if p.calibration is not None or not self._injects(step):
            return
        plain = step.run.combined({name: step.outputs[name] for name in step.branches})
        change = step.run.combined(self._injected(step)) - plain
        if p.process == "symmetric":
            step.output = step.output + change
        else:
            x, none = torch.zeros_like(change, dtype=torch.float32), torch.zeros_like(change, dtype=torch.float32)
            self._shift = step.path.to_x0(x, change.float(), step.t) - step.path.to_x0(x, none, step.t)
        self.mark(step)

    def after_step(self, step: Step) -> None:
        """The asymmetric reverse process (Asyrp, equation 7)."""
        if self._shift is None:
            return
        t = step.t_next
        factor = 1.0 if t is None else step.path.scale(t) * step.path.alpha_sigma(t)[0]
        step.x = (step.x + factor * self._shift).to(step.x.dtype)
        self._shift = None

    def finish(self, run: Run) -> None:
        if self.strength:
            del self._content

    def pictures(self, result: Any, index: int) -> dict[str, Image.Image]:
        """The picture that the content came from."""
        if self.contents is None:
            return {}
        with torch.no_grad():
            return {"content": as_pictures(result.model.decode(self.contents[index : index + 1]))[0]}

    # -- the content ---------------------------------------------------------------------------------------------------

    def _drawn(self, run: Run, x: Tensor, record: FeatureRecord) -> Tensor:
        """The content picture (b c h w), drawn by the run's settings from its own prompt and noise."""
        seed = self.params.content_seed
        if seed is not None or run.begin:
            generators = rng.generators("sample", run.seeds if seed is None else [seed] * len(run))
            noise = randn_tensor(tuple(x.shape), generator=generators, device=x.device, dtype=x.dtype)
            x = run.model.prepare(noise, run.scheduler)
        return draw_auxiliary(run, self.params.content or "", x=x, parts=[record]).x

    def _inverted(self, run: Run, record: FeatureRecord) -> Tensor:
        """The content picture (1 c h w), whose bottleneck is read while it is inverted."""
        assert self._picture is not None and run.request is not None
        fitted = files.fitted(Image.fromarray(self._picture.numpy()), run.size)
        prompt = self.params.content
        if prompt is None:
            prompt = prompt_of(self.params.content_image or "")
        trajectory = invert(run.model, fitted, prompt, steps=run.request.steps, size=run.size, interventions=[record])
        run.add_cost(trajectory.cost / len(run), None)
        return trajectory.latents[-1]

    # -- the injection -------------------------------------------------------------------------------------------------

    def _injects(self, step: Step) -> bool:
        every = max(1, step.total // self.params.injections)
        return self.strength > 0 and inside(step.progress, self.params.window) and step.i % every == 0

    def _injected(self, step: Step) -> dict[str, Tensor]:
        """The outputs of the step's branches with the content in the bottleneck."""
        outputs: dict[str, Tensor] = {}
        b, t = len(step.run), float(step.t)
        for names in step.run.model.calls(step.branches):
            content = torch.cat([self._content.at(name, t).expand(b, -1, -1, -1) for name in names])

            def turn(h: Tensor, content: Tensor = content) -> Tensor:
                return self._turned(h, content.to(h))

            with tapped(step.run.model, self._layer, turn):
                outputs |= step.predict(branches=names).outputs
        return outputs

    def _turned(self, h: Tensor, content: Tensor) -> Tensor:
        """The bottleneck (b c h w) turned towards the content's, within the mask."""
        mix = slerp if self.params.mix == "slerp" else torch.lerp
        if self._region is None:
            return mix(h, content, self.strength)
        cells = mask_ops.on_grid(self._region, (h.shape[-2], h.shape[-1])).bool().to(h.device)
        turned = h.clone()
        turned[..., cells] = mix(h[..., cells], content[..., cells], self.strength)
        return turned
