"""The parameters that systems which teach share; each overrides those whose defaults its source has differently, and an
overridden one keeps its place."""

from __future__ import annotations

from sfumato import cards
from sfumato.cards import Field
from sfumato.teach.denoising import Timesteps

__all__ = ["PictureParams", "TeachParams"]


class TeachParams(cards.Params):
    """What is taught, for how long, and what a resumed run finds."""

    name: str = Field(default="", description="the new word, such as <rex>")
    class_noun: str = Field(default="", description="what the pictures show, such as ball")
    steps: int = Field(default=800, ge=1, description="how many steps")
    lr: float = Field(default=1e-4, gt=0, le=1, description="learning rate of AdamW")
    checkpointing: bool = Field(default=False, description="recompute the denoiser's activations, to save memory")
    checkpoint_every: int = Field(default=100, ge=1, description="steps between checkpoints")
    seed: int = Field(default=0, ge=0, description="of order, noise and whatever else is drawn")


class PictureParams(TeachParams):
    """How pictures are shown to the denoiser."""

    batch: int = Field(
        default=1, ge=1, le=1000, description="pictures of each subject per step, and as many of the prior"
    )
    accumulate: int = Field(
        default=1, ge=1, le=1000, description="parts that a step's batch is cut into, to save memory"
    )
    flip: bool = Field(default=True, description="mirror every second picture; not for letters or faces")
    size: int = Field(
        default=0,
        ge=0,
        le=8192,
        description="side of the pictures; 0: the model's",
        json_schema_extra={"unit": "pixel"},
    )
    timesteps: Timesteps = Field(
        default="auto",
        description="density of noise levels; auto: uniform, for flow models logit_normal; cubic: mostly high noise, "
        "where colour and layout are decided",
    )
