"""Places in a denoiser: one `Site` per attention call of a forward pass and one `Layer` per block, in the order of
execution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Site:
    """One attention call of one denoiser forward pass at one picture size.

    Queries and keys of a *joint* site lie in one sequence, so ``image`` and ``text`` there are ranges of both. At a
    *cross* site the keys are the text alone; at a *self* site the image alone.
    """

    #: module path inside the denoiser, for example ``"mid_block.attentions.0.transformer_blocks.0.attn2"``
    path: str
    #: ``"self"``, ``"cross"``, ``"joint"`` or ``"temporal"``
    kind: str
    #: (h, w) of the image queries; ``None`` where the queries are not a picture
    grid: tuple[int, int] | None
    #: [start, stop) of the text among the keys; ``None`` where no text is seen
    text: tuple[int, int] | None
    #: [start, stop) of the image among the queries
    image: tuple[int, int]
    #: number of heads ``k``
    heads: int
    #: coarse place: ``"down.0"``, ``"mid"``, ``"up.1"``, ``"joint.3"``, ``"single.2"``, ``"block.5"``
    block: str
    #: position in the order of execution, from 0
    index: int


@dataclass(frozen=True)
class Layer:
    """One block of a denoiser whose output can be read and replaced as features of the picture."""

    #: as in `Site.block`: ``"down.0"``, ``"mid"``, ``"up.1"``, ``"joint.3"``, ``"single.2"``, ``"block.5"``
    name: str
    #: module path inside the denoiser
    path: str
    #: which entry of the block's output holds the picture; ``None`` where the output is that tensor
    entry: int | None = None


class SiteList(list[Site]):
    """Collects sites in the order of execution and numbers them."""

    def put(
        self,
        path: str,
        module: Any,
        *,
        kind: str,
        grid: tuple[int, int],
        block: str,
        text: tuple[int, int] | None = None,
        image: tuple[int, int] | None = None,
    ) -> None:
        image = image or (0, grid[0] * grid[1])
        self.append(Site(path, kind, grid, text, image, int(module.heads), block, len(self)))


def is_attention(module: Any) -> bool:
    """Whether a module is an attention layer, by what it holds rather than by the name of its class."""
    return hasattr(module, "heads") and any(hasattr(module, name) for name in ("to_q", "to_qkv"))
