"""The options of :func:`sfumato.sampling.generate`, declared once: names, types, ranges, units, what they mean.

The loop's checks, recipes, the command line's flags and the docs' tables are made from :class:`Options`. No torch here:
the command line reads it before anything heavy is loaded. What no text can say (latents, pictures, interventions) is an
argument of ``generate`` itself.

Marks in a field's ``json_schema_extra``: ``unit``; ``"recipe": False`` for what says how samples are made together
rather than what each of them is; ``"flag": False`` for what makes sense only beside a tensor.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema, field_validator, model_validator

from sfumato.cards import Field, Params
from sfumato.errors import BadInput, UnknownName
from sfumato.sampling.guidance import Guidance
from sfumato.valid import brief

__all__ = ["MAX_SIDE", "Options", "recorded"]

MAX_SIDE = 8192  # pixels; beyond it the latents alone outgrow any denoiser
MAX_AREA = 2**24  # pixels of a picture, such as 4096x4096
MAX_VOLUME = 2**28  # pixels of all frames of a clip
MOST_SAMPLES = 100_000
MOST_COMPOSED = 100
WHOLE_RUN = (0.0, 1.0)
PIXELS: dict[str, Any] = {"unit": "pixel"}
SIZES = ("size", "original_size", "target_size", "negative_original_size", "negative_target_size")
CROPS = ("crops_coords_top_left", "negative_crops_coords_top_left")
#: what diffusers and the web UIs call an option -> what it is called here
ELSEWHERE = {
    "num_inference_steps": "steps", "num_steps": "steps", "guidance_scale": "guidance", "cfg_scale": "guidance",
    "cfg": "guidance", "true_cfg_scale": "true_guidance", "guidance_rescale": "rescale", "negative_prompt": "negative",
    "num_images_per_prompt": "n", "num_videos_per_prompt": "n", "num_images": "n", "num_frames": "frames",
    "frame_rate": "fps", "width": "size=(width, height)", "height": "size=(width, height)",
    "generator": "seed, one whole number or one for each sample", "sampler": "scheduler", "sampler_name": "scheduler",
    "denoising_strength": "strength", "denoise": "strength", "callback_on_step_end": "on_step",
    "mask_image": "a system: inpaint or blend, with mask=", "image_reference": "reference",
    "output_type": "decode=False for latents, which the result holds in any case",
    "cross_attention_kwargs": "a system: lora:file=NAME,scale=0.8",
    "ip_adapter_image": "nothing: no IP-Adapter is attached; reference= for models that look at pictures",
    "prompt_2": "nothing: all text encoders read the one prompt",
    "negative_prompt_2": "nothing: all text encoders read the one negative",
}  # fmt: skip
_HEAVY = re.compile(r":[ \t]{0,20}[+-]?0*[1-9]\d{3,}(?:\.\d*)?[ \t]{0,20}\)")  # a weight of 1000 and more in a prompt


def _index(value: Any) -> Any:
    """Whole numbers of any kind (numpy's too) as int; everything else is left to the type check."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


Whole = Annotated[int, BeforeValidator(_index)]


class Options(Params):
    """What can be said about samples beside the model. None leaves the choice to the model."""

    MOST = MOST_SAMPLES

    prompt: str | list[str] = Field(description="what the picture shows; several: n samples of each")
    negative: str | list[str] | None = Field(
        default=None, description="what to steer away from; one text for all prompts or one each"
    )
    n: Whole = Field(
        default=1,
        ge=1,
        le=MOST_SAMPLES,
        description="how many samples of each prompt",
        json_schema_extra={"recipe": False},
    )
    steps: Whole | None = Field(default=None, ge=1, le=1000, description="how many steps from noise to picture")
    timesteps: list[float] | None = Field(
        default=None,
        max_length=1000,
        description="the schedule itself, from noise down, instead of steps; where the scheduler takes it",
    )
    sigmas: list[float] | None = Field(
        default=None,
        max_length=1000,
        description="noise levels from noise down instead of steps; euler's end with 0, a flow's do not",
    )
    guidance: float | None = Field(
        default=None,
        ge=0,
        description="scale of classifier-free guidance (1 or below: none), or of a distilled model's own guidance",
    )
    true_guidance: float | None = Field(
        default=None, ge=0, description="classifier-free guidance on top of a guidance-distilled model's own"
    )
    rescale: float = Field(
        default=0.0, ge=0, le=1, description="share by which the guided output's spread is pulled back (0 off)"
    )
    guidance_interval: tuple[float, float] = Field(
        default=WHOLE_RUN, description="between which classifier-free guidance acts",
        json_schema_extra={"unit": "progress"},
    )  # fmt: skip
    compose: list[tuple[str, float]] = Field(
        default=[], max_length=MOST_COMPOSED, description="further (text, weight) conditions of every sample"
    )
    long_prompts: Literal["chunks", "cut"] = Field(
        default="chunks",
        description="what of a prompt is longer than CLIP reads at once: read in further chunks, or cut off as in "
        "diffusers",
    )
    weighting: Literal["comfyui", "compel"] = Field(
        default="comfyui",
        description="where a word of weight below 1 moves to: what the empty prompt has in its place, or (as compel) "
        "the prompt without the word",
    )
    seed: Whole | list[Whole] | None = Field(
        default=0, description="sample i uses seed + i; or one per sample; none: a random one, written into the recipe"
    )
    size: tuple[Whole, Whole] | None = Field(
        default=None, description="width and height of the picture", json_schema_extra={"unit": "pixel"}
    )
    clip_skip: Whole | None = Field(
        default=None,
        ge=0,
        description="how many of the text encoder's last layers to leave out (A1111's Clip skip - 1)",
    )
    original_size: tuple[Whole, Whole] | None = Field(
        default=None,
        description="SDXL: width and height before resizing, of its size conditioning",
        json_schema_extra=PIXELS,
    )
    crops_coords_top_left: tuple[Whole, Whole] | None = Field(
        default=None, description="SDXL: top and left of the crop, of its size conditioning", json_schema_extra=PIXELS
    )
    target_size: tuple[Whole, Whole] | None = Field(
        default=None,
        description="SDXL: width and height to be made, of its size conditioning",
        json_schema_extra=PIXELS,
    )
    negative_original_size: tuple[Whole, Whole] | None = Field(
        default=None, description="SDXL: original_size of the unconditional branch", json_schema_extra=PIXELS
    )
    negative_crops_coords_top_left: tuple[Whole, Whole] | None = Field(
        default=None, description="SDXL: crops_coords_top_left of the unconditional branch", json_schema_extra=PIXELS
    )
    negative_target_size: tuple[Whole, Whole] | None = Field(
        default=None, description="SDXL: target_size of the unconditional branch", json_schema_extra=PIXELS
    )
    frames: Whole | None = Field(default=None, ge=1, le=4096, description="how many frames a clip has; models of clips")
    fps: float | None = Field(
        default=None, gt=0, le=1000, description="speed at which a clip is shown",
        json_schema_extra={"unit": "frame per second"},
    )  # fmt: skip
    scheduler: Annotated[Any, WithJsonSchema({"type": "string"})] = Field(
        default=None, description="a scheduler by short name, such as ddim, euler or dpm++, or a diffusers scheduler"
    )
    eta: float = Field(default=0.0, ge=0, le=1, description="share of fresh noise in DDIM steps")
    temperature: float | tuple[float, float] | None = Field(
        default=None, description="randomness of drawn tokens: one number, or the first and the last step's"
    )
    top_k: Whole | None = Field(default=None, ge=1, description="draw each token from the k likeliest only")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="draw each token from the likeliest ones that hold this probability"
    )
    start: Whole = Field(
        default=0, ge=0, description="the step of the schedule with which given latents begin",
        json_schema_extra={"flag": False},
    )  # fmt: skip
    denoising_start: float | None = Field(
        default=None, gt=0, lt=1, description="instead of start: the share of the noise levels behind given latents",
        json_schema_extra={"flag": False},
    )  # fmt: skip
    denoising_end: float | None = Field(
        default=None, gt=0, lt=1, description="the share of the noise levels after which another model goes on",
        json_schema_extra={"flag": False},
    )  # fmt: skip
    strength: float | None = Field(
        default=None, ge=0, le=1, description="how much of a given picture is drawn anew, 0 nothing, 1 all"
    )
    batch_size: Whole | None = Field(
        default=None, ge=1, description="how many samples to draw at once (none: all)",
        json_schema_extra={"recipe": False},
    )  # fmt: skip

    def __init__(self, /, **given: Any):
        """Raises BadInput for an option out of its range, UnknownName for one that does not exist. A :class:`Guidance`
        may stand for a scale; it says its rescale and interval as well."""
        for name in ("guidance", "true_guidance"):
            if isinstance(guidance := given.get(name), Guidance):
                for twice in ("rescale", "guidance_interval"):
                    if given.get(twice):
                        raise BadInput(f"{twice} is given twice: set it inside the Guidance object only.")
                given |= {name: guidance.scale, "rescale": guidance.rescale, "guidance_interval": guidance.interval}
        for name in given.keys() & ELSEWHERE.keys() - type(self).model_fields.keys():
            raise UnknownName(f"parameter of {self.SYSTEM}", name, type(self).model_fields, here=ELSEWHERE[name])
        super().__init__(**given)

    @field_validator("prompt", "negative")
    @classmethod
    def _some(cls, texts: Any) -> Any:
        if texts == []:
            raise ValueError("give at least one text")
        for text in [texts] if isinstance(texts, str) else texts or ():
            if max(text.count("AND"), text.count("<")) > MOST_COMPOSED:
                raise ValueError(f"at most {MOST_COMPOSED} texts are composed by AND, and adapters named by <...>")
            if found := _HEAVY.search(text):
                number = found[0].strip(":) \t")
                raise ValueError(
                    f"a weight of {brief(number, 20)[1:-1]} is more than any text encoder takes; about 1 is usual"
                )
        return texts

    @field_validator("seed")
    @classmethod
    def _seeds(cls, seed: Any) -> Any:
        for number in seed if isinstance(seed, list) else [seed]:
            if number is not None and not 0 <= number < 2**63:
                raise ValueError("a seed must be 0 or above and below 2**63")
        return seed

    @field_validator(*SIZES, mode="before")
    @classmethod
    def _pair(cls, size: Any) -> Any:
        if size is not None and not (isinstance(size, list | tuple) and len(size) == 2):
            raise ValueError("it must be (width, height), such as (512, 768)")
        return size

    @field_validator(*CROPS)
    @classmethod
    def _corner(cls, corner: tuple[int, int] | None) -> tuple[int, int] | None:
        if corner is not None and not all(0 <= side <= MAX_SIDE for side in corner):
            raise ValueError(f"top and left must lie between 0 and {MAX_SIDE}")
        return corner

    @field_validator("timesteps", "sigmas")
    @classmethod
    def _downwards(cls, levels: list[float] | None) -> list[float] | None:
        if levels is None:
            return None
        if not 1 <= len(levels) <= 1001 or not all(level >= 0 and math.isfinite(level) for level in levels):
            raise ValueError("give 1 to 1001 numbers, 0 or above")
        if any(later >= level for level, later in itertools.pairwise(levels)):
            raise ValueError("each must be smaller than the one before")
        return levels

    @field_validator(*SIZES)
    @classmethod
    def _sides(cls, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size is not None and not all(1 <= side <= MAX_SIDE for side in size):
            raise ValueError(f"each side must lie between 1 and {MAX_SIDE}")
        if size is not None and size[0] * size[1] > MAX_AREA:
            raise ValueError(f"the most is {MAX_AREA} pixels, such as 4096x4096")
        return size

    @model_validator(mode="after")
    def _bounded(self) -> Options:
        prompts = 1 if isinstance(self.prompt, str) else len(self.prompt)
        if prompts * self.n > MOST_SAMPLES:
            raise ValueError(f"{prompts} prompts with n = {self.n} make more than {MOST_SAMPLES} samples")
        if self.size and self.frames and self.size[0] * self.size[1] * self.frames > MAX_VOLUME:
            raise ValueError(
                f"{self.frames} frames of {self.size[0]}x{self.size[1]} have more than {MAX_VOLUME} pixels"
            )
        return self

    @field_validator("guidance_interval")
    @classmethod
    def _ordered(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError("it must be (start, end) with 0 <= start < end <= 1")
        return interval

    @field_validator("temperature")
    @classmethod
    def _warm(cls, temperature: Any) -> Any:
        ends = temperature if isinstance(temperature, tuple) else (temperature,)
        if temperature is not None and not all(end >= 0 and math.isfinite(end) for end in ends):
            raise ValueError("a temperature must be 0 or above")
        return temperature


def recorded() -> list[str]:
    """Names of the options that a recipe holds."""
    fields = Options.model_fields.items()
    return [name for name, field in fields if (field.json_schema_extra or {}).get("recipe", True)]  # type: ignore[union-attr]
