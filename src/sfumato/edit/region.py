"""What systems that redraw a region share: the parameters that name it, and the picture that is kept around it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from sfumato import cards, masks
from sfumato.cards import Field
from sfumato.errors import BadInput
from sfumato.sampling import Intervention, Run
from sfumato.sampling.auxiliary import draw_auxiliary
from sfumato.sampling.process.base import repeated

__all__ = ["RegionParams", "kept_picture", "region_of"]


class RegionParams(cards.Params):
    """The region to draw anew, and the picture around it."""

    mask: masks.MaskTexts = Field(
        default=[], description="picture that is white where to draw anew, of any size; several are joined"
    )
    box: masks.Boxes = Field(
        default=[], description="box x0|y0|x1|y1 to draw anew, as fractions or in pixels; several are joined"
    )
    invert: bool = Field(default=False, description="draw anew outside of mask and box instead")
    source: str | None = Field(
        default=None, description="without a picture: the prompt whose picture, from the same seed, is kept"
    )

    def soft_edges(self) -> bool:
        """Whether grey levels of the mask count as shares instead of being decided at a level."""
        return False


def region_of(
    run: Run, name: str, params: RegionParams, read: Sequence[Tensor], level: float = 0.5, each: bool = False
) -> Tensor:
    """The region (1 H W) of the run's pictures, or with ``each`` the i-th mask for the i-th sample (b H W).

    Warns `MaskWarning` where it makes no difference at ``level``. Raises `BadInput` without a region, and unless the
    run has exactly one of a picture and ``source``.
    """
    lightest = max((float(mask.max()) for mask in read), default=0.0)
    if 0 < lightest < level and not params.soft_edges():
        raise BadInput(
            f"the mask of {name} is nowhere lighter than {lightest:.2f}, but what is drawn anew begins at {level:g}; "
            f"give a lighter mask or a lower level."
        )
    layers = masks.regions(read, params.box, run.size)
    if not len(layers):
        raise BadInput(f"{name} needs a region to draw anew: give mask (a picture, white there) or box=x0|y0|x1|y1.")
    if each:
        if run.request is not None and len(layers) != len(run.request):
            raise BadInput(f"{name} has {len(layers)} masks for {len(run.request)} samples; each needs its own.")
        region = layers[run.samples.start : run.samples.stop]
    else:
        region = layers.amax(0, keepdim=True)
    region = 1 - region if params.invert else region
    why = "nothing is drawn anew" if not region.any() else None
    if why or bool((region >= level).all()):
        why = why or "nothing of the picture is kept"
        warnings.warn(masks.MaskWarning(f"the region of {name} makes no difference: {why}."), stacklevel=3)
    held = run.request is not None and run.request.source.pixels is not None
    if held == (params.source is not None):
        raise BadInput(
            f"{name} keeps a picture: give the run an image to begin from, or source, the prompt of one"
            + (", not both." if held else ".")
        )
    return region


def kept_picture(run: Run, x: Tensor, params: RegionParams, system: Intervention) -> tuple[Tensor | None, Tensor]:
    """Pixels (b or 1, 3 H W), if there are any, and clean latents (b c h w) of the picture to keep; with ``source`` it
    is drawn from the noise ``x``, and ``system`` pays for it."""
    assert run.request is not None
    pixels = run.request.source.pixels
    if pixels is None:
        drawn = draw_auxiliary(run, params.source or "", x=x, source=run.request.source)
        system.activity.cost += drawn.cost
        return None, drawn.x
    if len(pixels) > 1:
        pixels = pixels[run.samples.start : run.samples.stop]
    clean = run.model.encode_image(pixels)
    return pixels, clean if len(clean) == len(run) else repeated(clean, len(run))
