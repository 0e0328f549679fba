"""Options of the verbs. Written by ``python -m docs.generate`` from the schemas, for type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict


class EditArguments(TypedDict, total=False):
    """Options of an edit, and the parameters of the system that edits by default."""

    steps: int | None
    """How many denoising steps (>= 1, <= 1000)"""
    guidance: float | None
    """Strength of classifier-free guidance (>= 0)"""
    size: tuple[int, int] | None
    """Width and height to cut the picture to (unit: pixel)"""
    inner: int | None
    """Iterations of null-text optimisation per step, 0 none, 10 if not said (>= 0, <= 100)"""
    refine: int | None
    """Fixed-point iterations per step of inversion (>= 0, <= 20)"""
    invert: bool
    """Invert the picture even if it carries its recipe"""
    seed: int | None
    """Regions drawn anew: where the noise comes from, 0 (>= 0)"""
    scheduler: str | None
    """Regions drawn anew: who steps, such as ddim"""
    strength: float | None
    """Regions drawn anew: how much of the schedule, as in make; 1 if not said (>= 0, <= 1)"""
    mode: Literal["auto", "replace", "refine"]
    """Replace: word for word; refine: words added or removed; auto: replace where both prompts have equally many
    words"""
    reweight: str | Sequence[str]
    """Words of the new prompt with a factor for their attention, as word=1.5"""
    cross_replace: float | Sequence[float]
    """Share of the denoising whose attention to words is the source's: the end, or start and end (unit:
    progress)"""
    self_replace: float | Sequence[float]
    """The same for attention among pixels, which carries layout and geometry (unit: progress)"""
    windows: str | Sequence[str]
    """Words of the new prompt with a window of their own, as word=0.2-0.6"""
    self_cells: int | None
    """Largest grid at which attention among pixels is taken over; none: 16 times fewer cells than the latents but
    at least 64, and every layer of a joint attention (unit: cell, >= 1)"""
    layers: str | Sequence[str]
    """Blocks or module paths to edit, such as up; none: all"""
    blend: str | Sequence[str]
    """Words of either prompt; outside of where they act the source is kept"""
    substruct: str | Sequence[str]
    """Words whose place is taken out of that of blend"""
    threshold: float
    """Share of its maximum from which a word acts (>= 0, <= 1)"""
    substruct_threshold: float
    """The same for substruct (>= 0, <= 1)"""
    start_blend: float
    """When blending begins (unit: progress, >= 0, <= 1)"""
    blend_maps: Literal["edited", "own"]
    """Blend by the new prompt's maps after the edit, or as they were before it"""
    blend_cells: int | None
    """Grid whose layers blend reads; none: nearest to 16 times fewer cells than the latents, at least 64 (unit:
    cell, >= 1)"""


class SegmentArguments(TypedDict, total=False):
    """Parameters of the system that segments by default."""

    prompt: str
    """What pictures of the object show; {} stands for its name"""
    background: str | Sequence[str]
    """What is to be seen without the object, of several one for each picture in turn; none: what the remover's card
    says, or a photo of a background"""
    opposite: bool
    """Guide away from the object's prompt when removing it, as the released code does"""
    n: int
    """Pictures to make where none are given (>= 2, <= 100000)"""
    levels: int
    """Noise levels of the schedule that maps are read at (>= 1, <= 1000)"""
    window: tuple[float, float]
    """Share of the schedule whose levels are read (unit: progress)"""
    threshold: Literal["mixture", "half"]
    """What a map must reach to count as the object: the middle of two Gaussians fitted to it, or of its range
    (half), which keeps closer to the object where maps are sharp"""
    grow: float
    """Rough masks are grown by so much before the object is removed (unit: share of the picture's shorter side, >=
    0, <= 0.5)"""
    steps: int | None
    """Denoising steps; the model's own if not said (>= 1, <= 1000)"""
    guidance: float | None
    """Guidance of the removal; the model's own if not said (>= 0)"""
    tidy: bool
    """Close small gaps and fill holes of the refined masks"""
    width: int
    """Channels of the segmenter's finest level (>= 1, <= 256)"""
    iterations: int
    """Training steps of the segmenter (>= 1, <= 1000000)"""
    negatives: float
    """Share of its samples that are pictures without the object (>= 0, < 1)"""
    seed: int
    """Where all noise comes from (>= 0)"""


class TeachArguments(TypedDict, total=False):
    """Parameters of the system that teaches by default."""

    name: str
    """The new word, such as <rex>"""
    class_noun: str
    """What it is, such as ball: where the vectors begin; none: random"""
    steps: int
    """How many steps at most (>= 1)"""
    lr: float
    """Learning rate of AdamW (> 0, <= 10)"""
    checkpointing: bool
    """Recompute the denoiser's activations, to save memory"""
    checkpoint_every: int
    """Steps between checkpoints (>= 1)"""
    seed: int
    """Of order, noise and whatever else is drawn (>= 0)"""
    batch: int
    """Pictures per step (>= 1, <= 1000)"""
    accumulate: int
    """Parts that a step's batch is cut into, to save memory (>= 1, <= 1000)"""
    flip: bool
    """Mirror every second picture; not for letters or faces"""
    size: int
    """Side of the pictures; 0: the model's (unit: pixel, >= 0, <= 8192)"""
    timesteps: Literal["auto", "uniform", "logit_normal", "mode", "cubic"]
    """Density of noise levels; auto: uniform, for flow models logit_normal; cubic: mostly high noise, where colour
    and layout are decided"""
    begin: str
    """Another word for the vectors to begin as; none: class_noun"""
    kind: Literal["object", "style"]
    """The sentences it is learnt in"""
    templates: str | Sequence[str]
    """Sentences with {} instead; none: the 27 or 19 of the code"""
    with_class: bool
    """Write the class before the word: a photo of a ball <rex>"""
    vectors: int
    """K: more look more alike and obey prompts less (>= 1, <= 64)"""
    progressive: int
    """One vector more every so many steps; 0: all at once (>= 0)"""
    per_picture: float
    """Share of steps with a second word that is the picture's own; 0.25 (>= 0, <= 1)"""
    regularise: float
    """Weight of the distance to where the vectors began (>= 0)"""
    encoders: str | Sequence[str]
    """Text encoders that get vectors; none: all"""
    length: Literal["free", "clamp", "pull"]
    """Vectors: no longer than the longest word, or pulled to the table's deviation"""
    patience: int
    """End after so many probes without progress; 0: never (>= 0)"""
    probe_every: int
    """Steps between probes (>= 1)"""
    keep_aspect: bool
    """Pictures keep their aspect instead of being cut"""
