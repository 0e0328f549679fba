"""Which attention sites an edit changes, and which ones local blend reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.attention.sites import Site, matches_place
from sfumato.errors import NoMatch, NotSupported


@dataclass(frozen=True)
class EditedSites:
    """Paths of the sites whose attention to words (``text``) and among pixels (``image``) is edited, and of those that
    ``blend`` reads, with their grid (h w)."""

    text: frozenset[str]
    image: frozenset[str]
    blend: frozenset[str]
    blend_grid: tuple[int, int]


def edited_sites(
    sites: Sequence[Site],
    grid: tuple[int, int],
    *,
    layers: Sequence[str] = (),
    self_cells: int | None = None,
    blend: bool = False,
    blend_cells: int | None = None,
) -> EditedSites:
    """The sites of an edit at latents of ``grid`` (h w). ``self_cells``: the largest grid of attention among pixels
    that is edited; None: 16 times fewer cells than the latents but at least 64 (the 16x16 of Stable Diffusion's 64x64),
    and all of a joint attention. Raises NoMatch, NotSupported."""
    quarter = max(64, grid[0] * grid[1] // 16)
    reading = [site for site in sites if site.kind in ("cross", "joint") and site.text and site.grid]
    chosen = [site for site in sites if not layers or matches_place(site, layers)]
    if not chosen:
        places = ", ".join(dict.fromkeys(site.block for site in sites))
        raise NoMatch(f"layers={list(layers)} of prompt_to_prompt match none of: {places}.")
    limit = self_cells or (None if any(site.kind == "joint" for site in sites) else quarter)
    image = [site for site in chosen if site.kind in ("self", "joint") and (limit is None or _cells(site) <= limit)]
    if not image and self_cells:
        grids = ", ".join(str(_cells(site)) for site in sites if site.kind in ("self", "joint"))
        raise NoMatch(f"self_cells={limit} of prompt_to_prompt is below every grid here: {grids or 'none'} cells.")
    blended: list[Site] = []
    if blend:
        if not reading:
            raise NotSupported("blend of prompt_to_prompt reads attention from picture to text; there is none.")
        wanted = blend_cells or quarter
        best = min(reading, key=lambda site: (abs(_cells(site) - wanted), -_cells(site)))
        blended = [site for site in reading if site.grid == best.grid]
    return EditedSites(
        text=frozenset(site.path for site in chosen if site in reading),
        image=frozenset(site.path for site in image),
        blend=frozenset(site.path for site in blended),
        blend_grid=blended[0].grid or grid if blended else grid,
    )


def _cells(site: Site) -> int:
    return site.grid[0] * site.grid[1] if site.grid is not None else 0
