"""Places in a denoiser: one `Site` per attention call of a forward pass and one `Layer` per block, in the order of
execution."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Site:
    """One attention call of one denoiser forward pass at one picture size.

    Queries and keys of a *joint* site lie in one sequence, so ``image`` and ``text`` there are ranges of both. At a
    *cross* site the keys are the text alone; at a *self* site the image alone; at a *temporal* site the same cell in
    all frames.

    A site works on ``frames`` grids (f h w). Some networks fold what a call does not mix into its batch axis, the
    sample coming first: inflated picture layers fold the frames (rows ``(b f)``, queries ``(h w)``), temporal layers
    the cells (rows ``(b h w)``, queries ``f``); others fold nothing (queries ``(f h w)``). ``fold`` counts such rows of
    a sample.
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
    #: number of frames ``f``; 1 for a picture
    frames: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(h, w) for pictures, (f, h, w) for clips; empty where the queries are neither."""
        grid = self.grid or ()
        return (self.frames, *grid) if self.frames > 1 and grid else grid

    @property
    def cells(self) -> int:
        """f h w: places of one sample; 0 where the queries are not a picture."""
        return math.prod(self.shape) if self.grid is not None else 0

    @property
    def possible_queries(self) -> tuple[int, ...]:
        """How many image queries a call can have, with the one or the other folded away. Empty without a grid."""
        if self.grid is None:
            return ()
        return (self.frames,) if self.kind == "temporal" else (self.cells // self.frames, self.cells)

    @property
    def fold(self) -> int:
        """Rows of the call's batch axis that belong to one sample."""
        queries = self.image[1] - self.image[0]
        return self.cells // queries if self.cells and queries else 1

    def unfold(self, maps: Tensor) -> Tensor:
        """Maps of the image queries ((b fold) k n c) by sample and place (b k (f h w) c). A view where nothing is
        folded."""
        if self.fold == 1:
            return maps
        apart = maps.unflatten(0, (-1, self.fold))  # b fold k n c
        apart = apart.permute(0, 2, 3, 1, 4) if self.kind == "temporal" else apart.transpose(1, 2)
        return apart.flatten(2, 3)


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
        frames: int = 1,
    ) -> None:
        """``image``: by default all queries, with the frames folded away, or at a temporal site the cells."""
        image = image or (0, frames if kind == "temporal" else grid[0] * grid[1])
        self.append(Site(path, kind, grid, text, image, int(module.heads), block, len(self), frames))

    def put_joint(
        self,
        blocks: Iterable[Any],
        path: str,
        attention: str,
        block: str,
        *,
        grid: tuple[int, int],
        image: tuple[int, int],
        text: tuple[int, int],
        frames: int = 1,
    ) -> None:
        """The joint sites of ``blocks``, which lie at ``path`` in the denoiser: one in each, its part ``attention``;
        ``block``: their name, without the number."""
        for i, each in enumerate(blocks):
            self.put(
                f"{path}.{i}.{attention}",
                getattr(each, attention),
                kind="joint",
                grid=grid,
                block=f"{block}.{i}",
                image=image,
                text=text,
                frames=frames,
            )


def is_attention(module: Any) -> bool:
    """Whether a module is an attention layer, by what it holds rather than by the name of its class."""
    return hasattr(module, "heads") and any(hasattr(module, name) for name in ("to_q", "to_qkv"))
