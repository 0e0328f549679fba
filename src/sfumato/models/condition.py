"""What a denoiser is conditioned on: text embeddings and their companions, per sample and branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

#: the tensors of one branch, each with the samples first
Rows = dict[str, Tensor]

#: the order in which diffusers stacks the two branches of classifier-free guidance
UNCOND, COND = "uncond", "cond"


class TruncatedPrompt(UserWarning):
    """Part of a prompt does not fit into the text encoder and is not seen by it; the message quotes that part."""


@dataclass(frozen=True)
class Encoding:
    """How the texts of one run are encoded, beyond what they say.

    ``clip_skip``: how many of the last layers of its CLIPs are left out, as in diffusers. ``micro``: SDXL's six numbers
    (height and width of the original, top and left of the crop, height and width of the target; Podell et al. 2023,
    section 2.2) of the conditional and of the unconditional branch. ``references``: RGB pictures that the model looks
    at beside every text, in their own sizes.
    """

    clip_skip: int | None = None
    micro: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    references: tuple[Image, ...] = ()


@dataclass
class Condition:
    """The condition of ``b`` samples. Rows of the two guidance branches are kept apart so that either can be edited.

    Keys of the rows depend on the family: ``embeds`` (b t d) always; ``pooled`` (b d) for SDXL, SD3 and Flux; ``mask``
    (b t) for PixArt; ``hole`` (b 1+c h w), mask and picture outside it, for inpainting checkpoints; ``reference 0``,
    ``reference 1``, ... (b c h w), states of reference pictures in sizes of their own. SDXL also honours ``time_ids``
    (b 6) where given, else it derives them from the picture size.
    """

    cond: Rows
    uncond: Rows | None
    prompts: tuple[str, ...]
    negatives: tuple[str, ...] | None = None
    #: guidance scale given to a guidance-distilled denoiser (Flux-dev, LCM); ``None`` for all others
    guidance: float | None = None

    def __len__(self) -> int:
        return next(iter(self.cond.values())).shape[0]

    @property
    def branches(self) -> tuple[str, ...]:
        """``("uncond", "cond")``, or ``("cond",)`` without guidance."""
        return (COND,) if self.uncond is None else (UNCOND, COND)

    def branch(self, name: str) -> Rows:
        """The rows of one branch. Raises `BadInput` for an unknown or absent branch."""
        rows = {COND: self.cond, UNCOND: self.uncond}.get(name)
        if rows is None:
            raise BadInput(f"branch={name!r} is not in this condition; it has {', '.join(self.branches)}.")
        return rows

    def batch(self, branches: Sequence[str] | None = None) -> Rows:
        """Rows of the branches one below the other, by default unconditional first as diffusers feeds them."""
        parts = [self.branch(name) for name in (self.branches if branches is None else branches)]
        if len(parts) == 1:
            return dict(parts[0])
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def rows(self, index: int | slice | Sequence[int]) -> Condition:
        """The condition of some of the samples."""
        picked = range(len(self))[index] if isinstance(index, (int, slice)) else index
        positions = [picked] if isinstance(picked, int) else list(picked)
        prompts = tuple(self.prompts[i] for i in positions)
        negatives = None if self.negatives is None else tuple(self.negatives[i] for i in positions)
        return replace(self._map(lambda value: value[positions]), prompts=prompts, negatives=negatives)

    def repeat(self, n: int) -> Condition:
        """Every sample ``n`` times in a row (the order of diffusers' ``num_images_per_prompt``)."""
        return self.rows([i for i in range(len(self)) for _ in range(n)])

    def with_rows(self, **rows: Tensor) -> Condition:
        """With these tensors (b, ...) in every branch too, in place of any of the same name."""
        uncond = None if self.uncond is None else {**self.uncond, **rows}
        return replace(self, cond={**self.cond, **rows}, uncond=uncond)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move all tensors; only floating-point ones change their dtype."""
        return self._map(lambda value: value.to(device, dtype if value.is_floating_point() else None))

    def clone(self) -> Condition:
        """A condition whose tensors share no memory with this one."""
        return self._map(Tensor.clone)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Several conditions as one batch. All must have the same branches, keys and embedded guidance."""
        first = conditions[0]
        if len({(c.branches, tuple(c.cond), c.guidance) for c in conditions}) > 1:
            raise BadInput("conditions to join differ in branches, keys or embedded guidance.")

        def join(name: str) -> Rows:
            return {key: torch.cat([c.branch(name)[key] for c in conditions]) for key in first.branch(name)}

        negatives = [c.negatives for c in conditions if c.negatives is not None]
        return Condition(
            cond=join(COND),
            uncond=None if first.uncond is None else join(UNCOND),
            prompts=tuple(chain.from_iterable(c.prompts for c in conditions)),
            negatives=tuple(chain.from_iterable(negatives)) if len(negatives) == len(conditions) else None,
            guidance=first.guidance,
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        def over(rows: Rows) -> Rows:
            return {key: change(value) for key, value in rows.items()}

        return replace(self, cond=over(self.cond), uncond=None if self.uncond is None else over(self.uncond))


#: what denoisers call the width of the text that they read; of several in one the first
_WIDTHS = (
    "encoder_hid_dim", "caption_channels", "joint_attention_dim", "text_embed_dim", "cap_feat_dim", "text_dim",
    "encoder_hidden_size", "cross_attention_dim",
)  # fmt: skip


def require_width(rows: Rows, config: Any, name: str) -> None:
    """Raise BadInput where the text encoders give vectors that the denoiser with this ``config`` cannot read."""
    known = dict(config) if isinstance(config, Mapping) else vars(config)  # of diffusers, of transformers
    for held, keys in (("embeds", _WIDTHS), ("pooled", ("pooled_projection_dim",))):
        key = next((key for key in keys if known.get(key) is not None), "")
        if held in rows and isinstance(width := known.get(key), int) and width != (given := rows[held].shape[-1]):
            raise BadInput(
                f"the text encoders of this {name} give vectors of {given} numbers, its denoiser reads {width} "
                f"({key}); load it with the text encoders that it was trained with."
            )
