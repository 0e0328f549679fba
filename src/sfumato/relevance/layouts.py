"""Which tokens attend to which: the attention calls of a forward pass as steps between named token sets.

Transformers models are read by the names of their modules: a stack of layers (``vision_model.encoder.layers``) works on
one set of tokens; a call inside it is self-attention unless its name or its shape says that it looks elsewhere.
Diffusion denoisers are read by the sites their family knows. ``Move.call`` counts the calls as captured.

==================  =====================================  ====================================================
model               sets                                   steps
==================  =====================================  ====================================================
ViT, BERT, T5 ...   tokens                                 self
CLIP, SigLIP        image, text                            self in each tower
VisualBERT, ViLT    tokens (words, then regions)           self
LXMERT              text, image                            self in each, then co-attention and self
DETR                image, queries                         encoder self; decoder self and cross
encoder-decoder     encoder, decoder                       the same
U-Net, PixArt       image, text                            self and cross, with changes of the grid
SD3, Flux           tokens (image and text in one)         self; SD3.5's second attention on the image part
==================  =====================================  ====================================================
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sfumato.errors import NotSupported
from sfumato.models.site import Site
from sfumato.relevance.capture import CapturedAttention, refuse_windows

__all__ = ["Layout", "Move", "layout"]

_CROSS = re.compile(r"cross|encoder_attn|encdec|attn2$|visual_attention", re.IGNORECASE)


@dataclass(frozen=True)
class Move:
    """One step of relevance. ``kind``: "self", "cross" (rows look at columns), "both" (co-attention, ``back`` is the
    call of the other direction) or "grid" (``rows`` change from grid ``old`` to ``new``). ``part``: the range of
    ``rows`` that takes part, None for all."""

    kind: Literal["self", "cross", "both", "grid"]
    rows: str
    columns: str
    call: int = -1
    back: int = -1
    part: tuple[int, int] | None = None
    old: tuple[int, int] = (0, 0)
    new: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Layout:
    """``sizes``: tokens of each set at its first step; ``moves`` in forward order; ``grids``: the last grid of a set,
    if known; ``parts``: named ranges of a set ("image" and "text" of the joint "tokens")."""

    sizes: dict[str, int]
    moves: tuple[Move, ...]
    grids: dict[str, tuple[int, int]]
    parts: dict[str, tuple[int, int]]

    def last(self, rows: str, columns: str) -> Move | None:
        """The last step in which ``rows`` looked at ``columns``."""
        for move in reversed(self.moves):
            if move.kind == "both" and (rows, columns) == (move.columns, move.rows):
                return Move("cross", rows, columns, move.back)
            if move.kind != "grid" and (move.rows, move.columns) == (rows, columns) and move.part is None:
                return move
        return None


def layout(module: nn.Module, calls: Sequence[CapturedAttention], sites: Sequence[Site] | None = None) -> Layout:
    """How the captured ``calls`` of ``module`` hang together; ``sites`` are a diffusion denoiser's.

    NotSupported where attention runs over windows or time, whose tokens are not those of the picture.
    """
    return _of_sites(calls, sites) if sites is not None else _of_names(module, calls)


# -- transformers, by the names of their modules ---------------------------------------------------------------------


def _of_names(module: nn.Module, calls: Sequence[CapturedAttention]) -> Layout:
    refuse_windows([(call.path, call.probs.shape) for call in calls], min(call.probs.shape[0] for call in calls))
    reads_pictures = getattr(module, "main_input_name", "") == "pixel_values"
    stacks = {_stack(call.path): None for call in calls}
    two_sided = any("decoder" in stack for stack in stacks) and any("encoder" in stack for stack in stacks)
    queries = hasattr(getattr(module, "config", None), "num_queries")

    co = any("visual_attention" in call.path for call in calls)  # LXMERT: co-attention, and words without a name

    def name(path: str) -> str:
        if len(stacks) == 1:
            return "tokens"
        where = path if co and ".x_layers." in path else _stack(path)
        if "decoder" in where:
            return "queries" if queries else "decoder"
        if re.search(r"visn|r_layers|vision|visual|image", where):
            return "image"
        if co or re.search(r"lang|text", where):
            return "text"
        if two_sided:
            return "image" if reads_pictures else "encoder"
        return "tokens"

    sizes: dict[str, int] = {}
    moves: list[Move] = []
    skip = False
    for i, call in enumerate(calls):
        if skip:
            skip = False
            continue
        here, n, t = call.path.rpartition(".")[2], call.queries, call.keys
        holder = ".".join(call.path.split(".")[-2:])
        if co and "visual_attention" in call.path:
            sizes.setdefault("text", n)
            sizes.setdefault("image", t)
            moves.append(Move("both", "text", "image", i, back=i + 1))
            skip = True
            continue
        own = name(call.path)
        if _CROSS.search(holder) or _CROSS.search(here) or n != t:
            others = [s for s, size in sizes.items() if s != own and size == t]
            if not others:
                raise NotSupported(
                    f"attention at {call.path} looks at {t} tokens that no earlier attention worked on, so their "
                    f"relevance cannot be followed; known sets: "
                    + (", ".join(f"{s} ({size})" for s, size in sizes.items()) or "none") + "."
                )  # fmt: skip
            sizes.setdefault(own, n)
            moves.append(Move("cross", own, others[-1], i))
            continue
        if sizes.setdefault(own, n) != n:
            raise NotSupported(
                f"attention at {call.path} has {n} tokens where {own} had {sizes[own]} before; models that merge or "
                f"drop tokens between layers are not supported."
            )
        moves.append(Move("self", own, own, i))
    return Layout(sizes, tuple(moves), {}, {})


def _stack(path: str) -> str:
    """The list of layers that a module belongs to: its path up to the first number."""
    return re.split(r"\.\d+(?:\.|$)", path, maxsplit=1)[0]


# -- diffusion denoisers, by their sites -----------------------------------------------------------------------------


def _of_sites(calls: Sequence[CapturedAttention], sites: Sequence[Site]) -> Layout:
    at: dict[str, Any] = {site.path: site for site in sites}
    sizes: dict[str, int] = {}
    grids: dict[str, tuple[int, int]] = {}
    parts: dict[str, tuple[int, int]] = {}
    moves: list[Move] = []
    joint = any(site.kind == "joint" for site in sites)
    for i, call in enumerate(calls):
        site = at.get(call.path)
        if site is None or call.index:
            raise NotSupported(f"attention at {call.path} is none of the {len(at)} sites known of this denoiser.")
        if site.kind == "temporal":
            raise NotSupported(f"attention at {call.path} runs over time; relevance of clips is not supported.")
        if joint:
            whole = max(max(s.image[1], s.text[1] if s.text else 0) for s in sites)
            sizes.setdefault("tokens", whole)
            if site.kind == "joint":
                parts.update(image=site.image, **({"text": site.text} if site.text else {}))
                grids["image"] = site.grid
            first = next(s for s in sites if s.kind == "joint")
            moves.append(Move("self", "tokens", "tokens", i, part=first.image if call.keys < whole else None))
            continue
        grid = site.grid
        if "image" in grids and grid != grids["image"]:
            moves.append(Move("grid", "image", "image", old=grids["image"], new=grid))
        grids["image"] = grid
        sizes.setdefault("image", grid[0] * grid[1])
        if site.kind == "cross":
            sizes.setdefault("text", call.keys)
            moves.append(Move("cross", "image", "text", i))
        else:
            moves.append(Move("self", "image", "image", i))
    return Layout(sizes, tuple(moves), grids, parts)
