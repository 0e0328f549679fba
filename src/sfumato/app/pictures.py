"""Pictures that a command is given: read, brought to a model's size."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import clips, files, writing
from sfumato.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.models import Model


NARROWEST = 8  # times as long as wide


@dataclass(frozen=True)
class InputPictures:
    """The pictures that come with a batch: ``image``, a picture or frames (f h w 3), to begin from, and
    ``references`` to draw by."""

    image: Any = None
    references: tuple[Image, ...] = ()

    def arguments(self, model: Model, size: tuple[int, int] | None) -> dict[str, Any]:
        """These as arguments of the sampling loop, and the size that fits them where none was said."""
        given = {"image": self.image, "reference": list(self.references) or None}
        return {name: value for name, value in given.items() if value is not None} | fitted_to(
            model, self.image if self.image is not None else given["reference"], size
        )

    def digests(self) -> list[str | None]:
        """What tells these pictures from others."""
        shown = (self.image, *self.references)
        return [None if each is None else hashlib.sha256(each.tobytes()).hexdigest() for each in shown]


def is_picture(what: str) -> bool:
    """Whether a text names a file with a picture or clip rather than being a prompt."""
    return Path(what).suffix.lower() in (*writing.PICTURES, *writing.VIDEOS) and (
        " " not in what or Path(what).is_file()
    )


def read_media(path: str | Path) -> Any:
    """What a file shows: a picture, or the frames (f h w 3) of a video. Raises BadInput, OSError."""
    return clips.read_clip(path)[0] if Path(path).suffix.lower() in writing.VIDEOS else files.read_picture(path)


def media_for(model: Model, shown: Any, path: str | Path) -> Any:
    """What a file shows as the model takes it: of a model of clips all frames, also of an animated picture. Raises
    BadInput for a video where the model makes pictures."""
    frames = hasattr(shown, "ndim")
    if model.clips and not frames:
        return clips.read_clip(path)[0]
    if frames and not model.clips:
        raise BadInput(f"{path} is a clip, but {model.name} makes pictures.")
    return shown


def size_of(shown: Any) -> tuple[int, int] | None:
    """(width, height) of a picture (PIL or an array), of frames (f h w 3) or of the first of several; None for tensors,
    which are as they shall be, and for what is none of these."""
    if isinstance(shown, list | tuple):
        return size_of(shown[0]) if shown else None
    if hasattr(shown, "getexif"):
        turned = files.orientation(shown) in (5, 6, 7, 8)
        return shown.size[::-1] if turned else shown.size
    if not hasattr(shown, "__array_interface__") or not 2 <= shown.ndim <= 4 or 0 in shown.shape:
        return None
    return (shown.shape[2], shown.shape[1]) if shown.ndim == 4 else (shown.shape[1], shown.shape[0])


def fitted_to(model: Model, image: Any, size: tuple[int, int] | None) -> dict[str, Any]:
    """The ``size`` of a run that begins from a picture or is drawn by one, the first of several: without one that was
    said, about the model's own area in the picture's shape (:func:`fitting_size`), as wherever a picture is brought
    along. Nothing without a picture."""
    own = None if image is None or size is not None else size_of(image)
    return {} if own is None else {"size": fitting_size(model, own)}


def fitting_size(model: Model, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of about the model's own area in the shape of ``size``, in the steps the model can make; what is
    narrower than 1 to :data:`NARROWEST` is cut, or a strip would get sides that no model draws."""
    h, w = model.default_size
    step, shape = model.size_multiple, min(max(size[0] / size[1], 1 / NARROWEST), NARROWEST)
    sides = math.sqrt(w * h * shape), math.sqrt(w * h / shape)
    width, height = (max(step, round(side / step) * step) for side in sides)
    return width, height
