"""Flux.1 Kontext: Flux that looks at a picture beside the prompt, whose tokens follow those of the picture it draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.models.families.flux import Flux

if TYPE_CHECKING:
    from PIL.Image import Image


class FluxKontext(Flux):
    """Black Forest Labs 2025, arXiv 2506.15742. Without a reference picture it draws as Flux does. Tokens of the
    reference count as another picture in the same place (section 3), so maps of words are those of the drawn cells."""

    name = "flux-kontext"
    pipeline_classes = ("FluxKontextPipeline",)
    siblings = {"FluxKontextInpaintPipeline": ("FluxKontextPipeline", "")}
    capabilities = Flux.capabilities | {"reference"}
    references = range(2)

    def fit_reference(self, picture: Image) -> Image:
        """As one of the sizes that Kontext was trained on, whichever has the nearest shape."""
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS as TRAINED
        from PIL.Image import Resampling

        shape = picture.width / picture.height
        _, *sides = min((abs(shape - w / h), w, h) for w, h in TRAINED)
        share = self.default_size[0] / 1024  # 1 in the published checkpoints
        width, height = (int(side * share) // self.size_multiple * self.size_multiple for side in sides)
        return picture.resize((width, height), Resampling.LANCZOS)
