"""Options of a generation. Written by ``python -m docs.generate`` from the schemas, for type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from sfumato.sampling.guidance import Guidance


class GenerateArguments(TypedDict, total=False):
    """Options of a generation; see :class:`sfumato.sampling.Options`."""

    negative: str | Sequence[str] | None
    """What to steer away from; one text for all prompts or one each"""
    n: int
    """How many samples of each prompt (>= 1, <= 100000)"""
    steps: int | None
    """How many steps from noise to picture (>= 1, <= 1000)"""
    timesteps: float | Sequence[float] | None
    """The schedule itself, from noise down, instead of steps; where the scheduler takes it"""
    sigmas: float | Sequence[float] | None
    """Noise levels from noise down instead of steps; euler's end with 0, a flow's do not"""
    guidance: float | Guidance | None
    """Scale of classifier-free guidance (1 or below: none), or of a distilled model's own guidance (>= 0)"""
    true_guidance: float | Guidance | None
    """Classifier-free guidance on top of a guidance-distilled model's own (>= 0)"""
    rescale: float
    """Share by which the guided output's spread is pulled back (0 off) (>= 0, <= 1)"""
    guidance_interval: tuple[float, float]
    """Between which classifier-free guidance acts (unit: progress)"""
    compose: Sequence[tuple[str, float]]
    """Further (text, weight) conditions of every sample"""
    long_prompts: Literal["chunks", "cut"]
    """What of a prompt is longer than CLIP reads at once: read in further chunks, or cut off as in diffusers"""
    weighting: Literal["comfyui", "compel"]
    """Where a word of weight below 1 moves to: what the empty prompt has in its place, or (as compel) the prompt
    without the word"""
    seed: int | Sequence[int] | None
    """Sample i uses seed + i; or one per sample; none: a random one, written into the recipe"""
    size: tuple[int, int] | None
    """Width and height of the picture (unit: pixel)"""
    clip_skip: int | None
    """How many of the text encoder's last layers to leave out (A1111's Clip skip - 1) (>= 0)"""
    original_size: tuple[int, int] | None
    """SDXL: width and height before resizing, of its size conditioning (unit: pixel)"""
    crops_coords_top_left: tuple[int, int] | None
    """SDXL: top and left of the crop, of its size conditioning (unit: pixel)"""
    target_size: tuple[int, int] | None
    """SDXL: width and height to be made, of its size conditioning (unit: pixel)"""
    negative_original_size: tuple[int, int] | None
    """SDXL: original_size of the unconditional branch (unit: pixel)"""
    negative_crops_coords_top_left: tuple[int, int] | None
    """SDXL: crops_coords_top_left of the unconditional branch (unit: pixel)"""
    negative_target_size: tuple[int, int] | None
    """SDXL: target_size of the unconditional branch (unit: pixel)"""
    frames: int | None
    """How many frames a clip has; models of clips (>= 1, <= 4096)"""
    fps: float | None
    """Speed at which a clip is shown (unit: frame per second, > 0, <= 1000)"""
    scheduler: Any
    """A scheduler by short name, such as ddim, euler or dpm++, or a diffusers scheduler"""
    eta: float
    """Share of fresh noise in DDIM steps (>= 0, <= 1)"""
    temperature: float | tuple[float, float] | None
    """Randomness of drawn tokens: one number, or the first and the last step's"""
    top_k: int | None
    """Draw each token from the k likeliest only (>= 1)"""
    top_p: float | None
    """Draw each token from the likeliest ones that hold this probability (> 0, <= 1)"""
    start: int
    """The step of the schedule with which given latents begin (>= 0)"""
    denoising_start: float | None
    """Instead of start: the share of the noise levels behind given latents (> 0, < 1)"""
    denoising_end: float | None
    """The share of the noise levels after which another model goes on (> 0, < 1)"""
    strength: float | None
    """How much of a given picture is drawn anew, 0 nothing, 1 all (>= 0, <= 1)"""
    batch_size: int | None
    """How many samples to draw at once (none: all) (>= 1)"""
